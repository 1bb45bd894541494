// SPDX-License-Identifier: Apache-2.0
// How long the requests of an export took: from the moment when the last bytes of a request were
// received to the moment when its reply is handed to the socket.
//
// The clock is read once for each recv and once for each sendmsg, however many requests those
// carry, so measuring costs a request no system call and, under load, hardly any reading.

import Glibc
package import SystemIO

/// Times of requests since the start, by kind.
package struct RequestTimes: Sendable, Equatable {
  /// Nanoseconds of all reads together.
  package var reading: UInt64 = 0
  /// The same of writes.
  package var writing: UInt64 = 0
  /// The same of flushes.
  package var flushing: UInt64 = 0
  /// The same of discards and writes of zeroes.
  package var discarding: UInt64 = 0
  /// Reads, writes, discards and writes of zeroes.
  package var latencies = LatencyHistogram()
  /// Flushes.
  package var flushes = LatencyHistogram()

  /// Counts a request that took so many nanoseconds.
  mutating func add(command: UInt16, _ nanoseconds: UInt64) {
    switch command {
    case NBD.Command.flush:
      flushing &+= nanoseconds
      return flushes.add(nanoseconds)
    case NBD.Command.read: reading &+= nanoseconds
    case NBD.Command.write: writing &+= nanoseconds
    case NBD.Command.trim, NBD.Command.writeZeroes: discarding &+= nanoseconds
    default: return
    }
    latencies.add(nanoseconds)
  }

  /// Nanoseconds since some start.
  static func now() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
  }
}
