// SPDX-License-Identifier: Apache-2.0
// Uncommitted placements against a plain list of them: enough of one group to fill and empty many
// shelves.

import DiskModel
import Testing
import TestSupport

@testable import DiskFormats

@Suite struct PendingTests {
  static let blocks = Int(DscowBitmap.blocksPerPage) + 2000

  @Test(arguments: [1, 2, 3, 4]) func agreesWithAList(seed: UInt64) {
    var random = SplitMix64(seed: seed)
    var pending = PendingPlacements(
      blocksPerGroup: DscowBitmap.blocksPerPage, blockSize: 4096)
    var list: [PendingPlacements.Run] = []
    var mark: Mark = 0
    var committed: UInt64 = 0
    for _ in 0..<3000 {
      // Near the end of the first page and the beginning of the second.
      let block = UInt64(Self.blocks - 1 - random.below(4000))
      let next = list.map(\.blocks.first).filter { $0 > block && Self.page($0) == Self.page(block) }
        .min()
      let holder = list.first { $0.blocks.contains(block) }
      let found = pending.find(block)
      #expect(found.run?.mark == holder?.mark)
      // One that another has a block of, from before it or behind it, is refused.
      let end = (Self.page(block) + 1) * DscowBitmap.blocksPerPage
      let wide = BlockRange(block, min(end, next.map { $0 + 1 } ?? block + 1) - block)
      if holder != nil || next != nil {
        let isTaken = pending.insert(Self.run(wide, mark + 1))
        #expect(!isTaken)
      }
      guard holder == nil else { continue }
      #expect(found.next == next)
      let room = min(next ?? UInt64.max, (Self.page(block) + 1) * DscowBitmap.blocksPerPage) - block
      let count = min(room, UInt64(1 + random.below(3)))
      mark += 1
      let run = Self.run(BlockRange(block, count), mark)
      let isTaken = pending.insert(run)
      #expect(isTaken)
      list.append(run)
      guard random.below(100) == 0 else { continue }
      // Everything at times, and marks that were never given.
      let upTo = random.below(3) == 0 ? mark + 1 : mark - min(mark, UInt64(random.below(100)))
      Self.compare(pending.runs(upTo: upTo), list.filter { $0.mark <= upTo })
      let gone = list.filter { $0.mark <= upTo }.reduce(0) { $0 + $1.fresh }
      if random.below(2) == 0 {
        pending.commit(upTo: upTo)
        committed += gone
      } else {
        let removed = pending.remove { $0.mark <= upTo }
        #expect(removed.reduce(0) { $0 + $1.fresh } == gone)
      }
      list.removeAll { $0.mark <= upTo }
      Self.compare(pending.runs(upTo: .max), list)
      #expect(pending.isEmpty == list.isEmpty)
      #expect(pending.fresh == list.reduce(0) { $0 + $1.fresh })
      #expect(pending.placed == committed + pending.fresh)
    }
  }

  /// A provisional mark is none that a commit has; one that is gone is marked no more.
  @Test func marksGivenLater() {
    var pending = PendingPlacements(blocksPerGroup: 1000, blockSize: 4096)
    pending.isMarkedLater = true
    let marks = (0..<200).map { pending.place(BlockRange(UInt64($0) * 2), at: UInt64($0)) }
    #expect(marks.allSatisfy(\.isProvisional) && Set(marks).count == 200)
    #expect(pending.lastMark == 0 && pending.runs(upTo: 1 << 62).isEmpty)
    // In any order, and some of them never.
    for (index, mark) in marks.enumerated().reversed() where index % 3 != 0 {
      pending.mark(mark, as: UInt64(200 - index))
    }
    let few = pending.runs(upTo: 100).flatMap(\.runs).map(\.blocks.first)
    var expected: [UInt64] = []
    for index: UInt64 in 100..<200 where index % 3 != 0 { expected.append(index * 2) }
    #expect(few == expected)
    pending.commit(upTo: 1 << 62)
    #expect(pending.fresh == 67 && pending.find(0).run?.mark == marks[0])
    #expect(pending.remove { $0.mark == marks[3] }.count == 1)
    pending.mark(marks[3], as: 300)
    pending.insert(Self.run(BlockRange(6), 301))
    pending.mark(marks[3], as: 302)
    #expect(pending.find(6).run?.mark == 301 && pending.lastMark == 301)
    for (index, mark) in marks.enumerated() where index % 3 == 0 {
      pending.mark(mark, as: UInt64(400 + index))
    }
    pending.commit(upTo: 1000)
    #expect(pending.isEmpty && pending.fresh == 0)
  }

  static func run(_ blocks: BlockRange, _ mark: Mark) -> PendingPlacements.Run {
    PendingPlacements.Run(blocks: blocks, offset: blocks.first * 4096, mark: mark)
  }

  static func page(_ block: UInt64) -> UInt64 { block / DscowBitmap.blocksPerPage }

  static func compare(
    _ got: [(group: UInt64, runs: [PendingPlacements.Run])], _ list: [PendingPlacements.Run]
  ) {
    let sorted = list.map(\.blocks).sorted { $0.first < $1.first }
    #expect(got.flatMap { $0.runs.map(\.blocks) } == sorted)
    #expect(got.map(\.group) == Set(sorted.map { page($0.first) }).sorted())
  }
}
