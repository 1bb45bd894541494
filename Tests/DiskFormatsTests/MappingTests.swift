// SPDX-License-Identifier: Apache-2.0
// The answers of an open dscow disk, one rule at a time.

import BlockIO
import DiskModel
import Fakes
import Testing
import TestSupport

@testable import DiskFormats

@Suite struct MappingTests {
  static let unit: UInt64 = 4096
  static let sectors: UInt64 = 8

  /// A disk of `blocks` blocks of 4 KiB, its base shorter by half a block and `short` blocks.
  struct Bench {
    let store = MemoryStore("store")
    let base: MemoryStore
    let disk: Dscow
    /// The sector of the first block in the store.
    var first: UInt64 { disk.header.firstBlock / 512 }

    init(blocks: UInt64 = 16, short: UInt64 = 4) throws {
      base = MemoryStore("base", size: (blocks - short) * unit - unit / 2)
      try Dscow.create(
        store: store, base: base, baseName: "base", blockSize: UInt32(unit), size: blocks * unit)
      disk = try Dscow.open(store: store, base: base, writable: true)
    }

    func commit(_ mark: Mark) throws {
      try disk.commitPlan(upTo: mark).carry(to: store)
      disk.committed(upTo: mark)
    }

    func inStore(_ block: UInt64, _ count: UInt64, mark: Mark = 0) -> Extent {
      Extent(
        BlockRange(block, count), .device(0, sector: first + block * sectors), writable: true,
        mark: mark)
    }

    func inBase(_ block: UInt64, _ count: UInt64) -> Extent {
      Extent(BlockRange(block, count), .device(1, sector: block * sectors), writable: false)
    }

    func nowhere(_ block: UInt64, _ count: UInt64) -> Extent {
      Extent(BlockRange(block, count), .zero, writable: false)
    }
  }

  @Test func aFreshDiskIsItsBaseAndThenZeroes() throws {
    let bench = try Bench()
    // Block 11 is the base's last, in half.
    #expect(try bench.disk.find(0, limit: 100) == bench.inBase(0, 12))
    #expect(try bench.disk.find(5, limit: 3) == bench.inBase(5, 3))
    #expect(try bench.disk.find(12, limit: 100) == bench.nowhere(12, 4))
    #expect(bench.disk.allocatedBlocks == 0)
    #expect(throws: ImageError.self) { try bench.disk.find(16, limit: 1) }
  }

  @Test func placesAreUncommittedUntilTheirCommit() throws {
    let bench = try Bench()
    let one = try bench.disk.place(BlockRange(3), whole: false)
    #expect(one == Placement(bench.inStore(3, 1, mark: 1), .copy(from: .device(1, sector: 24))))
    let two = try bench.disk.place(BlockRange(5, 4), whole: true)
    #expect(two == Placement(bench.inStore(5, 4, mark: 2)))
    let three = try bench.disk.place(BlockRange(13), whole: false)
    #expect(three == Placement(bench.inStore(13, 1, mark: 3), .zero))
    #expect(bench.disk.allocatedBlocks == 6)
    #expect(try bench.disk.find(3, limit: 9) == bench.inStore(3, 1, mark: 1))
    #expect(try bench.disk.find(4, limit: 9) == bench.inBase(4, 1))
    #expect(try bench.disk.find(6, limit: 9) == bench.inStore(6, 3, mark: 2))
    // A block that has a place keeps it, and its mark; the answer bears none, being no news.
    #expect(
      try bench.disk.place(BlockRange(7, 2), whole: true)
        == Placement(bench.inStore(7, 2)))
    try bench.commit(2)
    #expect(try bench.disk.find(6, limit: 9) == bench.inStore(6, 3))
    #expect(try bench.disk.find(13, limit: 9) == bench.inStore(13, 1, mark: 3))
    #expect(bench.disk.allocatedBlocks == 6)
    let again = try Dscow.open(store: bench.store, base: bench.base, writable: true)
    #expect(try again.find(5, limit: 9) == bench.inStore(5, 4))
    #expect(try again.find(13, limit: 9) == bench.nowhere(13, 3))
    #expect(again.allocatedBlocks == 5)
  }

  /// Places for a run stop where something is mapped otherwise.
  @Test func runsEndWhereTheMappingChanges() throws {
    let bench = try Bench()
    _ = try bench.disk.place(BlockRange(6), whole: true)
    #expect(
      try bench.disk.place(BlockRange(2, 10), whole: true)
        == Placement(bench.inStore(2, 4, mark: 2)))
    try bench.commit(1)
    #expect(
      try bench.disk.place(BlockRange(6, 4), whole: true) == Placement(bench.inStore(6, 1)))
    #expect(
      try bench.disk.place(BlockRange(7, 9), whole: true)
        == Placement(bench.inStore(7, 5, mark: 3)))
  }

  /// A plan has the bits up to its mark and no others, of one byte or not.
  @Test func aPlanLeavesLaterPlacementsOut() throws {
    let bench = try Bench()
    for block: UInt64 in [0, 2, 1, 9] { _ = try bench.disk.place(BlockRange(block), whole: true) }
    let plan = try bench.disk.commitPlan(upTo: 2)
    #expect(plan.stages.count == 1)
    #expect(plan.stages[0].count == 1)
    #expect(plan.stages[0][0].offset == 8192)
    #expect(plan.stages[0][0].bytes.count == 4096)
    #expect(plan.stages[0][0].bytes[0] == 0b101)
    #expect(plan.stages[0][0].bytes[1] == 0)
    // Placed between plan and commit: not committed by it.
    _ = try bench.disk.place(BlockRange(4), whole: true)
    try plan.carry(to: bench.store)
    bench.disk.committed(upTo: 2)
    #expect(try bench.disk.commitPlan(upTo: .max).stages[0][0].bytes[0] == 0b10111)
    #expect(try bench.disk.commitPlan(upTo: 2).stages.isEmpty)
  }

  @Test func anAbandonedPlaceIsNone() throws {
    let bench = try Bench()
    _ = try bench.disk.place(BlockRange(1, 3), whole: true)
    bench.disk.abandon(1)
    #expect(try bench.disk.find(0, limit: 12) == bench.inBase(0, 12))
    #expect(bench.disk.allocatedBlocks == 0)
    #expect(try bench.disk.commitPlan(upTo: .max).stages.isEmpty)
    // Marks are not used twice.
    #expect(try bench.disk.place(BlockRange(1), whole: true).extent.mark == 2)
  }

  @Test func whatWasGrantedIsTakenUp() throws {
    let bench = try Bench()
    #expect(throws: ImageError.self) { try bench.disk.granted(bench.inStore(3, 1, mark: 1)) }
    #expect(bench.disk.takeMarks())
    let grant = try #require(bench.disk.grant())
    #expect(grant == Grant(BlockRange(0, 16), bench.inStore(0, 16).place))
    try bench.disk.granted(bench.inStore(3, 1, mark: 1))
    #expect(try bench.disk.find(3, limit: 9) == bench.inStore(3, 1, mark: 1))
    #expect(try bench.disk.place(BlockRange(3), whole: false) == Placement(bench.inStore(3, 1)))
    // Marks of its own are none until the target has given others.
    let own = Mark.firstProvisional + 1
    #expect(
      try bench.disk.place(BlockRange(5), whole: true) == Placement(bench.inStore(5, 1, mark: own)))
    try bench.disk.granted(bench.inStore(7, 2, mark: 2))
    #expect(
      try bench.disk.place(BlockRange(9), whole: true)
        == Placement(bench.inStore(9, 1, mark: own + 1)))
    #expect(bench.disk.allocatedBlocks == 5)
    for wrong in [
      bench.inStore(16, 1, mark: 9), bench.inStore(15, 2, mark: 9), bench.inStore(10, 1),
      bench.inBase(10, 1),
    ] {
      #expect(throws: ImageError.self) { try bench.disk.granted(wrong) }
    }
    try bench.commit(2)
    let again = try Dscow.open(store: bench.store, base: bench.base, writable: true)
    #expect(try again.find(3, limit: 1) == bench.inStore(3, 1))
    #expect(try again.find(7, limit: 2) == bench.inStore(7, 2))
    #expect(try again.find(5, limit: 1) == bench.inBase(5, 1))
    #expect(try bench.disk.commitPlan(upTo: 1 << 62).stages.isEmpty)
    bench.disk.marked(own, as: 3)
    bench.disk.abandon(own + 1)
    #expect(try bench.disk.find(5, limit: 1) == bench.inStore(5, 1, mark: 3))
    #expect(try bench.disk.find(9, limit: 1) == bench.inBase(9, 1))
    // What has come to nothing is marked no more.
    bench.disk.marked(own + 1, as: 4)
    try bench.commit(4)
    let last = try Dscow.open(store: bench.store, base: bench.base, writable: true)
    #expect(try last.find(5, limit: 1) == bench.inStore(5, 1))
    #expect(try last.find(9, limit: 1) == bench.inBase(9, 1))
  }

  @Test func whatIsToldTwiceIsNoNews() throws {
    let bench = try Bench()
    #expect(bench.disk.takeMarks())
    try bench.disk.granted(bench.inStore(3, 1, mark: 1))
    try bench.disk.granted(bench.inStore(7, 2, mark: 2))
    try bench.disk.granted(bench.inStore(2, 7, mark: 5))
    #expect(bench.disk.allocatedBlocks == 7)
    try bench.disk.granted(bench.inStore(2, 7, mark: 6))
    #expect(bench.disk.allocatedBlocks == 7)
    #expect(try bench.disk.find(3, limit: 9) == bench.inStore(3, 1, mark: 1))
    #expect(try bench.disk.find(4, limit: 9) == bench.inStore(4, 3, mark: 5))
    try bench.commit(2)
    let some = try Dscow.open(store: bench.store, base: bench.base, writable: true)
    #expect(try some.find(2, limit: 1) == bench.inBase(2, 1))
    #expect(try some.find(3, limit: 9) == bench.inStore(3, 1))
    #expect(try some.find(7, limit: 9) == bench.inStore(7, 2))
    // What is committed may be told, too: its flush was not heard of.
    try bench.disk.granted(bench.inStore(3, 2, mark: 7))
    #expect(bench.disk.allocatedBlocks == 7)
    try bench.commit(7)
    let all = try Dscow.open(store: bench.store, base: bench.base, writable: true)
    #expect(try all.find(2, limit: 9) == bench.inStore(2, 7))
  }

  @Test func theMappingIsALayer() throws {
    let bench = try Bench()
    let layered = try #require(bench.disk.layered)
    #expect(layered.layer == Layer(BlockRange(0, 16), bench.inStore(0, 16).place))
    _ = try bench.disk.place(BlockRange(2, 2), whole: true)
    // What is under a block is the base's, whatever became of the block.
    #expect(try layered.under(0, limit: 99) == bench.inBase(0, 12))
    #expect(try layered.under(3, limit: 2) == bench.inBase(3, 2))
    #expect(try layered.under(12, limit: 99) == Extent(BlockRange(12, 4), .zero, writable: false))
    func words() throws -> [UInt64] {
      let words = UnsafeMutableBufferPointer<UInt64>.allocate(capacity: 2)
      defer { words.deallocate() }
      try layered.readPresent(from: 0, into: words)
      return Array(words)
    }
    #expect(try words() == [0, 0])
    try bench.commit(1)
    #expect(try words() == [0b1100, 0])
    // Bits past the last block mean nothing, and are not told.
    try bench.store.write([0xff, 0xff, 0xff], at: bench.disk.header.bitmapOffset)
    #expect(try words() == [0xffff, 0])
    let reader = try Dscow.open(store: bench.store, base: bench.base, writable: false)
    #expect(reader.layered == nil)
  }

  @Test func discards() throws {
    let bench = try Bench()
    let all = BlockRange(0, 16)
    #expect(try bench.disk.discard(all, zeroing: false) == .nothing(blocks: 12))
    #expect(try bench.disk.discard(BlockRange(12, 4), zeroing: true) == .nothing(blocks: 4))
    _ = try bench.disk.place(BlockRange(2, 2), whole: true)
    #expect(
      try bench.disk.discard(BlockRange(2, 9), zeroing: false)
        == .zero(bench.inStore(2, 2)))
    #expect(try bench.disk.discard(all, zeroing: false) == .nothing(blocks: 2))
    #expect(
      try bench.disk.discard(BlockRange(4, 12), zeroing: true)
        == .zero(bench.inStore(4, 8, mark: 2)))
    #expect(bench.disk.allocatedBlocks == 10)
  }

  @Test func whatAFormerWorkerPlacedIsTakenOver() throws {
    let bench = try Bench(blocks: 3 * 32768)
    let crossing = bench.inStore(32760, 16, mark: 7)
    let committed = bench.inStore(3, 2, mark: 8)
    _ = try bench.disk.place(BlockRange(3, 2), whole: true)
    try bench.commit(1)
    let heir = try Dscow.open(store: bench.store, base: bench.base, writable: true)
    try heir.restore([crossing, committed])
    #expect(heir.allocatedBlocks == 18)
    #expect(try heir.find(32760, limit: 99).mark == 7)
    #expect(try heir.find(32770, limit: 99).blocks == BlockRange(32770, 6))
    #expect(try heir.place(BlockRange(40000), whole: true).extent.mark == 9)
    try heir.commitPlan(upTo: 8).carry(to: bench.store)
    heir.committed(upTo: 8)
    #expect(heir.allocatedBlocks == 19)
    #expect(try heir.find(32760, limit: 99) == bench.inStore(32760, 16))
    let last = try Dscow.open(store: bench.store, base: bench.base, writable: true)
    #expect(last.allocatedBlocks == 18)
  }

  @Test func whatNobodyPlacedIsNotTakenOver() throws {
    let bench = try Bench()
    for extents in [
      [Extent(BlockRange(3), .device(0, sector: 8), writable: true, mark: 1)],
      [Extent(BlockRange(3), .device(1, sector: 24), writable: true, mark: 1)],
      [Extent(BlockRange(3), .zero, writable: true, mark: 1)],
      [bench.inStore(3, 1)],
      [bench.inStore(15, 2, mark: 1)],
      [bench.inStore(16, 1, mark: 1)],
      [bench.inStore(3, .max, mark: 1)],
      [bench.inStore(3, 0, mark: 1)],
      [bench.inStore(3, 1, mark: 2), bench.inStore(4, 1, mark: 1)],
      [bench.inStore(3, 2, mark: 1), bench.inStore(4, 1, mark: 2)],
    ] {
      #expect(throws: ImageError.self) { try bench.disk.restore(extents) }
      #expect(bench.disk.allocatedBlocks == 0)
    }
  }

  @Test func requestsOutsideTheDiskAreRefused() throws {
    let bench = try Bench()
    for range in [BlockRange(16), BlockRange(15, 2), BlockRange(3, 0), BlockRange(1, .max)] {
      #expect(throws: ImageError.self) { try bench.disk.place(range, whole: true) }
      #expect(throws: ImageError.self) { try bench.disk.discard(range, zeroing: true) }
    }
    let reader = try Dscow.open(store: bench.store, base: bench.base, writable: false)
    #expect(throws: ImageError.self) { try reader.place(BlockRange(0), whole: true) }
    #expect(throws: ImageError.self) { try reader.discard(BlockRange(0), zeroing: true) }
    _ = try bench.disk.place(BlockRange(0), whole: true)
    try bench.commit(1)
    #expect(try !reader.find(0, limit: 1).writable)
  }

  @Test func aDiskOf64TiBInLittleMemory() throws {
    let store = MemoryStore("store")
    let base = MemoryStore("base", size: 1 << 40)
    try Dscow.create(
      store: store, base: base, baseName: "base", blockSize: 4096, size: 64 << 40)
    #expect(store.allocatedBytes() <= 16384)
    let disk = try Dscow.open(store: store, base: base, writable: true)
    let before = disk.allocatedBlocks
    let last: UInt64 = (64 << 40) / 4096 - 1
    #expect(try disk.find(last, limit: .max) == Extent(BlockRange(last), .zero, writable: false))
    let placed = try disk.place(BlockRange(last), whole: false)
    #expect(placed.preparation == .zero)
    #expect(
      placed.extent.place
        == .device(0, sector: (disk.header.firstBlock + last * 4096) / 512))
    // A whole run is cut at the bitmap page; a search looks at a bounded number of them.
    #expect(try disk.place(BlockRange(32000, 1 << 30), whole: true).extent.blocks.count == 768)
    #expect(try disk.find(40000, limit: .max).blocks.count < 17 * 32768)
    try disk.commitPlan(upTo: .max).carry(to: store)
    disk.committed(upTo: .max)
    // Far more pages than are kept.
    var random = SplitMix64(seed: 64)
    for _ in 0..<4000 {
      let block = UInt64(random.below(Int(last)))
      let isFirst = block >= 32000 && block < 32768
      #expect(try disk.find(block, limit: 1).writable == isFirst)
    }
    #expect(disk.allocatedBlocks == before + 769)
    #expect(store.allocatedBytes() <= 16384 + 8192)
  }

  /// A map has every block once, where it is, in runs as long as they can be.
  @Test(arguments: [UInt64(0), 100, 40_000, 66_000]) func theMapOfRandomBits(short: UInt64) throws {
    let bench = try Bench(blocks: 66_001, short: short)
    var random = SplitMix64(seed: short)
    var block: UInt64 = 0
    while block < 66_001 {
      // Some runs end with a page, some go on over one.
      let count = min(
        66_001 - block, random.chance(80) ? 1 + random.next() % 40 : 1 + random.next() % 40_000)
      if random.chance(50) { _ = try bench.disk.place(BlockRange(block, count), whole: true) }
      block += count
    }
    try bench.commit(.max)
    var runs: [Extent] = []
    let header = try Dscow.map(store: bench.store) { runs.append($0) }
    #expect(header.blocks == 66_001)
    var at: UInt64 = 0
    var last: Extent?
    for run in runs {
      #expect(run.blocks.first == at && run.blocks.count > 0)
      if let last {
        #expect(last.place.advanced(by: last.blocks.count * Self.sectors) != run.place)
      }
      for block in [run.blocks.first, run.blocks.end - 1] {
        let found = try bench.disk.find(block, limit: 1)
        #expect(found.place == run.place.advanced(by: (block - run.blocks.first) * Self.sectors))
      }
      var inside = run.blocks.first
      while inside < run.blocks.end {
        let found = try bench.disk.find(inside, limit: run.blocks.end - inside)
        #expect(found.place == run.place.advanced(by: (inside - run.blocks.first) * Self.sectors))
        inside = found.blocks.end
      }
      at = run.blocks.end
      last = run
    }
    #expect(at == 66_001)
  }

  /// The word-wise search agrees with a look at each bit.
  @Test func runsOfRandomBits() throws {
    let bench = try Bench(blocks: 33000, short: 100)
    var random = SplitMix64(seed: 5)
    var placed = [Bool](repeating: false, count: 33000)
    for _ in 0..<300 {
      let first = random.below(33000)
      let range = BlockRange(UInt64(first), UInt64(min(33000 - first, 1 + random.below(200))))
      let extent = try bench.disk.place(range, whole: true).extent
      for block in extent.blocks.first..<extent.blocks.end { placed[Int(block)] = true }
    }
    try bench.commit(.max)
    for _ in 0..<2000 {
      let first = random.below(33000)
      let limit = 1 + random.below(400)
      var end = first + 1
      while end < min(33000, first + limit), placed[end] == placed[first],
        placed[first] || (end < 32900) == (first < 32900)
      { end += 1 }
      let found = try bench.disk.find(UInt64(first), limit: UInt64(limit))
      #expect(found.writable == placed[first])
      #expect(found.blocks == BlockRange(UInt64(first), UInt64(end - first)))
    }
  }
}
