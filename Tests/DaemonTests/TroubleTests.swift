// SPDX-License-Identifier: Apache-2.0
// What an admin meets: stores that are missing, disks that cannot be had or cannot go, and what
// status says of them.

import BlockIO
import Daemon
import Fakes
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct TroubleTests {
  // MARK: - Missing stores

  @Test("A store is made only for a domain that boots, only to be written, only where allowed")
  func creation() async throws {
    try await inWorld(["store.create-in": "[\"/nowhere\"]"]) { world in
      let (store, base) = (world.folder.file("g.dscow"), world.folder.file("base"))
      let remedy =
        ": bring it back (is its file system mounted?), or make an empty one with"
        + " 'dscow_tool -c \(store) \(base)'"
      func refused(
        _ domain: Int, _ options: String = "", writable: Bool = true, boots: Bool = true
      ) async throws -> String {
        let disk = try world.attach(
          domain, world.spec("g.dscow", options: options), writable: writable)
        let said = try await world.addFailure(disk, boots: boots)
        #expect(access(store, F_OK) != 0, "nothing was made")
        try world.detach(disk)
        return said
      }
      #expect(
        try await refused(5)
          == "store \(store) does not exist, and it is created only below store.create-in of"
          + " \(world.configurationPath) or with '?create=yes' in its spec" + remedy)
      #expect(
        try await refused(6, "?create=yes", boots: false)
          == "store \(store) does not exist, and it is created only for a domain that xl boots,"
          + " which is not known of this one (it may be restored or migrated)" + remedy)
      #expect(
        try await refused(7, "?create=yes", writable: false)
          == "store \(store) does not exist, and none is made for a disk that is read only"
          + remedy)
      let disk = try world.attach(8, world.spec("g.dscow", options: "?create=yes"))
      try await world.add(disk)
      #expect(access(store, F_OK) == 0)
      try world.detach(disk)
      try await world.isGone(disk)

      // A file of 0 bytes is no store, whoever asks.
      try world.file("g.dscow", [])
      let empty = try world.attach(9, world.spec("g.dscow", options: "?create=yes"))
      #expect(
        try await world.addFailure(empty)
          == "store \(store) is no image, it has 0 bytes: bring its content back, or make an empty"
          + " disk of it with 'rm \(store) && dscow_tool -c \(store) \(base)'")
      var status = stat()
      #expect(stat(store, &status) == 0 && status.st_size == 0)
    }
  }

  @Test("Below create-in a spec may forbid it; a link does not lead there")
  func creationPlace() async throws {
    try await inWorld { world in
      let no = try world.attach(5, world.spec("g.dscow", options: "?create=no"))
      #expect(try await world.addFailure(no).contains("its spec forbids to create one"))
      let elsewhere = try TemporaryFolder()
      #expect(symlink(elsewhere.path, world.folder.file("link")) == 0)
      let linked = try world.attach(6, world.spec("link/g.dscow"))
      #expect(try await world.addFailure(linked).contains("only below store.create-in"))
      #expect(access(elsewhere.file("g.dscow"), F_OK) != 0)
    }
  }

  @Test("A store that goes while its disk is served is not replaced by an empty one")
  func vanished() async throws {
    try await inWorld(["worker.restart-limit": "1"]) { world in
      let disk = try world.attach(5, world.spec("g.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      try await world.stopDaemon(SIGKILL)
      kill(worker, SIGKILL)
      #expect(unlink(world.folder.file("g.dscow")) == 0)
      try await world.startDaemon()
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      #expect(access(world.folder.file("g.dscow"), F_OK) != 0)
    }
  }

  // MARK: - Failed attaches

  @Test("A failed attach stays in status until the next try or forget, over daemons")
  func failuresStay() async throws {
    try await inWorld { world in
      func fail(_ domain: Int, name: String = "xvda") async throws {
        let disk = try world.attach(domain, world.spec("g", base: "none"), name: name)
        _ = try await world.addFailure(disk)
        try world.detach(disk)
        try world.toolstack.destroyDomain(domain)
        try await eventually("it is given up") { try await world.isQuiet() }
      }
      try await fail(5)
      let status = try #require(try await world.status().first)
      #expect(status.state == .failed)
      #expect(status.domainName == "guest5")
      #expect(status.error?.hasPrefix("base \(world.folder.file("none")) does not exist") == true)
      try await fail(6, name: "xvdb")
      try await world.stopDaemon()
      try await world.startDaemon()
      #expect(try await world.status().count == 2)
      // The same guest, by another number, as a toolstack that tries again would have it.
      try world.toolstack.createDomain(7, name: "guest5")
      let again = try world.attach(7, world.spec("g"))
      try await world.add(again)
      let now = try await world.status()
      #expect(now.map(\.state) == [.failed, .ready], "\(now)")
      let none = try await world.command { $0.forget("9") }
      #expect(none == .noDisk)
      let done = try await world.command { $0.forget("guest6:xvdb") }
      #expect(done == .done)
      #expect(try await world.status().count == 1)
    }
  }

  @Test("A disk that waits says for what")
  func reasons() async throws {
    try await inWorld(["worker.ready-timeout": "35"]) { world in
      try world.useWorkers(instead: "exec sleep 1000")
      let disk = try world.attach(5, world.spec("g.dscow"))
      async let answer = world.addFailure(disk)
      try await eventually("it says so") {
        let status = try await world.status(5).first
        return status?.state == .starting && status?.error == "the worker opens the image"
      }
      try world.detach(disk)
      try await world.stopDaemon()
      #expect(try await answer.contains("dmu-xend is being stopped"))
    }
  }

  @Test("SINCE is the time of the last change of state, whichever daemon is asked")
  func since() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g.dscow"))
      try await world.add(disk)
      let before = try #require(try await world.status(5).first).since
      try await Task.sleep(for: .milliseconds(1200))
      for signal in [SIGTERM, SIGKILL] {
        try await world.stopDaemon(signal)
        try await world.startDaemon()
        #expect(try await world.status(5).first?.since == before)
        #expect(try world.node(disk, "since") == "\(before)")
      }
    }
  }

  @Test("Counters and the length of the store in use are those of now")
  func counters() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g.dscow"))
      try await world.add(disk)
      let wire = try await world.wire(of: disk)
      for round in 1...3 {
        let place = UInt64(round) << 17
        #expect(try wire.write([UInt8](repeating: 1, count: 1 << 16), at: place) == 0)
        #expect(try await world.status(5).first?.allocated == UInt64(round) << 16)
        #expect(try wire.flush() == 0)
        let status = try #require(try await world.status(5).first)
        #expect(status.flushes == UInt64(round))
        #expect(status.allocated == UInt64(round) << 16)
      }
    }
  }

  @Test(
    "A full file system is a pause", .enabled(if: geteuid() == 0, "only root may mount"))
  func full() async throws {
    try await inWorld { world in
      try world.file("base", [UInt8](repeating: 0, count: 8 << 20))
      let folder = world.folder.file("small")
      #expect(mkdir(folder, 0o755) == 0)
      try await world.run("/bin/mount", "-t", "tmpfs", "-o", "size=2m", "none", folder)
      defer { umount2(folder, Int32(MNT_DETACH)) }
      try world.file("small/ballast", [UInt8](repeating: 1, count: 1 << 20))
      let disk = try world.attach(5, world.spec("small/g.dscow"))
      try await world.add(disk)
      let wire = WireHolder(try await world.wire(of: disk))
      let piece = [UInt8](repeating: 7, count: 1 << 16)
      async let written = blocking {
        for index in 0..<24 {
          let code = try wire.wire.write(piece, at: UInt64(index) << 16)
          guard code == 0 else { return code }
        }
        return try wire.wire.flush()
      }
      try await eventually("it has no space") { try await world.state(disk) == .noSpace }
      #expect(try world.node(disk, "state") == "no-space")
      #expect(try world.node(disk, "error")?.isEmpty == false)
      try await Task.sleep(for: .seconds(1))
      #expect(unlink(folder + "/ballast") == 0)
      #expect(try await written == 0, "the guest has seen no error")
      try await eventually("it is ready") { try await world.state(disk) == .ready }
      #expect(try wire.wire.read(1 << 16, at: 23 << 16) == piece)
      try world.detach(disk)
      try await world.isGone(disk)
    }
  }

  @Test(
    "on-full = fail is an error for the guest at once",
    .enabled(if: geteuid() == 0, "only root may mount"))
  func fullFails() async throws {
    try await inWorld(["store.on-full": "\"fail\""]) { world in
      try world.file("base", [UInt8](repeating: 0, count: 8 << 20))
      let folder = world.folder.file("small")
      #expect(mkdir(folder, 0o755) == 0)
      try await world.run("/bin/mount", "-t", "tmpfs", "-o", "size=1m", "none", folder)
      defer { umount2(folder, Int32(MNT_DETACH)) }
      let disk = try world.attach(5, world.spec("small/g.dscow"))
      try await world.add(disk)
      let wire = try await world.wire(of: disk)
      let piece = [UInt8](repeating: 7, count: 1 << 16)
      var code: UInt32 = 0
      for index in 0..<24 where code == 0 {
        code = try wire.write(piece, at: UInt64(index) << 16)
      }
      #expect(code != 0)
    }
  }

  @Test("doctor names disks in trouble and what is left over; clean asks")
  func doctor() async throws {
    try await inWorld(["worker.restart-limit": "0"]) { world in
      let failed = try world.attach(5, world.spec("none", base: "none"))
      _ = try await world.addFailure(failed)
      let disk = try world.attach(6, world.spec("g.dscow"))
      try await world.add(disk)
      let wire = try await world.wire(of: disk)
      #expect(try wire.write([UInt8](repeating: 7, count: 4096), at: 0) == 0)
      try world.useWorkers(instead: "exit 1")
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("it has failed") { try await world.state(disk) == .failed }
      try world.detach(disk)
      try await world.isGone(disk)
      let doctor = Doctor(configurationPath: world.configurationPath, socket: nil)
      let findings = await doctor.findings().filter { $0.kind == .trouble && $0.trouble != nil }
      #expect(findings.map(\.what).contains("the disk xvda of domain guest5 (5)"), "\(findings)")
      let log = try #require(findings.first { $0.what.hasPrefix("left over: log ") })
      #expect(log.trouble?.contains("has writes that are not in it yet: 1 placement") == true)
      #expect(doctor.clean() == .failed, "nobody has agreed")
      #expect(world.logs().count == 1)
      let name = String(log.what.dropFirst("left over: ".count))
      _ = try await world.ask(ControlRequest(.clean, target: name))
      #expect(world.logs().isEmpty)
    }
  }

  // MARK: - Hand-over

  @Test("A disk that finds its store with a leaving domain waits, whatever the daemon has seen")
  func handOver() async throws {
    try await inWorld { world in
      try await world.makeStore("g.dscow")
      var old = try world.attach(10, world.spec("g.dscow"))
      try await world.add(old)
      for domain in 11..<31 {
        // All of it within a moment: the daemon may look at the new one first.
        try world.toolstack.beginDetach(old)
        let new = try world.attach(domain, world.spec("g.dscow"))
        async let answer = world.add(new, boots: false)
        try world.toolstack.backendCloses(old)
        try world.toolstack.finishDetach(old)
        try world.toolstack.destroyDomain(old.domain)
        _ = try await answer
        old = new
      }
      #expect(try await world.workers().count == 1)
    }
  }

  @Test("A disk of the own domain that is never connected does not keep its store")
  func bootloader() async throws {
    try await inWorld { world in
      let own = FakeDisk(domain: 0, params: world.spec("g.dscow"))
      try world.toolstack.attach(own)
      try world.toolstack.backendWaits(own)
      try await world.add(own)
      let early = try world.attach(5, world.spec("g.dscow"))
      #expect(
        try await world.addFailure(early).contains("is in use by domain 0 (xvda)"),
        "the toolstack may still be waiting for it")
      try world.detach(early)
      try await Task.sleep(for: .seconds(13))
      let guest = try world.attach(6, world.spec("g.dscow"))
      try await world.add(guest)
      try await world.isGone(own)
    }
  }

  @Test("Every holder is named, and another program by its name")
  func holders() async throws {
    try await inWorld { world in
      try await world.makeStore("g.dscow")
      let store = world.folder.file("g.dscow")
      let readers = try [5, 6].map {
        try world.attach($0, world.spec("g.dscow"), writable: false)
      }
      for reader in readers { try await world.add(reader) }
      let writer = try world.attach(7, world.spec("g.dscow"))
      #expect(
        try await world.addFailure(writer)
          == "store \(store) is in use by domains 5 (xvda) and 6 (xvda): detach it there first, or"
          + " give this disk a store of its own")
      try world.detach(writer)
      for reader in readers { try world.detach(reader) }
      for reader in readers { try await world.isGone(reader) }
      let file = try FileStore(path: store, writable: true)
      try file.lock(exclusive: true)
      let late = try world.attach(8, world.spec("g.dscow"))
      let said = try await world.addFailure(late)
      #expect(said.hasPrefix("store \(store) is in use by "), "\(said)")
      #expect(said.contains("(process \(getpid()))"), "\(said)")
    }
  }

  // MARK: - One daemon on a host

  @Test("A second daemon of the same host is refused, whatever its run directory")
  func oneDaemon() async throws {
    let lock = try TemporaryFolder()
    let options = ["--host-lock", lock.file("lock")]
    try await inWorld(daemon: false) { world in
      try await world.startDaemon(options)
      let other = try World()
      let second = try Command(
        Programs.directory + "/dmu-xend",
        ["-c", other.configurationPath, "--stand-in-devices"] + options
      ).start()
      #expect(try await blocking { try second.wait(milliseconds: 20_000) } == .exited(1))
      try await other.end()
    }
  }

  /// Lets every call of the daemon that names one of the files wait for a minute, by strace: a
  /// file system that hangs.
  private func hang(_ files: [String], _ daemon: ProcessHandle) async throws -> ProcessHandle {
    let calls = "openat,openat2,newfstatat,statx,readlink,access,faccessat2"
    let command = Command(
      "/usr/bin/strace",
      ["-f", "-q", "-o", "/dev/null", "-p", "\(daemon.pid)"] + files.flatMap { ["-P", $0] }
        + ["-e", "trace=\(calls)", "-e", "inject=\(calls):delay_enter=60000000"])
    let strace = try command.start()
    try await eventually("it is traced") {
      let status = try SmallFile.read("/proc/\(daemon.pid)/status")
      return !status.contains("TracerPid:\t0\n")
    }
    return strace
  }

  @Test(
    "Attaches that hang keep no other disk waiting, nor the daemon from ending",
    .enabled(if: access("/usr/bin/strace", X_OK) == 0, "strace makes files hang"))
  func hangingAttaches() async throws {
    try await inWorld { world in
      let healthy = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(healthy)
      let domains = 10..<30
      for domain in domains { try await world.makeStore("h\(domain)") }
      let daemon = try #require(world.daemonProcess)
      let strace = try await hang(domains.map { world.folder.file("h\($0)") }, daemon)
      defer { kill(strace.pid, SIGKILL) }
      for domain in domains { _ = try world.attach(domain, world.spec("h\(domain)")) }
      try await eventually("they are being started") { try await world.status().count == 21 }
      let begin = ContinuousClock.now
      let other = try world.attach(40, world.spec("g40.dscow"))
      try await world.add(other)
      kill(try await world.worker(healthy), SIGKILL)
      try await eventually("a worker is replaced", within: .seconds(30)) {
        let status = try await world.status(5).first
        return status?.state == .ready && status?.restarts == 1
      }
      #expect(try await world.status(10).first?.state == .starting)
      try daemon.send(SIGTERM)
      // A thread that strace holds back cannot end before strace does.
      try await eventually("the daemon ends", within: .seconds(30)) {
        try SmallFile.read(world.folder.file("daemon.log")).contains("dmu-xend ends")
      }
      let took = ContinuousClock.now - begin
      print("beside 20 attaches that hang: ready, replaced and ended after \(took)")
      #expect(took < .seconds(55), "the calls have ended, which shows nothing")
      kill(strace.pid, SIGKILL)
      try await world.stopDaemon()
    }
  }

  @Test(
    "Daemon and worker have died and the base has gone: status says so, and goes on when it is back"
  )
  func baseGone() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      try await world.stopDaemon(SIGKILL)
      kill(worker, SIGKILL)
      let (base, away) = (world.folder.file("base"), world.folder.file("away"))
      try #require(rename(base, away) == 0)
      try await world.startDaemon()
      try await eventually("the reason is told") {
        let error = try await world.status(5).first?.error ?? ""
        return error.contains(base) && error.contains("does not exist")
      }
      let told = try #require(try await world.status(5).first)
      print("status: \(told.state) \(told.error ?? "")")
      #expect(told.state == .failed)
      #expect(try world.node(disk, "error")?.contains(base) == true)
      try #require(rename(away, base) == 0)
      _ = try await world.ask(ControlRequest(.reload))
      try await eventually("it serves again") { try await world.status(5).first?.state == .ready }
    }
  }

  @Test("The run directory is wiped under the daemon: disks go on, and others can be had")
  func wiped() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      let bytes = [UInt8](repeating: 9, count: 4096)
      #expect(try world.wire().write(bytes, at: 8192) == 0)
      try await world.run("/bin/rm", "-rf", world.runDirectory)
      try await eventually("the daemon answers again") {
        guard access(world.socket, F_OK) == 0 else { return false }
        return try await world.status(5).first?.state == .ready
      }
      #expect(try await world.worker(disk) == worker)
      #expect(
        try SmallFile.read(world.folder.file("daemon.log")).contains("has gone and is made anew"))
      // Its worker can be replaced, with what it had not committed, and another disk can come.
      kill(worker, SIGKILL)
      try await eventually("it is replaced") {
        let now = try await world.status(5).first
        return now?.state == .ready && now?.restarts == 1
      }
      let other = try world.attach(6, world.spec("g6.dscow"))
      try await world.add(other)
      try await world.stopDaemon()
      try await world.startDaemon()
      try await eventually("both are ready") {
        try await world.status().map(\.state) == [.ready, .ready]
      }
      try world.detach(disk)
      try world.detach(other)
      try await world.isGone(disk)
      try await world.isGone(other)
    }
  }

  @Test("A log that nobody reads keeps neither the daemon nor a disk waiting")
  func fullLog() async throws {
    try await inWorld { world in
      try await world.stopDaemon()
      let pipe = try FullPipe()
      try await world.startDaemon(log: pipe.raw)
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let bytes = [UInt8](repeating: 9, count: 4096)
      #expect(try world.wire().write(bytes, at: 8192) == 0)
      try world.detach(disk)
      try await world.isGone(disk)
      try await world.stopDaemon()
    }
  }

  @Test("Without descriptors a disk is refused, nothing is left of it, and the daemon answers")
  func descriptors() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let workers = try await world.workers()
      let daemon = try #require(world.daemonProcess)
      let used = World.names("/proc/\(daemon.pid)/fd").count
      try await world.run(
        "/usr/bin/prlimit", "--pid", "\(daemon.pid)", "--nofile=\(used + 8):\(used + 8)")
      for domain in 6...9 {
        let more = try world.attach(domain, world.spec("g\(domain).dscow"))
        await #expect(throws: (any Error).self) { try await world.add(more) }
        let error = try await world.status(domain).first?.error ?? ""
        #expect(error.contains("LimitNOFILE") || error.contains("Too many open files"), "\(error)")
      }
      #expect(try await world.workers() == workers)
      #expect(try await world.status(5).first?.state == .ready)
    }
  }
}
