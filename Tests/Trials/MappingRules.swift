// SPDX-License-Identifier: Apache-2.0
// Rules 1 to 4, 6 and 10: one mapping, one request, one invalidation.

import DiskModel
import Glibc
import Target
import TestSupport

extension Rules {
  static let mappingRules: [(name: String, check: @Sendable (Rules) throws -> Void)] = [
    ("remembers-what-it-was-told", { try $0.remembers() }),
    ("temporary-mapping-is-forgotten", { try $0.temporary() }),
    ("answer-may-cover-less-than-asked", { try $0.coversLess() }),
    ("partial-write-carries-the-block-along", { try $0.copyFirst() }),
    ("zero-first-fills-the-rest", { try $0.zeroFirst() }),
    ("whole-blocks-are-not-copied", { try $0.wholeBlocks() }),
    ("write-to-a-read-only-mapping-is-a-fault", { try $0.readOnly() }),
    ("one-block-is-served-in-order", { try $0.order() }),
    ("failed-placement-comes-to-nothing", { try $0.failedPlacement() }),
    ("invalidation-waits-for-what-is-under-way", { try $0.invalidation() }),
    ("discard-of-whole-blocks-is-asked", { try $0.discard() }),
    ("write-zeroes-reaches-every-sector", { try $0.writeZeroes() }),
    ("fail-reaches-the-waiting-request", { try $0.fail() }),
  ]

  func remembers() throws {
    let first = read(0, 1)
    try engine.answer(.map(readFault(0), Placement(base(0, 8))))
    try holds(first, [1000])
    let second = read(17, 2)
    try holds(second, [1017, 1018])
    try nothing()
  }

  func temporary() throws {
    for _ in 0..<2 {
      let request = read(0, 1)
      try engine.answer(.map(readFault(0), Placement(base(0)), temporary: true))
      try holds(request, [1000])
    }
  }

  func coversLess() throws {
    let request = read(0, 16)
    try engine.answer(.map(readFault(0), Placement(base(0))))
    let second = try readFault(1)
    try waits(request)
    try engine.answer(.map(second, Placement(Extent(BlockRange(1), .zero, writable: false))))
    try holds(request, old(0..<8) + zeroes(8))
  }

  func copyFirst() throws {
    try engine.answer(.prime(base(0, 8)))
    let before = driver.contents(0)
    let request = write(10, 2, 7)
    let (id, count) = try writeFault(1, whole: false)
    try expect(count == 1, "\(count) blocks")
    try engine.answer(.map(id, Placement(place(1, mark: 1), .copy(from: base(1).place))))
    try ended(request)
    let all = read(8, 8)
    try holds(all, [1008, 1009, 7, 7, 1012, 1013, 1014, 1015])
    // The store holds the block, and nothing beside it has changed.
    let store = driver.contents(0)
    try expect(store[..<(16 * 512)] == before[..<(16 * 512)], "written before the block")
    try expect(store[(24 * 512)...] == before[(24 * 512)...], "written behind the block")
    // Mapped for writing now: no more faults.
    try ended(write(8, 1, 8))
    try nothing()
  }

  func zeroFirst() throws {
    let request = write(10, 2, 7)
    let (id, _) = try writeFault(1, whole: false)
    try engine.answer(.map(id, Placement(place(1, mark: 1), .zero)))
    let all = read(8, 8)
    try ended(request)
    try holds(all, [0, 0, 7, 7, 0, 0, 0, 0])
  }

  func wholeBlocks() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = write(12, 28, 7)
    let (head, _) = try writeFault(1, whole: false)
    try engine.answer(.map(head, Placement(place(1, mark: 1), .copy(from: base(1).place))))
    var block: UInt64 = 2
    var mark: Mark = 2
    while block < 5 {
      let (id, count) = try writeFault(block, whole: true)
      // The copy is not made: it would bring other sectors. One block, as a copy has to be.
      let taken = min(count, 1)
      try engine.answer(
        .map(id, Placement(place(block, taken, mark: mark), .copy(from: base(7).place))))
      block += taken
      mark += 1
    }
    try ended(request)
    try nothing()
    try holds(read(8, 32), old(8..<12) + sevens(28))
  }

  func readOnly() throws {
    try engine.answer(.prime(place(0, writable: false)))
    let request = write(0, 8, 7)
    let (id, _) = try writeFault(0, whole: true)
    try waits(request)
    try engine.answer(.fail(id, code: EIO))
    try ended(request, with: EIO)
  }

  func order() throws {
    try engine.answer(.prime(base(0, 8)))
    driver.holdIO()
    let first = write(8, 2, 1)
    let second = write(9, 2, 2)
    let third = read(8, 4)
    let (id, _) = try writeFault(1, whole: false)
    try nothing()
    try engine.answer(.map(id, Placement(place(1, mark: 1), .copy(from: base(1).place))))
    try waits(first, third)
    driver.release()
    try ended(first, second)
    try holds(third, [1, 2, 2, 1011])
  }

  func failedPlacement() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = write(8, 1, 7)
    let (id, _) = try writeFault(1, whole: false)
    driver.failIO(true)
    try engine.answer(.map(id, Placement(place(1, mark: 1), .copy(from: base(1).place))))
    try ended(request, with: EIO)
    driver.failIO(false)
    let news = next()
    try expect(
      news == .mapError(block: 1, mark: 1, code: EIO), "told \(String(describing: news))")
    // What was known of the block before may be forgotten with it.
    let old = read(8, 1)
    while let fault = next() {
      guard case .read(let id, let blocks) = fault else { throw TrialBroken("told \(fault)") }
      try engine.answer(.map(id, Placement(base(blocks.first))))
    }
    try holds(old, [1008])
  }

  func invalidation() throws {
    try engine.answer(.prime(place(0, 8)))
    driver.holdIO()
    let under = write(8, 1, 1)
    try engine.answer(.invalidate(BlockRange(1)))
    try waits(under)
    // What comes now asks anew, whether before or after the invalidation has ended.
    let later = write(9, 1, 2)
    try waits(under, later)
    driver.release()
    try ended(under)
    var isDone = false
    var question: FaultID?
    while let fault = next() {
      switch fault {
      case .invalidateDone(BlockRange(1)): isDone = true
      case .write(let id, BlockRange(1, 1), whole: false): question = id
      default: throw TrialBroken("unexpected: \(fault)")
      }
    }
    guard isDone, let question else { throw TrialBroken("done \(isDone), no question") }
    let away = Extent(BlockRange(1), .device(0, sector: 96), writable: true, mark: 1)
    try engine.answer(.map(question, Placement(away, .copy(from: place(1).place))))
    try ended(later)
    try holds(read(8, 2), [1, 2])
  }

  func discard() throws {
    try engine.answer(.prime(place(0, 8)))
    try ended(write(0, 64, 7))
    // One sector of block 0, blocks 1 and 2, half of block 3.
    let request = driver.submit(.discard(7 * 512, 21 * 512))
    let (id, count) = try discardFault(1, zeroing: false)
    try expect(count == 2, "\(count) blocks")
    try engine.answer(.map(id, Placement(place(1), .zero)))
    let (rest, _) = try discardFault(2, zeroing: false)
    try engine.answer(.done(rest, blocks: 1))
    try ended(request)
    try holds(read(0, 32), sevens(8) + zeroes(8) + sevens(16))
  }

  func writeZeroes() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = driver.submit(.zero(7 * 512, 21 * 512))
    // Head, body and tail in any order: the engine may ask for all at once.
    var mark: Mark = 0
    while let fault = next() {
      mark += 1
      switch fault {
      case .write(let id, let blocks, whole: false):
        let from = base(blocks.first).place
        try engine.answer(.map(id, Placement(place(blocks.first, mark: mark), .copy(from: from))))
      case .write(let id, let blocks, whole: true):
        // Where the devices below write no zeroes the kernel sends them as data.
        try engine.answer(.map(id, Placement(place(blocks.first, mark: mark))))
      case .discard(let id, let blocks, zeroing: true):
        try expect(blocks.first >= 1 && blocks.end <= 3, "zeroes of \(blocks)")
        try engine.answer(
          .map(id, Placement(place(blocks.first, blocks.count, mark: mark), .zero)))
      default: throw TrialBroken("unexpected: \(fault)")
      }
    }
    try ended(request)
    try holds(read(0, 32), old(0..<7) + zeroes(21) + old(28..<32))
  }

  func fail() throws {
    let request = read(0, 1)
    let id = try readFault(0)
    try engine.answer(.fail(id, code: ENOSPC))
    try ended(request, with: ENOSPC)
    try refused(.fail(id, code: EIO), .unknownFault(id))
  }
}
