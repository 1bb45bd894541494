// SPDX-License-Identifier: Apache-2.0
// What the daemon reports to the service manager that started it: that it is ready, reads its
// configuration, lives and ends. Sources: sd_notify(3), sd_watchdog_enabled(3).
//
// Invariants:
// - Without NOTIFY_SOCKET nothing is sent. The variables are unset when they are read: no process
//   that the daemon starts can report in its name.
// - A ping follows a job that the reconciler has done after the ping before it. The reconciler's
//   actor decides everything about disks and never blocks: a host call that may hang runs on a
//   thread of Offload, so it delays its disk and no ping.
// - No report waits for the service manager.

import Glibc
internal import Logging
internal import ServiceLifecycle
internal import SystemIO

/// The service manager that started this process.
final class ServiceManager: Sendable {
  /// The variables of the environment that say how to report.
  static let variables = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"]

  /// Pings must come at least this often; nil: none are wanted.
  let watchdog: Duration?
  /// A path, or "@" and the name of an abstract address.
  private let address: String
  /// Kept open: a process that has no descriptor left must be able to ping.
  private let socket: Descriptor
  private let log: Logger

  /// Reports as these variables say; nil if no service manager wants reports. Throws EMFILE and the
  /// like.
  init?(_ environment: [String: String], log: Logger) throws(IOError) {
    guard let address = environment["NOTIFY_SOCKET"], !address.isEmpty else { return nil }
    self.address = address
    self.log = log
    socket = try UnixSocket.sender()
    // A variable that a process inherits from its parent names the parent.
    let isOurs = environment["WATCHDOG_PID"].map { $0 == String(getpid()) } ?? true
    let microseconds = environment["WATCHDOG_USEC"].flatMap { Int64($0) } ?? 0
    watchdog = isOurs && microseconds > 0 ? .microseconds(microseconds) : nil
  }

  /// Takes the variables out of this process's environment, before there is a second thread.
  static func takeVariables() -> [String: String] {
    var found: [String: String] = [:]
    for name in variables {
      if let value = getenv(name) { found[name] = String(cString: value) }
      unsetenv(name)
    }
    return found
  }

  /// The daemon answers and has taken up what was there.
  func ready() { report("READY=1") }

  /// The daemon reads its configuration; `ready` follows.
  func reloading() {
    var now = timespec()
    clock_gettime(CLOCK_MONOTONIC, &now)
    report("RELOADING=1\nMONOTONIC_USEC=\(now.tv_sec * 1_000_000 + now.tv_nsec / 1000)")
  }

  /// The daemon begins to end.
  func stopping() { report("STOPPING=1") }

  /// How many disks there are, for `systemctl status`.
  func status(disks: Int) {
    report("STATUS=Serving \(disks) \(disks == 1 ? "disk" : "disks")")
  }

  /// Pings at half the wanted interval, each time after `work` has been done, until the task is
  /// cancelled. While `work` does not return there is no ping, and the service manager restarts the
  /// daemon. Returns at once if no pings are wanted.
  func ping(after work: @Sendable () async -> Void) async {
    guard let watchdog else { return }
    while !Task.isCancelled {
      await work()
      report("WATCHDOG=1")
      do { try await Task.sleep(for: watchdog / 2) } catch { return }
    }
  }

  private func report(_ text: String) {
    do throws(IOError) {
      try UnixSocket.send(Array(text.utf8), from: socket.raw, to: address)
    } catch {
      log.warning("cannot report to the service manager", metadata: ["error": "\(error)"])
    }
  }
}

/// Reports the end of the daemon when it begins.
struct EndService: Service {
  let manager: ServiceManager

  func run() async throws {
    try await gracefulShutdown()
    manager.stopping()
  }
}
