// SPDX-License-Identifier: Apache-2.0
// The workers that this daemon has, from the instant in which they are made: whoever looks among
// the processes for what a worker has left must not take a worker of today for it. Numbers of
// files come again, and looking takes time.

import Glibc
import Synchronization
internal import SystemIO

/// The process ids of workers that have not ended. For any thread.
final class LiveWorkers: Sendable {
  private let pids = Mutex<Set<Int32>>([])

  /// Makes a worker; nobody looks meanwhile.
  func start(
    _ body: () throws(IOError) -> any HostProcess
  ) throws(IOError) -> any HostProcess {
    let result = pids.withLock { pids -> Result<any HostProcess, IOError> in
      do throws(IOError) {
        let process = try body()
        pids.insert(process.pid)
        return .success(process)
      } catch { return .failure(error) }
    }
    return try result.get()
  }

  /// Takes a worker of an earlier daemon for one of this one's.
  func insert(_ pid: Int32) { pids.withLock { _ = $0.insert(pid) } }

  /// A worker has ended; before its number can be given to another process.
  func remove(_ pid: Int32) { pids.withLock { _ = $0.remove(pid) } }

  /// Kills a process unless it is one of these. nil: it is, or it has just ended.
  func killStranger(_ pid: Int32) throws(IOError) -> ProcessHandle? {
    let result = pids.withLock { pids -> Result<ProcessHandle?, IOError> in
      guard !pids.contains(pid) else { return .success(nil) }
      do throws(IOError) {
        let process = try ProcessHandle(pid: pid)
        try process.send(SIGKILL)
        return .success(process)
      } catch {
        return error.code == ESRCH || error.code == ENOENT ? .success(nil) : .failure(error)
      }
    }
    return try result.get()
  }
}
