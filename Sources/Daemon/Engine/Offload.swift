// Calls that may block (open on a file system that hangs, netlink, spawn) run on threads
// of their own, so that no disk waits for another's sake.

internal import NIOPosix

/// Runs blocking work.
struct Offload: Sendable {
  /// More blocking calls at once than this wait for one another.
  static let threads = 16

  private let pool: NIOThreadPool

  init() {
    pool = NIOThreadPool(numberOfThreads: Offload.threads)
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
