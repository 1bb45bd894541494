// SPDX-License-Identifier: Apache-2.0
// A set of clusters of a store, kept as runs.

/// Clusters by number. Cheap while they lie in few runs.
struct HostRuns {
  /// Disjoint, in order, none touching the next.
  private(set) var runs: [Range<UInt64>] = []

  /// The index of the first run that ends after a cluster.
  private func index(endingAfter cluster: UInt64) -> Int {
    var low = 0
    var high = runs.count
    while low < high {
      let middle = (low + high) / 2
      if runs[middle].upperBound <= cluster { low = middle + 1 } else { high = middle }
    }
    return low
  }

  /// Whether a cluster is in the set.
  func contains(_ cluster: UInt64) -> Bool {
    let index = index(endingAfter: cluster)
    return index < runs.count && runs[index].contains(cluster)
  }

  /// Whether some cluster of a range is in the set.
  func overlaps(_ range: Range<UInt64>) -> Bool {
    let index = index(endingAfter: range.lowerBound)
    return index < runs.count && runs[index].lowerBound < range.upperBound
  }

  /// Takes in clusters.
  mutating func insert(_ range: Range<UInt64>) {
    guard !range.isEmpty else { return }
    // The first run that this one touches, and the first that it does not.
    var first = index(endingAfter: range.lowerBound)
    if first > 0, runs[first - 1].upperBound == range.lowerBound { first -= 1 }
    var end = first
    var merged = range
    while end < runs.count, runs[end].lowerBound <= range.upperBound {
      merged =
        min(
          merged.lowerBound, runs[end].lowerBound)..<max(
          merged.upperBound, runs[end].upperBound)
      end += 1
    }
    runs.replaceSubrange(first..<end, with: [merged])
  }

  /// Takes out clusters.
  mutating func remove(_ range: Range<UInt64>) {
    guard !range.isEmpty else { return }
    let first = index(endingAfter: range.lowerBound)
    var end = first
    var rest: [Range<UInt64>] = []
    while end < runs.count, runs[end].lowerBound < range.upperBound {
      let run = runs[end]
      if run.lowerBound < range.lowerBound { rest.append(run.lowerBound..<range.lowerBound) }
      if run.upperBound > range.upperBound { rest.append(range.upperBound..<run.upperBound) }
      end += 1
    }
    runs.replaceSubrange(first..<end, with: rest)
  }
}
