// SPDX-License-Identifier: Apache-2.0
// How long requests took, counted by size. The bounds are the same for every disk and for both
// ways to the kernel, so that the counts of several disks can be added.

/// Counts of latencies: one for each bound, and one for what took longer than the last.
package struct LatencyHistogram: Sendable, Hashable {
  /// The upper bounds of the buckets but the last, in nanoseconds.
  package static let bounds: [UInt64] = [
    10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000,
    25_000_000, 50_000_000, 100_000_000, 250_000_000, 500_000_000, 1_000_000_000, 2_500_000_000,
    10_000_000_000,
  ]

  /// How many there were in each bucket, the one without a bound last.
  package private(set) var counts: [UInt64]
  /// All of them together, in nanoseconds.
  package private(set) var nanoseconds: UInt64

  /// Nothing counted yet.
  package init() {
    counts = [UInt64](repeating: 0, count: Self.bounds.count + 1)
    nanoseconds = 0
  }

  /// Counts that were made elsewhere; nil unless there is one for each bucket.
  package init?(counts: [UInt64], nanoseconds: UInt64) {
    guard counts.count == Self.bounds.count + 1 else { return nil }
    self.counts = counts
    self.nanoseconds = nanoseconds
  }

  /// Counts one.
  package mutating func add(_ latency: UInt64) {
    var index = 0
    while index < Self.bounds.count, latency > Self.bounds[index] { index += 1 }
    counts[index] &+= 1
    nanoseconds &+= latency
  }

  /// How many there were. What a worker reports may overflow: then the sum wraps.
  package var count: UInt64 { counts.reduce(0, &+) }

  /// What has come since an earlier look; nil when these are not the same counts going on, since
  /// the worker is another one.
  package func since(_ earlier: LatencyHistogram) -> LatencyHistogram? {
    guard zip(counts, earlier.counts).allSatisfy({ $0 >= $1 }), nanoseconds >= earlier.nanoseconds
    else { return nil }
    var difference = self
    difference.nanoseconds -= earlier.nanoseconds
    for index in counts.indices { difference.counts[index] -= earlier.counts[index] }
    return difference
  }

  /// The latency in nanoseconds under which this part of all lies (0.99: 99 of 100), as far as the
  /// buckets tell: linear within one, the last bound for what took longer. nil without any.
  package func quantile(_ part: Double) -> Double? {
    let total = counts.reduce(0.0) { $0 + Double($1) }
    guard total > 0 else { return nil }
    var rest = part * total
    for (index, bound) in Self.bounds.enumerated() {
      let here = Double(counts[index])
      if here > 0, rest <= here {
        let lower = index == 0 ? 0 : Double(Self.bounds[index - 1])
        return lower + (Double(bound) - lower) * rest / here
      }
      rest -= here
    }
    return Self.bounds.last.map { Double($0) }
  }
}
