// SPDX-License-Identifier: Apache-2.0
// The control socket against clients that are wrong, slow, many or not root; the commands;
// and reloading.

import Daemon
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct ControlTests {
  /// Sends bytes as they are; what comes back until the daemon closes or so long.
  private func raw(_ world: World, _ bytes: [UInt8], milliseconds: Int32 = 3000) async throws
    -> String?
  {
    let socket = world.socket
    return try await blocking {
      let client = try UnixSocket.connect(to: socket, kind: .stream)
      var rest = bytes[...]
      while !rest.isEmpty {
        let count = rest.withUnsafeBytes {
          send(client.raw, $0.baseAddress, min($0.count, 4096), Int32(MSG_NOSIGNAL))
        }
        if count <= 0 { break }
        rest = rest.dropFirst(count)
      }
      var item = pollfd(fd: client.raw, events: Int16(POLLIN), revents: 0)
      guard poll(&item, 1, milliseconds) == 1 else { return nil }
      var buffer = [UInt8](repeating: 0, count: 65536)
      let count = recv(client.raw, &buffer, buffer.count, 0)
      return String(decoding: buffer[..<max(count, 0)], as: UTF8.self)
    }
  }

  @Test("The socket is the owner's only")
  func mode() async throws {
    try await inWorld { world in
      var status = stat()
      #expect(stat(world.socket, &status) == 0)
      #expect(status.st_mode & 0o777 == 0o600)
      #expect(stat(world.runDirectory, &status) == 0)
      #expect(status.st_mode & 0o777 == 0o711, "searched by tools, listed by nobody else")
      #expect(stat(world.runDirectory + "/disks", &status) == 0)
      #expect(status.st_mode & 0o777 == 0o700)
    }
  }

  @Test("Nonsense is answered, a line without end is cut off, and others are served meanwhile")
  func nonsense() async throws {
    try await inWorld { world in
      let answer = try await raw(world, Array("hello\n".utf8))
      #expect(answer?.contains("\"ok\":false") == true)
      #expect(
        try await raw(world, Array("{\"command\":\"dance\"}\n".utf8))?.contains("status") == true)
      #expect(try await raw(world, Array("[]\n{}\n".utf8))?.contains("\"ok\":false") == true)
      #expect(try await raw(world, [UInt8](repeating: 65, count: 1 << 20)) == "")
      #expect(try await raw(world, [0xFF, 0xFE, 10])?.contains("\"ok\":false") == true)
      let path = try await raw(world, Array("{\"command\":\"attach\",\"path\":\"x\"}\n".utf8))
      #expect(path?.contains("is not a disk's path in xenstore") == true)
      #expect(try await world.status().isEmpty)
    }
  }

  @Test("A client that asks and never reads harms nobody")
  func slow() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let client = try UnixSocket.connect(to: world.socket, kind: .stream)
      try UnixSocket.setNonBlocking(client.raw)
      let request = Array("{\"command\":\"status\"}\n".utf8)
      var sent = 0
      for _ in 0..<200_000 {
        let count = send(client.raw, request, request.count, Int32(MSG_NOSIGNAL))
        if count < 0 { break }
        sent += count
      }
      #expect(sent > 1000, "the daemon took its requests until it had enough of them")
      let start = ContinuousClock.now
      #expect(try await world.status().count == 1)
      #expect(.now - start < .seconds(5))
      #expect(try await world.state(disk) == .ready)
    }
  }

  @Test("Who is not root is refused", .enabled(if: geteuid() == 0, "only root can be another"))
  func stranger() async throws {
    try await inWorld { world in
      // The door is opened wide, so that only the daemon's own look at the peer is left.
      for path in [world.folder.path, world.runDirectory] { #expect(chmod(path, 0o755) == 0) }
      #expect(chmod(world.socket, 0o666) == 0)
      let log = try Descriptor(
        path: world.folder.file("answer"), flags: O_RDWR | O_CREAT, mode: 0o666)
      var command = Command(
        "/usr/bin/setpriv",
        [
          "--reuid=65534", "--clear-groups", Programs.directory + "/dmu-xen", "status",
          "--socket", world.socket,
        ])
      command.descriptors = [2: log.raw]
      let process = try command.start()
      let status = try await blocking { try process.wait(milliseconds: 20_000) }
      #expect(status == .exited(1))
      var buffer = [UInt8](repeating: 0, count: 4096)
      let count = pread(log.raw, &buffer, buffer.count, 0)
      let answer = String(decoding: buffer[..<max(count, 0)], as: UTF8.self)
      #expect(answer.hasPrefix("dmu-xend has ended before it answered"), "\(answer)")
    }
  }

  @Test("An error in the configuration leaves the running one in force, and says where it is")
  func reload() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      try world.configure(["worker.restart-limit": "\"many\""])
      let request = ControlRequest(.reload)
      do {
        _ = try await world.ask(request)
        Issue.record("a bad configuration was taken")
      } catch let error as DiskFailure {
        #expect(error.sentence.contains("\(world.configurationPath) line "))
        #expect(error.sentence.contains("worker.restart-limit: the value must be a number"))
        #expect(error.sentence.hasSuffix("the running configuration stays in force"))
      }
      let process = try #require(world.daemonProcess)
      try process.send(SIGHUP)
      try await Task.sleep(for: .milliseconds(200))
      #expect(!process.hasEnded)
      // The limit that was in force is still 10: a worker that dies is replaced.
      let worker = try await world.worker(disk)
      kill(worker, SIGKILL)
      try await eventually("it is replaced") {
        let status = try await world.status(5).first
        return status?.state == .ready && status?.worker != nil && status?.worker != worker
      }
      try world.configure(["worker.restart-limit": "0"])
      try process.send(SIGHUP)
      try await Task.sleep(for: .milliseconds(300))
      kill(try await world.worker(disk), SIGKILL)
      try await eventually("the new limit counts") { try await world.state(disk) == .failed }
    }
  }

  @Test("A daemon does not start with an error in its configuration")
  func badAtStart() async throws {
    try await inWorld(["daemon.look-interval": "0"], daemon: false) { world in
      let process = try Command(
        Programs.directory + "/dmu-xend", ["-c", world.configurationPath]
      ).start()
      #expect(try await blocking { try process.wait(milliseconds: 10_000) } == .exited(78))
    }
  }

  @Test("Status of one domain, by number and by name, and of none")
  func statusOfDomain() async throws {
    try await inWorld { world in
      try await world.add(try world.attach(5, world.spec("g5.dscow")))
      try await world.add(try world.attach(6, world.spec("g6.dscow")))
      #expect(try await world.ask(ControlRequest(.status, domain: "6")).disks?.count == 1)
      #expect(try await world.ask(ControlRequest(.status, domain: "guest5")).disks?.count == 1)
      #expect(try await world.ask(ControlRequest(.status, domain: "7")).disks?.isEmpty == true)
      #expect(try await world.command { $0.status(domain: "7", json: false) } == .noDisk)
      #expect(try await world.command { $0.status(domain: nil, json: true) } == .done)
    }
  }
}
