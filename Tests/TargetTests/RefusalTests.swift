// SPDX-License-Identifier: Apache-2.0
// Rule 10: an answer that is wrong is refused and changes nothing.

import DiskModel
import Glibc
import Target
import TargetTrials
import Testing
import TestSupport

@Suite struct RefusalTests {
  let driver: UserTargetDriver

  init() throws { driver = try UserTargetDriver() }

  func place(_ block: UInt64, _ count: UInt64 = 1, mark: Mark = 0) -> Extent {
    Extent(BlockRange(block, count), .device(0, sector: 8 * block + 8), writable: true, mark: mark)
  }

  func writeFault() -> FaultID {
    _ = driver.submit(.write(4096, Stamp.sectors(1, 7)))
    driver.settle()
    guard case .write(let id, _, _) = driver.target.nextFault() else { return 0 }
    return id
  }

  @Test func lies() throws {
    let target = driver.target
    let id = writeFault()
    let far = Extent(BlockRange(1), .device(0, sector: 1 << 50), writable: true, mark: 1)
    let other = Extent(BlockRange(1), .device(2, sector: 0), writable: true, mark: 1)
    let base = Extent(BlockRange(1), .device(1, sector: 0), writable: true, mark: 1)
    var readOnly = place(1, mark: 1)
    readOnly.writable = false
    let copy = Preparation.copy(from: .device(9, sector: 0))
    let lies: [(Answer, AnswerRefusal)] = [
      (.map(id + 1, Placement(place(1, mark: 1))), .unknownFault(id + 1)),
      (.map(0, Placement(place(1, mark: 1))), .unknownFault(0)),
      (.map(.max, Placement(place(1, mark: 1))), .unknownFault(.max)),
      (.flushDone(id), .unknownFault(id)),
      (.done(id, blocks: 1), .unknownFault(id)),
      (.map(id, Placement(place(2, mark: 1))), .badBlocks(BlockRange(2))),
      (.map(id, Placement(place(1, 0, mark: 1))), .badBlocks(BlockRange(1, 0))),
      (.map(id, Placement(place(1, 8, mark: 1))), .badBlocks(BlockRange(1, 8))),
      (.map(id, Placement(place(1, .max, mark: 1))), .badBlocks(BlockRange(1, .max))),
      (.map(id, Placement(place(1, 2, mark: 1))), .badBlocks(BlockRange(1, 2))),
      (.map(id, Placement(far)), .badBlocks(BlockRange(1))),
      (.map(id, Placement(other)), .badDevice(2)),
      (.map(id, Placement(base)), .badDevice(1)),
      (.map(id, Placement(readOnly)), .badBlocks(BlockRange(1))),
      (.map(id, Placement(place(1, mark: 1), copy)), .badDevice(9)),
      (.map(id, Placement(place(1, mark: 1)), temporary: true), .badMark(1)),
      (.map(id, Placement(place(1, mark: .max))), .badMark(.max)),
      (.prime(place(7, 2)), .badBlocks(BlockRange(7, 2))),
      (.prime(place(7, mark: 3)), .badMark(3)),
      (.invalidate(BlockRange(8)), .badBlocks(BlockRange(8))),
    ]
    for (answer, refusal) in lies {
      #expect(throws: refusal, "\(answer)") { try target.answer(answer) }
    }
    // Nothing of it has harmed the fault: the right answer is still taken.
    try target.answer(.map(id, Placement(place(1, mark: 1), .zero)))
    driver.settle()
    #expect(driver.result(0) == 0)
    #expect(throws: AnswerRefusal.unknownFault(id)) {
      try target.answer(.map(id, Placement(place(1, mark: 2))))
    }
  }

  @Test func uncommittedIsNotOverlapped() throws {
    let target = driver.target
    let id = writeFault()
    try target.answer(.map(id, Placement(place(1, mark: 4), .zero)))
    driver.settle()
    let elsewhere = Extent(BlockRange(0, 8), .device(1, sector: 0), writable: false)
    #expect(throws: AnswerRefusal.overlap(BlockRange(0, 8))) {
      try target.answer(.prime(elsewhere))
    }
    #expect(throws: AnswerRefusal.overlap(BlockRange(1))) {
      try target.answer(.invalidate(BlockRange(1)))
    }
    // A run that says the same is welcome, and leaves the uncommitted block as it was.
    try target.answer(.prime(place(0, 8)))
    #expect(target.uncommitted() == [place(1, mark: 4)])
    _ = driver.submit(.flush)
    driver.settle()
    guard case .flush(let flush, upTo: 4) = target.nextFault() else {
      Issue.record("flush"); return
    }
    // A mark has to be greater than all before it, committed or not.
    try target.answer(.invalidate(BlockRange(2)))
    _ = driver.submit(.write(8192, Stamp.sectors(1, 7)))
    driver.settle()
    #expect(target.nextFault() == .invalidateDone(BlockRange(2)))
    guard case .write(let again, _, _) = target.nextFault() else { Issue.record("fault"); return }
    #expect(throws: AnswerRefusal.badMark(4)) {
      try target.answer(.map(again, Placement(place(2, mark: 4))))
    }
    try target.answer(.flushDone(flush))
    #expect(throws: AnswerRefusal.unknownFault(flush)) { try target.answer(.flushDone(flush)) }
  }

  @Test func readOnlyTargetRefusesWrites() throws {
    let driver = try UserTargetDriver(readOnly: true)
    for request in [
      DriverRequest.write(0, Stamp.sectors(1, 1)), .zero(0, 4096), .discard(0, 4096),
    ] {
      #expect(driver.result(driver.submit(request)) == EROFS)
    }
    #expect(driver.target.nextFault() == nil)
  }

  @Test func requestsOutsideTheDisk() {
    let size = UInt64(64 * 512)
    #expect(driver.result(driver.submit(.read(size, 1))) == EINVAL)
    #expect(driver.result(driver.submit(.write(size - 1, [1, 2]))) == ENOSPC)
    #expect(driver.result(driver.submit(.zero(.max, 1))) == EINVAL)
    #expect(driver.target.nextFault() == nil)
  }
}
