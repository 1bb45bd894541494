// SPDX-License-Identifier: Apache-2.0
// Closing descriptors that somebody else has chosen. close(2) may wait: a socket with SO_LINGER for
// its unsent data, a file of a network or user file system for its server. So may the end of a
// socket whose queue holds such descriptors.

import Glibc
import Synchronization

/// Closes descriptors one after the other, on a thread of its own that lives as long as there are
/// some. Whoever is given many such owners of descriptors has one for each peer, so that none
/// waits for another's.
package final class Closer: Sendable {
  private struct State {
    var queue: [Int32] = []
    var isRunning = false
  }

  private let state = Mutex(State())

  /// A closer that has nothing to do.
  package init() {}

  /// Takes an owned descriptor over and closes it soon. Does not wait.
  package func close(_ raw: Int32) {
    let starts = state.withLock { state in
      state.queue.append(raw)
      defer { state.isRunning = true }
      return !state.isRunning
    }
    if starts { start() }
  }

  private func start() {
    do throws(IOError) {
      try DetachedThread.start(stackSize: 128 << 10) { self.run() }
    } catch {
      // Too many threads: what is queued is closed after the next descriptor that comes.
      state.withLock { $0.isRunning = false }
    }
  }

  private func run() {
    while let raw = next() { _ = Glibc.close(raw) }
  }

  private func next() -> Int32? {
    state.withLock { state in
      guard !state.queue.isEmpty else {
        state.isRunning = false
        return nil
      }
      return state.queue.removeFirst()
    }
  }
}
