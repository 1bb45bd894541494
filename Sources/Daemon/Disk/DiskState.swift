// SPDX-License-Identifier: Apache-2.0
// The states of a disk, as a value that cannot hold what does not belong together, and the
// decision that follows from a state and from what is wanted. Both are pure: everything
// that touches the world is in Reconcile/.

/// The states that everybody is told: `dmu/state` in xenstore, and status.
package enum PublicState: String, Sendable, Codable, CaseIterable {
  /// On its way to being served, for the first time or with a new worker.
  case starting
  /// Served.
  case ready
  /// Served with an error that an admin should see to.
  case degraded
  /// Served, but the store's file system is full.
  case noSpace = "no-space"
  /// Not served; the reason says why.
  case failed
  /// On its way out; the reason says what it waits for.
  case stopping
  /// A named disk that is only kept by its name; only in status.
  case inactive
  /// No disk any more, but its store's pending log holds writes; only in status.
  case pending

  /// Whether there is a disk, or is to be one.
  var isOfDisk: Bool { self != .pending && self != .inactive }
}

/// What xenstore says of a disk.
package struct WantedDisk: Sendable, Equatable {
  /// The params as they stand, beginning "dmu:".
  package var params: String
  /// Whether the guest may only read.
  package var readOnly: Bool
  /// Whether the toolstack or the guest has begun to take the disk away.
  package var going: Bool

  /// A wish from its parts.
  package init(params: String, readOnly: Bool, going: Bool) {
    self.params = params
    self.readOnly = readOnly
    self.going = going
  }
}

/// Where a disk stands between "not there" and "served".
package enum DiskPhase: Sendable {
  /// Nothing is held.
  case idle
  /// Another disk that is going still holds the store.
  case waiting(holder: DiskID)
  /// The store does not exist, and the block script has not said yet whether the domain boots.
  case asking(store: String)
  /// A worker is being started for the first time.
  case starting
  /// Served. `trouble` is what the worker reported, nil when all is well.
  case serving(Trouble?)
  /// The worker has died, for this reason; its successor starts then. `hasFailed`: one could not
  /// be started since.
  case restarting(at: ContinuousClock.Instant, why: String? = nil, hasFailed: Bool = false)
  /// A vbd that uses the disk of another one.
  case joined(DiskID)
  /// Failed. `attached` when the device is still there, its requests waiting.
  case failed(DiskFailure, attached: Bool)
  /// Being taken down; `stuck` when something below the disk keeps it from going.
  case stopping(Stuck?)

  /// Why a disk cannot go yet.
  package struct Stuck: Sendable, Hashable {
    /// The reason.
    package var failure: DiskFailure
    /// When it is tried again.
    package var retry: ContinuousClock.Instant

    /// A reason and a time.
    package init(_ failure: DiskFailure, retry: ContinuousClock.Instant) {
      self.failure = failure
      self.retry = retry
    }
  }

  /// What a worker that still serves reports.
  package struct Trouble: Sendable, Hashable {
    /// `degraded` or `noSpace`.
    package var state: PublicState
    /// The reason, one line.
    package var error: String

    /// A report from its parts.
    package init(state: PublicState, error: String) {
      self.state = state
      self.error = error
    }
  }

  /// What everybody is told.
  package var publicState: PublicState {
    switch self {
    case .restarting(_, _, hasFailed: true): .failed
    case .idle, .waiting, .asking, .starting, .restarting: .starting
    case .serving(let trouble): trouble?.state ?? .ready
    case .joined: .ready
    case .failed: .failed
    case .stopping: .stopping
    }
  }

  /// The reason that goes with the state, if there is one.
  package var error: String? {
    switch self {
    case .serving(let trouble): trouble?.error
    case .failed(let failure, _): failure.sentence
    case .waiting(let holder):
      "waiting for \(holder.words) to let go of the store"
    case .asking(let store):
      "store \(store) does not exist: waiting for the block script to say whether the domain boots"
    case .restarting(_, let why, hasFailed: true): why.map { "\($0) (it is tried again)" }
    case .restarting(_, let why, _): why.map { "the worker is replaced, since \($0)" }
    case .stopping(let stuck): stuck?.failure.sentence
    case .idle, .starting, .joined: nil
    }
  }
}

/// The next step for a disk.
package enum DiskStep: Sendable, Equatable {
  /// Nothing now.
  case none
  /// Open, lock, start a worker, attach.
  case start
  /// Start a new worker for the device that is there.
  case restart
  /// Wait until then, and look again.
  case wait(until: ContinuousClock.Instant)
  /// Take everything down that is held.
  case stop
  /// Let go of the disk that was joined.
  case leave
  /// Nothing is held and nothing is wanted: drop the entry.
  case forget
}

extension DiskPhase {
  /// The step that leads from here to what is wanted (nil: the disk is not wanted).
  package func step(
    wanted: WantedDisk?, holderGone: Bool = false, now: ContinuousClock.Instant
  ) -> DiskStep {
    switch self {
    case .idle:
      guard let wanted else { return .forget }
      return wanted.going ? .none : .start
    case .waiting:
      guard let wanted else { return .forget }
      return holderGone && !wanted.going ? .start : .none
    case .asking: return wanted == nil ? .forget : .none
    case .failed(_, let attached):
      if wanted == nil { return attached ? .stop : .forget }
      return .none
    case .serving: return wanted == nil ? .stop : .none
    case .joined: return wanted == nil ? .leave : .none
    case .restarting(let instant, _, _):
      if wanted == nil { return .stop }
      return instant <= now ? .restart : .wait(until: instant)
    case .stopping(let stuck?):
      // Whatever is wanted by now: it has to be gone before it can come again.
      return stuck.retry <= now ? .stop : .wait(until: stuck.retry)
    case .starting, .stopping(nil): return .none
    }
  }
}
