// SPDX-License-Identifier: Apache-2.0
// What a guest was told is written outlives every end of a disk: a worker that dies, hangs or
// never comes up, a daemon that is killed, a domain that is destroyed. Until it is in the store
// it is in the store's pending log, which everybody respects.

import BlockIO
import Daemon
import Fakes
import Glibc
import LinuxBlock
import SystemIO
import Testing
import TestSupport

private let hasStrace = access("/usr/bin/strace", X_OK) == 0

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct PendingTests {
  private let flushed = [UInt8](repeating: 0x41, count: 1 << 17)
  private let acknowledged = [UInt8](repeating: 0x42, count: 3 << 17)

  /// A disk with a flushed write and, over and behind it, one that was only acknowledged.
  private func written(
    _ world: World, domain: Int, at offset: UInt64 = 1 << 17
  ) async throws -> FakeDisk {
    let disk = try world.attach(domain, world.spec("g.dscow"))
    try await world.add(disk)
    let wire = try await world.wire(of: disk)
    #expect(try wire.write(flushed, at: 0) == 0)
    #expect(try wire.flush() == 0)
    #expect(try wire.write(acknowledged, at: offset) == 0)
    return disk
  }

  /// A disk of another domain on the same store reads all of it, and nothing is left to recover.
  private func readsBack(_ world: World, domain: Int) async throws {
    let disk = try world.attach(domain, world.spec("g.dscow"))
    try await world.add(disk, boots: false)
    let wire = try await world.wire(of: disk)
    #expect(try wire.read(flushed.count, at: 0) == flushed)
    #expect(try wire.read(acknowledged.count, at: 1 << 17) == acknowledged)
    try world.detach(disk)
    try await world.isGone(disk)
    #expect(world.logs().isEmpty, "\(world.logs())")
    try await eventually("nothing is announced") { try world.announcedPending() == "0" }
  }

  @Test("Plain: a disk that is taken down has committed everything")
  func plain() async throws {
    try await inWorld { world in
      let disk = try await written(world, domain: 5)
      #expect(world.logs().count == 1, "one log while it is served")
      try world.detach(disk)
      try await world.isGone(disk)
      #expect(world.logs().isEmpty)
      try await readsBack(world, domain: 6)
    }
  }

  @Test("A worker that died just before the end: another one commits")
  func deadAtTheEnd() async throws {
    try await inWorld { world in
      let disk = try await written(world, domain: 5)
      kill(try await world.worker(disk), SIGKILL)
      try world.detach(disk)
      try await world.isGone(disk)
      try await readsBack(world, domain: 6)
    }
  }

  @Test("A flush that takes longer than a worker may", .enabled(if: hasStrace, "strace"))
  func slow() async throws {
    try await inWorld(["worker.stop-timeout": "1"]) { world in
      try await world.makeStore("g.dscow")
      try world.useWorkers(
        "exec strace -D -f -o /dev/null -e trace=fdatasync"
          + " -e inject=fdatasync:delay_exit=1500000")
      let disk = try await written(world, domain: 5)
      try world.useWorkers()
      try world.detach(disk)
      try await world.isGone(disk)
      try await readsBack(world, domain: 6)
    }
  }

  @Test(
    "No worker lives: the log is kept and told of, tools refuse the store, the next disk reads it")
  func crash() async throws {
    try await inWorld(["worker.restart-limit": "1"]) { world in
      let disk = try await written(world, domain: 5)
      let store = world.folder.file("g.dscow")
      try world.useWorkers(instead: "exit 1")
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      try world.toolstack.destroyDomain(5)
      try await world.isGone(disk)
      #expect(try world.devices == 0)

      let kept = try #require(try await world.status().first)
      #expect(kept.state == .pending)
      #expect(kept.store == store)
      #expect(kept.domainName == "guest5")
      #expect(kept.uncommitted ?? 0 > 0)
      let sentence = try #require(kept.error)
      #expect(
        sentence.hasPrefix("store \(store) has writes that are not in it yet: "), "\(sentence)")
      #expect(sentence.contains("the worker was lost while it started"), "\(sentence)")
      #expect(sentence.contains("dmu-xen recover \(store)"), "\(sentence)")
      try await eventually("xenstore counts it") { try world.announcedPending() == "1" }
      try await toolsRefuse(world, store)

      // Whoever has the store under another format would misread the log.
      let other = try world.attach(7, "dmu:raw:\(store)")
      #expect(
        try await world.addFailure(other).contains("has writes of a disk of format dscow"))
      try world.detach(other)
      let recovered = try await world.command { $0.recover(store, json: false) }
      #expect(recovered == .failed)
      #expect(world.logs().count == 1)
      try world.useWorkers()
      try await readsBack(world, domain: 6)
      try await toolsWork(world, store)
    }
  }

  @Test("Daemon and worker are dead: tools refuse the store; the next daemon commits by itself")
  func bothDead() async throws {
    try await inWorld { world in
      let disk = try await written(world, domain: 5)
      let store = world.folder.file("g.dscow")
      let worker = try await world.worker(disk)
      try await world.stopDaemon(SIGKILL)
      kill(worker, SIGKILL)
      try await eventually("the worker is gone") { !isAlive(worker) }
      try await toolsRefuse(world, store)
      // The domain goes while nobody is there to see it.
      try world.detach(disk)
      try await world.startDaemon()
      try await world.isGone(disk)
      try await eventually("its log is committed") { world.logs().isEmpty }
      try await toolsWork(world, store)
      try await readsBack(world, domain: 6)
    }
  }

  @Test("recover commits without a disk, discard-pending gives up by order only")
  func commands() async throws {
    try await inWorld(["worker.restart-limit": "0"]) { world in
      let store = world.folder.file("g.dscow")
      for round in 0..<2 {
        let disk = try await written(
          world, domain: 5 + round, at: UInt64(1 + 3 * round) << 17)
        try world.useWorkers(instead: "exit 1")
        kill(try await world.worker(disk), SIGKILL)
        try await eventually("it has failed") { try await world.state(disk) == .failed }
        try world.detach(disk)
        try await world.isGone(disk)
        try world.useWorkers()
        #expect(world.logs().count == 1)
        let nowhere = try await world.command { $0.recover("/nowhere", json: false) }
        #expect(nowhere == .noDisk)
        let nothing = try await world.command {
          $0.discard("/nowhere", confirmed: true, json: true)
        }
        #expect(nothing == .noDisk)
        if round == 0 {
          let done = try await world.command { $0.recover(nil, json: true) }
          #expect(done == .done)
        } else {
          let asked = try await world.command { $0.discard(store, confirmed: false, json: false) }
          #expect(asked == .failed, "nobody has agreed")
          #expect(world.logs().count == 1)
          let done = try await world.command { $0.discard(store, confirmed: true, json: false) }
          #expect(done == .done)
        }
        #expect(world.logs().isEmpty)
        #expect(try await world.status().isEmpty)
        try isFree(world, store)
        if round == 0 { try await readsBack(world, domain: 8) }
      }
    }
  }

  @Test(
    "doctor finds a loop device that is left of a store, and takes the file from it",
    .enabled(if: geteuid() == 0, "only root has loop devices"))
  func leftLoop() async throws {
    try await inWorld { world in
      let disk = try await written(world, domain: 5)
      kill(try await world.worker(disk), SIGKILL)
      try world.useWorkers(instead: "exit 1")
      try world.detach(disk)
      try await world.isGone(disk)
      #expect(world.logs().count == 1)
      let path = world.folder.file("g.dscow")
      func loops() async throws -> [Leftover] {
        let all = try await world.ask(ControlRequest(.leftovers)).leftovers ?? []
        return all.filter { $0.name.hasPrefix("loop-device ") }
      }
      #expect(try await loops().isEmpty)
      do {
        let file = try Descriptor(path: path, flags: O_RDWR)
        let loop = try LoopDevice(file: file.raw, name: path, readOnly: true, direct: false)
        let left = try #require(try await loops().first)
        #expect(left.name == "loop-device \(loop.path)")
        #expect(left.what.contains(path))
        _ = try await world.ask(ControlRequest(.clean, target: left.name))
      }
      try await eventually("it is gone") { try await loops().isEmpty }
      try world.useWorkers()
      try await readsBack(world, domain: 6)
    }
  }

  @Test("A disk that only reads gets what the log holds, too")
  func readOnly() async throws {
    try await inWorld(["worker.restart-limit": "0"]) { world in
      let disk = try await written(world, domain: 5)
      try world.useWorkers(instead: "exit 1")
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      try world.detach(disk)
      try await world.isGone(disk)
      let reader = try world.attach(6, world.spec("g.dscow"), writable: false)
      #expect(try await world.addFailure(reader).contains("the worker was lost"))
      try world.useWorkers()
      let second = try world.attach(7, world.spec("g.dscow"), writable: false)
      try await world.add(second)
      let wire = try await world.wire(of: second)
      #expect(try wire.read(acknowledged.count, at: 1 << 17) == acknowledged)
      #expect(world.logs().isEmpty)
    }
  }

  @Test("Another file by the store's name is refused while the former one's log is kept")
  func otherFile() async throws {
    try await inWorld(["worker.restart-limit": "0"]) { world in
      let disk = try await written(world, domain: 5)
      let store = world.folder.file("g.dscow")
      try world.useWorkers(instead: "exit 1")
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      try world.detach(disk)
      try await world.isGone(disk)
      try world.useWorkers()
      #expect(rename(store, store + ".away") == 0)
      try await world.makeStore("g.dscow")
      let next = try world.attach(6, world.spec("g.dscow"))
      let said = try await world.addFailure(next)
      #expect(said.hasPrefix("store \(store) is another file than"), "\(said)")
      try world.detach(next)
      #expect(rename(store + ".away", store) == 0)
      try await readsBack(world, domain: 7)
    }
  }

  @Test("A file that the store names is kept from others as long as the store is")
  func namedFiles() async throws {
    let settings = ["worker.restart-limit": "0", "store.directories": "[\"/\"]"]
    try await inWorld(settings) { world in
      let (store, data) = (world.folder.file("g.qcow2"), world.folder.file("data"))
      try await world.run(
        "/usr/bin/qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=\(data)", store, "1M")
      let disk = try world.attach(5, "dmu:qcow2:\(store)")
      try await world.add(disk)
      let wire = try await world.wire(of: disk)
      #expect(try wire.write(flushed, at: 0) == 0)
      try world.useWorkers(instead: "exit 1")
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      try world.detach(disk)
      try await world.isGone(disk)
      try world.useWorkers()
      let registry = PendingRegistry(runDirectory: world.runDirectory)
      for path in [store, data] {
        let file = try FileStore(path: path, writable: true)
        #expect(try registry.hindrance(file) != nil, "\(path)")
      }
      let thief = try world.attach(6, "dmu:qcow2:\(world.folder.file("h.qcow2")):\(data)")
      #expect(try await world.addFailure(thief).contains("writes of a disk that are not in it yet"))
      try world.detach(thief)
      let next = try world.attach(7, "dmu:qcow2:\(store)")
      try await world.add(next)
      let now = try await world.wire(of: next)
      #expect(try now.read(flushed.count, at: 0) == flushed)
      try world.detach(next)
      try await world.isGone(next)
      #expect(World.names(world.runDirectory + "/pending").isEmpty)
    }
  }

  @Test("A new disk whose start fails leaves neither store nor log")
  func failedStart() async throws {
    try await inWorld { world in
      try world.useWorkers(instead: "exit 1")
      let disk = try world.attach(5, world.spec("g.dscow"))
      _ = try await world.addFailure(disk)
      #expect(world.logs().isEmpty)
      #expect(access(world.folder.file("g.dscow"), F_OK) != 0)
    }
  }

  private func toolsRefuse(_ world: World, _ store: String) async throws {
    try await world.run("dmu-img", "resize", "-f", "dscow", store, "2M", expecting: 1)
    try await world.run(
      "dscow_tool", "create", "-f", store, world.folder.file("base"), expecting: 1)
    let socket = world.folder.file("by-hand")
    try await world.run("cowd", "-p", "dscow", "--nbd", "unix:\(socket)", store, expecting: 1)
    // To look at it is allowed.
    try await world.run("dscow_tool", "info", store)
  }

  private func toolsWork(_ world: World, _ store: String) async throws {
    try await world.run("dscow_tool", "check", store)
    try isFree(world, store)
  }

  private func isFree(_ world: World, _ store: String) throws {
    let file = try FileStore(path: store, writable: true)
    try file.lock(exclusive: true)
    #expect(try PendingRegistry(runDirectory: world.runDirectory).hindrance(file) == nil)
  }
}
