// SPDX-License-Identifier: Apache-2.0
// The map of extents against a table with an entry for every block.

import DiskModel
import Testing
import TestSupport

@testable import Target

@Suite struct ExtentMapTests {
  static let blocks = 3000

  struct Entry: Equatable {
    var place: UInt64
    var writable: Bool
    var mark: Mark
  }

  static func random(_ random: inout SplitMix64, _ mark: Mark) -> Run {
    let first = UInt64(random.below(blocks))
    let longest = random.chance(10) ? 400 : 6
    let end = min(UInt64(blocks), first + 1 + UInt64(random.below(longest)))
    let kind = random.below(4)
    // Mostly places that continue each other, as images have them.
    let place: Place =
      kind == 0 ? .zero : .device(UInt16(kind & 1), sector: 8 * first + (kind == 2 ? 64 : 0))
    return Run(
      first: first, end: end, place: Run.pack(place), mark: mark, writable: random.chance(50))
  }

  @Test(arguments: [(1, 1 << 20), (2, 1 << 20), (3, 300), (4, 16)] as [(UInt64, Int)])
  func agreesWithATable(seed: UInt64, cap: Int) {
    var random = SplitMix64(seed: seed)
    let map = ExtentMap(sectorShift: 3, cap: cap)
    var table = [Entry?](repeating: nil, count: Self.blocks)
    var mark: Mark = 0
    for step in 0..<6000 {
      switch random.below(10) {
      case 0:
        let first = random.below(Self.blocks)
        let end = min(Self.blocks, first + random.below(200))
        map.remove(UInt64(first), UInt64(end))
        for block in first..<max(first, end) { table[block] = nil }
      case 1: map.committed = mark
      default:
        let isUncommitted = random.chance(30)
        if isUncommitted { mark += 1 }
        let run = Self.random(&random, isUncommitted ? mark : 0)
        map.set(run)
        for block in run.first..<run.end {
          table[Int(block)] = Entry(
            place: run.place(of: block, sectorShift: 3), writable: run.writable, mark: run.mark)
        }
      }
      if step % 100 == 99 { check(map, table, isWhole: cap > 100_000, seed) }
      // Beyond the cap there is only what must not be forgotten.
      let uncommitted = table.count { ($0?.mark ?? 0) > map.committed }
      #expect(map.count <= max(cap, 2 * uncommitted) * 5 / 4 + 130)
    }
  }

  private func check(_ map: ExtentMap, _ table: [Entry?], isWhole: Bool, _ seed: UInt64) {
    var last: UInt64 = 0
    var count = 0
    map.forEach { run in
      #expect(run.first >= last && run.first < run.end)
      last = run.end
      count += 1
    }
    #expect(count == map.count)
    for block in 0..<Self.blocks {
      let found = map.find(UInt64(block))
      let wanted = table[block]
      if let found {
        #expect(found.place(of: UInt64(block), sectorShift: 3) == wanted?.place, "seed \(seed)")
        #expect(found.writable == wanted?.writable)
        #expect((found.mark > map.committed) == ((wanted?.mark ?? 0) > map.committed))
      } else {
        #expect(wanted == nil || (!isWhole && (wanted?.mark ?? 0) <= map.committed))
      }
      let next = map.findOrNext(UInt64(block))
      #expect(found == nil || next?.first == found?.first)
      #expect(next.map { $0.end > block } ?? true)
    }
  }

  @Test func continuingRunsAreOne() {
    let map = ExtentMap(sectorShift: 7, cap: 1000)
    let order = [5, 3, 4, 0, 2, 1, 9, 7, 8, 6] as [UInt64]
    for block in order {
      let place = Run.pack(.device(0, sector: 128 * (block + 1)))
      map.set(Run(first: block, end: block + 1, place: place, mark: 0, writable: true))
    }
    #expect(map.count == 1)
    #expect(map.find(7)?.end == 10)
  }

  @Test func aMillionExtentsStayBounded() {
    let map = ExtentMap(sectorShift: 7, cap: 4096)
    for block in 0..<1_000_000 as Range<UInt64> {
      let place = Run.pack(.device(0, sector: block % 2 == 0 ? 0 : 1 << 30))
      map.set(Run(first: block, end: block + 1, place: place, mark: 0, writable: true))
    }
    #expect(map.count <= 4096)
    #expect(map.find(999_999) != nil)
  }
}
