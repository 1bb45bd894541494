// SPDX-License-Identifier: Apache-2.0
// Workers that an image or a guest has taken over, played: what they may do to their own disk, and
// that it goes no further.

import BlockIO
import Daemon
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct HostileWorkerTests {
  /// A world whose workers do something hostile, or, after `reform`, nothing.
  private func inHostileWorld(
    _ act: String, _ settings: [String: String] = [:], _ body: (World) async throws -> Void
  ) async throws {
    try await inWorld(settings, hasMapper: true) { world in
      try world.useWorkers("export PLAYED=\(act); exec")
      try await body(world)
    }
  }

  /// A store that was not there before, with something in it.
  private func store(_ world: World, _ name: String) throws -> String {
    world.spec(
      try world.file(name, [UInt8](repeating: 1, count: 4096)).split(separator: "/").last
        .map(String.init) ?? "")
  }

  /// Waits until another worker serves the disk of domain 5.
  private func isReplaced(_ world: World, _ first: Int32) async throws {
    try await eventually("another worker serves") {
      let now = try await world.status(5).first
      return now?.state == .ready && now?.worker != first
    }
  }

  @Test(
    "A descriptor whose close waits blocks nobody but a thread; its worker is replaced",
    arguments: ["linger", "many"])
  func lingering(_ act: String) async throws {
    try await inHostileWorld(act) { world in
      let disk = try world.attach(5, try store(world, "a"))
      try await world.add(disk)
      try world.useWorkers()
      // Another disk starts, which needs the thread that receives what workers send.
      let other = try world.attach(6, try store(world, "b"))
      try await world.add(other)
      try await eventually("the hostile one is replaced") {
        let now = try #require(try await world.status(5).first)
        return now.state == .ready && now.restarts > 0
      }
      let said = try SmallFile.read(world.folder.file("daemon.log"))
      let reason =
        act == "linger" ? "sent descriptors that nobody asked for" : "the message is too large"
      #expect(said.contains(reason), "\(said.suffix(2000))")
    }
  }

  @Test("A worker that gives other files back than it was given is replaced; they stay as they are")
  func stranger() async throws {
    let folder = try TemporaryFolder()
    #expect(chmod(folder.path, 0o755) == 0)
    let victim = folder.file("victim")
    do { _ = try Descriptor(path: victim, flags: O_RDWR | O_CREAT, mode: 0o644) }
    try await inHostileWorld("stranger:\(victim)") { world in
      let disk = try world.attach(5, try store(world, "a"))
      try await world.add(disk)
      let first = try await world.worker(disk)
      // Its log has no name any more: the daemon has to look for it.
      try world.useWorkers()
      try await world.stopDaemon(SIGKILL)
      for name in world.logs() { #expect(unlink("\(world.runDirectory)/pending/\(name)") == 0) }
      try await world.startDaemon()
      try await isReplaced(world, first)
      #expect(access(victim, F_OK) == 0, "nobody has moved it")
    }
  }

  @Test("A child of a worker that keeps its link and its store stops neither daemon nor disk")
  func children() async throws {
    try await inHostileWorld("children") { world in
      let disk = try world.attach(5, try store(world, "a"))
      try await world.add(disk)
      try world.useWorkers()
      let first = try await world.worker(disk)
      try await world.stopDaemon(SIGKILL)
      kill(first, SIGKILL)
      try await world.startDaemon()
      try await isReplaced(world, first)
      #expect(try await world.workers(["sleep"]).isEmpty, "the child has gone, too")
    }
  }

  @Test("What a child of a worker keeps after its disk has gone is free for others")
  func childrenAfter() async throws {
    try await inHostileWorld("children") { world in
      let disk = try world.attach(5, try store(world, "a"))
      try await world.add(disk)
      try world.useWorkers()
      try world.detach(disk)
      try await world.isGone(disk)
      let file = try FileStore(path: world.folder.file("a"), writable: true)
      try file.lock(exclusive: true)
      try file.unlock()
      try await world.add(try world.attach(6, world.spec("a")))
    }
  }

  @Test("Nobody else gets a store while its daemon is gone, nor after the next one has come")
  func lockedWithoutDaemon() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      func isLocked() throws -> Bool {
        let file = try FileStore(path: world.folder.file("g.dscow"), writable: true)
        do throws(IOError) {
          try file.lock(exclusive: true)
          return false
        } catch { return error.code == EAGAIN }
      }
      for signal in [SIGTERM, SIGKILL] {
        try await world.stopDaemon(signal)
        #expect(try isLocked(), "the worker has the locks")
        try await world.startDaemon()
        #expect(try await world.worker(disk) == worker)
        #expect(try isLocked(), "both have them")
      }
      try world.detach(disk)
      try await world.isGone(disk)
      #expect(try !isLocked())
    }
  }

  @Test("A worker that gives its locks up gives them to nobody: one store, one disk")
  func unlocking() async throws {
    try await inHostileWorld("unlock") { world in
      let disk = try world.attach(5, try store(world, "a"))
      try await world.add(disk)
      try await Task.sleep(for: .milliseconds(300))
      let second = try world.attach(6, world.spec("a"))
      let said = try await world.addFailure(second)
      #expect(said.contains("is in use by domain 5 (xvda)"), "\(said)")
      for name in ["a", "base"] {
        let file = try FileStore(path: world.folder.file(name), writable: true)
        #expect(throws: IOError.self, "\(name)") { try file.lock(exclusive: true) }
      }
      // As a base, too.
      let third = try world.attach(7, world.spec("c", base: "a"))
      #expect(try await world.addFailure(third).contains("in use as the store of domain 5"))
    }
  }

  @Test(
    "Who may only read a base stops no other disk on it, be it a worker or a user",
    .enabled(if: geteuid() == 0, "only root sees who has a lock"))
  func baseLocks() async throws {
    try await inHostileWorld("lock-base") { world in
      let disk = try world.attach(5, try store(world, "a"))
      try await world.add(disk)
      try await Task.sleep(for: .milliseconds(300))
      try world.useWorkers()
      try await world.add(try world.attach(6, try store(world, "b")))
      let reader = try FileStore(path: world.folder.file("base"), writable: false)
      for byte: Int64 in [101, 103, 200] { try reader.lockShared(byte) }
      try await world.add(try world.attach(7, try store(world, "c")))
      // A writer is respected as ever.
      let writer = try FileStore(path: world.folder.file("base"), writable: true)
      try writer.lockShared(101)
      let late = try world.attach(8, try store(world, "d"))
      #expect(try await world.addFailure(late).contains("is in use by"))
    }
  }

  // MARK: - Files that it asks for

  @Test("A worker cannot have more files than a chain may have")
  func manyFiles() async throws {
    let names = (0..<300).map { "f\($0)" }
    try await inHostileWorld(
      "need:\(names.joined(separator: ","))", ["base.directories": "[\"/\"]"]
    ) { world in
      for name in names { try world.file(name, [1]) }
      let disk = try world.attach(5, try store(world, "a"))
      let said = try await world.addFailure(disk)
      #expect(said.contains("names more than 256 files"), "\(said)")
    }
  }

  @Test("A later worker gets no file that the first did not ask for, unless the admin says so")
  func laterFile() async throws {
    let settings = ["base.directories": "[\"/\"]", "worker.restart-limit": "1"]
    try await inHostileWorld("need:b,c", settings) { world in
      for name in ["b", "c", "d"] { try world.file(name, [1]) }
      let disk = try world.attach(5, try store(world, "a"))
      try await world.add(disk)
      try world.useWorkers("export PLAYED=need:b,d; exec")
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      let said = try #require(try await world.status(5).first?.error)
      #expect(said.contains("names d as its extent, which it did not name"), "\(said)")
      #expect(try await world.command { $0.reload() } == .done)
      try await eventually("it is ready") { try await world.state(disk) == .ready }
    }
  }

  @Test("A path that is too long to be resolved leads nowhere")
  func longPath() async throws {
    let allowed = try TemporaryFolder()
    let victim = try TemporaryFolder()
    do { _ = try Descriptor(path: victim.file("v"), flags: O_RDWR | O_CREAT, mode: 0o644) }
    // Two links through folders of long names; behind them one that leads out.
    let name = String(repeating: "n", count: 250)
    var folder = open(allowed.path, O_RDONLY | O_DIRECTORY)
    for link in ["one", "two"] {
      let start = folder
      for _ in 0..<10 {
        try #require(mkdirat(folder, name, 0o755) == 0)
        folder = openat(folder, name, O_RDONLY | O_DIRECTORY)
      }
      let path = Array(repeating: name, count: 10).joined(separator: "/")
      try #require(symlinkat(path, start, link) == 0)
    }
    try #require(symlinkat(victim.file("v"), folder, "out") == 0)
    let settings = ["base.directories": "[\"\(allowed.path)\"]"]
    try await inHostileWorld("need:\(allowed.path)/one/two/out", settings) { world in
      let disk = try world.attach(5, try store(world, "a"))
      let said = try await world.addFailure(disk)
      #expect(said.contains("which the configuration does not allow"), "\(said)")
    }
    try await world(removing: allowed.path)
  }

  /// Removes what is too deep for the end of the test to remove.
  private func world(removing path: String) async throws {
    _ = try await blocking {
      try Command("/bin/rm", ["-rf", path]).start().wait(milliseconds: 20_000)
    }
  }

  @Test("A file that is exchanged for a link while nobody has it open is not opened again")
  func exchanged() async throws {
    let settings = ["base.directories": "[\"/\"]", "worker.restart-limit": "0"]
    try await inHostileWorld("need:b", settings) { world in
      for name in ["b", "victim"] { try world.file(name, [UInt8](repeating: 1, count: 4096)) }
      let victim = world.folder.file("victim")
      for (domain, name) in [(5, "b"), (6, "base"), (7, "store7")] {
        let disk = try world.attach(domain, try store(world, "store\(domain)"))
        try await world.add(disk)
        let worker = try await world.worker(disk)
        try await world.stopDaemon(SIGKILL)
        kill(worker, SIGKILL)
        let path = world.folder.file(name)
        #expect(rename(path, path + ".old") == 0)
        #expect(symlink(victim, path) == 0)
        try await world.startDaemon()
        try await eventually("it has failed") { try await world.state(disk) == .failed }
        let said = try #require(try await world.status(domain).first?.error)
        #expect(said.contains("\(path) is another file than the one"), "\(said)")
        #expect(unlink(path) == 0)
        #expect(rename(path + ".old", path) == 0)
        #expect(try await world.command { $0.reload() } == .done)
        try await eventually("it is ready") { try await world.state(disk) == .ready }
        try world.detach(disk)
        try await world.isGone(disk)
      }
    }
  }

  // MARK: - Its pending log

  @Test("A worker whose pending log grows beyond its bound is ended, with the reason")
  func growingLog() async throws {
    try await inHostileWorld("grow-log:1000000000", ["worker.restart-limit": "1"]) { world in
      let disk = try world.attach(5, try store(world, "a"))
      try await world.add(disk)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      let said = try #require(try await world.status(5).first?.error)
      #expect(said.contains("its pending log has grown to"), "\(said)")
      let log = try #require(world.logs().first)
      var status = stat()
      #expect(stat("\(world.runDirectory)/pending/\(log)", &status) == 0)
      #expect(status.st_size < 4 << 20)
    }
  }

  @Test(
    "A full run directory keeps no disk from starting and no worker from being replaced",
    .enabled(if: geteuid() == 0, "only root may mount"), arguments: ["worker", "stranger"])
  func fullRun(_ who: String) async throws {
    try await inWorld(daemon: false, hasMapper: true) { world in
      try #require(mkdir(world.runDirectory, 0o711) == 0)
      try await world.run(
        "/bin/mount", "-t", "tmpfs", "-o", "size=16m,mode=711", "none", world.runDirectory)
      defer { umount2(world.runDirectory, Int32(MNT_DETACH)) }
      try await world.startDaemon()
      let disk = try world.attach(5, try store(world, "a"))
      if who == "worker" { try world.useWorkers("export PLAYED=fill-log; exec") }
      try await world.add(disk)
      let first = try await world.worker(disk)
      try world.useWorkers()
      if who == "stranger" {
        let ballast = try Descriptor(
          path: world.runDirectory + "/ballast", flags: O_RDWR | O_CREAT, mode: 0o600)
        let piece = [UInt8](repeating: 1, count: 4096)
        while write(ballast.raw, piece, piece.count) > 0 {}
        kill(first, SIGKILL)
      }
      try await world.add(try world.attach(6, try store(world, "b")))
      try await isReplaced(world, first)
      try await world.stopDaemon(SIGKILL)
      try await world.startDaemon()
      #expect(try await world.state(disk) == .ready)
      try await world.stopDaemon()
    }
  }
}
