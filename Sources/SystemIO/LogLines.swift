// SPDX-License-Identifier: Apache-2.0
// Lines of a log, which must never cost more than they tell: nobody waits for a reader that has
// stopped, and one message that comes again and again is counted instead of written.

internal import CLinux
import Glibc
import Synchronization

/// A descriptor that takes lines, for any thread. It stays the caller's.
package final class LogLines: Sendable {
  /// The longest line in bytes, its end included; longer ones are cut. A pipe takes as much at once.
  package static let longest = 4096

  private let descriptor: Int32
  private let dropped = Mutex<UInt64>(0)

  /// Lines for a descriptor.
  package init(_ descriptor: Int32) { self.descriptor = descriptor }

  /// Writes a line that has no end yet, in one write(2), so that lines of several threads stay
  /// whole. When nobody reads it is dropped, and how many were is said before the next that is not:
  /// `remark` makes that line.
  package func write(_ line: String, remark: (UInt64) -> String) {
    dropped.withLock { dropped in
      guard isReady else {
        dropped += 1
        return
      }
      if dropped > 0 {
        put(remark(dropped))
        dropped = 0
        guard isReady else {
          dropped = 1
          return
        }
      }
      put(line)
    }
  }

  private var isReady: Bool {
    var item = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
    return poll(&item, 1, 0) > 0 && item.revents & Int16(POLLOUT) != 0
  }

  private func put(_ line: String) {
    var bytes = Array(line.utf8.prefix(Self.longest - 1))
    bytes.append(0x0a)
    // A log that cannot be written has nowhere to say so.
    _ = Glibc.write(descriptor, bytes, bytes.count)
  }
}

/// How often each message may be written: so many at once, then one a second. For any thread.
package final class LogRate: Sendable {
  private struct Bucket {
    var tokens: Int64
    var time: Int64
    var held: UInt64 = 0
  }

  private static let mostBuckets = 1024
  private let burst: Int64
  private let buckets = Mutex<[String: Bucket]>([:])

  /// A rate with so many at once.
  package init(burst: Int64 = 20) { self.burst = burst }

  /// Whether a message may be written at this time, in milliseconds, and if so how many of the same
  /// were held back before it.
  package func admit(_ message: String, at now: Int64 = LogRate.now()) -> UInt64? {
    buckets.withLock { buckets in
      var bucket = buckets[message] ?? Bucket(tokens: burst * 1000, time: now)
      bucket.tokens = min(burst * 1000, bucket.tokens + max(0, now - bucket.time))
      bucket.time = now
      defer { buckets[message] = bucket }
      guard bucket.tokens >= 1000 else {
        bucket.held += 1
        return nil
      }
      bucket.tokens -= 1000
      defer { bucket.held = 0 }
      if buckets.count >= Self.mostBuckets {
        buckets = buckets.filter { now - $0.value.time < burst * 1000 }
        if buckets.count >= Self.mostBuckets { buckets = [:] }
      }
      return bucket.held
    }
  }

  /// Milliseconds since some start.
  package static func now() -> Int64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Int64(time.tv_sec) * 1000 + Int64(time.tv_nsec) / 1_000_000
  }
}
