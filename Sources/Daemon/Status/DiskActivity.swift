// SPDX-License-Identifier: Apache-2.0
// What is counted and measured of a disk beyond what status shows.

internal import SystemIO
internal import WorkerLink

/// Counts of a disk since its worker started or, with dm, since its device was made. What is not
/// known is absent.
package struct DiskActivity: Codable, Sendable, Hashable {
  /// Bytes that reads asked for.
  package var bytesRead: UInt64?
  /// Bytes that writes brought.
  package var bytesWritten: UInt64?
  /// Discards and writes of zeroes.
  package var discards: UInt64?
  /// Nanoseconds of all reads together.
  package var reading: UInt64?
  /// The same of writes.
  package var writing: UInt64?
  /// The same of flushes.
  package var flushing: UInt64?
  /// The same of discards and writes of zeroes.
  package var discarding: UInt64?
  /// How long reads, writes and discards took.
  package var latency: DiskLatency?
  /// How long flushes took.
  package var flushLatency: DiskLatency?
  /// How often a worker took the place of another since the daemon started.
  package var restarts: UInt64 = 0

  /// Nothing known.
  package init() {}

  /// Takes what a worker has measured.
  mutating func take(_ times: ReportedTimes) {
    (bytesRead, bytesWritten) = (times.bytesRead, times.bytesWritten)
    discards = times.discards
    (reading, writing) = (times.reading, times.writing)
    (flushing, discarding) = (times.flushing, times.discarding)
    latency = DiskLatency(times.latencies)
    flushLatency = DiskLatency(times.flushLatencies)
  }

  /// Takes what the kernel has counted.
  mutating func take(_ counters: MappedCounters) {
    (bytesRead, bytesWritten) = (counters.bytesRead, counters.bytesWritten)
    discards = counters.discards
    reading = counters.reading &* 1_000_000
    writing = counters.writing &* 1_000_000
    discarding = counters.discarding &* 1_000_000
  }
}

/// A histogram of latencies, as JSON has it.
package struct DiskLatency: Codable, Sendable, Hashable {
  /// How many there were in each bucket, those above the last bound at the end.
  package var counts: [UInt64]
  /// All of them together, in nanoseconds.
  package var nanoseconds: UInt64

  init(_ histogram: LatencyHistogram) {
    counts = histogram.counts
    nanoseconds = histogram.nanoseconds
  }

  /// nil when the daemon is of another version, with other buckets.
  var histogram: LatencyHistogram? {
    LatencyHistogram(counts: counts, nanoseconds: nanoseconds)
  }
}
