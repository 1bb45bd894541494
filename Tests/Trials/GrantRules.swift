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
    let mark = 3 + Grant.room
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
}
