// SPDX-License-Identifier: Apache-2.0
// Starting programs and following processes by descriptor, so that a process id that has
// been given to somebody else is never mistaken for ours.

internal import CLinux
import Glibc

/// How a process ended.
package enum ExitStatus: Sendable, Equatable, CustomStringConvertible {
  /// By exit(2), with this status.
  case exited(Int32)
  /// By a signal.
  case signalled(Int32)

  /// "exit status 1", "signal 9".
  package var description: String {
    switch self {
    case .exited(let status): "exit status \(status)"
    case .signalled(let signal): "signal \(signal)"
    }
  }
}

/// A process: our child, or one that somebody else started and that we follow.
package final class ProcessHandle: Sendable {
  /// Process id.
  package let pid: Int32
  /// When it started, in clock ticks since the system did: with `pid`, its name for ever.
  /// Source: proc_pid_stat(5), field 22.
  package let startTime: UInt64
  /// The pidfd, lent: it polls readable when the process has ended.
  package var raw: Int32 { descriptor.raw }

  private let descriptor: Descriptor

  /// Takes hold of a process that runs. With `startTime`, only if it is that very process.
  /// Throws: ESRCH when there is none (any more), and the errno of pidfd_open(2).
  package init(pid: Int32, startTime: UInt64? = nil) throws(IOError) {
    let raw = dmu_pidfd_open(pid)
    guard raw >= 0 else { throw IOError.last("open", "process \(pid)") }
    // From here on the descriptor names one process; whether it is the wanted one is told
    // by its start time, read after the descriptor was made.
    self.descriptor = Descriptor(owning: raw)
    self.pid = pid
    self.startTime = try Self.startTime(of: pid)
    if let startTime, startTime != self.startTime {
      throw IOError(ESRCH, "open", "process \(pid)")
    }
  }

  /// Sends a signal; to a process that has ended, nothing happens. Throws: the errno of
  /// pidfd_send_signal(2).
  package func send(_ signal: Int32) throws(IOError) {
    guard dmu_pidfd_send_signal(raw, signal) == 0 || errno == ESRCH else {
      throw IOError.last("send signal \(signal) to", "process \(pid)")
    }
  }

  /// Whether it has ended, without waiting.
  package var hasEnded: Bool {
    var item = pollfd(fd: raw, events: Int16(POLLIN), revents: 0)
    return poll(&item, 1, 0) > 0
  }

  /// Collects a child that has ended; nil while it runs. Throws: ECHILD for a process that
  /// is not our child or has been collected.
  package func reap() throws(IOError) -> ExitStatus? {
    var code: Int32 = 0
    var status: Int32 = 0
    let result = dmu_pidfd_reap(raw, &code, &status)
    guard result >= 0 else { throw IOError.last("wait for", "process \(pid)") }
    guard result > 0 else { return nil }
    return code == Int32(CLD_EXITED) ? .exited(status) : .signalled(status)
  }

  /// Waits for a child to end, at most so long; nil when it did not. Throws as `reap`.
  package func wait(milliseconds: Int32) throws(IOError) -> ExitStatus? {
    var item = pollfd(fd: raw, events: Int16(POLLIN), revents: 0)
    while poll(&item, 1, milliseconds) < 0 {
      guard errno == EINTR else { throw IOError.last("wait for", "process \(pid)") }
    }
    return try reap()
  }

  /// Whether that very process will run no instruction any more and is there nevertheless: it was
  /// killed or has exited, and a thread of it waits in the kernel for what does not answer. Its
  /// descriptors and locks stay until then. Throws what reading proc(5) fails with.
  package static func isEnding(_ pid: Int32, startTime: UInt64) throws(IOError) -> Bool {
    do throws(IOError) {
      guard try self.startTime(of: pid) == startTime else { return false }
      let folder = "/proc/\(pid)/task"
      for name in try Folder.names(folder) {
        guard try isThreadEnding("\(folder)/\(name)") else { return false }
      }
      // Read again: threads that are made meanwhile are made by one that was not ending.
      return try self.startTime(of: pid) == startTime
    } catch {
      if error.code == ESRCH || error.code == ENOENT { return false }
      throw error
    }
  }

  /// One whose SIGKILL is pending never comes back from the kernel. Sources: proc_pid_stat(5),
  /// fields 3 and 9 (PF_EXITING is 4); proc_pid_status(5), SigPnd and ShdPnd.
  private static func isThreadEnding(_ folder: String) throws(IOError) -> Bool {
    let fields = try statFields(folder)
    if fields[0] == "Z" || fields[0] == "X" { return true }
    if let flags = UInt64(fields[6]), flags & 4 != 0 { return true }
    let kill = UInt64(1) << (SIGKILL - 1)
    return try text("\(folder)/status").split(separator: "\n").contains { line in
      guard line.hasPrefix("SigPnd:") || line.hasPrefix("ShdPnd:"),
        let pending = line.split(whereSeparator: \.isWhitespace).last,
        let mask = UInt64(pending, radix: 16)
      else { return false }
      return mask & kill != 0
    }
  }

  /// The user that it runs as. Throws what reading proc(5) fails with.
  package func user() throws(IOError) -> UInt32 {
    let path = "/proc/\(pid)/status"
    for line in try ProcessHandle.text(path).split(separator: "\n") where line.hasPrefix("Uid:") {
      let words = line.split(whereSeparator: \.isWhitespace)
      if words.count > 2, let user = UInt32(words[2]) { return user }
    }
    throw IOError(EPROTO, "read", path)
  }

  private static func startTime(of pid: Int32) throws(IOError) -> UInt64 {
    guard let ticks = UInt64(try statFields("/proc/\(pid)")[19]) else {
      throw IOError(EINVAL, "read", "/proc/\(pid)/stat")
    }
    return ticks
  }

  /// The fields of a stat file from the third on, the state.
  private static func statFields(_ folder: String) throws(IOError) -> [Substring] {
    let stat = try text("\(folder)/stat")
    // The name, field 2, stands in parentheses and may hold any character.
    guard let end = stat.lastIndex(of: ")") else { throw IOError(EINVAL, "read", folder) }
    let fields = stat[stat.index(after: end)...].split(separator: " ")
    guard fields.count > 19 else { throw IOError(EINVAL, "read", folder) }
    return fields
  }

  private static func text(_ path: String) throws(IOError) -> String {
    let file = try Descriptor(path: path, flags: O_RDONLY)
    var buffer = [UInt8](repeating: 0, count: 4096)
    let count = Glibc.read(file.raw, &buffer, buffer.count)
    guard count > 0 else { throw IOError(count < 0 ? errno : ESRCH, "read", path) }
    return String(decoding: buffer[..<count], as: UTF8.self)
  }
}

/// A program to start, with exactly the descriptors that it is given.
package struct Command: Sendable {
  /// Path of the program.
  package var path: String
  /// Arguments after the program's own name.
  package var arguments: [String]
  /// The environment, "NAME=VALUE" each; nil: ours.
  package var environment: [String]?
  /// The child's descriptors: its number to ours. Ours stay ours. Missing 0, 1 and 2 are
  /// inherited; every other descriptor is closed.
  package var descriptors: [Int32: Int32] = [:]
  /// Whether it becomes the leader of a new session.
  package var newSession = false
  /// Whether it is the first process of a new PID namespace: it sees no other, and whatever it
  /// starts ends with it. Needs CAP_SYS_ADMIN. Source: pid_namespaces(7).
  package var newProcessNamespace = false

  /// A program from its path and arguments.
  package init(_ path: String, _ arguments: [String] = [], environment: [String]? = nil) {
    self.path = path
    self.arguments = arguments
    self.environment = environment
  }

  /// Starts it, with no signal blocked or ignored. Throws: the errno of posix_spawn(3), with
  /// the path; with a namespace also that of unshare(2).
  package func start() throws(IOError) -> ProcessHandle {
    guard newProcessNamespace else { return try spawn() }
    // The namespace is that of the thread's next process. A thread that has one can start no
    // thread any more, so it is one of its own.
    let outcome = Outcome()
    try OwnThread.run { outcome.result = spawnIsolated() }
    return try outcome.result.get()
  }

  // Written by the thread before it ends, read after it was joined.
  private final class Outcome: @unchecked Sendable {
    var result: Result<ProcessHandle, IOError> = .failure(IOError(ECANCELED, "run a thread"))
  }

  private func spawnIsolated() -> Result<ProcessHandle, IOError> {
    do throws(IOError) {
      guard dmu_unshare(DMU_NAMESPACE_PID) == 0 else {
        throw IOError.last("make a PID namespace for", path)
      }
      return .success(try spawn())
    } catch { return .failure(error) }
  }

  private func spawn() throws(IOError) -> ProcessHandle {
    var actions = posix_spawn_file_actions_t()
    var attributes = posix_spawnattr_t()
    posix_spawn_file_actions_init(&actions)
    posix_spawnattr_init(&attributes)
    defer {
      posix_spawn_file_actions_destroy(&actions)
      posix_spawnattr_destroy(&attributes)
    }
    // Sources first move out of the way of every target, so that no order of the moves
    // can overwrite one that is still wanted.
    let highest = max(2, descriptors.keys.max() ?? 2)
    var copies: [Int32] = []
    defer { for copy in copies { _ = Glibc.close(copy) } }
    for (target, source) in descriptors {
      let copy = fcntl(source, F_DUPFD_CLOEXEC, highest + 1)
      guard copy >= 0 else { throw IOError.last("hand a descriptor to", path) }
      copies.append(copy)
      posix_spawn_file_actions_adddup2(&actions, copy, target)
    }
    for gap in 3..<(highest + 1) where descriptors[gap] == nil {
      posix_spawn_file_actions_addclose(&actions, gap)
    }
    dmu_spawn_close_from(&actions, highest + 1)

    var signals = sigset_t()
    sigemptyset(&signals)
    posix_spawnattr_setsigmask(&attributes, &signals)
    sigfillset(&signals)
    for signal in [SIGKILL, SIGSTOP] { sigdelset(&signals, signal) }
    posix_spawnattr_setsigdefault(&attributes, &signals)
    var flags = POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF
    if newSession { flags |= DMU_SPAWN_SETSID }
    posix_spawnattr_setflags(&attributes, Int16(flags))

    var pid: pid_t = 0
    let code = withStrings([path] + arguments) { arguments in
      guard let environment else {
        return posix_spawn(&pid, path, &actions, &attributes, arguments, environ)
      }
      return withStrings(environment) {
        posix_spawn(&pid, path, &actions, &attributes, arguments, $0)
      }
    }
    guard code == 0 else { throw IOError(code, "start", path) }
    do throws(IOError) {
      return try ProcessHandle(pid: pid)
    } catch {
      // Without a handle nobody could end it later.
      kill(pid, SIGKILL)
      var status: Int32 = 0
      while waitpid(pid, &status, 0) < 0, errno == EINTR {}
      throw error
    }
  }
}

/// Lends a list of C strings that ends in a null pointer.
private func withStrings<R>(
  _ strings: [String], _ body: ([UnsafeMutablePointer<CChar>?]) -> R
) -> R {
  let copies: [UnsafeMutablePointer<CChar>?] = strings.map { strdup($0) } + [nil]
  defer { for copy in copies { free(copy) } }
  return body(copies)
}
