// SPDX-License-Identifier: Apache-2.0
// What is left of a worker that has ended: processes that it made and that keep what it had. No
// worker of ours makes any; one that was taken over might, to keep its link's listener or its
// store.

import Glibc
internal import Logging
internal import SystemIO

/// A worker that has ended, as far as needed to find what it has left.
struct FormerWorker: Sendable, Hashable {
  let pid: Int32
  let startTime: UInt64
}

/// What a worker of a disk may have left, to be ended on a thread that may block.
struct WorkerRemains: Sendable {
  let worker: FormerWorker?
  let link: String
  let files: [FileIdentity]
  let users: ClosedRange<UInt32>
  let others: Set<Int32>
  let live: LiveWorkers

  /// Ends it, and tells of it. Without a former worker there is nothing to look for.
  func end(_ log: Logger) throws(IOError) {
    guard let worker else { return }
    let killed = try Self.end(
      of: worker, link: link, files: files, users: users, sparing: others, live)
    guard !killed.isEmpty else { return }
    log.error(
      "a worker has left processes, which were killed",
      metadata: ["worker": "\(worker.pid)", "processes": "\(killed)"])
  }

  /// Kills what is left of workers of a disk and waits for its end. A process belongs to them when
  /// it is a worker or runs as one of the workers' users, and has a socket that is bound to the disk's
  /// link, is in the session of that worker, or has one of the disk's files open for writing.
  /// `others` are workers that
  /// live, as far as the caller knows; those of `live` are spared, too. Answers the processes killed. Throws EBUSY when one of
  /// them does not end. Blocks.
  static func end(
    of worker: FormerWorker?, link: String?, files: [FileIdentity],
    users: ClosedRange<UInt32>, sparing others: Set<Int32>, _ live: LiveWorkers
  ) throws(IOError) -> [Int32] {
    let sockets = try link.map { link throws(IOError) in
      try FoundWorker.boundPaths().filter { $0.value == link }
    }
    var killed: [ProcessHandle] = []
    for pid in FileUsers.processes() where pid != getpid() && !others.contains(pid) {
      guard isUser(pid, users) || FoundWorker.isWorker(pid),
        isSession(pid, worker) || has(pid, socketsOf: sockets ?? [:]) || writes(pid, files)
      else { continue }
      if let process = try live.killStranger(pid) { killed.append(process) }
    }
    for process in killed {
      for _ in 0..<500 where !process.hasEnded { usleep(10_000) }
      guard process.hasEnded else { throw IOError(EBUSY, "end", "process \(process.pid)") }
    }
    return killed.map(\.pid)
  }

  private static func has(_ pid: Int32, socketsOf inodes: [String: String]) -> Bool {
    guard !inodes.isEmpty else { return false }
    return FileUsers.descriptors(of: pid).contains { path in
      guard let target = FileUsers.link(path), target.hasPrefix("socket:[") else { return false }
      return inodes[String(target.dropFirst(8).dropLast())] != nil
    }
  }

  /// Source: proc_pid_status(5), Uid: real, effective, saved, file system.
  private static func isUser(_ pid: Int32, _ users: ClosedRange<UInt32>) -> Bool {
    do throws(IOError) {
      let lines = try TextFile.readRepairing("/proc/\(pid)/status").split(separator: "\n")
      let words = lines.first { $0.hasPrefix("Uid:") }?.split(whereSeparator: \.isWhitespace)
      return words?.dropFirst().first.flatMap { UInt32($0) }.map(users.contains) ?? false
    } catch { return false }
  }

  /// Whether it is in the session that a worker led. A number is not given away as long as a
  /// session has it; so a leader of another start time is another session's.
  private static func isSession(_ pid: Int32, _ worker: FormerWorker?) -> Bool {
    guard let worker, pid != worker.pid else { return false }
    do throws(IOError) {
      let stat = try TextFile.readRepairing("/proc/\(pid)/stat")
      guard let end = stat.lastIndex(of: ")") else { return false }
      // Fields 3 to 6: state, parent, group, session.
      let fields = stat[stat.index(after: end)...].split(separator: " ")
      guard fields.count > 3, fields[3] == "\(worker.pid)" else { return false }
    } catch { return false }
    do throws(IOError) {
      return try ProcessHandle(pid: worker.pid).startTime == worker.startTime
    } catch { return true }
  }

  private static func writes(_ pid: Int32, _ files: [FileIdentity]) -> Bool {
    guard !files.isEmpty else { return false }
    return FileUsers.names(in: "/proc/\(pid)/fd").contains { name in
      let path = "/proc/\(pid)/fd/\(name)"
      return files.contains { FileUsers.isFile(path, $0) }
        && LockHolders.canWrite("/proc/\(pid)/fdinfo/\(name)")
    }
  }
}
