// SPDX-License-Identifier: Apache-2.0
// What the daemon reports to systemd, as a real datagram socket in systemd's place receives it.

import Glibc
import Logging
import Synchronization
import SystemIO
import Testing
import TestSupport

@testable import Daemon

/// Receives as systemd does.
private final class Manager: Sendable {
  let address: String
  private let socket: Descriptor
  private let lastStatus = Mutex("")
  /// The last status that came.
  var status: String { lastStatus.withLock { $0 } }

  init(at path: String) throws {
    address = path
    socket = try UnixSocket.receiver(at: path, mode: 0o777)
  }

  /// The next report but for the status; nil when none comes within so many milliseconds.
  func next(_ milliseconds: Int32 = 20_000) async throws -> String? {
    while let report = try await any(milliseconds) {
      guard report.hasPrefix("STATUS=") else { return report }
      lastStatus.withLock { $0 = report }
    }
    return nil
  }

  private func any(_ milliseconds: Int32 = 20_000) async throws -> String? {
    try await blocking { [self] in
      var item = pollfd(fd: socket.raw, events: Int16(POLLIN), revents: 0)
      guard poll(&item, 1, milliseconds) > 0 else { return nil }
      var bytes = [UInt8](repeating: 0, count: 4096)
      let count = recv(socket.raw, &bytes, bytes.count, 0)
      return String(decoding: bytes[..<max(count, 0)], as: UTF8.self)
    }
  }

  /// Drops what has come.
  func drain() async throws { while try await next(0) != nil {} }
}

@Suite("Reports to the service manager", .serialized) struct ServiceManagerTests {
  private let log = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }

  @Test("Nothing is reported without the variables, and no pings are meant for another process")
  func unwanted() throws {
    #expect(try ServiceManager([:], log: log) == nil)
    #expect(try ServiceManager(["NOTIFY_SOCKET": "", "WATCHDOG_USEC": "5"], log: log) == nil)
    let folder = try TemporaryFolder()
    var variables = ["NOTIFY_SOCKET": folder.file("s")]
    #expect(try #require(try ServiceManager(variables, log: log)).watchdog == nil)
    variables["WATCHDOG_USEC"] = "5"
    #expect(try #require(try ServiceManager(variables, log: log)).watchdog == .microseconds(5))
    variables["WATCHDOG_PID"] = String(getpid())
    #expect(try #require(try ServiceManager(variables, log: log)).watchdog == .microseconds(5))
    variables["WATCHDOG_PID"] = String(getppid())
    #expect(try #require(try ServiceManager(variables, log: log)).watchdog == nil)
    for word in ["0", "-1", "x", "99999999999999999999"] {
      variables = ["NOTIFY_SOCKET": folder.file("s"), "WATCHDOG_USEC": word]
      #expect(try #require(try ServiceManager(variables, log: log)).watchdog == nil)
    }
  }

  @Test("The variables are taken once")
  func taken() {
    setenv("NOTIFY_SOCKET", "/x", 1)
    setenv("WATCHDOG_USEC", "7", 1)
    #expect(ServiceManager.takeVariables() == ["NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "7"])
    #expect(ServiceManager.takeVariables() == [:])
    #expect(getenv("NOTIFY_SOCKET") == nil)
  }

  @Test("Pings follow work, and end when the work does not return")
  func pings() async throws {
    let folder = try TemporaryFolder()
    for address in [folder.file("s"), "@dmu-test-\(getpid())"] {
      let manager = try Manager(at: address)
      let variables = ["NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"]
      let reports = try #require(try ServiceManager(variables, log: log))
      let core = Core()
      let pings = Task { await reports.ping { await core.work() } }
      let start = ContinuousClock.now
      for _ in 0..<4 { #expect(try await manager.next() == "WATCHDOG=1") }
      #expect(ContinuousClock.now - start >= .milliseconds(550))
      await core.block()
      try await Task.sleep(for: .milliseconds(100))
      try await manager.drain()
      #expect(try await manager.next(1000) == nil)
      await core.unblock()
      #expect(try await manager.next() == "WATCHDOG=1")
      pings.cancel()
      await pings.value
      try await manager.drain()
      #expect(try await manager.next(500) == nil)
    }
  }

  @Test(
    "The daemon reports what systemd waits for",
    .enabled(if: Programs.arePresent, "the programs have to be built first"))
  func daemon() async throws {
    try await inWorld(daemon: false) { world in
      let manager = try Manager(at: world.folder.file("notify"))
      let inherited = world.folder.file("environment")
      try world.useWorkers("env >'\(inherited)'; exec")
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.makeStore("g5.dscow")
      try await world.startDaemon(environment: [
        "NOTIFY_SOCKET=\(manager.address)", "WATCHDOG_USEC=4000000",
      ])
      // A ping may come before: systemd heeds them from READY on.
      var report = try await manager.next()
      while report == "WATCHDOG=1" { report = try await manager.next() }
      #expect(report == "READY=1")
      let version = try await world.ask(ControlRequest(.version)).version
      #expect(version != nil)
      try await eventually("the number of disks is reported") {
        try await manager.drain()
        return manager.status == "STATUS=Serving 1 disk"
      }
      try await eventually("it is ready") { try await world.state(disk) == .ready }
      #expect(try !SmallFile.read(inherited).contains("NOTIFY_SOCKET"))
      #expect(try !SmallFile.read(inherited).contains("WATCHDOG"))

      try await manager.drain()
      for _ in 0..<2 { #expect(try await manager.next(4000) == "WATCHDOG=1") }
      let process = try #require(world.daemonProcess)
      try process.send(SIGSTOP)
      try await Task.sleep(for: .milliseconds(100))
      try await manager.drain()
      #expect(try await manager.next(3000) == nil)
      try process.send(SIGCONT)
      #expect(try await manager.next(4000) == "WATCHDOG=1")

      try process.send(SIGHUP)
      var reports: [String] = []
      while reports.last != "READY=1" { reports.append(try #require(try await manager.next())) }
      reports.removeAll { $0 == "WATCHDOG=1" }
      #expect(reports.count == 2)
      let words = reports[0].split(separator: "\n")
      #expect(words.count == 2)
      #expect(words[0] == "RELOADING=1")
      #expect(words[1].hasPrefix("MONOTONIC_USEC="))

      try await world.stopDaemon()
      var last: [String] = []
      while let report = try await manager.next(0) { last.append(report) }
      #expect(last.contains("STOPPING=1"))
    }
  }
}

/// Work that can be kept from ending.
private actor Core {
  private var isBlocked = false

  func work() async {
    while isBlocked {
      do { try await Task.sleep(for: .milliseconds(5)) } catch { return }
    }
  }

  func block() { isBlocked = true }
  func unblock() { isBlocked = false }
}
