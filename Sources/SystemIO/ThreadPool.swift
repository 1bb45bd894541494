// SPDX-License-Identifier: Apache-2.0
// A few threads for what may wait: cold reads, slow writes, fdatasync, commit plans. Their
// completions come back to the loop through an eventfd.
//
// Invariants:
// - A job belongs to whoever submits it until `submit`, to a thread while it performs, and
//   to the loop's thread again from `finished` on. So a job needs no lock of its own.
// - Stacks are small, since a worker locks its memory.

internal import CLinux
import Glibc

/// Something to do on another thread. Subclasses add what they need; an instance may be
/// submitted again once it has finished.
open class PoolJob {
  fileprivate var next: Unmanaged<PoolJob>?

  /// A job at rest.
  package init() {}

  /// Does the work, on a thread of the pool.
  open func perform() {}

  /// Takes notice of it, on the loop's thread.
  open func finished() {}
}

// The queues and `stopping` are guarded by `mutex`; `registration`, `threads` and `loop`
// belong to the loop's thread.
/// Threads, a queue to them, and a queue back.
package final class ThreadPool: @unchecked Sendable {
  private struct Queue {
    var head: Unmanaged<PoolJob>?
    var tail: Unmanaged<PoolJob>?

    mutating func append(_ job: Unmanaged<PoolJob>) {
      job._withUnsafeGuaranteedRef { $0.next = nil }
      if let tail { tail._withUnsafeGuaranteedRef { $0.next = job } } else { head = job }
      tail = job
    }

    mutating func take() -> Unmanaged<PoolJob>? {
      guard let first = head else { return nil }
      head = first._withUnsafeGuaranteedRef { $0.next }
      if head == nil { tail = nil }
      return first
    }
  }

  private static let stackSize = 192 << 10
  private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  private let bell: Descriptor
  private let loop: EventLoop
  private var registration: EventLoop.Registration?
  private var threads: [pthread_t] = []
  private var waiting = Queue()
  private var done = Queue()
  private var stopping = false

  /// Starts the threads. Throws: the errno of eventfd(2) or pthread_create(3).
  package init(loop: EventLoop, threads count: Int = 4) throws(IOError) {
    pthread_mutex_init(mutex, nil)
    pthread_cond_init(condition, nil)
    self.loop = loop
    let raw = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
    guard raw >= 0 else { throw IOError.last("create an eventfd") }
    bell = Descriptor(owning: raw)
    registration = try loop.add(raw, for: .readable) { [unowned self] _ in drain() }
    do throws(IOError) {
      for _ in 0..<count { try start() }
    } catch {
      shutdown()
      throw error
    }
  }

  deinit {
    precondition(threads.isEmpty, "a pool goes before its shutdown")
    pthread_cond_destroy(condition)
    pthread_mutex_destroy(mutex)
    condition.deallocate()
    mutex.deallocate()
  }

  private func start() throws(IOError) {
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    defer { pthread_attr_destroy(&attributes) }
    pthread_attr_setstacksize(&attributes, ThreadPool.stackSize)
    var thread = pthread_t()
    let context = Unmanaged.passRetained(self)
    let result = pthread_create(
      &thread, &attributes,
      { context in
        guard let context else { return nil }
        Unmanaged<ThreadPool>.fromOpaque(context).takeRetainedValue().work()
        return nil
      }, context.toOpaque())
    guard result == 0 else {
      context.release()
      throw IOError(result, "start a thread")
    }
    threads.append(thread)
  }

  /// Queues a job, which is kept alive until it has finished. From the loop's thread.
  package func submit(_ job: PoolJob) {
    let reference = Unmanaged.passRetained(job)
    pthread_mutex_lock(mutex)
    precondition(!stopping, "a job for a pool that is shut down")
    waiting.append(reference)
    pthread_cond_signal(condition)
    pthread_mutex_unlock(mutex)
  }

  /// Runs `work` on a thread, then `then` with what it returned on the loop's.
  package func run<Result: Sendable>(
    _ work: @escaping @Sendable () -> Result, then: @escaping (Result) -> Void
  ) {
    submit(ClosureJob(work, then))
  }

  /// Waits for what runs, lets what only waits go unperformed, ends the threads and tells of
  /// everything that was performed. On the loop's thread.
  package func shutdown() {
    pthread_mutex_lock(mutex)
    stopping = true
    pthread_cond_broadcast(condition)
    pthread_mutex_unlock(mutex)
    for thread in threads { pthread_join(thread, nil) }
    threads = []
    drain()
    while let job = waiting.take() { job.release() }
    if let registration { loop.remove(registration) }
    registration = nil
  }

  private func work() {
    pthread_mutex_lock(mutex)
    while true {
      guard !stopping else { break }
      guard let job = waiting.take() else {
        pthread_cond_wait(condition, mutex)
        continue
      }
      pthread_mutex_unlock(mutex)
      job._withUnsafeGuaranteedRef { $0.perform() }
      pthread_mutex_lock(mutex)
      let first = done.head == nil
      done.append(job)
      if first { ring() }
    }
    pthread_mutex_unlock(mutex)
  }

  private func ring() {
    var one: UInt64 = 1
    // An eventfd refuses only when its counter is full, and then it rings already.
    _ = Glibc.write(bell.raw, &one, 8)
  }

  private func drain() {
    var counter: UInt64 = 0
    // EAGAIN when another drain came first; then the queue tells all the same.
    _ = Glibc.read(bell.raw, &counter, 8)
    pthread_mutex_lock(mutex)
    var batch = done
    done = Queue()
    pthread_mutex_unlock(mutex)
    while let reference = batch.take() {
      let job = reference.takeRetainedValue()
      job.finished()
    }
  }
}

private final class ClosureJob<Result: Sendable>: PoolJob {
  private let body: @Sendable () -> Result
  private let then: (Result) -> Void
  private var result: Result?

  init(_ body: @escaping @Sendable () -> Result, _ then: @escaping (Result) -> Void) {
    self.body = body
    self.then = then
  }

  override func perform() { result = body() }
  override func finished() {
    guard let result else { preconditionFailure("a job has ended before its work") }
    then(result)
  }
}
