// SPDX-License-Identifier: Apache-2.0
// Placements that are not yet durable, kept apart from the durable bits so that a commit
// can take exactly those up to a mark, even where later ones share their page.
//
// Invariants: runs do not overlap; none crosses a bitmap page; those of a page are in the
// order of their blocks, in shelves of at most `DscowPending.shelfSize`, none of them empty. A
// guest that writes all over a page puts runs between others, and a shelf is all that moves.

import Posix

/// The uncommitted half of a dscow mapping.
struct DscowPending {
  /// A placement, or a part of one.
  struct Run {
    var blocks: BlockRange
    var mark: Mark
    /// How many of the blocks have no durable bit yet.
    var fresh: UInt64
  }

  /// How many runs stand in one shelf at most.
  static let shelfSize = 64

  private var pages: [UInt64: [[Run]]] = [:]
  /// Blocks that have a place only here.
  private(set) var fresh: UInt64 = 0

  /// What is pending at a block: a run that holds it, or else the first block after it in
  /// its page that is pending.
  func find(_ block: UInt64) -> (run: Run?, next: UInt64?) {
    guard let shelves = pages[block / DscowBitmap.blocksPerPage] else { return (nil, nil) }
    let at = Self.shelf(in: shelves, of: block)
    let after = Self.firstIndex(in: shelves[at], after: block)
    if after > 0, shelves[at][after - 1].blocks.contains(block) {
      return (shelves[at][after - 1], nil)
    }
    if after < shelves[at].count { return (nil, shelves[at][after].blocks.first) }
    return (nil, at + 1 < shelves.count ? shelves[at + 1][0].blocks.first : nil)
  }

  /// The index of the last shelf that begins at or before a block, or of the first.
  private static func shelf(in shelves: [[Run]], of block: UInt64) -> Int {
    var low = 0
    var high = shelves.count
    while low < high {
      let middle = (low + high) / 2
      if shelves[middle][0].blocks.first <= block { low = middle + 1 } else { high = middle }
    }
    return max(low - 1, 0)
  }

  /// The index of the first run that begins after a block.
  private static func firstIndex(in runs: [Run], after block: UInt64) -> Int {
    var low = 0
    var high = runs.count
    while low < high {
      let middle = (low + high) / 2
      if runs[middle].blocks.first <= block { low = middle + 1 } else { high = middle }
    }
    return low
  }

  /// Takes in a run that crosses no page; false, and nothing has changed, when another one has a
  /// block of it.
  @discardableResult
  mutating func insert(_ run: Run) -> Bool {
    let page = run.blocks.first / DscowBitmap.blocksPerPage
    guard Self.insert(run, into: &pages[page, default: []]) else { return false }
    fresh += run.fresh
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
    shelves[at].insert(run, at: index)
    guard shelves[at].count > shelfSize else { return true }
    let rest = Array(shelves[at][(shelfSize / 2)...])
    shelves[at].removeSubrange((shelfSize / 2)...)
    shelves.insert(rest, at: at + 1)
    return true
  }

  /// The pages that have runs up to a mark, in order, with those runs' blocks.
  func runs(upTo mark: Mark) -> [(page: UInt64, runs: [BlockRange])] {
    pages.keys.sorted().compactMap { page in
      let runs = (pages[page] ?? []).joined().filter { $0.mark <= mark }.map(\.blocks)
      return runs.isEmpty ? nil : (page, runs)
    }
  }

  /// Takes out the runs that meet a condition; returns how many fresh blocks they had.
  @discardableResult
  mutating func remove(where condition: (Run) -> Bool) -> UInt64 {
    var removed: UInt64 = 0
    for page in Array(pages.keys) {
      guard var shelves = pages[page] else { continue }
      var changed = false
      for at in shelves.indices {
        let count = shelves[at].count
        shelves[at].removeAll { run in
          guard condition(run) else { return false }
          removed += run.fresh
          return true
        }
        changed = changed || shelves[at].count < count
      }
      guard changed else { continue }
      shelves.removeAll(where: \.isEmpty)
      pages[page] = shelves.isEmpty ? nil : shelves
    }
    fresh -= removed
    return removed
  }
}
