// SPDX-License-Identifier: Apache-2.0

import Fakes
import Testing
import TestSupport
import XenStore

@Suite("The stand-in for the toolstack", .timeLimit(.minutes(2))) struct FakeToolstackTests {
  let xenstored: XenStored
  let toolstack: FakeToolstack
  let store: XenStoreClient

  init() throws {
    xenstored = try XenStored.start()
    toolstack = try FakeToolstack(xenstored)
    store = try client(of: xenstored)
  }

  @Test func leadsADiskThroughItsLife() async throws {
    let disk = FakeDisk(domain: 5, params: "dmu:dscow:/g1.dscow:/dev/vg/base")
    #expect(disk.backend == "/local/domain/0/backend/vbd/5/51712")
    #expect(FakeDisk.number(of: "xvdc") == 51744)
    try toolstack.createDomain(5, name: "guest")
    #expect(try await store.isIntroduced(5))
    try toolstack.attach(disk)
    #expect(try await store.readString("\(disk.relativeBackend)/params") == disk.params)
    #expect(
      try await store.list(disk.backend).sorted() == [
        "bootable", "dev", "device-type", "discard-enable", "frontend", "frontend-id", "mode",
        "online", "params", "removable", "script", "specification", "state", "type",
      ])
    #expect(try await store.permissions(of: "\(disk.backend)/params").description == "n0,r5")
    #expect(try await store.permissions(of: "\(disk.frontend)/state").description == "n5,r0")
    #expect(try await store.readString("\(disk.frontend)/backend") == disk.backend)
    try toolstack.backendWaits(disk)
    #expect(try toolstack.read("\(disk.backend)/state") == "2")
    try toolstack.connect(disk, sectors: 2048)
    #expect(try toolstack.read("\(disk.backend)/sectors") == "2048")
    #expect(try toolstack.backends() == ["5/51712"])
    try toolstack.beginDetach(disk)
    #expect(try toolstack.read("\(disk.backend)/online") == "0")
    #expect(try toolstack.read("\(disk.backend)/state") == "5")
    try toolstack.backendCloses(disk)
    try toolstack.finishDetach(disk)
    // Nothing is left, not even the directories above.
    #expect(try await store.listIfPresent("/local/domain/0/backend") == nil)
    #expect(try await store.listIfPresent("/libxl") == nil)
    try toolstack.destroyDomain(5)
    #expect(try await store.isIntroduced(5) == false)
    #expect(try await store.listIfPresent("/local/domain/5") == nil)
  }

  /// 200 disks come and go; a consumer that only re-reads on events ends with the right set.
  @Test func churnIsFollowedByWatchAndRead() async throws {
    let random = SeededRandom(announcedAs: "churnIsFollowedByWatchAndRead")
    let disks = (0..<200).map { number in
      FakeDisk(
        domain: 1 + number / 4, name: "xvd" + ["a", "b", "c", "d"][number % 4],
        params: "dmu:dscow:/store\(number)")
    }
    let watch = try await store.watch("backend/vbd")
    var churn = FakeDiskChurn(toolstack, disks: disks, random: random)
    for _ in 0..<1500 { try churn.step() }
    let wanted = try churn.settle().map { "\($0.domain)/\($0.device)" }.sorted()
    #expect(try toolstack.backends() == wanted)
    try toolstack.write("/local/domain/0/backend/vbd/end", "")
    let store = self.store
    let seen = try await within(.seconds(30)) {
      var present: Set<String> = []
      for try await event in watch {
        guard case .changed(let path) = event else { continue }
        if path == "backend/vbd/end" { break }
        let parts = path.split(separator: "/")
        if parts.count < 4 {
          // A directory that libxl took away, as it was left empty: all below it is gone.
          let prefix = parts.count == 3 ? "\(parts[2])/" : ""
          guard try await store.readIfPresent(path) == nil else { continue }
          present = present.filter { !$0.hasPrefix(prefix) }
          continue
        }
        let key = "\(parts[2])/\(parts[3])"
        let root = parts.prefix(4).joined(separator: "/")
        if try await store.readIfPresent(root) == nil {
          present.remove(key)
        } else {
          present.insert(key)
        }
      }
      return present
    }
    #expect(seen.sorted() == wanted)
  }
}
