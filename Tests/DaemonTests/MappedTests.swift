// SPDX-License-Identifier: Apache-2.0
// Disks that are served by their nodes: the daemon's part, with a device-mapper and workers
// that are played.

import BlockIO
import Daemon
import Fakes
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct MappedTests {
  private func device(_ world: World, _ name: String) throws -> String {
    try SmallFile.read("\(world.mapper)/\(name)")
  }

  @Test("The device stands on store and base, is live when the script has its answer, and goes")
  func life() async throws {
    try await inWorld(hasMapper: true) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      let answer = try await world.add(disk)
      #expect(answer.path == "/stand-in/dmu-5-51712")
      #expect(answer.number == "fd:5")
      #expect(
        try device(world, "5-51712")
          == "LIVE \(world.folder.file("g5.dscow")) ro:\(world.folder.file("base"))")
      let status = try #require(try await world.status(5).first)
      #expect(status.transport == .dm)
      #expect(status.device == "/stand-in/dmu-5-51712")
      #expect(status.kernelDevice == "/dev/dm-5")
      #expect(status.note == nil)
      #expect(try world.devices == 0, "there is no nbd device")
      try world.detach(disk)
      try await eventually("everything is gone") {
        let workers = try await world.workers()
        return workers.isEmpty && world.directories().isEmpty
      }
      #expect(World.names(world.mapper) == ["flushed"], "it was flushed, and removed")
    }
  }

  @Test("A file that the image names stands where the worker says")
  func parts() async throws {
    try await inWorld(["store.directories": "[\"/\"]"], hasMapper: true) { world in
      try world.file("q.qcow2", [1])
      try world.file("data", [UInt8](repeating: 0, count: 4096))
      let disk = try world.attach(
        5, "dmu:qcow2:\(world.folder.file("q.qcow2")):\(world.folder.file("base"))")
      try await world.add(disk)
      let names = ["q.qcow2", "data"].map { world.folder.file($0) }.joined(separator: " ")
      #expect(try device(world, "5-51712") == "LIVE \(names) ro:\(world.folder.file("base"))")
    }
  }

  @Test("A worker that is killed is replaced, and the device is left as it is")
  func killed() async throws {
    try await inWorld(hasMapper: true) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let first = try await world.worker(disk)
      kill(first, SIGKILL)
      try await eventually("another worker serves") { try await replaced(world, disk, first) }
      #expect(try device(world, "5-51712").hasPrefix("LIVE "))
      #expect(try await world.status(5).first?.transport == .dm)
      #expect(try world.reattachments == 0)
    }
  }

  @Test("A daemon that is killed leaves the disk; the next one keeps the worker")
  func restart() async throws {
    try await inWorld(hasMapper: true) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      for signal in [SIGTERM, SIGKILL] {
        try await world.stopDaemon(signal)
        #expect(isAlive(worker))
        try await world.startDaemon()
        #expect(try await world.state(disk) == .ready)
        #expect(try await world.worker(disk) == worker)
        #expect(try await world.status(5).first?.transport == .dm)
      }
      // What the new daemon has been given back is enough to replace the worker.
      kill(worker, SIGKILL)
      try await eventually("another worker serves") { try await replaced(world, disk, worker) }
    }
  }

  @Test("A worker that died while no daemon was there is replaced; locks are the kernel's then")
  func diedMeanwhile() async throws {
    try await inWorld(hasMapper: true) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      try await world.stopDaemon(SIGKILL)
      kill(worker, SIGKILL)
      try await eventually("it is gone") { !isAlive(worker) }
      // As a loop device would.
      let store = try FileStore(path: world.folder.file("g5.dscow"), writable: true)
      try store.lock(exclusive: true)
      try await world.startDaemon()
      try await eventually("another worker serves") { try await replaced(world, disk, worker) }
    }
  }

  @Test("Files that are not those of the device are given to no worker")
  func otherFiles() async throws {
    try await inWorld(["worker.restart-limit": "0"], hasMapper: true) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      try world.file("mapper/5-51712", Array("LIVE /elsewhere".utf8))
      kill(worker, SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      #expect(try device(world, "5-51712") == "LIVE /elsewhere", "the device stays")
    }
  }

  @Test("A device that no disk has is removed when the daemon starts")
  func stray() async throws {
    try await inWorld(daemon: false, hasMapper: true) { world in
      try world.file("mapper/7-51712", Array("SUSPENDED /x".utf8))
      try await world.startDaemon()
      #expect(World.names(world.mapper).isEmpty)
    }
  }

  // MARK: - Going

  /// A disk in use whose device holds placements that are in no image.
  private func uncommitted(_ world: World, domain: Int = 5) async throws -> FakeDisk {
    let disk = try world.attach(domain, world.spec("g5.dscow"))
    try await world.add(disk)
    try world.file("mapper/\(domain)-51712.uncommitted", Array("7".utf8))
    return disk
  }

  private func stuck(_ world: World, _ domain: Int, _ words: String) async throws {
    try await eventually("it is stopping, and says why: \(words)") {
      let status = try await world.status(domain).first
      return status?.state == .stopping && status?.error?.contains(words) == true
    }
  }

  @Test("Without a worker at the end another one is started, so that the device is committed")
  func deadAtTheEnd() async throws {
    try await inWorld(["worker.restart-limit": "0"], hasMapper: true) { world in
      let disk = try await uncommitted(world)
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      try world.detach(disk)
      try await world.isGone(disk)
      #expect(World.names(world.mapper) == ["flushed"], "it was flushed, and removed")
    }
  }

  @Test("Without any worker the device stays, the next disk on the store waits for it, and it goes")
  func noWorker() async throws {
    try await inWorld(["worker.restart-limit": "0"], hasMapper: true) { world in
      let disk = try await uncommitted(world)
      try world.useWorkers(instead: "exit 1")
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      try world.detach(disk)
      try await stuck(world, 5, "may hold writes that are not in store")
      #expect(try device(world, "5-51712").hasPrefix("LIVE "))
      // By hand and by tools the store is not to be had either.
      let file = try FileStore(path: world.folder.file("g5.dscow"), writable: true)
      #expect(throws: IOError.self) { try file.lock(exclusive: true) }
      let next = try world.attach(6, world.spec("g5.dscow"))
      async let answer = world.add(next)
      try await eventually("it waits") {
        try await world.status(6).first?.error?.contains("waiting for domain 5") == true
      }
      try world.useWorkers()
      _ = try await answer
      #expect(!World.names(world.mapper).contains("5-51712"))
    }
  }

  @Test("A daemon that comes later goes on with a disk that cannot go")
  func stuckAcrossDaemons() async throws {
    try await inWorld(["worker.stop-timeout": "1"], hasMapper: true) { world in
      let disk = try await uncommitted(world)
      try world.file("mapper/flush-hangs", [])
      try world.detach(disk)
      try await stuck(world, 5, "is not written out")
      try await world.stopDaemon(SIGKILL)
      try await world.startDaemon()
      try await stuck(world, 5, "is not written out")
      #expect(unlink(world.mapper + "/flush-hangs") == 0)
      try await world.isGone(disk)
      #expect(World.names(world.mapper) == ["flushed"])
    }
  }

  @Test("What is below hangs: the disk stays and says so, and goes when that answers")
  func hangs() async throws {
    try await inWorld(["worker.stop-timeout": "1"], hasMapper: true) { world in
      let disk = try await uncommitted(world)
      let worker = try await world.worker(disk)
      try world.file("mapper/flush-hangs", [])
      try world.toolstack.destroyDomain(5)
      try await stuck(world, 5, "hangs")
      #expect(isAlive(worker), "it may still have to answer")
      try await eventually("xenstore says so") { try world.node(disk, "state") == "stopping" }
      #expect(try world.node(disk, "error")?.contains("hangs") == true)
      #expect(unlink(world.mapper + "/flush-hangs") == 0)
      try await world.isGone(disk)
      #expect(!isAlive(worker))
    }
  }

  @Test("A device that is open, or whose flush fails, is not removed; discard-pending does it")
  func openAndFailing() async throws {
    try await inWorld(["worker.stop-timeout": "1"], hasMapper: true) { world in
      let disk = try await uncommitted(world)
      try world.file("mapper/5-51712.open", [])
      try world.file("mapper/flush-fails", [])
      try world.detach(disk)
      try await stuck(world, 5, "is still open")
      #expect(unlink(world.mapper + "/5-51712.open") == 0)
      try await stuck(world, 5, "its flush failed")
      let store = world.folder.file("g5.dscow")
      let asked = try await world.command { $0.discard(store, confirmed: false, json: false) }
      #expect(asked == .failed)
      #expect(try device(world, "5-51712").hasPrefix("LIVE "))
      let done = try await world.command { $0.discard(store, confirmed: true, json: false) }
      #expect(done == .done)
      try await world.isGone(disk)
    }
  }

  @Test("A device that a backend has open and no frontend ever connected to gives its store back")
  func unconnected() async throws {
    try await inWorld(["worker.stop-timeout": "1"], hasMapper: true) { world in
      let disk = try await uncommitted(world)
      try world.file("mapper/5-51712.open", [])
      try world.toolstack.write(disk.backend + "/state", "4")
      let removed = Task { try await world.command { $0.remove(disk.relativeBackend) } }
      try await stuck(world, 5, "is still open")
      #expect(try device(world, "5-51712").hasPrefix("LIVE "), "one that is connected stays")
      try world.toolstack.write(disk.backend + "/state", "2")
      try await world.isGone(disk)
      #expect(try device(world, "5-51712") == "ERROR")
      #expect(World.names(world.mapper).contains("flushed"), "what it held was committed first")
      _ = try await removed.value
      let next = try world.attach(6, world.spec("g5.dscow"))
      try await world.add(next)
      #expect(try device(world, "6-51712").hasPrefix("LIVE "))
    }
  }

  @Test("clear tells the device and the worker")
  func clear() async throws {
    try await inWorld(hasMapper: true) { world in
      let disk = try await uncommitted(world)
      let other = try await world.command { $0.clear("6", json: false) }
      #expect(other == .noDisk)
      for name in ["5", "guest5", "5-51712", "guest5:xvda"] {
        let done = try await world.command { $0.clear(name, json: true) }
        #expect(done == .done)
        #expect(try SmallFile.read(world.mapper + "/cleared") == "5-51712")
        #expect(unlink(world.mapper + "/cleared") == 0)
      }
      #expect(try await world.state(disk) == .ready)
    }
  }

  @Test("The run directory is lost: device, worker and uncommitted placements go on")
  func lostRunDirectory() async throws {
    try await inWorld(hasMapper: true) { world in
      let disk = try await uncommitted(world)
      try world.toolstack.write(disk.backend + "/physical-device", "fd:5")
      let worker = try await world.worker(disk)
      for round in 0..<2 {
        try await world.stopDaemon(SIGKILL)
        if round == 0 {
          // Only its name has changed: the worker is found where it listens.
          #expect(rename(world.runDirectory, world.folder.file("former")) == 0)
        } else {
          try await world.run("/bin/rm", "-r", world.runDirectory)
        }
        try await world.startDaemon()
        try await eventually("it is served, round \(round)") {
          try await world.state(disk) == .ready
        }
        #expect(try device(world, "5-51712").hasPrefix("LIVE "), "the device was not touched")
        #expect(try device(world, "5-51712.uncommitted") == "7")
      }
      #expect(!isAlive(worker), "one that cannot be spoken to is replaced")
      try world.detach(disk)
      try await world.isGone(disk)
    }
  }

  @Test("A device of no disk is left alone when it is open or holds writes")
  func strays() async throws {
    try await inWorld(hasMapper: true) { world in
      try await world.stopDaemon()
      for name in ["7-51712", "8-51712", "9-51712"] {
        try world.file("mapper/\(name)", Array("LIVE /x".utf8))
      }
      try world.file("mapper/7-51712.open", [])
      try world.file("mapper/8-51712.uncommitted", Array("3".utf8))
      try await world.startDaemon()
      #expect(
        World.names(world.mapper)
          == ["7-51712", "7-51712.open", "8-51712", "8-51712.uncommitted"])
      let left = try await world.ask(ControlRequest(.leftovers)).leftovers ?? []
      #expect(
        left.map(\.name).sorted() == [
          "device /stand-in/dmu-7-51712", "device /stand-in/dmu-8-51712",
        ])
      #expect(left.allSatisfy { $0.loses != nil })
      _ = try await world.ask(ControlRequest(.clean, target: "device /stand-in/dmu-8-51712"))
      #expect(try await world.ask(ControlRequest(.leftovers)).leftovers?.count == 1)
    }
  }

  @Test("What the kernel cannot serve goes by nbd and says why; with dm it is refused")
  func fallback() async throws {
    try await inWorld(hasMapper: true) { world in
      let store = try world.file("r.raw", [UInt8](repeating: 0, count: 1 << 20))
      let disk = try world.attach(5, "dmu:raw:\(store)")
      try await world.add(disk)
      let status = try #require(try await world.status(5).first)
      #expect(status.transport == .nbd)
      #expect(status.note == "served by nbd, since its image is only played")
      #expect(try world.devices == 1)
      #expect(World.names(world.mapper).isEmpty)
      try world.detach(disk)
      try await eventually("it is gone") { world.directories().isEmpty }

      let forced = try world.attach(6, "dmu:raw?transport=dm:\(store)")
      #expect(
        try await world.addFailure(forced)
          == "store \(store) cannot be served by the device-mapper (it is only played): use"
          + " transport auto or nbd")
    }
  }

  @Test("transport = nbd leaves the device-mapper alone; a spec may say otherwise")
  func forced() async throws {
    try await inWorld(["daemon.transport": "\"nbd\""], hasMapper: true) { world in
      try await world.add(try world.attach(5, world.spec("g5.dscow")))
      try await world.add(try world.attach(6, world.spec("g6.dscow", options: "?transport=dm")))
      #expect(try await world.status(5).first?.transport == .nbd)
      #expect(try await world.status(6).first?.transport == .dm)
    }
  }

  @Test("Without the module dm is refused with the remedy, and auto goes by nbd")
  func noModule() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow", options: "?transport=dm"))
      let sentence = try await world.addFailure(disk)
      #expect(sentence.contains("install its module, dm-userspace"), "\(sentence)")
      try await world.add(try world.attach(6, world.spec("g6.dscow")))
      let status = try #require(try await world.status(6).first)
      #expect(status.transport == .nbd)
      #expect(status.note == nil)
    }
  }

  private func replaced(_ world: World, _ disk: FakeDisk, _ old: Int32) async throws -> Bool {
    let status = try await world.status(disk.domain).first
    return status?.state == .ready && status?.worker != nil && status?.worker != old
  }
}
