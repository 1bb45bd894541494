// SPDX-License-Identifier: Apache-2.0
//
// The engine of a client: what its two threads share.
//
//     tasks ── submit ──► queue ──► requester ── requests ──► libxenstore handle
//       ▲                              │ publishes                  │
//       │                              ▼                            ▼
//       └── deadlines, closing ──── listener ◄── watch events, end of the connection
//
// * The requester (Requester.swift) connects, runs the jobs in order, sets watches, closes handles.
// * The listener (Listener.swift) polls: it hands watch events to their watches, notices the end
//   of the connection, and fails the jobs whose deadline has passed, the running one included,
//   whose connection it then kills, which frees the requester.
//
// Everything shared stands in `State` under one lock that is held for moments only, never
// across a call of libxenstore.

import Synchronization

final class Core: Sendable {
  struct State {
    /// Jobs that wait for the requester, oldest first.
    var queue: [Job] = []
    /// The job that the requester is at.
    var running: Job?
    /// What the listener listens to.
    var connection: Connection?
    var connectionState = XenStoreClient.ConnectionState.connecting(lastFailure: nil)
    var watches: [UInt64: WatchState] = [:]
    var nextWatch: UInt64 = 1
    /// The listener sleeps with no deadline to look after.
    var listenerIsIdle = false
    var isClosed = false
  }

  let configuration: XenStoreClient.Configuration
  let state = Mutex(State())
  let requesterBell: Wakeup
  let listenerBell: Wakeup

  init(_ configuration: XenStoreClient.Configuration) throws(XenStoreError) {
    self.configuration = configuration
    requesterBell = try Wakeup()
    listenerBell = try Wakeup()
  }

  /// Starts both threads. They keep the core alive until `close`.
  func start() throws(XenStoreError) {
    try startThread { self.runRequester() }
    do throws(XenStoreError) {
      try startThread { self.runListener() }
    } catch {
      close()
      throw error
    }
  }

  /// Queues a job, or fails it at once if the client is closed.
  func submit(_ job: Job) {
    let (accepted, wakeListener) = state.withLock { state in
      if state.isClosed { return (false, false) }
      state.queue.append(job)
      defer { state.listenerIsIdle = false }
      return (true, state.listenerIsIdle)
    }
    guard accepted else { return job.fail(.closed(job.operation, job.path)) }
    requesterBell.ring()
    if wakeListener { listenerBell.ring() }
  }

  /// Runs `body` on the requester's thread and waits for its result.
  func run<T: Sendable>(
    _ operation: String, _ path: String? = nil,
    _ body: @escaping @Sendable (Connection, Job) -> Result<T, XenStoreError>
  ) async throws(XenStoreError) -> T {
    let result = await withCheckedContinuation {
      (waiter: CheckedContinuation<Result<T, XenStoreError>, Never>) in
      submit(
        Job(
          operation, path, limit: configuration.deadline,
          work: { connection, job in
            let result = body(connection, job)
            if job.finish() { waiter.resume(returning: result) }
          },
          failure: { waiter.resume(returning: .failure($0)) }))
    }
    return try result.get()
  }

  /// Ends everything: waiting requests fail with `.closed`, watches end, both threads go away.
  func close() {
    let wasClosed = state.withLock { state in
      defer { state.isClosed = true }
      return state.isClosed
    }
    if wasClosed { return }
    listenerBell.ring()
    requesterBell.ring()
  }

  func announce(_ new: XenStoreClient.ConnectionState) {
    let isNews = state.withLock { state in
      guard state.connectionState != .closed, state.connectionState != new else { return false }
      state.connectionState = new
      return true
    }
    if isNews { configuration.onConnectionChange?(new) }
  }
}
