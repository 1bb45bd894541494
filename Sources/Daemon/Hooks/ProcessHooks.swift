// SPDX-License-Identifier: Apache-2.0
// Runs hooks as processes, each in a session of its own, with files for what it reads and writes.
//
//     FILES.in   FILES.out   FILES.err    the hook's; FILES.log   systemd-run's own words
//
// A daemon that is confined by its unit has no network, may load no module and may write nothing
// below /etc; hooks have to. There systemd starts them, as a transient unit beside the daemon's.
// systemd-run goes by systemd's own socket here (no --wait, no --pipe), so that no bus is needed; it
// ends when the unit, a oneshot, has ended.
//
// Invariants:
// - What a hook leaves running does not keep its run from ending: nobody waits for the end of a
//   pipe.
// - The files are removed when the run's processes have ended. Files that are there when a run
//   begins are those of one that did not end: whoever still writes to them is killed first.

import Glibc
internal import SystemIO

/// Starts hooks on this host.
struct ProcessHooks: HookRunning {
  /// Whether systemd is to start them.
  var asService = ProcessHooks.isConfined

  /// Whether this process was started by a unit.
  static var isConfined: Bool {
    getenv("INVOCATION_ID") != nil && access("/run/systemd/system", F_OK) == 0
  }

  /// The most that a hook may write on one of its two ways out, in bytes.
  private static let mostOutput = 1 << 20
  private static let variables = [
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8",
  ]
  private static let suffixes = [".in", ".out", ".err", ".log"]

  func run(_ call: HookCall) throws(IOError) -> HookOutcome {
    try ProcessHooks.endFormer(call.files)
    let outcome: HookOutcome
    do throws(IOError) { outcome = try runAlone(call) } catch {
      ProcessHooks.removeFiles(call.files)
      throw error
    }
    if outcome.status != nil {
      ProcessHooks.removeFiles(call.files)
    } else {
      // Whoever cannot be killed yet is waited for by the next run.
      do throws(IOError) { try ProcessHooks.endFormer(call.files) } catch {
        guard error.code == EBUSY else { throw error }
      }
    }
    return outcome
  }

  private func runAlone(_ call: HookCall) throws(IOError) -> HookOutcome {
    let files = call.files
    if let input = call.input { try TextFile.replace(files + ".in", with: input) }
    let flags = O_RDWR | O_CREAT | O_TRUNC | O_APPEND
    let out = try Descriptor(path: files + ".out", flags: flags, mode: 0o600)
    let complaints = try Descriptor(path: files + ".err", flags: flags, mode: 0o600)
    let own = try Descriptor(path: files + ".log", flags: flags, mode: 0o600)
    let input = try Descriptor(
      path: call.input == nil ? "/dev/null" : files + ".in", flags: O_RDONLY)
    var command = asService ? ProcessHooks.service(call) : ProcessHooks.direct(call)
    command.newSession = true
    command.descriptors =
      asService
      ? [0: input.raw, 1: own.raw, 2: own.raw] : [0: input.raw, 1: out.raw, 2: complaints.raw]
    let process = try command.start()
    // systemd keeps the deadline itself; it has some seconds more to kill and to say so.
    let limit = call.deadline + (asService ? .seconds(5) : .zero)
    let (status, isInTime) = try ProcessHooks.wait(
      process, until: .now + limit, watching: [out.raw, complaints.raw])
    var outcome = HookOutcome(status: isInTime ? status : nil)
    outcome.output = try ProcessHooks.text(files + ".out")
    outcome.complaints = ProcessHooks.lines(try ProcessHooks.text(files + ".err"))
    guard asService, outcome.status != .exited(0), outcome.status != nil else { return outcome }
    let words = try ProcessHooks.text(files + ".log")
    if words.contains("timeout") || words.contains("timed out") { outcome.status = nil }
    if outcome.complaints.isEmpty { outcome.complaints = ProcessHooks.lines(words) }
    return outcome
  }

  private static func direct(_ call: HookCall) -> Command {
    Command(call.program, call.arguments, environment: environment(call))
  }

  /// "NAME=VALUE" of everything that a hook finds in its environment.
  private static func environment(_ call: HookCall) -> [String] {
    variables.merging(call.environment) { $1 }.sorted { $0.key < $1.key }
      .map { "\($0.key)=\($0.value)" }
  }

  private static func service(_ call: HookCall) -> Command {
    let name = call.files.split(separator: "/").last.map { String($0) } ?? "hook"
    // One that has just ended may be known to systemd for a while. What a unit's name may have:
    // systemd.unit(5).
    var now = timespec()
    clock_gettime(CLOCK_MONOTONIC, &now)
    let unit = name.replacing("+", with: "\\x2b") + "-\(now.tv_sec)-\(now.tv_nsec)"
    let input = call.input == nil ? "null" : "file:" + call.files + ".in"
    var arguments = [
      "--quiet", "--collect", "--service-type=oneshot", "--unit=dmu-xen-hook-" + unit,
      "--description=hook of dmu-xen: \(call.program)",
      "--property=TimeoutStartSec=\(call.deadline.components.seconds)",
      "--property=TimeoutStopSec=2", "--property=StandardInput=\(input)",
      "--property=StandardOutput=append:\(call.files).out",
      "--property=StandardError=append:\(call.files).err", "--property=LimitFSIZE=64M",
    ]
    arguments += environment(call).map { "--setenv=" + $0 }
    return Command(
      "/usr/bin/systemd-run", arguments + ["--", call.program] + call.arguments,
      environment: variables.map { "\($0.key)=\($0.value)" })
  }

  /// How a process ended, nil if it could not be killed, and whether it did so in time and did not
  /// write too much.
  private static func wait(
    _ process: ProcessHandle, until end: ContinuousClock.Instant, watching files: [Int32]
  ) throws(IOError) -> (ExitStatus?, Bool) {
    while true {
      if let status = try process.wait(milliseconds: 50) { return (status, true) }
      let isFull = files.contains { raw in
        var status = stat()
        return fstat(raw, &status) == 0 && status.st_size > mostOutput
      }
      guard isFull || ContinuousClock.now >= end else { continue }
      // The whole session, while its leader is not collected and has the number.
      kill(-process.pid, SIGKILL)
      try process.send(SIGKILL)
      return (try process.wait(milliseconds: 2000), false)
    }
  }

  /// Kills who writes to the files of an earlier run, and removes them. Throws EBUSY for one that
  /// does not end.
  private static func endFormer(_ files: String) throws(IOError) {
    guard suffixes.contains(where: { access(files + $0, F_OK) == 0 }) else { return }
    let outputs = [".out", ".err", ".log"].compactMap { suffix -> FileIdentity? in
      var status = stat()
      return stat(files + suffix, &status) == 0 ? FileIdentity(status) : nil
    }
    for attempt in 0..<200 {
      let writers = FileUsers.processes().filter { pid in
        pid != getpid()
          && [1, 2].contains { number in
            outputs.contains { FileUsers.isFile("/proc/\(pid)/fd/\(number)", $0) }
          }
      }
      if writers.isEmpty { return removeFiles(files) }
      for pid in writers { kill(pid, SIGKILL) }
      usleep(attempt < 100 ? 10_000 : 20_000)
    }
    throw IOError(EBUSY, "end", "an earlier run of the hook, which waits for something that hangs")
  }

  /// They are in a folder of the daemon's own: one that cannot be removed is found by the next run.
  private static func removeFiles(_ files: String) {
    for suffix in suffixes { unlink(files + suffix) }
  }

  /// The beginning of a file.
  private static func text(_ path: String) throws(IOError) -> String {
    do throws(IOError) { return try TextFile.readRepairing(path) } catch {
      guard error.code == EFBIG else { throw error }
      return "more than it may write"
    }
  }

  private static func lines(_ text: String) -> [String] {
    text.split(whereSeparator: \.isNewline).suffix(50)
      .map { ForeignText.shown(String($0), limit: 300) }
  }
}
