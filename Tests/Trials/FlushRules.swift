// SPDX-License-Identifier: Apache-2.0
// Rules 5, 7 and 8: commit on flush, the worker's death, suspending.

import DiskModel
import Glibc
import Target
import TestSupport

extension Rules {
  static let flushRules: [(name: String, check: @Sendable (Rules) throws -> Void)] = [
    ("commits-on-flush", { try $0.commits() }),
    ("flush-with-nothing-uncommitted-asks-nobody", { try $0.plainFlush() }),
    ("flush-waits-for-placements-up-to-its-mark", { try $0.flushWaits() }),
    ("forced-write-is-committed", { try $0.forced() }),
    ("failed-flush-stands", { try $0.failedFlush() }),
    ("commit-without-room-is-tried-again", { try $0.failedCommit() }),
    ("successor-is-told-what-is-uncommitted", { try $0.successor() }),
    ("questions-outlive-their-worker", { try $0.unanswered() }),
    ("suspended-questions-come-again", { try $0.suspended() }),
  ]

  /// A write of one sector into a block of the base, placed with this mark.
  private func placed(_ block: Int, _ stamp: UInt64, mark: Mark, fua: Bool = false) throws -> Int {
    let request = write(8 * block, 1, stamp, fua: fua)
    let (id, _) = try writeFault(UInt64(block), whole: false)
    let from = base(UInt64(block)).place
    try engine.answer(
      .map(id, Placement(place(UInt64(block), mark: mark), .copy(from: from))))
    return request
  }

  func commits() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = write(8, 8, 7)
    let (id, _) = try writeFault(1, whole: true)
    driver.holdIO()
    try engine.answer(.map(id, Placement(place(1, mark: 5))))
    try waits(request)
    driver.release()
    try ended(request)
    let before = driver.flushes
    let flush = driver.submit(.flush)
    let question = try flushFault(upTo: 5)
    try flushed(1, since: before)
    try waits(flush)
    // Another flush meanwhile waits for the next round.
    let other = driver.submit(.flush)
    try nothing()
    try engine.answer(.flushDone(question))
    try ended(flush, other)
    try refused(.flushDone(question), .unknownFault(question))
  }

  func plainFlush() throws {
    try engine.answer(.prime(place(0, 8)))
    try ended(write(0, 1, 7))
    let before = driver.flushes
    try ended(driver.submit(.flush))
    try flushed(1, since: before)
    try nothing()
  }

  func flushWaits() throws {
    try engine.answer(.prime(base(0, 8)))
    try ended(placed(1, 7, mark: 1))
    let late = write(0, 1, 1)
    let (id, _) = try writeFault(0, whole: false)
    // Its copy is held back, and so is the flush of the store.
    driver.holdIO()
    try engine.answer(.map(id, Placement(place(0, mark: 2), .copy(from: base(0).place))))
    try waits(late)
    let flush = driver.submit(.flush)
    try nothing()
    driver.release()
    // What was not acknowledged when the flush came may be part of it, or not.
    let fault = next()
    guard case .flush(let question, let mark) = fault, mark == 1 || mark == 2 else {
      throw TrialBroken("no flush: \(String(describing: fault))")
    }
    try ended(late)
    try engine.answer(.flushDone(question))
    try ended(flush)
  }

  func forced() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = try placed(1, 7, mark: 1, fua: true)
    let question = try flushFault(upTo: 1)
    try waits(request)
    try engine.answer(.flushDone(question))
    try ended(request)
  }

  func failedFlush() throws {
    try engine.answer(.prime(place(0, 8)))
    try ended(write(0, 1, 1))
    guard driver.failFlushes(true) else { return }
    try ended(driver.submit(.flush), with: EIO)
    try expect(driver.failFlushes(false), "flushes go on failing")
    try ended(driver.submit(.flush), write(0, 1, 2, fua: true), with: EIO)
    try ended(write(0, 1, 3))
    try nothing()
    try expect(driver.isDegraded, "nobody is told")
    // A new worker does not forget it, and an admin may.
    try driver.replaceWorker()
    try ended(driver.submit(.flush), with: EIO)
    try nothing()
    try expect(driver.isDegraded, "the successor is not told")
    driver.clearFailure()
    try ended(driver.submit(.flush))
    try nothing()
    try expect(!driver.isDegraded, "it is not told that all is well")
  }

  func failedCommit() throws {
    try engine.answer(.prime(base(0, 8)))
    try ended(placed(1, 7, mark: 1))
    let flush = driver.submit(.flush)
    try engine.answer(.fail(try flushFault(upTo: 1), code: ENOSPC))
    try ended(flush, with: ENOSPC)
    let other = driver.submit(.flush)
    try engine.answer(.flushDone(try flushFault(upTo: 1)))
    try ended(other)
  }

  func successor() throws {
    try engine.answer(.prime(base(0, 8)))
    try ended(placed(1, 7, mark: 1), placed(3, 8, mark: 2))
    try driver.replaceWorker()
    try expect(
      engine.uncommitted() == [place(1, mark: 1), place(3, mark: 2)],
      "told \(engine.uncommitted())")
    let flush = driver.submit(.flush)
    let question = try flushFault(upTo: 2)
    try engine.answer(.flushDone(question))
    try ended(flush)
    try driver.replaceWorker()
    try expect(engine.uncommitted().isEmpty, "told \(engine.uncommitted())")
  }

  func unanswered() throws {
    let request = read(8, 2)
    _ = try readFault(1)
    try driver.replaceWorker()
    let id = try readFault(1)
    try engine.answer(.map(id, Placement(base(1, 7))))
    try holds(request, [1008, 1009])
  }

  func suspended() throws {
    try engine.answer(.prime(base(0, 8)))
    let request = read(8, 2)
    let other = write(24, 1, 7)
    _ = try writeFault(3, whole: false)
    try driver.suspend()
    try ended(request)
    try waits(other)
    // What asked before is an orphan: it is asked again, in a new question or the same.
    try driver.replaceWorker()
    try engine.answer(.prime(base(0, 8)))
    let (id, _) = try writeFault(3, whole: false)
    try engine.answer(.map(id, Placement(place(3, mark: 1), .copy(from: base(3).place))))
    try ended(other)
    try holds(read(24, 2), [7, 1025])
  }
}
