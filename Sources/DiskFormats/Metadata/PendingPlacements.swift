// SPDX-License-Identifier: Apache-2.0
// Placements that are not yet durable, kept apart from the durable tables so that a commit can
// take exactly those up to a mark, even where later ones share their table.
//
// Invariants:
// - Runs do not overlap; none crosses a group (the blocks of one table, or of one page of a
//   bitmap). A run's blocks lie one after the other in device 0.
// - The runs of a group are in the order of their blocks, in shelves of at most `shelfSize`, none
//   of them empty. A guest that writes all over a group puts runs between others, and a shelf is
//   all that moves.
// - No mark is given twice, nor one that is less than any that has been taken in. Where the target
//   gives the marks, a run has a provisional one until it is marked, and is not committed before.

import DiskModel

/// The uncommitted half of a mapping.
struct PendingPlacements {
  /// A placement, or a part of one.
  struct Run {
    var blocks: BlockRange
    /// Where the first block lives in device 0, in bytes.
    var offset: UInt64
    var mark: Mark
    /// How many of the blocks have no durable place yet.
    var fresh: UInt64

    /// A run of which no block has a durable place, unless that is said.
    init(blocks: BlockRange, offset: UInt64, mark: Mark, fresh: UInt64? = nil) {
      self.blocks = blocks
      self.offset = offset
      self.mark = mark
      self.fresh = fresh ?? blocks.count
    }
  }

  /// How many runs stand in one shelf at most.
  static let shelfSize = 64

  private let blocksPerGroup: UInt64
  private let blockSize: UInt64
  private var groups: [UInt64: [[Run]]] = [:]
  /// Blocks that have a place only here.
  private(set) var fresh: UInt64 = 0
  private var committed: UInt64 = 0
  /// How many blocks have got a place since the image was opened.
  var placed: UInt64 { committed + fresh }
  /// The greatest mark that was given or taken in.
  private(set) var lastMark: Mark = 0
  /// Whether the target gives the marks, those of `place` being provisional.
  var isMarkedLater = false
  /// The last provisional mark, and where the runs are that have one still, by their first block.
  private var lastProvisional: Mark = .firstProvisional
  private var unmarked: [Mark: UInt64] = [:]

  init(blocksPerGroup: UInt64, blockSize: UInt64) {
    self.blocksPerGroup = blocksPerGroup
    self.blockSize = blockSize
  }

  /// Whether nothing is pending.
  var isEmpty: Bool { groups.isEmpty }

  // MARK: Looking

  /// What is pending at a block: the run that holds it, or else the first block after it in
  /// its group that is pending.
  func find(_ block: UInt64) -> (run: Run?, next: UInt64?) {
    guard let shelves = groups[block / blocksPerGroup] else { return (nil, nil) }
    let at = Self.shelf(in: shelves, of: block)
    let after = Self.firstIndex(in: shelves[at], after: block)
    if after > 0, shelves[at][after - 1].blocks.contains(block) {
      return (shelves[at][after - 1], nil)
    }
    if after < shelves[at].count { return (nil, shelves[at][after].blocks.first) }
    return (nil, at + 1 < shelves.count ? shelves[at + 1][0].blocks.first : nil)
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

  /// The groups that have runs up to a mark, in order, with those runs.
  func runs(upTo mark: Mark) -> [(group: UInt64, runs: [Run])] {
    groups.keys.sorted().compactMap { group in
      guard let shelves = groups[group] else { return nil }
      var runs: [Run] = []
      runs.reserveCapacity(shelves.reduce(0) { $0 + $1.count })
      for shelf in shelves {
        for run in shelf where run.mark <= mark { runs.append(run) }
      }
      return runs.isEmpty ? nil : (group, runs)
    }
  }

  /// The index of the last shelf that begins at or before a block, or of the first.
  private static func shelf(in shelves: [[Run]], of block: UInt64) -> Int {
    max(partition(shelves.count) { shelves[$0][0].blocks.first > block } - 1, 0)
  }

  /// The index of the first run that begins after a block.
  private static func firstIndex(in runs: [Run], after block: UInt64) -> Int {
    partition(runs.count) { runs[$0].blocks.first > block }
  }

  /// The first of so many indices for which something is so, as it is for all after it.
  @inline(__always)
  private static func partition(_ count: Int, _ isAfter: (Int) -> Bool) -> Int {
    var (low, high) = (0, count)
    while low < high {
      let middle = (low + high) / 2
      if isAfter(middle) { high = middle } else { low = middle + 1 }
    }
    return low
  }

  // MARK: Changing

  /// Takes in blocks that get a place now, under the next mark, which is returned. They overlap no
  /// run and cross no group.
  mutating func place(_ blocks: BlockRange, at offset: UInt64) -> Mark {
    guard isMarkedLater else {
      let mark = lastMark + 1
      insert(Run(blocks: blocks, offset: offset, mark: mark))
      return mark
    }
    lastProvisional += 1
    unmarked[lastProvisional] = blocks.first
    insert(Run(blocks: blocks, offset: offset, mark: lastProvisional))
    return lastProvisional
  }

  /// A run with a provisional mark gets one that counts; nothing happens when it is gone.
  mutating func mark(_ provisional: Mark, as mark: Mark) {
    guard let block = unmarked.removeValue(forKey: provisional) else { return }
    let group = block / blocksPerGroup
    guard let shelves = groups[group] else { return }
    let at = Self.shelf(in: shelves, of: block)
    let index = Self.firstIndex(in: shelves[at], after: block) - 1
    guard index >= 0, shelves[at][index].mark == provisional else { return }
    groups[group]?[at][index].mark = mark
    skip(to: mark)
  }

  /// Gives no mark up to this one any more.
  mutating func skip(to mark: Mark) { lastMark = max(lastMark, mark) }

  /// Takes in a run that crosses no group; false, and nothing has changed, when another one has a
  /// block of it.
  @discardableResult
  mutating func insert(_ run: Run) -> Bool {
    guard Self.insert(run, into: &groups[run.blocks.first / blocksPerGroup, default: []]) else {
      return false
    }
    fresh += run.fresh
    if !run.mark.isProvisional { skip(to: run.mark) }
    return true
  }

  private static func insert(_ run: Run, into shelves: inout [[Run]]) -> Bool {
    guard !shelves.isEmpty else {
      shelves.append([run])
      return true
    }
    let at = shelf(in: shelves, of: run.blocks.first)
    let index = firstIndex(in: shelves[at], after: run.blocks.first)
    // Without one before it in its shelf it has none before it.
    guard index == 0 || shelves[at][index - 1].blocks.end <= run.blocks.first else { return false }
    let isLast = index == shelves[at].count
    let next = isLast ? at + 1 < shelves.count ? shelves[at + 1][0] : nil : shelves[at][index]
    guard next.map({ run.blocks.end <= $0.blocks.first }) ?? true else { return false }
    if isLast, index == shelfSize, at + 1 == shelves.count {
      // Runs that come in a row leave full shelves behind them.
      shelves.insert([run], at: at + 1)
      return true
    }
    shelves[at].insert(run, at: index)
    guard shelves[at].count > shelfSize else { return true }
    let rest = Array(shelves[at][(shelfSize / 2)...])
    shelves[at].removeSubrange((shelfSize / 2)...)
    shelves.insert(rest, at: at + 1)
    return true
  }

  /// Takes out the runs up to a mark, which are committed.
  mutating func commit(upTo mark: Mark) {
    let before = fresh
    if mark >= lastMark, unmarked.isEmpty {
      groups.removeAll(keepingCapacity: true)
      fresh = 0
    } else {
      take(where: { $0.mark <= mark }, { _ in })
    }
    committed += before - fresh
  }

  /// Takes out the runs that meet a condition and returns them.
  @discardableResult
  mutating func remove(where condition: (Run) -> Bool) -> [Run] {
    var removed: [Run] = []
    take(where: condition) { removed.append($0) }
    for run in removed { unmarked[run.mark] = nil }
    return removed
  }

  @inline(__always)
  private mutating func take(where condition: (Run) -> Bool, _ each: (Run) -> Void) {
    for group in Array(groups.keys) {
      guard var shelves = groups[group] else { continue }
      var (count, blocks) = (0, UInt64(0))
      for at in shelves.indices {
        shelves[at].removeAll { run in
          guard condition(run) else { return false }
          count += 1
          blocks += run.fresh
          each(run)
          return true
        }
      }
      guard count > 0 else { continue }
      fresh -= blocks
      shelves.removeAll(where: \.isEmpty)
      groups[group] = shelves.isEmpty ? nil : shelves
    }
  }
}
