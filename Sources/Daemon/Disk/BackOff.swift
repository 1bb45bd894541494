// SPDX-License-Identifier: Apache-2.0
// How soon a worker that died is replaced, and when to stop trying.

/// The waiting times of a disk's restarts, and their limit.
package struct BackOff: Sendable, Equatable {
  /// Waiting times for the first restarts; the last one is used for all that follow.
  package static let delays: [Duration] = [
    .zero, .milliseconds(100), .milliseconds(200), .milliseconds(500), .seconds(1),
    .seconds(2),
  ]

  /// So many restarts are allowed...
  package var limit: Int
  /// ...in so long a time.
  package var window: Duration

  private var restarts: [ContinuousClock.Instant] = []

  /// A back-off that has seen no restart.
  package init(limit: Int, window: Duration) {
    self.limit = limit
    self.window = window
  }

  /// How many restarts lie within the window.
  package func recent(at now: ContinuousClock.Instant) -> Int {
    restarts.count { now - $0 < window }
  }

  /// A worker has died. The time to wait before the next one, or nil when the limit is
  /// reached: then the disk has failed.
  package mutating func next(at now: ContinuousClock.Instant) -> Duration? {
    restarts.removeAll { now - $0 >= window }
    guard restarts.count < limit else { return nil }
    let delay = BackOff.delays[min(restarts.count, BackOff.delays.count - 1)]
    restarts.append(now + delay)
    return delay
  }

  /// Forgets every restart: an admin has asked to try anew.
  package mutating func reset() { restarts = [] }
}
