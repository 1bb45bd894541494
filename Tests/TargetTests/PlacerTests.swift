// SPDX-License-Identifier: Apache-2.0
// A placement's way, step by step, and blocks that are put together in any number of pieces.

import BlockIO
import DiskModel
import Fakes
import Glibc
import Testing
import TestSupport

@testable import Target

/// A placer over a store and a base of 16 blocks of 4 KiB. Block b's place is b + 1.
private final class Placing {
  static let size: UInt64 = 16 * 4096
  static let base = (0..<size / 2).map { byte($0) }
  let store = MemoryStore("store", size: 2 * size)
  let executor: SimulatedExecutor
  let requests: RequestTable
  let map = ExtentMap(sectorShift: 3, cap: 1000)
  let log: PendingLog
  let locks: BlockLocks
  let faults = FaultQueue()
  let placer: Placer
  /// What came of operations that have ended, by slot.
  var outcomes: [Int: Placer.Outcome] = [:]
  var buffers: [UnsafeMutableRawBufferPointer] = []

  init(
    seed: UInt64 = 1, atOnce: Int = 100, piece: Int = 4096, log given: PendingLog? = nil
  ) throws {
    let base = MemoryStore("base", bytes: Self.base)
    base.isWritable = false
    var manners = SimulatedExecutor.Manners()
    manners.atOnce = atOnce
    executor = SimulatedExecutor(devices: [store, base], seed: seed, manners: manners)
    log = try given ?? PendingLog(anonymousFor: Self.size, blockSize: 4096)
    var limits = TargetLimits()
    limits.requests = 16
    limits.piece = piece
    limits.scratch = 0
    let geometry = DiskGeometry(size: Self.size, blockSize: 4096)
    requests = RequestTable(capacity: 16)
    locks = BlockLocks(requests, shift: 12, capacity: 16)
    let rounds = FlushRounds(log: log, map: map, executor: executor, faults: faults)
    let io = DeviceIO(executor, geometry, requests, rounds, capacity: 16)
    let mappings = Mappings(geometry, executor, log, map, locks)
    placer = Placer(mappings, requests, io, faults, limits: limits)
    executor.completion = { [unowned self] token, code in
      let index = Int(token)
      requests.endIO(index)
      outcomes[index] = code == 0 ? placer.ended(index) : .failed(code)
    }
  }

  deinit {
    for buffer in buffers { buffer.deallocate() }
  }

  /// What the base has at a byte. It ends in the middle of the disk.
  static func byte(_ at: UInt64) -> UInt8 {
    at < size / 2 ? UInt8(truncatingIfNeeded: at * 31 + at >> 8 + 1) : 0
  }

  /// A request that is about to place the block in which it begins.
  func begin(
    _ bytes: Range<UInt64>, _ operation: TargetRequest.Operation = .write, fill: UInt8 = 0xAB,
    whole: Bool = false
  ) throws -> Int {
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: bytes.count, alignment: 8)
    buffer.initializeMemory(as: UInt8.self, repeating: fill)
    buffers.append(buffer)
    let request = TargetRequest(
      operation, offset: bytes.lowerBound, count: UInt64(bytes.count),
      buffer: operation == .write ? buffer.baseAddress : nil)
    #expect(requests.admit(request, owner: 0, cursor: bytes.lowerBound))
    #expect(requests.beginSteps())
    let index = try #require(requests.nextReady())
    #expect(requests.nextReady() == nil)
    #expect(placer.reserve(index, whole: whole) == .kept)
    let first = bytes.lowerBound >> 12
    locks.hold(index, first, whole ? bytes.upperBound >> 12 : first + 1)
    requests.ask(index, faults.number(slot: index))
    return index
  }

  func placement(
    _ block: UInt64, _ count: UInt64 = 1, mark: Mark, _ preparation: Preparation = .none
  ) -> Placement {
    Placement(
      Extent(
        BlockRange(block, count), .device(0, sector: 8 * block + 8), writable: true, mark: mark),
      preparation)
  }

  func copied(_ block: UInt64, mark: Mark) -> Placement {
    placement(block, mark: mark, .copy(from: .device(1, sector: 8 * block)))
  }

  /// The slot is stepped as after an answer.
  func go(_ index: Int) -> Placer.Outcome {
    #expect(requests.beginSteps() && requests.nextReady() == index)
    #expect(requests.nextReady() == nil)
    #expect(placer.isAnswered(index))
    return placer.begin(index)
  }

  /// Runs a slot's operations to their end.
  func settle(_ index: Int, _ outcome: Placer.Outcome) -> Placer.Outcome {
    var outcome = outcome
    while case .waits = outcome {
      guard executor.step() else { return outcome }
      if let next = outcomes.removeValue(forKey: index) { outcome = next }
    }
    return outcome
  }

  func end(_ index: Int) {
    requests.leave(index)
    requests.free(index)
  }

  func contents(_ block: UInt64) -> [UInt8] {
    Array(store.contents()[Int(4096 * block + 4096)..<Int(4096 * block + 8192)])
  }
}

@Suite struct PlacerTests {
  @Test func fromTheQuestionToTheRecord() throws {
    let all = try Placing(atOnce: 0)
    let placer = all.placer
    let index = try all.begin(4096 + 512..<4096 + 1024)
    #expect(placer.isPlacing(index) && !placer.isAnswered(index) && placer.reserved == 1)
    #expect(!placer.isPlacing(BlockRange(1)), "asked for is not placed")
    try placer.take(index, all.copied(1, mark: 5), isTemporary: false)
    #expect(placer.isPlacing(BlockRange(0, 2)) && !placer.isPlacing(BlockRange(2)))
    #expect(placer.highestMark == 5 && placer.recordedMark == 0)
    #expect(placer.unwritten(upTo: 5) == 1 && placer.unwritten(upTo: 4) == 0)
    #expect(all.go(index) == .waits)
    #expect(placer.isReading(index) && !placer.isAnswered(index))
    #expect(all.executor.step())
    #expect(all.outcomes[index] == .waits && !placer.isReading(index))
    #expect(all.executor.step())
    #expect(all.outcomes[index] == .written)
    #expect(all.log.count == 0 && all.map.find(1) == nil && placer.isPlacing(BlockRange(1)))
    #expect(placer.record(index) == 5)
    #expect(placer.recordedMark == 5 && all.log.extents().map(\.mark) == [5])
    #expect(all.map.find(1)?.mark == 5)
    placer.letGo(index)
    #expect(!placer.isPlacing(index) && placer.reserved == 0 && all.locks.count == 0)
    #expect(placer.unwritten(upTo: 5) == 0 && placer.copies == 1)
    var expected = (4096..<8192).map { Placing.byte($0) }
    for at in 512..<1024 { expected[at] = 0xAB }
    #expect(all.contents(1) == expected)
  }

  @Test func aFailureComesToNothing() throws {
    let all = try Placing(atOnce: 0)
    let index = try all.begin(4096..<4608)
    try all.placer.take(index, all.copied(1, mark: 5), isTemporary: false)
    all.executor.manners.failing = 100
    #expect(all.settle(index, all.go(index)) == .failed(EIO))
    #expect(all.placer.isReading(index))
    #expect(all.placer.abandon(index, EIO) == 5)
    #expect(all.faults.next() == .mapError(block: 1, mark: 5, code: EIO))
    #expect(all.placer.reserved == 0 && all.locks.count == 0 && all.log.count == 0)
    #expect(all.placer.recordedMark == 0 && all.placer.highestMark == 5)
    #expect(!all.placer.isReading(index) && all.placer.unwritten(upTo: 9) == 0)
  }

  /// What the write covers is neither read nor put together.
  @Test func whatIsCoveredIsNotCopied() throws {
    let all = try Placing()
    let index = try all.begin(8192..<8192 + 3 * 4096, whole: true)
    try all.placer.take(index, all.placement(2, 2, mark: 1, .zero), isTemporary: false)
    #expect(all.go(index) == .written && all.placer.copies == 0)
    // Two blocks of three are answered.
    #expect(all.requests[index].pointee.pieceEnd == 4 * 4096)
    #expect(all.contents(2) == [UInt8](repeating: 0xAB, count: 4096))
    #expect(all.contents(4) == [UInt8](repeating: 0, count: 4096))
  }

  @Test func answersAreChecked() throws {
    let all = try Placing()
    let placer = all.placer
    let first = try all.begin(0..<512)
    try placer.take(first, all.copied(0, mark: 7), isTemporary: false)
    #expect(all.go(first) == .written)
    _ = placer.record(first)
    placer.letGo(first)
    all.end(first)
    let index = try all.begin(4096..<4608)
    // The slot is the same, and as new.
    #expect(index == first && placer.unwritten(upTo: 9) == 0)
    #expect(!placer.isPlacing(BlockRange(1)))
    func refuse(_ placement: Placement, temporary: Bool = false, _ refusal: AnswerRefusal) {
      #expect(throws: refusal, "\(placement)") {
        try placer.take(index, placement, isTemporary: temporary)
      }
    }
    refuse(all.placement(1, mark: 7), .badMark(7))
    refuse(all.placement(1, mark: .max), .badMark(.max))
    refuse(all.placement(1, mark: 8), temporary: true, .badMark(8))
    refuse(all.placement(1, 2, mark: 8), .badBlocks(BlockRange(1, 2)))
    refuse(all.placement(1, 2, mark: 0, .zero), .badBlocks(BlockRange(1, 2)))
    refuse(all.placement(1, mark: 8, .copy(from: .device(4, sector: 0))), .badDevice(4))
    refuse(Placement(Extent(BlockRange(1), .zero, writable: true)), .badBlocks(BlockRange(1)))
    var readOnly = all.placement(1, mark: 8)
    readOnly.extent.writable = false
    refuse(readOnly, .badBlocks(BlockRange(1)))
    var base = all.placement(1, mark: 8)
    base.extent.place = .device(1, sector: 0)
    refuse(base, .badDevice(1))
    // Block 0 is uncommitted, so it stays where it is.
    var moved = all.placement(0, 2, mark: 0)
    moved.extent.place = .device(0, sector: 800)
    refuse(moved, .overlap(BlockRange(0, 2)))
    #expect(!placer.isAnswered(index) && placer.highestMark == 7)
    #expect(all.requests.nextReady() == nil)
    // A place that was there already may go beyond what was asked.
    try placer.take(index, all.placement(1, 3, mark: 0), isTemporary: false)
    #expect(all.go(index) == .written && placer.record(index) == 0)
    #expect(all.map.find(3)?.place(of: 3, sectorShift: 3) == Run.pack(.device(0, sector: 32)))
    #expect(all.log.count == 1)
  }

  @Test func aDiscardIsZeroedAndForOnceIsForgotten() throws {
    let all = try Placing()
    let placer = all.placer
    let index = try all.begin(0..<8192, .discard, whole: true)
    #expect(placer.isDiscard(index))
    #expect(throws: AnswerRefusal.badBlocks(BlockRange(0))) {
      try placer.take(index, all.copied(0, mark: 1), isTemporary: false)
    }
    #expect(throws: AnswerRefusal.badBlocks(BlockRange(0, 3))) {
      try placer.take(index, all.placement(0, 3, mark: 0), isTemporary: false)
    }
    let zeroes = Placement(Extent(BlockRange(0, 2), .zero, writable: false, mark: 1))
    try placer.take(index, zeroes, isTemporary: false)
    #expect(all.go(index) == .written && placer.record(index) == 1)
    #expect(all.map.find(1)?.isZero == true)
    placer.letGo(index)
    let write = try all.begin(4 * 4096..<5 * 4096, .write, whole: true)
    #expect(!placer.isDiscard(write))
    try placer.take(write, all.placement(4, mark: 0), isTemporary: true)
    #expect(all.go(write) == .written && placer.record(write) == 0)
    #expect(all.map.find(4) == nil && all.contents(4)[0] == 0xAB)
    placer.letGo(write)
    all.end(write)
    let zero = try all.begin(4 * 4096..<5 * 4096, .zero, whole: true)
    #expect(placer.isDiscard(zero))
    try placer.take(zero, all.placement(4, mark: 2), isTemporary: false)
    #expect(all.settle(zero, all.go(zero)) == .written)
    #expect(all.contents(4) == [UInt8](repeating: 0, count: 4096))
    placer.letGo(zero)
    let part = try all.begin(5 * 4096..<5 * 4096 + 512, .zero)
    #expect(!placer.isDiscard(part))
  }

  /// There are two buffers at least; the third copy waits for one of them.
  @Test func buffersAreWaitedFor() throws {
    let all = try Placing(atOnce: 0)
    var slots: [Int] = []
    for block in 0..<3 as Range<UInt64> {
      slots.append(try all.begin(4096 * block..<4096 * block + 512))
      try all.placer.take(
        slots[Int(block)], all.copied(block, mark: block + 1), isTemporary: false)
      #expect(all.go(slots[Int(block)]) == .waits)
    }
    #expect(all.executor.waiting == 2 && all.placer.isAnswered(slots[2]))
    #expect(all.placer.scratchBytes == 8192)
    #expect(all.settle(slots[0], .waits) == .written)
    _ = all.placer.record(slots[0])
    #expect(all.requests.beginSteps() && all.requests.nextReady() == nil)
    all.placer.letGo(slots[0])
    #expect(all.go(slots[2]) == .waits && all.placer.scratchBytes == 8192)
    #expect(all.placer.unwritten(upTo: 3) == 2 && all.placer.unwritten(upTo: 2) == 1)
  }

  @Test func anInvalidationIsWaitedFor() throws {
    let all = try Placing(atOnce: 0)
    let mover = try all.begin(4096..<4608)
    try all.placer.take(mover, all.placement(1, mark: 0), isTemporary: false)
    #expect(all.go(mover) == .waits)
    #expect(!all.locks.invalidate(BlockRange(1, 2)))
    let index = try all.begin(2 * 4096..<2 * 4096 + 512)
    try all.placer.take(index, all.placement(2, mark: 0), isTemporary: false)
    #expect(all.go(index) == .waits && all.placer.isAnswered(index))
    #expect(all.executor.waiting == 1)
    #expect(all.settle(mover, .waits) == .written)
    // It still is, so nothing is learned of it.
    #expect(all.placer.record(mover) == 0 && all.map.find(1) == nil)
    #expect(all.locks.endInvalidations() == [BlockRange(1, 2)])
    #expect(all.go(index) == .waits && all.executor.waiting == 1)
  }

  @Test func roomInTheLog() throws {
    let log = try PendingLog(anonymousFor: Placing.size, blockSize: 4096)
    func fill(_ count: Int) {
      while log.count < count {
        precondition(log.makeRoom(for: 1))
        log.append(
          Extent(
            BlockRange(0), .device(0, sector: 8), writable: true, mark: Mark(log.count + 1)))
      }
    }
    fill(2)
    let all = try Placing(log: log)
    #expect(all.placer.highestMark == 2 && all.placer.recordedMark == 2)
    #expect(all.map.find(0)?.mark == 2)
    fill(PendingLog.maximumCapacity / 2 - 1)
    log.failFlush(EIO)
    #expect(all.placer.reserve(0, whole: true) == .kept)
    #expect(all.placer.reserve(1, whole: true) == .never)
    log.clearFlushFailure()
    #expect(!all.placer.isLogFilling)
    fill(PendingLog.maximumCapacity * 3 / 4)
    #expect(all.placer.isLogFilling && all.placer.reserve(1, whole: true) == .kept)
    fill(PendingLog.maximumCapacity - 4)
    #expect(all.placer.reserve(2, whole: true) == .kept)
    #expect(all.placer.reserve(3, whole: true) == .full && all.placer.reserved == 3)
    log.failFlush(EIO)
    #expect(!all.placer.isLogFilling)
  }

  /// Whatever the pieces, the source and the write: the block is the source with the write on it,
  /// and no block beside it is touched.
  @Test(arguments: Depth.seeds(200)) func blocksArePutTogether(seed: UInt64) throws {
    var random = SplitMix64(seed: seed)
    let all = try Placing(
      seed: seed, atOnce: [0, 50, 100][random.below(3)], piece: [512, 1536, 4096][random.below(3)])
    try all.store.write([UInt8](repeating: 0xEE, count: Int(2 * Placing.size)), at: 0)
    let block = UInt64(random.below(15))
    let start = UInt64(random.below(4095))
    let end = start + 1 + UInt64(random.below(Int(4096 - start) - 1))
    let isZero = random.chance(20)
    let bytes = 4096 * block + start..<4096 * block + end
    let index = try all.begin(bytes, isZero ? .zero : .write, fill: 0x5A)
    let from = UInt64(random.below(15))
    let zeroes = random.chance(30)
    let source: Preparation = zeroes ? .zero : .copy(from: .device(1, sector: 8 * from))
    try all.placer.take(index, all.placement(block, mark: 1, source), isTemporary: false)
    #expect(all.settle(index, all.go(index)) == .written)
    let expected = (0..<4096 as Range<UInt64>).map { at -> UInt8 in
      let old = zeroes ? 0 : Placing.byte(4096 * from + at)
      return start..<end ~= at ? (isZero ? 0 : 0x5A) : old
    }
    var store = [UInt8](repeating: 0xEE, count: Int(2 * Placing.size))
    store.replaceSubrange(Int(4096 * block + 4096)..<Int(4096 * block + 8192), with: expected)
    #expect(all.store.contents() == store, "DMU_SEED=\(seed)")
    #expect(all.placer.record(index) == 1)
    all.placer.letGo(index)
    #expect(all.placer.reserved == 0 && all.placer.copies == 1)
  }
}
