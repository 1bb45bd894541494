// SPDX-License-Identifier: Apache-2.0
// Flushes: commit on flush, in rounds.
//
// A round notes the highest mark recorded, waits until every placement up to it has its
// data written, flushes the store, asks the worker to commit up to the mark, and ends all
// the flushes that it began with. Flushes that arrive meanwhile share the next round.
//
//              start                  written: the last one        deviceFlushed, 0
//     idle ───────────────► placing ─────────────────────► device ──────────────────► asking
//      ▲ │ a flush stands     at once, if all is written     │ at once, if nothing     │
//      │ │ as failed                                         │ was written             │
//      │ ▼                                                   │                         │
//      └─┴◄──── failed, or nothing is uncommitted ───────────┘ ◄────── answered ───────┘
//
// Every way back to idle is an `End`: the caller completes its slots, and begins the next round
// if `wantsRound`.
//
// | what has ended | the flushes end with | afterwards |
// |---|---|---|
// | the commit succeeded, or there was none | 0 | the log has dropped what is committed |
// | the commit failed | its errno | the next round tries again |
// | a flush of the store failed | EIO | it stands: every round fails until an admin acts |
//
// Invariants:
// 1. One round at a time. A flush ends with the round that was begun after it came.
// 2. A round asks for a commit only after all data up to its mark is written and flushed.
// 3. The log says that a flush is under way from before it begins until its result is seen.
// 4. A flush of the store that failed stands, in the log: the kernel may have dropped the data
//    that it could not write, so no later success would mean anything.

import BlockIO
import DiskModel
import Glibc

/// The rounds of flushes of one target. Used from one thread.
final class FlushRounds {
  /// A round has ended: what is left to do.
  struct End: Equatable {
    /// The requests that end with it, and their errno, 0 for success.
    var slots: [Int32]
    var code: Int32
    /// How the commit ended, with its errno; nil: there was none, or a failed flush hides it.
    var commit: Int32?
  }

  private enum Phase {
    case idle
    /// Placements up to the mark are still being written.
    case placing
    /// The store is being flushed.
    case device
    /// The worker is asked to commit.
    case asking
  }

  /// What tells a device flush from the operations of slots.
  static let token = UInt32.max
  /// Faults of flushes have this in place of a slot.
  static let faultSlot = 0xffff

  private let log: PendingLog
  private let map: ExtentMap
  private let executor: any IOExecutor
  private let faults: FaultQueue
  private var phase = Phase.idle
  /// The mark of the round, 0: nothing was uncommitted.
  private var mark: Mark = 0
  /// Placements up to the mark that are not written yet.
  private var placing = 0
  private var fault: FaultID = 0
  /// Something was written to the store since its last flush began. True at the start: a
  /// former worker may have written.
  private var isDirty = true
  /// The log is nearly full: a round without anybody who asked.
  private var wantsRoom = false
  /// The slots of this round and of the next.
  private var current: [Int32] = []
  private var next: [Int32] = []
  /// Flushes of the worker's own, by tag.
  private var closures: [UInt64: (Int32) -> Void] = [:]
  private var lastTag: UInt64 = 0

  init(log: PendingLog, map: ExtentMap, executor: any IOExecutor, faults: FaultQueue) {
    self.log = log
    self.map = map
    self.executor = executor
    self.faults = faults
  }

  // MARK: What leads to a round

  /// Something is written to the store.
  @inline(__always)
  func noteWrite() {
    isDirty = true
  }

  /// Whether a flush would have nothing to do; `recorded` is the highest mark recorded.
  func isClean(recorded: Mark) -> Bool {
    phase == .idle && !isDirty && recorded <= map.committed
  }

  /// A request ends with the next round.
  func join(_ index: Int) {
    next.append(Int32(index))
  }

  /// The log has to become shorter, though nobody may have asked for a flush.
  func wantRoom() {
    wantsRoom = true
  }

  /// Whether a round should be started, and can be.
  var wantsRound: Bool { phase == .idle && (!next.isEmpty || wantsRoom) }

  // MARK: A round

  /// Starts a round. `recorded` is the highest mark recorded, `unwritten` the number of placements
  /// with marks up to that whose data is not written.
  func start(recorded: Mark, unwritten: Int) -> End? {
    precondition(wantsRound, "a round that nobody wants, or within another")
    swap(&current, &next)
    wantsRoom = false
    if log.flushFailed != 0 { return end(EIO) }
    mark = recorded > map.committed ? recorded : 0
    placing = mark == 0 ? 0 : unwritten
    phase = .placing
    return placing == 0 ? flushDevice() : nil
  }

  /// A placement with this mark is written, or came to nothing.
  func written(_ placed: Mark) -> End? {
    guard phase == .placing, placed != 0, placed <= mark else { return nil }
    placing -= 1
    return placing == 0 ? flushDevice() : nil
  }

  private func flushDevice() -> End? {
    phase = .device
    guard isDirty else { return askCommit() }
    isDirty = false
    log.beginFlush()
    executor.start(BackingIO(.flush, device: 0, token: FlushRounds.token))
    return nil
  }

  /// The operation with `token` has ended.
  func deviceFlushed(_ code: Int32) -> End? {
    precondition(phase == .device, "a flush that nobody started has ended")
    log.endFlush(code)
    return log.flushFailed == 0 ? askCommit() : end(EIO)
  }

  private func askCommit() -> End? {
    guard mark > map.committed else { return end(0) }
    phase = .asking
    fault = faults.number(slot: FlushRounds.faultSlot)
    faults.ask(.flush(fault, upTo: mark))
    return nil
  }

  /// Whether this is the number of the round's question.
  func isAsking(_ id: FaultID) -> Bool { id != 0 && id == fault }

  /// The worker has committed, or has failed with an errno.
  func answered(_ id: FaultID, _ code: Int32) throws(AnswerRefusal) -> End {
    guard isAsking(id), phase == .asking else { throw .unknownFault(id) }
    fault = 0
    guard code == 0 else {
      return log.flushFailed == 0 ? end(code, commit: code) : end(EIO)
    }
    log.drop(upTo: mark)
    map.committed = log.committed
    return end(0, commit: 0)
  }

  private func end(_ code: Int32, commit: Int32? = nil) -> End {
    phase = .idle
    let ended = End(slots: current, code: code, commit: commit)
    current = []
    return ended
  }

  // MARK: Flushes of the worker's own

  /// A tag for a flush that ends with a call of `done`.
  func tag(_ done: @escaping (Int32) -> Void) -> UInt64 {
    lastTag += 1
    closures[lastTag] = done
    return lastTag
  }

  /// Calls what belongs to a tag, with the flush's errno.
  func tell(_ tag: UInt64, _ code: Int32) {
    closures.removeValue(forKey: tag)?(code)
  }
}
