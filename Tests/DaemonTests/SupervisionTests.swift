// SPDX-License-Identifier: Apache-2.0
// Workers die, daemons are stopped and started: the disks go on.

import Daemon
import Fakes
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct SupervisionTests {
  private let block = [UInt8](repeating: 0x5A, count: 4096)

  @Test(
    "A worker that cannot give up its privileges serves nothing",
    .enabled(if: geteuid() == 0, "only root has any"))
  func privileges() async throws {
    try await inWorld(["worker.restart-limit": "1"]) { world in
      // Root of a namespace without another user to become.
      try world.useWorkers("exec unshare --user --map-root-user")
      let disk = try world.attach(5, world.spec("g5.dscow"))
      let why = try await world.addFailure(disk)
      #expect(why.contains("the worker was lost while it started (it ended with exit status 1)"))
      #expect(try SmallFile.read(world.workerLog).contains("cannot drop the groups"))
      try world.useWorkers()
      try world.detach(disk)
      try await world.isGone(disk)
    }
  }

  @Test("A worker that is killed is replaced, and what it had not committed survives")
  func killed() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      do {
        let wire = try world.wire()
        // Acknowledged and never flushed: only the memory file knows of it.
        #expect(try wire.write(block, at: 16384) == 0)
      }
      #expect(try await world.status(5).first?.uncommitted ?? 0 > 0)
      let first = try await world.worker(disk)
      kill(first, SIGKILL)
      try await eventually("another worker serves") {
        let status = try await world.status(5).first
        return status?.state == .ready && status?.worker != first
      }
      #expect(try world.reattachments == 1)
      let wire = try world.wire()
      #expect(try wire.read(4096, at: 16384) == block)
      #expect(try wire.flush() == 0)
      #expect(try await world.status(5).first?.uncommitted == 0)
      #expect(try await world.status(5).first?.restarts == 1)
    }
  }

  @Test("A worker that dies too often makes its disk fail, with the reason; reload tries again")
  func limit() async throws {
    try await inWorld(["worker.restart-limit": "2"]) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      for _ in 0..<3 {
        let worker = try await world.worker(disk)
        kill(worker, SIGKILL)
        try await eventually("it is replaced or has failed") {
          if try await world.state(disk) == .failed { return true }
          return try await replaced(world, disk, worker)
        }
      }
      let status = try #require(try await world.status(5).first)
      #expect(status.state == .failed)
      #expect(status.worker == nil)
      #expect(status.device != nil, "the guest's requests wait")
      let reason = try #require(status.error)
      #expect(reason.contains("died 3 times within 60 seconds"), "\(reason)")
      #expect(reason.contains("signal 9"), "\(reason)")
      try await eventually("xenstore says so") { try world.node(disk, "state") == "failed" }
      #expect(try world.node(disk, "error") == reason)
      #expect(try await world.addFailure(disk) == reason)

      #expect(try await world.command { $0.reload() } == .done)
      try await eventually("it serves again") { try await world.state(disk) == .ready }
      let wire = try world.wire()
      #expect(try wire.read(1, at: 0) == [0xB5])
    }
  }

  @Test("A failed disk that is not wanted any more is taken down")
  func failedThenGone() async throws {
    try await inWorld(["worker.restart-limit": "0"]) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      #expect(try world.devices == 1)
      try world.detach(disk)
      try await eventually("everything has gone") {
        let devices = try world.devices
        return world.directories().isEmpty && devices == 0
      }
    }
  }

  @Test("A link that nobody reads does not keep the daemon from starting")
  func muteLink() async throws {
    try await inWorld { world in
      try await world.stopDaemon()
      let folder = world.runDirectory + "/disks/7-51712"
      try #require(mkdir(folder, 0o700) == 0)
      let mute = try UnixSocket.listen(at: folder + "/link", kind: .packets)
      try await world.startDaemon()
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let left = try #require(try await world.status(7).first)
      #expect(left.state == .failed)
      #expect(left.error?.contains("end the worker at \(folder)/link") == true)
      #expect(mute.raw >= 0)
    }
  }

  @Test("A worker that does not answer is replaced, and what it had not committed survives")
  func silentWorker() async throws {
    try await inWorld(["worker.heartbeat": "1"]) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      let other = try world.attach(6, world.spec("g6.dscow"))
      try await world.add(disk)
      try await world.add(other)
      let (worker, healthy) = (try await world.worker(disk), try await world.worker(other))
      #expect(try world.wire().write([UInt8](repeating: 7, count: 4096), at: 0) == 0)
      kill(worker, SIGSTOP)
      try await eventually("it is replaced") {
        let now = try await world.status(5).first
        return now?.state == .ready && now?.worker != nil && now?.worker != worker
      }
      #expect(try world.wire().read(4096, at: 0) == [UInt8](repeating: 7, count: 4096))
      #expect(try await world.worker(other) == healthy)
      #expect(
        try SmallFile.read(world.folder.file("daemon.log")).contains("has not answered for 3 s"))
    }
  }

  @Test("Each disk's worker runs as a user of its own", .enabled(if: geteuid() == 0))
  func users() async throws {
    try await inWorld(["worker.uids": "\"2000100-2000102\""]) { world in
      var disks: [FakeDisk] = []
      for domain in 5...7 {
        let disk = try world.attach(domain, world.spec("g\(domain).dscow"))
        try await world.add(disk)
        disks.append(disk)
      }
      var users: [UInt32] = []
      for disk in disks {
        let process = try ProcessHandle(pid: try await world.worker(disk))
        users.append(try process.user())
      }
      #expect(users.sorted() == [2_000_100, 2_000_101, 2_000_102])
      // The next daemon knows whom they belong to: there is none left.
      try await world.stopDaemon()
      try await world.startDaemon()
      let more = try world.attach(8, world.spec("g8.dscow"))
      await #expect(throws: (any Error).self) { try await world.add(more) }
      let status = try await world.status(8).first
      #expect(status?.error?.contains("widen worker.uids") == true)
      // A replaced worker is the same user again.
      kill(try await world.worker(disks[0]), SIGKILL)
      try await eventually("it is replaced") { try await world.status(5).first?.restarts == 1 }
      try await eventually("it serves") { try await world.status(5).first?.state == .ready }
      #expect(try ProcessHandle(pid: try await world.worker(disks[0])).user() == users[0])
    }
  }

  @Test("A live worker whose socket ends gets another one")
  func socketLost() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      let socket = try StandInDoor.socket(of: 0, runDirectory: world.runDirectory)
      shutdown(socket.raw, Int32(SHUT_RDWR))
      try await eventually("it has a new socket") { try world.reattachments == 1 }
      let wire = try world.wire()
      #expect(try wire.read(1, at: 0) == [0xB5])
      #expect(try await world.worker(disk) == worker)
    }
  }

  @Test("A daemon that is stopped leaves disks and workers; the next one takes them over")
  func restart() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      let kernel = try world.wire()
      try await world.stopDaemon()
      #expect(isAlive(worker))
      #expect(try world.toolstack.read("/local/domain/0/dmu-xen/state") == "stopped")
      // Served without a daemon.
      #expect(try kernel.write(block, at: 0) == 0)
      try await world.startDaemon()
      #expect(try await world.state(disk) == .ready)
      #expect(try await world.worker(disk) == worker)
      #expect(try world.reattachments == 0)
      // What the new daemon has been given back is enough to replace the worker.
      kill(worker, SIGKILL)
      try await eventually("another worker serves") { try await replaced(world, disk, worker) }
      let wire = try world.wire()
      #expect(try wire.read(4096, at: 0) == block)
      // And the store is still locked against others.
      let other = try world.attach(6, world.spec("g5.dscow"))
      #expect(try await world.addFailure(other).contains("is in use by domain 5 (xvda)"))
    }
  }

  @Test("A worker that died while the daemon was away is replaced")
  func diedMeanwhile() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      do {
        let wire = try world.wire()
        #expect(try wire.write(block, at: 4096) == 0)
      }
      try await world.stopDaemon()
      kill(worker, SIGKILL)
      try await Task.sleep(for: .milliseconds(50))
      try await world.startDaemon()
      try await eventually("another worker serves") { try await replaced(world, disk, worker) }
      let wire = try world.wire()
      #expect(try wire.read(4096, at: 4096) == block)
    }
  }

  @Test("A disk that vanished while the daemon was away is taken down")
  func vanishedMeanwhile() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      try await world.stopDaemon()
      try world.detach(disk)
      try await world.startDaemon()
      try await eventually("it is gone") {
        let devices = try world.devices
        return !isAlive(worker) && world.directories().isEmpty && devices == 0
      }
    }
  }

  @Test("A process that was given the worker's number meanwhile is not touched")
  func reusedNumber() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      try await world.stopDaemon()
      kill(worker, SIGKILL)
      let bystander = try Command("/bin/sleep", ["1000"]).start()
      defer { kill(bystander.pid, SIGKILL) }
      let path = "\(world.runDirectory)/disks/5-51712/disk"
      let record = try SmallFile.read(path)
      try world.file(
        "run/disks/5-51712/disk",
        Array(record.replacing("worker=\(worker)\n", with: "worker=\(bystander.pid)\n").utf8))
      try await world.startDaemon()
      try await eventually("another worker serves") { try await world.state(disk) == .ready }
      #expect(!bystander.hasEnded)
    }
  }

  @Test("State files that make no sense end in a disk that is started anew")
  func brokenRecord() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      try await world.stopDaemon()
      kill(worker, SIGKILL)
      try await Task.sleep(for: .milliseconds(50))
      try world.file("run/disks/5-51712/disk", Array("worker=\nnonsense".utf8))
      try await world.startDaemon()
      try await eventually("it serves") { try await world.state(disk) == .ready }
      #expect(try world.devices == 1, "the stray device was ended")
    }
  }

  @Test("A second daemon is refused")
  func second() async throws {
    try await inWorld { world in
      let command = Command(Programs.directory + "/dmu-xend", ["-c", world.configurationPath])
      let second = try command.start()
      #expect(try await blocking { try second.wait(milliseconds: 10_000) } == .exited(1))
    }
  }

  private func replaced(_ world: World, _ disk: FakeDisk, _ old: Int32) async throws -> Bool {
    let status = try await world.status(disk.domain).first
    return status?.state == .ready && status?.worker != nil && status?.worker != old
  }
}
