// The rules of docs/target.md, one by one, against any engine.

import Glibc
import Posix
@testable import Target
import TestSupport
import Testing

/// 8 blocks of 8 sectors; the store keeps block b at sector 8 + 8 b.
@Suite struct ConformanceTests {
  let driver: any EngineDriver

  init() throws { driver = try UserTargetDriver() }

  var engine: any TargetEngine { driver.engine }

  func place(_ block: UInt64, _ count: UInt64 = 1, mark: Mark = 0, writable: Bool = true) -> Extent
  {
    Extent(
      BlockRange(block, count), .device(0, sector: 8 * block + 8), writable: writable, mark: mark)
  }
  func base(_ block: UInt64, _ count: UInt64 = 1) -> Extent {
    Extent(BlockRange(block, count), .device(1, sector: 8 * block), writable: false)
  }

  func write(_ sector: Int, _ count: Int, _ stamp: UInt64, fua: Bool = false) -> Int {
    driver.submit(.write(UInt64(sector * 512), Stamp.sectors(count, stamp), fua: fua))
  }
  func read(_ sector: Int, _ count: Int) -> Int {
    driver.submit(.read(UInt64(sector * 512), count * 512))
  }
  func stamps(_ request: Int) -> [UInt64?] {
    let bytes = driver.bytes(request)
    return stride(from: 0, to: bytes.count, by: 512).map { at in
      bytes.withUnsafeBytes { Stamp.read($0, at: at) }
    }
  }
  func next() -> Fault? {
    driver.settle()
    return engine.nextFault()
  }

  @Test func remembersWhatItWasTold() throws {
    let first = read(0, 1)
    guard case .read(let id, let blocks) = next() else { Issue.record("no fault"); return }
    #expect(blocks == BlockRange(0, 1))
    try engine.answer(.map(id, Placement(base(0, 8))))
    driver.settle()
    #expect(driver.result(first) == 0)
    #expect(stamps(first) == [1000])
    let second = read(17, 2)
    driver.settle()
    #expect(driver.result(second) == 0)
    #expect(stamps(second) == [1017, 1018])
    #expect(engine.nextFault() == nil)
  }

  @Test func temporaryMappingIsForgotten() throws {
    for _ in 0..<2 {
      let request = read(0, 1)
      guard case .read(let id, _) = next() else { Issue.record("no fault"); return }
      try engine.answer(.map(id, Placement(base(0, 8)), temporary: true))
      driver.settle()
      #expect(stamps(request) == [1000])
    }
  }

  @Test func answerMayCoverLessThanAsked() throws {
    let request = read(0, 16)
    guard case .read(let first, BlockRange(0, 2)) = next() else { Issue.record("fault"); return }
    try engine.answer(.map(first, Placement(base(0))))
    guard case .read(let second, BlockRange(1, 1)) = next() else { Issue.record("fault"); return }
    #expect(driver.result(request) == nil)
    try engine.answer(.map(second, Placement(Extent(BlockRange(1), .zero, writable: false))))
    driver.settle()
    #expect(stamps(request) == (0..<8).map { 1000 + $0 } + [UInt64](repeating: 0, count: 8))
  }

  @Test func partialWriteCarriesTheBlockAlong() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = write(10, 2, 7)
    guard case .write(let id, BlockRange(1, 1), whole: false) = next() else {
      Issue.record("fault")
      return
    }
    try engine.answer(.map(id, Placement(place(1, mark: 1), .copy(from: base(1).place))))
    driver.settle()
    #expect(driver.result(request) == 0)
    let all = read(8, 8)
    driver.settle()
    #expect(stamps(all) == [1008, 1009, 7, 7, 1012, 1013, 1014, 1015])
    #expect(engine.uncommitted() == [place(1, mark: 1)])
    // The store holds the block, and nothing beside it.
    let store = driver.contents(0)
    #expect(store[..<(16 * 512)].allSatisfy { $0 == 0 })
    #expect(store[(24 * 512)...].allSatisfy { $0 == 0 })
    // Mapped for writing now: no more faults.
    let again = write(8, 1, 8)
    driver.settle()
    #expect(driver.result(again) == 0)
    #expect(engine.nextFault() == nil)
  }

  @Test func zeroFirstFillsTheRest() throws {
    let request = write(10, 2, 7)
    guard case .write(let id, _, _) = next() else { Issue.record("no fault"); return }
    try engine.answer(.map(id, Placement(place(1, mark: 1), .zero)))
    let all = read(8, 8)
    driver.settle()
    #expect(driver.result(request) == 0)
    #expect(stamps(all) == [0, 0, 7, 7, 0, 0, 0, 0])
  }

  @Test func wholeBlocksAreNotCopied() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = write(12, 28, 7)
    guard case .write(let head, BlockRange(1, 1), whole: false) = next() else {
      Issue.record("head")
      return
    }
    try engine.answer(.map(head, Placement(place(1, mark: 1), .copy(from: base(1).place))))
    guard case .write(let body, BlockRange(2, 3), whole: true) = next() else {
      Issue.record("body")
      return
    }
    // The copy is not made: device 1 would bring other sectors.
    try engine.answer(.map(body, Placement(place(2, 3, mark: 2), .copy(from: base(7).place))))
    driver.settle()
    #expect(driver.result(request) == 0)
    #expect(engine.nextFault() == nil)
    let all = read(8, 32)
    driver.settle()
    #expect(stamps(all) == (1008..<1012).map { $0 } + [UInt64](repeating: 7, count: 28))
  }

  @Test func writeToAReadOnlyMappingIsAFault() throws {
    try engine.answer(.prime(place(0, writable: false)))
    _ = write(0, 8, 7)
    guard case .write(_, BlockRange(0, 1), whole: true) = next() else {
      Issue.record("fault")
      return
    }
  }

  @Test func oneBlockIsServedInOrder() throws {
    try engine.answer(.prime(base(0, 8)))
    driver.holdIO()
    let first = write(8, 2, 1)
    let second = write(9, 2, 2)
    let third = read(8, 4)
    guard case .write(let id, _, _) = engine.nextFault() else { Issue.record("fault"); return }
    #expect(engine.nextFault() == nil)
    try engine.answer(.map(id, Placement(place(1, mark: 1), .copy(from: base(1).place))))
    #expect(driver.result(first) == nil && driver.result(third) == nil)
    driver.release()
    #expect(driver.result(first) == 0 && driver.result(second) == 0)
    #expect(stamps(third) == [1, 2, 2, 1011])
  }

  @Test func commitsOnFlush() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = write(8, 8, 7)
    guard case .write(let id, _, _) = next() else { Issue.record("fault"); return }
    driver.holdIO()
    try engine.answer(.map(id, Placement(place(1, mark: 5))))
    driver.release()
    #expect(driver.result(request) == 0)
    let before = driver.flushes
    let flush = driver.submit(.flush)
    guard case .flush(let question, upTo: 5) = next() else { Issue.record("flush"); return }
    #expect(driver.flushes == before + 1)
    #expect(driver.result(flush) == nil)
    // Another flush meanwhile waits for the next round.
    let other = driver.submit(.flush)
    driver.settle()
    #expect(engine.nextFault() == nil)
    try engine.answer(.flushDone(question))
    driver.settle()
    #expect(driver.result(flush) == 0 && driver.result(other) == 0)
    #expect(engine.uncommitted().isEmpty)
    #expect(throws: AnswerRefusal.unknownFault(question)) {
      try engine.answer(.flushDone(question))
    }
  }

  @Test func flushWithNothingUncommittedAsksNobody() throws {
    try engine.answer(.prime(place(0, 8)))
    let request = write(0, 1, 7)
    driver.settle()
    let before = driver.flushes
    let flush = driver.submit(.flush)
    driver.settle()
    #expect(driver.result(request) == 0 && driver.result(flush) == 0)
    #expect(driver.flushes == before + 1)
    #expect(engine.nextFault() == nil)
  }

  @Test func flushWaitsForPlacementsUpToItsMark() throws {
    try engine.answer(.prime(base(0, 8)))
    let late = write(0, 1, 1)
    let early = write(8, 1, 2)
    guard case .write(let first, _, _) = next(), case .write(let second, _, _) = next() else {
      Issue.record("faults")
      return
    }
    // The placement with the lower mark has its copy held back, the other one is written.
    driver.holdIO()
    try engine.answer(.map(first, Placement(place(0, mark: 1), .copy(from: base(0).place))))
    (driver as? UserTargetDriver)?.executor.manners.atOnce = 100
    try engine.answer(.map(second, Placement(place(1, mark: 2), .copy(from: base(1).place))))
    #expect(driver.result(late) == nil && driver.result(early) == 0)
    let before = driver.flushes
    let flush = driver.submit(.flush)
    #expect(engine.nextFault() == nil)
    if let driver = driver as? UserTargetDriver {
      // The store's flush is not even begun.
      #expect(driver.executor.waiting == 1)
    }
    driver.release()
    #expect(driver.result(late) == 0 && driver.flushes == before + 1)
    guard case .flush(let id, upTo: 2) = next() else {
      Issue.record("flush")
      return
    }
    #expect(engine.uncommitted().map(\.mark) == [1, 2])
    try engine.answer(.flushDone(id))
    #expect(driver.result(flush) == 0)
  }

  @Test func forcedWriteIsCommitted() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = write(8, 1, 7, fua: true)
    guard case .write(let id, _, _) = next() else { Issue.record("fault"); return }
    try engine.answer(.map(id, Placement(place(1, mark: 1), .copy(from: base(1).place))))
    guard case .flush(let question, upTo: 1) = next() else { Issue.record("flush"); return }
    #expect(driver.result(request) == nil)
    try engine.answer(.flushDone(question))
    #expect(driver.result(request) == 0)
  }

  @Test func failedFlushStands() throws {
    guard let driver = driver as? UserTargetDriver else { return }
    try engine.answer(.prime(place(0, 8)))
    _ = write(0, 1, 1)
    driver.settle()
    driver.executor.manners.failingFlush = 100
    let first = driver.submit(.flush)
    driver.settle()
    driver.executor.manners.failingFlush = 0
    let second = driver.submit(.flush)
    let forced = write(0, 1, 2, fua: true)
    let plain = write(0, 1, 3)
    driver.settle()
    #expect(driver.result(first) == EIO && driver.result(second) == EIO)
    #expect(driver.result(forced) == EIO && driver.result(plain) == 0)
    #expect(driver.target.health == .degraded(EIO, UserTarget.flushReason))
    driver.target.clearFailure()
    let third = driver.submit(.flush)
    driver.settle()
    #expect(driver.result(third) == 0)
  }

  @Test func failedPlacementComesToNothing() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = write(8, 1, 7)
    guard case .write(let id, _, _) = next() else { Issue.record("fault"); return }
    driver.failIO(true)
    try engine.answer(.map(id, Placement(place(1, mark: 1), .copy(from: base(1).place))))
    driver.settle()
    driver.failIO(false)
    #expect(driver.result(request) == EIO)
    #expect(engine.nextFault() == .mapError(block: 1, mark: 1, code: EIO))
    #expect(engine.uncommitted().isEmpty)
    let old = read(8, 1)
    driver.settle()
    #expect(stamps(old) == [1008])
  }

  @Test func invalidationWaitsForWhatIsUnderWay() throws {
    try engine.answer(.prime(place(0, 8)))
    driver.holdIO()
    let under = write(8, 1, 1)
    try engine.answer(.invalidate(BlockRange(1)))
    #expect(engine.nextFault() == nil)
    // What comes now waits with the invalidation, and then asks.
    let later = write(9, 1, 2)
    #expect(engine.nextFault() == nil)
    driver.release()
    #expect(driver.result(under) == 0)
    #expect(engine.nextFault() == .invalidateDone(BlockRange(1)))
    guard case .write(let id, BlockRange(1, 1), whole: false) = engine.nextFault() else {
      Issue.record("fault")
      return
    }
    try engine.answer(
      .map(
        id,
        Placement(
          Extent(BlockRange(1), .device(0, sector: 100), writable: true, mark: 1),
          .copy(from: place(1).place))))
    let all = read(8, 3)
    driver.settle()
    #expect(driver.result(later) == 0)
    #expect(stamps(all) == [1, 2, 0])
  }

  @Test func discardOfWholeBlocksIsAsked() throws {
    try engine.answer(.prime(place(0, 8)))
    _ = write(0, 64, 7)
    driver.settle()
    // One sector of block 0, blocks 1 and 2, half of block 3.
    let request = driver.submit(.discard(7 * 512, 21 * 512))
    guard case .discard(let id, BlockRange(1, 2), zeroing: false) = next() else {
      Issue.record("fault")
      return
    }
    try engine.answer(.map(id, Placement(place(1), .zero)))
    guard case .discard(let rest, BlockRange(2, 1), zeroing: false) = next() else {
      Issue.record("rest")
      return
    }
    try engine.answer(.done(rest, blocks: 1))
    let all = read(0, 32)
    driver.settle()
    #expect(driver.result(request) == 0)
    let expected =
      [UInt64](repeating: 7, count: 8) + [UInt64](repeating: 0, count: 8)
      + [UInt64](repeating: 7, count: 16)
    #expect(stamps(all) == expected)
  }

  @Test func writeZeroesReachesEverySector() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = driver.submit(.zero(7 * 512, 21 * 512))
    guard case .write(let head, BlockRange(0, 1), whole: false) = next() else {
      Issue.record("head")
      return
    }
    try engine.answer(.map(head, Placement(place(0, mark: 1), .copy(from: base(0).place))))
    guard case .discard(let body, BlockRange(1, 2), zeroing: true) = next() else {
      Issue.record("body")
      return
    }
    try engine.answer(.map(body, Placement(place(1, 2, mark: 2), .zero)))
    guard case .write(let tail, BlockRange(3, 1), whole: false) = next() else {
      Issue.record("tail")
      return
    }
    try engine.answer(.map(tail, Placement(place(3, mark: 3), .copy(from: base(3).place))))
    let all = read(0, 32)
    driver.settle()
    #expect(driver.result(request) == 0)
    let zeroes = [UInt64](repeating: 0, count: 21)
    #expect(stamps(all) == (1000..<1007).map { $0 } + zeroes + (1028..<1032).map { $0 })
    #expect(engine.uncommitted().map(\.mark) == [1, 2, 3])
  }

  @Test func failReachesTheWaitingRequest() throws {
    let request = read(0, 1)
    guard case .read(let id, _) = next() else { Issue.record("fault"); return }
    try engine.answer(.fail(id, code: ENOSPC))
    #expect(driver.result(request) == ENOSPC)
    #expect(throws: AnswerRefusal.unknownFault(id)) { try engine.answer(.fail(id, code: EIO)) }
  }
}
