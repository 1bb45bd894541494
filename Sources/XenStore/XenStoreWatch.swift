// SPDX-License-Identifier: Apache-2.0
//
// A watch from its consumer's side, and what it shares with the client.
//
// xenstore's events carry no values: they say "look again". So equal pending paths are one
// event, a slow consumer costs a bounded amount of memory, and whoever reads a node after taking
// its event sees its last state.

import Synchronization

/// What a watch tells its consumer.
package enum XenStoreWatchEvent: Hashable, Sendable {
  /// The node, or something just below its watched place, was written, removed or given other
  /// permissions; or the watch was set just now. Read the node for its present state.
  case changed(String)
  /// Events may have been missed: read everything below the watched place anew.
  case resync(Reason)

  /// Why events may have been missed.
  package enum Reason: Hashable, Sendable {
    /// The connection to xenstored was lost and made again. The store may be a new, empty one.
    case reconnected
    /// The consumer fell behind by more than `XenStoreWatch.pendingLimit` different paths.
    case overflow
  }
}

/// The events of one watch, for one consumer. It never ends by itself.
///
/// Ends (with nil) when the client closes, the consumer's task is cancelled, or `cancel` is called;
/// throws if xenstored refuses to set the watch anew after a reconnection. xenstored forgets the
/// watch as soon as the consumer drops the sequence. A sequence keeps its client alive.
package struct XenStoreWatch: AsyncSequence, Sendable {
  /// One event.
  package typealias Element = XenStoreWatchEvent
  /// Why the watch could not be kept.
  package typealias Failure = XenStoreError

  /// The number of different paths that are kept for a consumer; then it is told to read all anew.
  package static let pendingLimit = 16_384

  let state: WatchState
  let doorbell: AsyncStream<Void>
  let client: XenStoreClient

  /// The watched path, as it was asked for.
  package var path: String { state.path }

  /// Ends the sequence and takes the watch back.
  package func cancel() { state.end(nil) }

  /// The consumer's end. Two iterators of one watch share its events between them.
  package func makeAsyncIterator() -> Iterator {
    Iterator(state: state, ring: doorbell.makeAsyncIterator(), client: client)
  }

  /// Takes the events of a watch one by one.
  package struct Iterator: AsyncIteratorProtocol {
    let state: WatchState
    var ring: AsyncStream<Void>.Iterator
    let client: XenStoreClient

    /// The next event; waits for one. Nil at the end.
    package mutating func next(
      isolation actor: isolated (any Actor)? = #isolation
    ) async throws(XenStoreError) -> XenStoreWatchEvent? {
      while !Task.isCancelled {
        if let event = state.take() { return event }
        if await ring.next(isolation: actor) == nil { break }
      }
      if Task.isCancelled { state.end(nil) }
      // What was posted before the end still counts, unless the consumer itself gave up.
      if !Task.isCancelled, let event = state.take() { return event }
      if let failure = state.failure { throw failure }
      return nil
    }

    /// The next event; waits for one. Nil at the end.
    package mutating func next() async throws(XenStoreError) -> XenStoreWatchEvent? {
      try await next(isolation: nil)
    }
  }
}

/// The pending events of one watch: posted by the client's threads, taken by the consumer.
final class WatchState: Sendable {
  private struct Pending {
    var resync: XenStoreWatchEvent.Reason?
    var order: [String] = []
    var taken = 0
    var paths: Set<String> = []
    var failure: XenStoreError?

    mutating func forgetPaths() {
      order.removeAll(keepingCapacity: order.count < 256)
      paths.removeAll(keepingCapacity: paths.capacity < 256)
      taken = 0
    }
  }

  let id: UInt64
  let path: String
  /// The connection on which the watch was last set; 0 before the first.
  let generation = Atomic<Int>(0)
  private let doorbell: AsyncStream<Void>.Continuation
  private let pending = Mutex(Pending())

  init(id: UInt64, path: String, doorbell: AsyncStream<Void>.Continuation) {
    self.id = id
    self.path = path
    self.doorbell = doorbell
  }

  /// What xenstored sends back with each event. Never used twice by one client.
  var token: String { "dmu\(id)" }

  static func id(ofToken token: String) -> UInt64? {
    token.hasPrefix("dmu") ? UInt64(token.dropFirst(3)) : nil
  }

  /// Adds an event, unless an equal one is pending.
  func post(_ event: XenStoreWatchEvent) {
    pending.withLock { pending in
      switch event {
      case .resync(let reason):
        pending.resync = reason
      case .changed(let path):
        guard pending.paths.insert(path).inserted else { return }
        pending.order.append(path)
        guard pending.paths.count > XenStoreWatch.pendingLimit else { return }
        pending.forgetPaths()
        pending.resync = pending.resync ?? .overflow
      }
    }
    doorbell.yield()
  }

  /// The oldest pending event, resynchronisation first.
  func take() -> XenStoreWatchEvent? {
    pending.withLock { pending -> XenStoreWatchEvent? in
      if let reason = pending.resync {
        pending.resync = nil
        return .resync(reason)
      }
      guard pending.taken < pending.order.count else { return nil }
      let path = pending.order[pending.taken]
      pending.paths.remove(path)
      pending.taken += 1
      if pending.taken == pending.order.count { pending.forgetPaths() }
      return .changed(path)
    }
  }

  /// Ends the sequence, with an error or without. What is pending can still be taken.
  func end(_ failure: XenStoreError?) {
    pending.withLock { $0.failure = $0.failure ?? failure }
    doorbell.finish()
  }

  var failure: XenStoreError? { pending.withLock { $0.failure } }
}
