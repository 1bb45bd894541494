// Disks that are served by their nodes: the daemon's part, with a device-mapper and workers
// that are played.

import Daemon
import Glibc
import Posix
import TestSupport
import Testing

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
