// SPDX-License-Identifier: Apache-2.0

import Synchronization

/// One thing for the requester to do, finished once: by the requester with a result, or by the
/// listener when the deadline has passed or the client closes.
final class Job: Sendable {
  let operation: String
  let path: String?
  let limit: Duration
  let deadline: ContinuousClock.Instant
  private let finished = Atomic<Bool>(false)
  private let work: @Sendable (Connection, Job) -> Void
  private let failure: @Sendable (XenStoreError) -> Void

  /// `work` must end in a call of `finish`; `failure` is called instead of it, or while it runs.
  init(
    _ operation: String, _ path: String?, limit: Duration,
    work: @escaping @Sendable (Connection, Job) -> Void,
    failure: @escaping @Sendable (XenStoreError) -> Void
  ) {
    self.operation = operation
    self.path = path
    self.limit = limit
    self.deadline = .now + limit
    self.work = work
    self.failure = failure
  }

  var isFinished: Bool { finished.load(ordering: .acquiring) }

  /// The error of a job whose time is over.
  var overdue: XenStoreError { .timedOut(operation, path, after: limit) }

  /// True for the first caller alone, who then tells the waiting task.
  func finish() -> Bool { !finished.exchange(true, ordering: .acquiringAndReleasing) }

  func run(on connection: Connection) {
    if !isFinished { work(connection, self) }
  }

  func fail(_ error: XenStoreError) {
    if finish() { failure(error) }
  }
}
