// Placements that are not yet durable, kept apart from the durable bits so that a commit
// can take exactly those up to a mark, even where later ones share their page.
//
// Invariants: runs do not overlap; none crosses a bitmap page; those of a page are in the
// order of their blocks.

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

  private var pages: [UInt64: [Run]] = [:]
  /// Blocks that have a place only here.
  private(set) var fresh: UInt64 = 0

  /// What is pending at a block: a run that holds it, or else the first block after it in
  /// its page that is pending.
  func find(_ block: UInt64) -> (run: Run?, next: UInt64?) {
    guard let runs = pages[block / DscowBitmap.blocksPerPage] else { return (nil, nil) }
    let after = Self.firstIndex(in: runs, after: block)
    if after > 0, runs[after - 1].blocks.contains(block) { return (runs[after - 1], nil) }
    return (nil, after < runs.count ? runs[after].blocks.first : nil)
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

  /// Takes in a run that overlaps none and crosses no page.
  mutating func insert(_ run: Run) {
    let page = run.blocks.first / DscowBitmap.blocksPerPage
    let index = Self.firstIndex(in: pages[page, default: []], after: run.blocks.first)
    pages[page, default: []].insert(run, at: index)
    fresh += run.fresh
  }

  /// The pages that have runs up to a mark, in order, with those runs' blocks.
  func runs(upTo mark: Mark) -> [(page: UInt64, runs: [BlockRange])] {
    pages.keys.sorted().compactMap { page in
      let runs = (pages[page] ?? []).filter { $0.mark <= mark }.map(\.blocks)
      return runs.isEmpty ? nil : (page, runs)
    }
  }

  /// Takes out the runs that meet a condition; returns how many fresh blocks they had.
  @discardableResult
  mutating func remove(where condition: (Run) -> Bool) -> UInt64 {
    var removed: UInt64 = 0
    for page in Array(pages.keys) {
      guard var runs = pages[page] else { continue }
      let before = runs.count
      runs.removeAll { run in
        guard condition(run) else { return false }
        removed += run.fresh
        return true
      }
      guard runs.count < before else { continue }
      pages[page] = runs.isEmpty ? nil : runs
    }
    fresh -= removed
    return removed
  }
}
