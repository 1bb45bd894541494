// SPDX-License-Identifier: Apache-2.0
//
// The thread that waits for all else: watch events, the end of the connection, deadlines, closing.

import Glibc
import Synchronization

extension Core {
  /// Lives until the client is closed.
  func runListener() {
    while true {
      let (connection, timeout) = expireJobs()
      if isClosed { return endEverything() }
      guard let connection, !connection.isReleased else {
        listenerBell.wait(timeout)
        continue
      }
      if !listen(to: connection, timeout) {
        connection.kill()
        connection.release()
        requesterBell.ring()
      }
    }
  }

  /// Waits for something to happen; false once the connection is dead.
  private func listen(to connection: Connection, _ timeout: Duration?) -> Bool {
    if connection.isDead { return false }
    var items = [
      pollfd(fd: listenerBell.descriptor, events: Int16(POLLIN), revents: 0),
      pollfd(fd: connection.events, events: Int16(POLLIN), revents: 0),
      pollfd(fd: connection.lifeline, events: Connection.hangUp, revents: 0),
    ]
    let ready = poll(&items, 3, timeout.map(\.pollMilliseconds) ?? -1)
    guard ready > 0 else { return true }
    if items[0].revents != 0 { listenerBell.silence() }
    if connection.isDead || Connection.isHangUp(items[2].revents) { return false }
    if items[1].revents != 0 { deliverEvents(connection) }
    return true
  }

  private func deliverEvents(_ connection: Connection) {
    while let event = nextWatchEvent(connection.handle) {
      // Events of a watch that has just been given up find nobody.
      guard let id = WatchState.id(ofToken: event.token) else { continue }
      let watch = state.withLock { $0.watches[id] }
      watch?.post(.changed(event.path))
    }
  }

  /// Fails the jobs whose time is over; returns what to listen to and for how long.
  private func expireJobs() -> (Connection?, Duration?) {
    let now = ContinuousClock.now
    let (overdue, stuck, connection, next) = state.withLock { state in
      // All jobs are given the same time, so the oldest is the first to be overdue.
      let count = state.queue.prefix { $0.deadline <= now }.count
      var overdue = Array(state.queue.prefix(count))
      state.queue.removeFirst(count)
      var stuck: Connection?
      if let running = state.running, running.deadline <= now, !running.isFinished {
        overdue.append(running)
        stuck = state.connection
      }
      let running = state.running.flatMap { $0.isFinished ? nil : $0.deadline }
      let next = [running, state.queue.first?.deadline].compactMap { $0 }.min()
      state.listenerIsIdle = next == nil
      return (overdue, stuck, state.connection, next)
    }
    for job in overdue { job.fail(describe(job, wasRunning: stuck != nil)) }
    // The answer may still come, and no later request may take it for its own. A connection that
    // has been let go of is dead already, and its descriptors may be somebody else's.
    if let stuck, !stuck.isReleased { stuck.kill() }
    return (connection, next.map { $0 - now })
  }

  /// A job that was never begun failed of the missing connection, if there is none.
  private func describe(_ job: Job, wasRunning: Bool) -> XenStoreError {
    let current = state.withLock { $0.connectionState }
    guard !wasRunning, case .connecting(let failure?) = current else { return job.overdue }
    return .disconnected(job.operation, job.path, because: failure)
  }

  private func endEverything() {
    let (jobs, connection, watches) = state.withLock { state in
      let jobs = state.queue + (state.running.map { [$0] } ?? [])
      let watches = Array(state.watches.values)
      state.queue = []
      state.watches = [:]
      return (jobs, state.connection, watches)
    }
    for job in jobs { job.fail(.closed(job.operation, job.path)) }
    for watch in watches { watch.end(nil) }
    if let connection, !connection.isReleased {
      connection.kill()
      connection.release()
    }
    requesterBell.ring()
  }
}
