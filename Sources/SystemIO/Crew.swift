// SPDX-License-Identifier: Apache-2.0
// Threads that work through something together and then are done: for tools, which have no
// loop to come back to.

import Glibc
import Synchronization

/// A number of threads on one piece of work.
package enum Crew {
  private final class Job: Sendable {
    let work: @Sendable (Int) -> Void
    let index: Int
    init(_ work: @escaping @Sendable (Int) -> Void, _ index: Int) {
      self.work = work
      self.index = index
    }
  }

  /// How many processors this process may use.
  package static var processors: Int { max(1, Int(sysconf(Int32(_SC_NPROCESSORS_ONLN)))) }

  /// How many threads read, compute and write in turn: one a processor, and some so that none
  /// of them is idle while others wait for a medium.
  package static var usual: Int { max(4, processors) }

  /// Runs `work` on so many threads, the calling one among them, each with its number, and
  /// returns when all have. Where no more threads are to be had fewer do it.
  package static func run(_ count: Int, _ work: @escaping @Sendable (Int) -> Void) {
    var threads: [pthread_t] = []
    for index in 1..<max(1, count) {
      var thread = pthread_t()
      let job = Unmanaged.passRetained(Job(work, index))
      let result = pthread_create(
        &thread, nil,
        { context in
          guard let context else { return nil }
          let job = Unmanaged<Job>.fromOpaque(context).takeRetainedValue()
          job.work(job.index)
          return nil
        }, job.toOpaque())
      guard result == 0 else {
        job.release()
        break
      }
      threads.append(thread)
    }
    work(0)
    for thread in threads { pthread_join(thread, nil) }
  }
}

// Guarded by `mutex`, which is held for every access to what follows it.
/// Lets numbered pieces of work pass one at a time, in the order of their numbers from 0 on.
package final class Turnstile: @unchecked Sendable {
  private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)
  private var current = 0
  private var isBroken = false

  /// A turnstile that waits for number 0.
  package init() {
    pthread_mutex_init(mutex, nil)
    pthread_cond_init(condition, nil)
  }

  deinit {
    pthread_cond_destroy(condition)
    pthread_mutex_destroy(mutex)
    condition.deallocate()
    mutex.deallocate()
  }

  /// Waits until all lower numbers have passed; false when the turnstile is broken.
  package func enter(_ number: Int) -> Bool {
    pthread_mutex_lock(mutex)
    defer { pthread_mutex_unlock(mutex) }
    while current != number, !isBroken { pthread_cond_wait(condition, mutex) }
    return !isBroken
  }

  /// The number that entered has passed.
  package func leave() {
    pthread_mutex_lock(mutex)
    current += 1
    pthread_cond_broadcast(condition)
    pthread_mutex_unlock(mutex)
  }

  /// Nobody passes any more: something has failed.
  package func close() {
    pthread_mutex_lock(mutex)
    isBroken = true
    pthread_cond_broadcast(condition)
    pthread_mutex_unlock(mutex)
  }
}
