// SPDX-License-Identifier: Apache-2.0
//
// Setting a watch and taking it back. A watch stands in the table before xenstored is asked, since
// its first event may come before the answer; it leaves the table first and xenstored after, and
// events that still come in between find nobody.

import CXenStore
import Synchronization

extension Core {
  /// Sets a watch and returns it with the stream that rings when it has events.
  func watch(_ path: String) async throws(XenStoreError) -> (WatchState, AsyncStream<Void>) {
    let (stream, continuation) = AsyncStream.makeStream(
      of: Void.self, bufferingPolicy: .bufferingNewest(1))
    let watch = state.withLock { state in
      defer { state.nextWatch += 1 }
      return WatchState(id: state.nextWatch, path: path, doorbell: continuation)
    }
    continuation.onTermination = { [weak self] _ in self?.unwatch(watch) }
    do throws(XenStoreError) {
      try await run("watch", path) { connection, job in
        self.state.withLock { $0.watches[watch.id] = watch }
        return Result { () throws(XenStoreError) in
          try self.set(watch, on: connection, for: job)
        }
      }
    } catch {
      watch.end(nil)
      throw error
    }
    return (watch, stream)
  }

  /// The stream has ended: forget the watch, and have xenstored forget it.
  func unwatch(_ watch: WatchState) {
    state.withLock { _ = $0.watches.removeValue(forKey: watch.id) }
    submit(
      Job(
        "unwatch", watch.path, limit: configuration.deadline,
        work: { connection, job in
          // A connection younger than the watch has never heard of it. A refusal means that
          // xenstored does not know the watch, which is what was wanted.
          if watch.generation.load(ordering: .acquiring) == connection.generation {
            if !xs_unwatch(connection.handle, watch.path, watch.token) {
              _ = connection.checkPulse()
            }
          }
          _ = job.finish()
        },
        failure: { _ in }))
  }

  /// Ends a watch that xenstored refused to set anew.
  func drop(_ watch: WatchState, because error: XenStoreError) {
    state.withLock { _ = $0.watches.removeValue(forKey: watch.id) }
    watch.end(error)
  }
}
