// SPDX-License-Identifier: Apache-2.0
// Calls that may block (open on a file system that hangs, netlink, spawn) run on threads
// of their own, so that no disk waits for another's sake.

import Glibc
import Synchronization
internal import SystemIO

/// Runs blocking work. Threads are made as they are needed: what hangs has a thread to itself, and
/// whatever comes next has another.
final class Offload: Offloading {
  private struct State {
    var jobs: [@Sendable () -> Void] = []
    var idle = 0
    var threads = 0
  }

  /// So many calls that hang leave none for the next.
  static let mostThreads = 4096

  private let most: Int
  private let bell: Bell
  private let state = Mutex(State())

  /// At most so many threads: with fewer than there are blocking calls, they wait for one another.
  init(threads: Int = Offload.mostThreads) {
    most = threads
    bell = Bell()
  }

  /// Runs the work on a thread.
  func run<Value: Sendable, Failure: Error>(
    _ work: @escaping @Sendable () throws(Failure) -> Value
  ) async throws(Failure) -> Value {
    let result = await withCheckedContinuation { continuation in
      submit {
        continuation.resume(returning: Result { () throws(Failure) in try work() })
      }
    }
    return try result.get()
  }

  private func submit(_ job: @escaping @Sendable () -> Void) {
    let wantsThread = state.withLock { state in
      state.jobs.append(job)
      guard state.idle < state.jobs.count, state.threads < most else { return false }
      state.threads += 1
      return true
    }
    if wantsThread, !start() {
      state.withLock { $0.threads -= 1 }
      // Then it waits for one of those there are. Without any, the caller has to do.
      if state.withLock({ $0.threads == 0 }) { drain() }
    }
    bell.ring()
  }

  /// Whether there is a thread more.
  private func start() -> Bool {
    do throws(IOError) {
      try DetachedThread.start(stackSize: 512 << 10) { [self] in work() }
      return true
    } catch { return false }
  }

  /// The life of a thread: it ends after a while without work, but for the last few.
  private func work() {
    while true {
      drain()
      state.withLock { $0.idle += 1 }
      let isWanted = bell.wait(seconds: 10) { state.withLock { !$0.jobs.isEmpty } }
      let ends = state.withLock { state in
        state.idle -= 1
        guard !isWanted, state.jobs.isEmpty, state.threads > 2 else { return false }
        state.threads -= 1
        return true
      }
      if ends { return }
    }
  }

  private func drain() {
    while let job = state.withLock({ $0.jobs.isEmpty ? nil : $0.jobs.removeFirst() }) { job() }
  }
}

/// Wakes threads that wait for something to do.
// The mutex guards nothing but the way to sleep; both live as long as this.
private final class Bell: @unchecked Sendable {
  private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)

  init() {
    pthread_mutex_init(mutex, nil)
    pthread_cond_init(condition, nil)
  }

  deinit {
    pthread_cond_destroy(condition)
    pthread_mutex_destroy(mutex)
    condition.deallocate()
    mutex.deallocate()
  }

  func ring() {
    pthread_mutex_lock(mutex)
    pthread_cond_signal(condition)
    pthread_mutex_unlock(mutex)
  }

  /// Waits until `isThere`, at most so long. Whether it is.
  func wait(seconds: Int, until isThere: () -> Bool) -> Bool {
    var end = timespec()
    clock_gettime(CLOCK_REALTIME, &end)
    end.tv_sec += seconds
    pthread_mutex_lock(mutex)
    defer { pthread_mutex_unlock(mutex) }
    while !isThere() {
      guard pthread_cond_timedwait(condition, mutex, &end) == 0 else { return isThere() }
    }
    return true
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
  func wait(_ limit: Duration, _ scheduler: any Scheduling) async -> Bool {
    let clock = scheduler.after(limit) { [self] in
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
