// SPDX-License-Identifier: Apache-2.0
// What the target remembers: runs of blocks that are mapped alike, sorted, merged where
// they continue each other.
//
// Structure: leaves of at most 128 runs, and one row with the first block of each leaf, so
// a lookup is two binary searches and an insertion moves a few kilobytes at most.
//
// Invariants:
// - Runs do not overlap; the first key of a leaf is its first run's first block.
// - Memory is bounded: beyond `cap` runs, committed ones are forgotten, leaf by leaf; a
//   fault brings them back. Uncommitted ones are never forgotten.
// - A run whose mark is at most `committed` is committed. Nothing is swept when a commit
//   ends; runs that continue each other by then are merged in passing.

import DiskModel

/// A run of blocks as the map keeps it.
struct Run {
  /// The first block and the one after the last.
  var first: UInt64
  var end: UInt64
  /// Device in the upper 16 bits, sector in the lower 48; all ones: zeroes.
  var place: UInt64
  var mark: Mark
  var writable: Bool

  static let zero = UInt64.max
  static let sectorBits: UInt64 = 48

  var isZero: Bool { place == Run.zero }
  var device: UInt16 { UInt16(place >> Run.sectorBits) }
  var sector: UInt64 { place & (1 << Run.sectorBits - 1) }

  static func pack(_ place: Place) -> UInt64 {
    switch place {
    case .device(let device, let sector): UInt64(device) << sectorBits | sector
    case .zero: zero
    }
  }

  /// The run's place as the contract says it.
  var unpacked: Place { isZero ? .zero : .device(device, sector: sector) }

  /// The place of a block within the run.
  func place(of block: UInt64, sectorShift: UInt64) -> UInt64 {
    isZero ? place : place + (block - first) << sectorShift
  }
}

/// Runs of blocks, sorted by block.
final class ExtentMap {
  private struct Leaf {
    var runs: UnsafeMutablePointer<Run>
    var count: Int
  }
  private static let fanout = 128

  /// Runs in the map.
  private(set) var count = 0
  /// Everything up to this mark is committed.
  var committed: Mark = 0
  private let cap: Int
  private let sectorShift: UInt64
  private var leaves: UnsafeMutablePointer<Leaf>
  private var keys: UnsafeMutablePointer<UInt64>
  private var leafCount = 0
  private var leafCapacity = 16
  private var hand = 0
  private var relieveAt: Int

  /// A map of blocks of 2^sectorShift sectors that forgets beyond `cap` runs.
  init(sectorShift: UInt64, cap: Int) {
    self.sectorShift = sectorShift
    self.cap = cap
    relieveAt = cap
    leaves = .allocate(capacity: leafCapacity)
    keys = .allocate(capacity: leafCapacity)
    addLeaf(at: 0)
  }

  deinit {
    for index in 0..<leafCount { leaves[index].runs.deallocate() }
    leaves.deallocate()
    keys.deallocate()
  }

  // MARK: Looking up

  /// The leaf that a block belongs to: the last whose key is not greater.
  private func leaf(of block: UInt64) -> Int {
    var low = 0
    var high = leafCount
    while high - low > 1 {
      let middle = (low + high) >> 1
      if keys[middle] <= block { low = middle } else { high = middle }
    }
    return low
  }

  /// The number of runs in a leaf that begin at or before a block.
  private func upper(_ leaf: Int, _ block: UInt64) -> Int {
    let runs = leaves[leaf].runs
    var low = 0
    var high = leaves[leaf].count
    while low < high {
      let middle = (low + high) >> 1
      if runs[middle].first <= block { low = middle + 1 } else { high = middle }
    }
    return low
  }

  /// The run that holds a block.
  func find(_ block: UInt64) -> Run? {
    let leaf = leaf(of: block)
    let index = upper(leaf, block)
    guard index > 0 else { return nil }
    let run = leaves[leaf].runs[index - 1]
    return block < run.end ? run : nil
  }

  /// The first run that ends after a block: the one that holds it, or the next one.
  func findOrNext(_ block: UInt64) -> Run? {
    let leaf = leaf(of: block)
    let index = upper(leaf, block)
    if index > 0, block < leaves[leaf].runs[index - 1].end { return leaves[leaf].runs[index - 1] }
    if index < leaves[leaf].count { return leaves[leaf].runs[index] }
    // A leaf is empty only when it is the only one.
    return leaf + 1 < leafCount ? leaves[leaf + 1].runs[0] : nil
  }

  /// Every run, in order.
  func forEach(_ body: (Run) -> Void) {
    for leaf in 0..<leafCount {
      for index in 0..<leaves[leaf].count { body(leaves[leaf].runs[index]) }
    }
  }

  // MARK: Changing

  /// Maps a run, whatever was there before.
  func set(_ run: Run) {
    remove(run.first, run.end)
    insert(run)
    if count > relieveAt { relieve() }
  }

  /// Unmaps the blocks from `first` up to, not including, `end`.
  func remove(_ first: UInt64, _ end: UInt64) {
    while let run = findOrNext(first), run.first < end {
      let leaf = leaf(of: run.first)
      let index = upper(leaf, run.first) - 1
      let runs = leaves[leaf].runs
      if run.first < first {
        runs[index].end = first
        if run.end > end {
          var rest = run
          rest.place = run.place(of: end, sectorShift: sectorShift)
          rest.first = end
          add(rest, leaf, index + 1)
          return
        }
      } else if run.end > end {
        runs[index].place = run.place(of: end, sectorShift: sectorShift)
        runs[index].first = end
        if index == 0 { keys[leaf] = end }
        return
      } else {
        delete(leaf, index)
      }
    }
  }

  private func isCommitted(_ run: Run) -> Bool { run.mark <= committed }

  private func continues(_ left: Run, _ right: Run) -> Bool {
    left.end == right.first && left.writable == right.writable
      && left.place(of: left.end, sectorShift: sectorShift) == right.place
      && (left.mark == right.mark || (isCommitted(left) && isCommitted(right)))
  }

  /// Inserts a run where nothing is mapped.
  private func insert(_ run: Run) {
    let leaf = leaf(of: run.first)
    let index = upper(leaf, run.first)
    let runs = leaves[leaf].runs
    if index > 0, continues(runs[index - 1], run) {
      runs[index - 1].end = run.end
      if index < leaves[leaf].count, continues(runs[index - 1], runs[index]) {
        runs[index - 1].end = runs[index].end
        delete(leaf, index)
      }
      return
    }
    if index < leaves[leaf].count, continues(run, runs[index]) {
      runs[index].first = run.first
      runs[index].place = run.place
      if index == 0 { keys[leaf] = run.first }
      return
    }
    add(run, leaf, index)
  }

  private func add(_ run: Run, _ leaf: Int, _ index: Int) {
    var leaf = leaf
    var index = index
    if leaves[leaf].count == ExtentMap.fanout {
      if index == ExtentMap.fanout, leaf + 1 == leafCount {
        // Runs that come in a row leave full leaves behind them.
        addLeaf(at: leaf + 1)
        leaf += 1
        index = 0
      } else {
        split(leaf)
        if index > leaves[leaf].count {
          index -= leaves[leaf].count
          leaf += 1
        }
      }
    }
    let runs = leaves[leaf].runs
    (runs + index + 1).update(from: runs + index, count: leaves[leaf].count - index)
    runs[index] = run
    leaves[leaf].count += 1
    count += 1
    if index == 0 { keys[leaf] = run.first }
  }

  private func delete(_ leaf: Int, _ index: Int) {
    let runs = leaves[leaf].runs
    leaves[leaf].count -= 1
    count -= 1
    (runs + index).update(from: runs + index + 1, count: leaves[leaf].count - index)
    if leaves[leaf].count > 0 {
      if index == 0 { keys[leaf] = runs[0].first }
    } else if leafCount > 1 {
      removeLeaf(leaf)
    }
  }

  private func addLeaf(at index: Int) {
    if leafCount == leafCapacity {
      let larger = leafCapacity * 2
      let leaves = UnsafeMutablePointer<Leaf>.allocate(capacity: larger)
      let keys = UnsafeMutablePointer<UInt64>.allocate(capacity: larger)
      leaves.update(from: self.leaves, count: leafCount)
      keys.update(from: self.keys, count: leafCount)
      self.leaves.deallocate()
      self.keys.deallocate()
      self.leaves = leaves
      self.keys = keys
      leafCapacity = larger
    }
    (leaves + index + 1).update(from: leaves + index, count: leafCount - index)
    (keys + index + 1).update(from: keys + index, count: leafCount - index)
    leaves[index] = Leaf(runs: .allocate(capacity: ExtentMap.fanout), count: 0)
    keys[index] = 0
    leafCount += 1
  }

  private func removeLeaf(_ index: Int) {
    leaves[index].runs.deallocate()
    leafCount -= 1
    (leaves + index).update(from: leaves + index + 1, count: leafCount - index)
    (keys + index).update(from: keys + index + 1, count: leafCount - index)
  }

  private func split(_ leaf: Int) {
    addLeaf(at: leaf + 1)
    let half = leaves[leaf].count / 2
    let rest = leaves[leaf].count - half
    leaves[leaf + 1].runs.update(from: leaves[leaf].runs + half, count: rest)
    leaves[leaf + 1].count = rest
    leaves[leaf].count = half
    keys[leaf + 1] = leaves[leaf + 1].runs[0].first
  }

  // MARK: Forgetting

  /// Merges what continues each other and forgets committed runs, until an eighth is free.
  private func relieve() {
    let goal = cap - cap / 8
    var visits = leafCount
    while count > goal, visits > 0 {
      visits -= 1
      if hand >= leafCount { hand = 0 }
      let before = leaves[hand].count
      merge(hand)
      if leaves[hand].count * 4 > before * 3 { forget(hand) }
      if leaves[hand].count == 0, leafCount > 1 { removeLeaf(hand) } else { hand += 1 }
    }
    // When nearly all is uncommitted: do not look again for every insertion.
    relieveAt = max(cap, count + cap / 8)
  }

  private func merge(_ leaf: Int) {
    let runs = leaves[leaf].runs
    guard leaves[leaf].count > 1 else { return }
    var kept = 0
    for index in 1..<leaves[leaf].count {
      if continues(runs[kept], runs[index]) {
        runs[kept].end = runs[index].end
      } else {
        kept += 1
        runs[kept] = runs[index]
      }
    }
    count -= leaves[leaf].count - (kept + 1)
    leaves[leaf].count = kept + 1
  }

  private func forget(_ leaf: Int) {
    let runs = leaves[leaf].runs
    var kept = 0
    for index in 0..<leaves[leaf].count where !isCommitted(runs[index]) {
      runs[kept] = runs[index]
      kept += 1
    }
    count -= leaves[leaf].count - kept
    leaves[leaf].count = kept
    if kept > 0 { keys[leaf] = runs[0].first }
  }
}
