// SPDX-License-Identifier: Apache-2.0
// Grants: first writes that an engine places by itself. One that takes none refuses them all.

import DiskModel
import Glibc
import Target
import TestSupport

extension Rules {
  static let grantRules: [(name: String, check: @Sendable (Rules) throws -> Void)] = [
    ("granted-writes-ask-nothing", { try $0.grantedWrites() }),
    ("granted-placements-are-told-before-questions", { try $0.grantedOrder() }),
    ("grants-end-and-what-they-placed-stays", { try $0.grantedSuccessor() }),
    ("grants-that-cannot-be-are-refused", { try $0.grantRefusals() }),
    ("pools-are-used-in-order", { try $0.pooledWrites() }),
    ("pools-that-cannot-be-are-refused", { try $0.poolRefusals() }),
    ("marks-are-given-where-they-are-provisional", { try $0.givenMarks() }),
  ]

  /// Everything is in the base; some blocks may go to the store. False: the engine takes none.
  private func granted(_ blocks: BlockRange) throws -> Bool {
    let grant = Grant(blocks, place(blocks.first).place)
    guard engine.takesGrants else {
      do throws(AnswerRefusal) {
        try engine.grant(grant)
      } catch { return false }
      throw TrialBroken("takes no grants, but has taken \(grant)")
    }
    try engine.answer(.prime(base(0, 8)))
    try engine.grant(grant)
    return true
  }

  private func told(_ block: UInt64, mark: Mark, line: Int = #line) throws {
    let fault = next()
    try expect(
      fault == .placed(place(block, mark: mark)), "told \(String(describing: fault))", line: line)
  }

  func grantedWrites() throws {
    guard try granted(BlockRange(0, 6)) else { return }
    try ended(write(10, 2, 7), write(16, 8, 8))
    try holds(read(8, 16), [1008, 1009, 7, 7] + old(12..<16) + [UInt64](repeating: 8, count: 8))
    let flush = driver.submit(.flush)
    try told(1, mark: 1)
    try told(2, mark: 2)
    let question = try flushFault(upTo: 2)
    try waits(flush)
    // The next belongs to the next flush.
    try ended(write(24, 1, 9))
    try engine.answer(.flushDone(question))
    try ended(flush)
    let other = write(25, 1, 9, fua: true)
    try told(3, mark: 3)
    let second = try flushFault(upTo: 3)
    try waits(other)
    try engine.answer(.flushDone(second))
    try ended(other)
    try nothing()
    // A block that was not granted.
    let outside = write(48, 1, 9)
    let (id, _) = try writeFault(6, whole: false)
    let mark: Mark = 3 + 1 << 20
    try engine.answer(.map(id, Placement(place(6, mark: mark), .copy(from: base(6).place))))
    try ended(outside)
    try ended(write(0, 1, 9))
    try told(0, mark: mark + 1)
  }

  func grantedOrder() throws {
    guard try granted(BlockRange(0, 8)) else { return }
    try ended(write(8, 1, 7))
    let discard = driver.submit(.discard(8 * 512, 8 * 512))
    try told(1, mark: 1)
    let (id, _) = try discardFault(1, zeroing: false)
    try engine.answer(.map(id, Placement(place(1), .zero)))
    try ended(discard)
    try holds(read(8, 8), zeroes(8))
    // A flush waits for placements under way, and one block keeps its order.
    driver.holdIO()
    let first = write(18, 2, 1)
    let second = write(19, 2, 2)
    try waits(first, second)
    let flush = driver.submit(.flush)
    try waits(first, second, flush)
    driver.release()
    try ended(first, second)
    try told(2, mark: 2)
    try engine.answer(.flushDone(flushFault(upTo: 2)))
    try ended(flush)
    try holds(read(16, 8), [1016, 1017, 1, 2, 2, 1021, 1022, 1023])
  }

  func grantedSuccessor() throws {
    guard try granted(BlockRange(0, 8)) else { return }
    try ended(write(8, 1, 7), write(24, 1, 8))
    try driver.replaceWorker()
    // They may have come in any order.
    let left = engine.uncommitted().sorted { $0.blocks.first < $1.blocks.first }
    try expect(left.map(\.blocks.first) == [1, 3], "told \(left)")
    let request = write(32, 1, 9)
    let (id, _) = try writeFault(4, whole: false)
    try engine.answer(.map(id, Placement(place(4, mark: 3), .copy(from: base(4).place))))
    try ended(request)
    try engine.grant(Grant(BlockRange(0, 8), place(0).place))
    try ended(write(40, 1, 9))
    try engine.grant(nil)
    try told(5, mark: 4)
    let last = write(48, 1, 9)
    let (other, _) = try writeFault(6, whole: false)
    try engine.answer(.fail(other, code: EIO))
    try ended(last, with: EIO)
    let flush = driver.submit(.flush)
    try engine.answer(.flushDone(flushFault(upTo: 4)))
    try ended(flush)
  }

  func grantRefusals() throws {
    guard try granted(BlockRange(0, 1)) else { return }
    for grant in [
      Grant(BlockRange(0, 9), place(0).place), Grant(BlockRange(8, 1), place(0).place),
      Grant(BlockRange(0, 8), .device(1, sector: 0)), Grant(BlockRange(0, 8), .zero),
      Grant(BlockRange(0, 8), .device(7, sector: 0)),
      Grant(BlockRange(0, 8), .device(0, sector: 1 << 50)),
    ] {
      do throws(AnswerRefusal) {
        try engine.grant(grant)
      } catch { continue }
      throw TrialBroken("has taken \(grant)")
    }
    // The one that was good stands.
    try ended(write(0, 1, 7))
    try told(0, mark: 1)
  }

  // MARK: Pools

  /// Where a pool's places are: every second block of the store from its first on.
  private func pooled(_ index: UInt64) -> Place { .device(0, sector: 16 * index) }

  /// As `granted`, the writes going to a pool of so many places.
  private func pooling(_ first: UInt64, _ count: UInt32) throws -> Bool {
    let pool = Pool(BlockRange(0, 6), pooled(first), stride: 16, count: count)
    guard engine.takesGrants else {
      do throws(AnswerRefusal) {
        try engine.pool(pool)
      } catch { return false }
      throw TrialBroken("takes no pools, but has taken \(pool)")
    }
    if first == 0 { try engine.answer(.prime(base(0, 8))) }
    try engine.pool(pool)
    return true
  }

  private func told(_ block: UInt64, in place: UInt64, mark: Mark, line: Int = #line) throws {
    let extent = Extent(BlockRange(block), pooled(place), writable: true, mark: mark)
    let fault = next()
    try expect(fault == .placed(extent), "told \(String(describing: fault))", line: line)
  }

  func pooledWrites() throws {
    guard try pooling(0, 2) else { return }
    try ended(write(42, 2, 7))
    // Half of the pool is used: the worker may give another, which follows it.
    try told(5, in: 0, mark: 1)
    guard try pooling(2, 2) else { return }
    try ended(write(16, 8, 8), write(24, 1, 9))
    try holds(read(40, 8), [1040, 1041, 7, 7] + old(44..<48))
    try holds(read(16, 8), [UInt64](repeating: 8, count: 8))
    let flush = driver.submit(.flush)
    try told(2, in: 1, mark: 2)
    try told(3, in: 2, mark: 3)
    try engine.answer(.flushDone(flushFault(upTo: 3)))
    try ended(flush)
    try ended(write(0, 1, 1))
    // None is left.
    let last = write(8, 1, 1)
    try told(0, in: 3, mark: 4)
    let (id, _) = try writeFault(1, whole: false)
    try engine.answer(.fail(id, code: EIO))
    try ended(last, with: EIO)
  }

  func poolRefusals() throws {
    guard try pooling(0, 1) else { return }
    let all = BlockRange(0, 8)
    for pool in [
      Pool(BlockRange(0, 9), pooled(0), stride: 16, count: 1),
      Pool(all, pooled(0), stride: 7, count: 2), Pool(all, pooled(0), stride: 16, count: 0),
      Pool(all, pooled(0), stride: 1 << 62, count: 4),
      Pool(all, .device(0, sector: 1 << 50), stride: 16, count: 1),
      Pool(all, .device(1, sector: 0), stride: 16, count: 1),
      Pool(all, .zero, stride: 16, count: 1),
      Pool(all, .device(7, sector: 0), stride: 16, count: 1),
    ] {
      do throws(AnswerRefusal) {
        try engine.pool(pool)
      } catch { continue }
      throw TrialBroken("has taken \(pool)")
    }
    try ended(write(0, 1, 7))
    try told(0, in: 0, mark: 1)
  }

  func givenMarks() throws {
    guard engine.givesMarks else { return }
    try engine.answer(.prime(base(0, 8)))
    let (one, other) = (Mark.firstProvisional + 1, Mark.firstProvisional + 2)
    let first = write(8, 8, 7)
    let (id, _) = try writeFault(1, whole: true)
    try engine.answer(.map(id, Placement(place(1, mark: one))))
    try ended(first)
    let news = next()
    try expect(news == .marked(one, as: 1), "told \(String(describing: news))")
    let second = driver.submit(.discard(16 * 512, 8 * 512))
    let (discard, _) = try discardFault(2, zeroing: false)
    try engine.answer(.map(discard, Placement(place(2, mark: other), .zero)))
    try ended(second)
    let later = next()
    try expect(later == .marked(other, as: 2), "told \(String(describing: later))")
    let flush = driver.submit(.flush)
    try engine.answer(.flushDone(flushFault(upTo: 2)))
    try ended(flush)
  }
}
