// SPDX-License-Identifier: Apache-2.0
//
// The thread that makes all requests of a client, one after the other, and keeps it connected.

import CXenStore
import Synchronization

extension Core {
  /// Lives until the client is closed.
  func runRequester() {
    var generation = 0
    var delay = configuration.reconnectDelays.lowerBound
    while !isClosed {
      let opened: Connection
      do throws(OpeningFailure) {
        opened = try Opening.open(
          path: configuration.socketPath, generation: generation + 1,
          limit: min(configuration.deadline, .seconds(1)))
      } catch {
        announce(.connecting(lastFailure: error.reason))
        pause(delay)
        delay = min(delay * 2, configuration.reconnectDelays.upperBound)
        continue
      }
      generation += 1
      publish(opened)
      if restoreWatches(on: opened) {
        delay = configuration.reconnectDelays.lowerBound
        announce(.connected(generation: generation))
        serve(opened)
      } else {
        pause(delay)
      }
      retire(opened)
      if !isClosed { announce(.connecting(lastFailure: "the connection to xenstored broke")) }
    }
    announce(.closed)
  }

  var isClosed: Bool { state.withLock { $0.isClosed } }

  /// Runs jobs until the connection is dead or the client closed.
  private func serve(_ connection: Connection) {
    while !connection.isDead {
      guard let job = nextJob() else {
        if isClosed { return }
        requesterBell.wait(nil)
        continue
      }
      job.run(on: connection)
      state.withLock { $0.running = nil }
    }
  }

  private func nextJob() -> Job? {
    state.withLock { state in
      guard !state.isClosed, !state.queue.isEmpty else { return nil }
      state.running = state.queue.removeFirst()
      return state.running
    }
  }

  /// Waits for `delay`, or until the client is closed.
  private func pause(_ delay: Duration) {
    let end = ContinuousClock.now + delay
    while !isClosed {
      let left = end - .now
      if left <= .zero { return }
      requesterBell.wait(left)
    }
  }

  private func publish(_ connection: Connection) {
    state.withLock { state in
      // After the closing there is no listener that could let go of it.
      if state.isClosed { return connection.release() }
      state.connection = connection
    }
    listenerBell.ring()
  }

  /// Closes a connection once the listener has let go of it.
  private func retire(_ connection: Connection) {
    connection.kill()
    listenerBell.ring()
    while !connection.isReleased { requesterBell.wait(nil) }
    state.withLock { state in
      if state.connection === connection { state.connection = nil }
    }
    connection.close()
  }

  /// Sets every watch anew; false if the connection broke over it.
  ///
  /// Each watch hears of the reconnection before it is set, and requests wait until all are: so
  /// what a consumer reads after hearing of it is younger than its watch.
  private func restoreWatches(on connection: Connection) -> Bool {
    let job = Job("watch", nil, limit: configuration.deadline, work: { _, _ in }, failure: { _ in })
    let watches = state.withLock { state in
      state.running = job
      return state.watches.values.sorted { $0.id < $1.id }
    }
    listenerBell.ring()
    defer { state.withLock { $0.running = nil } }
    for watch in watches {
      watch.post(.resync(.reconnected))
      do throws(XenStoreError) {
        try set(watch, on: connection, for: job)
      } catch {
        if connection.isDead || error.code == .timedOut { return false }
        drop(watch, because: error)
      }
    }
    return !connection.isDead
  }

  /// Asks xenstored to watch.
  func set(
    _ watch: WatchState, on connection: Connection, for job: Job
  ) throws(XenStoreError) {
    let session = XenStoreSession(connection: connection, transaction: 0, job: job)
    connection.hasReader = true
    try session.accomplish("watch", watch.path) { handle in
      xs_watch(handle, watch.path, watch.token)
    }
    watch.generation.store(connection.generation, ordering: .releasing)
  }
}
