// SPDX-License-Identifier: Apache-2.0
// Daemon and worker are dead, nobody holds the store's lock, and another program writes to it
// before the next worker comes with the pending log.

import Glibc
import SystemIO
import Testing
import TestSupport
import WorkerLink

@Suite("A store that was changed", .serialized, .enabled(if: hasQemu))
struct StoreChangedTests {
  private static let megabyte: UInt64 = 1 << 20

  private struct Scene {
    let image: TestImage
    let daemon: TestDaemon
    let path: String
    let bytes = Stamp.sectors(128, 3)

    var order: StartOrder {
      var order = StartOrder(disk: "1-51712", format: "qcow2")
      order.storePath = path
      return order
    }

    /// A qcow2 image of 64 MiB of which one cluster is acknowledged and not committed.
    init() throws {
      image = try TestImage(sectors: 8, blockSize: 4096)
      path = image.folder.file("store.qcow2")
      try tool("/usr/bin/qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
      daemon = try TestDaemon(image, store: path)
      _ = try daemon.startReady(order, roles: [.store, .pending, .witness])
      let client = try daemon.attach()
      try client.run(.write, offset: megabyte, length: bytes.count, data: bytes)
      try daemon.worker.kill9()
    }

    /// The next worker's first report.
    func restarted() throws -> WorkerReport {
      try daemon.replaceWorker()
      try daemon.start(order, roles: [.store, .pending, .witness])
      return try daemon.report().0
    }
  }

  private static func tool(_ program: String, _ arguments: String...) throws {
    let command = Command(program, arguments)
    #expect(try command.start().wait(milliseconds: 60_000) == .exited(0), "\(arguments)")
  }

  /// What another program did to the store, and whether the pending log still fits.
  enum Change: CaseIterable {
    case nothing, anotherBlock, theSameBlock, anotherTable, snapshot, longer
  }

  @Test(arguments: Change.allCases) func aLogIsBelievedOnlyIfTheStoreFits(_ change: Change) throws {
    let scene = try Scene()
    let path = scene.path
    func io(_ command: String) throws {
      try Self.tool("/usr/bin/qemu-io", "-f", "qcow2", "-c", command, path)
    }
    switch change {
    case .nothing: break
    case .anotherBlock: try io("write -q -P 0x42 2M 64k")
    case .theSameBlock: try io("write -q -P 0x42 1M 64k")
    // Below another L2 table, where the new one takes the place of the pending cluster.
    case .anotherTable:
      try Self.tool("/usr/bin/qemu-img", "resize", "-q", "-f", "qcow2", path, "2G")
      try io("write -q -z 1G 64k")
      try Self.tool("/usr/bin/qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", path, "64M")
    case .snapshot: try Self.tool("/usr/bin/qemu-img", "snapshot", "-q", "-c", "one", path)
    case .longer: try Self.tool("/usr/bin/qemu-img", "resize", "-q", "-f", "qcow2", path, "65M")
    }
    let report = try scene.restarted()
    if case .failed(let code, let message) = report {
      #expect(change != .nothing)
      #expect(code == .pendingStale, "\(message)")
      #expect(message.contains("discard"))
      return
    }
    guard case .ready = report else {
      Issue.record("\(report)")
      return
    }
    // Believed: then it has to be right, and stay so.
    #expect(change == .nothing || change == .anotherTable || change == .snapshot)
    let client = try scene.daemon.attach()
    let read = try client.run(
      .read, offset: Self.megabyte, length: scene.bytes.count)
    #expect(read == scene.bytes)
    try scene.daemon.link.send(.stop)
    #expect(try scene.daemon.worker.process.wait(milliseconds: 10_000) == .exited(0))
    try Self.tool("/usr/bin/qemu-img", "check", "-q", "-f", "qcow2", path)
  }

  /// With the lock held all the time nothing is compared.
  @Test func aStoreThatWasHeldIsNotCompared() throws {
    let scene = try Scene()
    var order = scene.order
    order.isHeld = true
    try scene.daemon.replaceWorker()
    _ = try scene.daemon.startReady(order, roles: [.store, .pending, .witness])
  }
}
