// SPDX-License-Identifier: Apache-2.0
// Placements that are not yet durable, for formats that put a block wherever there is room.
//
// Invariants: runs do not overlap; none crosses a group (the blocks of one table); those of a
// group are in the order of their blocks. A run's blocks lie one after the other in device 0.

import Posix

/// The uncommitted half of a mapping.
struct PendingPlacements {
  /// A placement, or a part of one.
  struct Run {
    var blocks: BlockRange
    /// Where the first block lives in device 0, in bytes.
    var offset: UInt64
    var mark: Mark
  }

  private let blocksPerGroup: UInt64
  private let blockSize: UInt64
  private var groups: [UInt64: [Run]] = [:]
  /// How many blocks are pending.
  private(set) var blocks: UInt64 = 0
  /// How many blocks were pending and are committed.
  private(set) var committed: UInt64 = 0
  /// How many blocks have got a place since the image was opened.
  var placed: UInt64 { committed + blocks }

  init(blocksPerGroup: UInt64, blockSize: UInt64) {
    self.blocksPerGroup = blocksPerGroup
    self.blockSize = blockSize
  }

  /// Whether nothing is pending.
  var isEmpty: Bool { groups.isEmpty }

  /// What is pending at a block: the run that holds it, or else the first block after it in
  /// its group that is pending.
  func find(_ block: UInt64) -> (run: Run?, next: UInt64?) {
    guard let runs = groups[block / blocksPerGroup] else { return (nil, nil) }
    let after = Self.firstIndex(in: runs, after: block)
    if after > 0, runs[after - 1].blocks.contains(block) { return (runs[after - 1], nil) }
    return (nil, after < runs.count ? runs[after].blocks.first : nil)
  }

  /// A run that has blocks in a range within one group, if there is one.
  func first(in range: BlockRange) -> Run? {
    let (run, next) = find(range.first)
    if let run { return run }
    guard let next, next < range.end else { return nil }
    return find(next).run
  }

  /// The byte in device 0 where a block of a run lives.
  func offset(of block: UInt64, in run: Run) -> UInt64 {
    run.offset + (block - run.blocks.first) * blockSize
  }

  private static func firstIndex(in runs: [Run], after block: UInt64) -> Int {
    var low = 0
    var high = runs.count
    while low < high {
      let middle = (low + high) / 2
      if runs[middle].blocks.first <= block { low = middle + 1 } else { high = middle }
    }
    return low
  }

  /// Takes in a run that overlaps none and crosses no group.
  mutating func insert(_ run: Run) {
    let group = run.blocks.first / blocksPerGroup
    let index = Self.firstIndex(in: groups[group, default: []], after: run.blocks.first)
    groups[group, default: []].insert(run, at: index)
    blocks += run.blocks.count
  }

  /// The groups that have runs up to a mark, in order, with those runs.
  func runs(upTo mark: Mark) -> [(group: UInt64, runs: [Run])] {
    groups.keys.sorted().compactMap { group in
      let runs = (groups[group] ?? []).filter { $0.mark <= mark }
      return runs.isEmpty ? nil : (group, runs)
    }
  }

  /// Takes out the runs up to a mark, which are committed.
  mutating func commit(upTo mark: Mark) {
    for run in remove(where: { $0.mark <= mark }) { committed += run.blocks.count }
  }

  /// Takes out the runs that meet a condition and returns them.
  @discardableResult
  mutating func remove(where condition: (Run) -> Bool) -> [Run] {
    var removed: [Run] = []
    for group in Array(groups.keys) {
      guard var runs = groups[group], runs.contains(where: condition) else { continue }
      removed += runs.filter(condition)
      runs.removeAll(where: condition)
      groups[group] = runs.isEmpty ? nil : runs
    }
    for run in removed { blocks -= run.blocks.count }
    return removed
  }
}
