// SPDX-License-Identifier: Apache-2.0
// A worker as the daemon has it: a process that is followed, and the link to it.

import Glibc
import Synchronization
internal import SystemIO
internal import WorkerLink

/// A process with a link. It may be a child of ours, or of a daemon before us.
final class Worker: Sendable {
  let process: any HostProcess
  let channel: WorkerChannel

  private struct State {
    var ended: String?
    var waiters: [UInt64: CheckedContinuation<Bool, Never>] = [:]
    var next: UInt64 = 1
  }
  private let state = Mutex(State())
  private let scheduler: any Scheduling

  /// Follows a process. `onEnd` is called once, on the poller's thread, with how it ended.
  init(
    process: any HostProcess, channel: WorkerChannel, host: Host, live: LiveWorkers,
    onEnd: @escaping @Sendable (String) -> Void
  ) {
    self.process = process
    self.channel = channel
    scheduler = host.scheduler
    host.poller.add(process.raw) { [self] in
      live.remove(process.pid)
      let how = Worker.collect(process)
      let waiters = state.withLock { state in
        defer { state.waiters = [:] }
        state.ended = how
        return state.waiters.values
      }
      for waiter in waiters { waiter.resume(returning: true) }
      onEnd(how)
      return false
    }
  }

  /// How it ended, nil while it runs.
  var ended: String? { state.withLock { $0.ended } }

  /// Waits for the end of the process, at most so long. Whether it has ended.
  func waitForEnd(_ limit: Duration) async -> Bool {
    let number = state.withLock { state in
      defer { state.next += 1 }
      return state.next
    }
    let clock = scheduler.after(limit) { [self] in
      let waiter = state.withLock { $0.waiters.removeValue(forKey: number) }
      waiter?.resume(returning: false)
    }
    defer { clock.cancel() }
    return await withCheckedContinuation { continuation in
      let over = state.withLock { state in
        guard state.ended == nil else { return true }
        state.waiters[number] = continuation
        return false
      }
      if over { continuation.resume(returning: true) }
    }
  }

  /// Kills it and waits for its end. False when even that did not end it.
  func kill() async throws(IOError) -> Bool {
    try process.send(SIGKILL)
    return await waitForEnd(.seconds(5))
  }

  /// Collects a child so that no zombie stays. A process of an earlier daemon is not ours to
  /// collect: then nobody knows how it ended.
  private static func collect(_ process: any HostProcess) -> String {
    do {
      return try process.reap().map { "\($0)" } ?? "unknown"
    } catch { return "unknown (it was started by an earlier daemon)" }
  }
}
