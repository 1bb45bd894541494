// SPDX-License-Identifier: Apache-2.0
// Many disks coming and going in random order, the daemon killed and started in the midst:
// in the end exactly the right workers run, and nothing else is left.

import Daemon
import Fakes
import Glibc
import Testing
import TestSupport

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct ChurnTests {
  @Test("200 disks appear and disappear in random order, under a daemon that is killed")
  func churn() async throws {
    var random = SeededRandom(announcedAs: "ChurnTests.churn")
    try await inWorld(["worker.stop-timeout": "60", "worker.ready-timeout": "35"]) { world in
      // Real specs on one base, a store each; now and then the former domain's store.
      let disks = (0..<200).map { index in
        FakeDisk(
          domain: 1 + index / 4, name: ["xvda", "xvdb", "xvdc", "xvdd"][index % 4],
          params: world.spec("s\(index).dscow"))
      }
      for index in disks.indices { try await world.makeStore("s\(index).dscow") }
      var churn = FakeDiskChurn(world.toolstack, disks: disks, random: random)
      let blows = Set((0..<3).map { _ in Int.random(in: 200..<1400, using: &random) })
      for step in 0..<1500 {
        try churn.step()
        if blows.contains(step) {
          try await world.stopDaemon([SIGKILL, SIGTERM].randomElement(using: &random)!)
          for _ in 0..<20 { try churn.step() }
          try await world.startDaemon()
        }
        if step % 100 == 50, let victim = try World.pids(world.runDirectory + "/disks").first {
          kill(victim, SIGKILL)
        }
        if step % 16 == 0 { try await Task.sleep(for: .milliseconds(20)) }
      }
      let wanted = try churn.settle()
      print("ChurnTests.churn: \(wanted.count) disks are wanted in the end")
      try await settled(world, wanted)

      // And every one of them goes.
      for disk in wanted { try world.detach(disk) }
      try await settled(world, [])
      let log = try SmallFile.read(world.folder.file("daemon.log"))
      // One that a daemon started and did not live to write down is killed by the next, which says
      // so without a disk.
      let taken = log.split(separator: "\n").filter {
        $0.contains("left processes") && $0.contains("disk=")
      }
      #expect(taken.isEmpty, "a worker of another disk was taken for one's child")
    }
  }

  private func settled(_ world: World, _ wanted: Set<FakeDisk>) async throws {
    let names = wanted.map { "\($0.domain)-\($0.device)" }.sorted()
    var last = ""
    do {
      try await eventually("the right disks", within: .seconds(120)) {
        let status = try await world.status()
        last = "\(status.map { "\($0.id) \($0.state) \($0.error ?? "")" })"
        return status.map { "\($0.id)" }.sorted() == names
          && status.allSatisfy { $0.state == .ready }
      }
    } catch {
      Issue.record("wanted \(names), found \(last)")
      throw error
    }
    try await eventually("the right directories") { world.directories() == names }
    let workers = try await world.status().compactMap(\.worker)
    #expect(Set(workers).count == wanted.count)
    #expect(try World.pids(world.runDirectory + "/disks").sorted() == workers.sorted())
    do {
      try await eventually("the right processes") {
        try await world.workers().sorted() == workers.sorted()
      }
    } catch {
      let strangers = Set(try await world.workers()).subtracting(workers)
      Issue.record("workers of no disk: \(strangers), of \(workers.count)")
      throw error
    }
    #expect(try world.devices <= wanted.count)
    for disk in wanted {
      try await eventually("its node") { try world.node(disk, "state") == "ready" }
    }
    try await eventually("the count") {
      try world.toolstack.read("/local/domain/0/dmu-xen/disks") == "\(wanted.count)"
    }
  }
}
