// Calls that may block (open on a file system that hangs, netlink, spawn) run on threads
// of their own, so that no disk waits for another's sake.

internal import NIOPosix
internal import Synchronization

/// Runs blocking work.
struct Offload: Sendable {
  private let pool: NIOThreadPool

  /// More blocking calls at once than there are threads wait for one another.
  init(threads: Int = 16) {
    pool = NIOThreadPool(numberOfThreads: threads)
    pool.start()
  }

  /// Runs the work on a thread of the pool and waits for it without blocking the caller's.
  func run<Value: Sendable, Failure: Error>(
    _ work: @escaping @Sendable () throws(Failure) -> Value
  ) async throws(Failure) -> Value {
    let result = await withCheckedContinuation { continuation in
      pool.submit { _ in
        // Also when the pool is being shut down: the caller holds descriptors that the
        // work takes care of.
        continuation.resume(returning: Result { () throws(Failure) in try work() })
      }
    }
    return try result.get()
  }
}

/// Something that ends once, and one who waits for it.
final class Ended: Sendable {
  private struct State {
    var isSet = false
    var waiter: CheckedContinuation<Bool, Never>?
  }

  private let state = Mutex(State())

  /// It has ended.
  func set() {
    let waiter = state.withLock { state in
      state.isSet = true
      return state.waiter.take()
    }
    waiter?.resume(returning: true)
  }

  /// Waits for the end, at most so long. Whether it has come.
  func wait(_ limit: Duration) async -> Bool {
    let clock = Task { [self] in
      try await Task.sleep(for: limit)
      state.withLock { $0.waiter.take() }?.resume(returning: false)
    }
    defer { clock.cancel() }
    return await withCheckedContinuation { continuation in
      let isSet = state.withLock { state in
        if !state.isSet { state.waiter = continuation }
        return state.isSet
      }
      if isSet { continuation.resume(returning: true) }
    }
  }
}
