// SPDX-License-Identifier: Apache-2.0
// Flushes: commit on flush, in rounds.
//
// A round notes the highest mark recorded, waits until every placement up to it has its
// data written, flushes the store, asks the worker to commit up to the mark, and ends all
// the flushes that it began with. Flushes that arrive meanwhile share the next round.
//
// A flush of the store that failed stands: the kernel may have dropped the data that it
// could not write, so no later success would mean anything.

import Glibc
import Posix

/// The state of flushing.
struct FlushRounds {
  enum Phase {
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
  static let faultSlot: UInt64 = 0xffff

  var phase = Phase.idle
  /// The mark of the round.
  var mark: Mark = 0
  /// Placements up to the mark that are not written yet.
  var placing = 0
  var fault: FaultID = 0
  /// Something was written to the store since its last flush began. True at the start: a
  /// former worker may have written.
  var dirty = true
  /// The log is nearly full: a round without anybody who asked.
  var wantsRoom = false
  /// The slots of this round and of the next.
  var current: [Int32] = []
  var next: [Int32] = []
  /// Flushes of the worker's own, by tag.
  var closures: [UInt64: (Int32) -> Void] = [:]
  var lastTag: UInt64 = 0

  /// Who waited for the next round is in this one now.
  mutating func begin() {
    swap(&current, &next)
  }
}

extension UserTarget {
  /// What is said while a failed flush stands.
  package static let flushReason =
    "a flush of the store has failed, so writes may be lost: see to the store, then run"
    + " 'dmu-xen clear'"

  /// A flush of the worker's own, with the errno of its end, 0 for success.
  package func flush(_ done: @escaping (Int32) -> Void) {
    rounds.lastTag += 1
    rounds.closures[rounds.lastTag] = done
    if let code = submitFlush(TargetRequest(.flush, tag: rounds.lastTag), -1) {
      told(rounds.lastTag, code)
    }
  }

  /// The end of a flush of the worker's own.
  func told(_ tag: UInt64, _ code: Int32) {
    rounds.closures.removeValue(forKey: tag)?(code)
  }

  func submitFlush(_ request: TargetRequest, _ owner: Int32) -> Int32? {
    if log.flushFailed != 0 { return EIO }
    if rounds.phase == .idle, !rounds.dirty, recordedMark <= map.committed { return 0 }
    guard let index = requests.admitFlush(request, owner: owner) else { return ENOMEM }
    joinFlush(index)
    drain()
    return nil
  }

  /// A request that ends with the next round.
  func joinFlush(_ index: Int) {
    rounds.next.append(Int32(index))
    startFlushRound()
  }

  func startFlushRound() {
    guard rounds.phase == .idle, !rounds.next.isEmpty || rounds.wantsRoom else { return }
    rounds.begin()
    rounds.wantsRoom = false
    if log.flushFailed != 0 {
      endRound(EIO)
      return
    }
    rounds.mark = recordedMark > map.committed ? recordedMark : 0
    rounds.placing = 0
    for position in 0..<locks.count {
      let mark = requests[Int(locks[position].slot)].pointee.placement.mark
      if mark != 0, mark <= rounds.mark { rounds.placing += 1 }
    }
    rounds.phase = .placing
    if rounds.placing == 0 { flushDevice() }
  }

  /// A placement with this mark is written, or came to nothing.
  func settlePlacement(_ mark: Mark) {
    guard rounds.phase == .placing, mark != 0, mark <= rounds.mark else { return }
    rounds.placing -= 1
    if rounds.placing == 0 { flushDevice() }
  }

  private func flushDevice() {
    rounds.phase = .device
    guard rounds.dirty else {
      askCommit()
      return
    }
    rounds.dirty = false
    log.beginFlush()
    executor.start(BackingIO(.flush, device: 0, token: FlushRounds.token))
  }

  func deviceFlushed(_ code: Int32) {
    log.endFlush(code)
    guard code == 0 else {
      flushFailed(code)
      endRound(EIO)
      return
    }
    if log.flushFailed != 0 { endRound(EIO) } else { askCommit() }
  }

  /// A flush of the store has failed, here or in a commit plan.
  func flushFailed(_ code: Int32) {
    log.failFlush(code)
    refreshHealth()
  }

  private func askCommit() {
    guard rounds.mark > map.committed else {
      endRound(0)
      return
    }
    rounds.phase = .asking
    lastFault += 1
    rounds.fault = lastFault << 16 | FlushRounds.faultSlot
    raise(.flush(rounds.fault, upTo: rounds.mark))
  }

  func flushAnswered(_ id: FaultID, _ code: Int32) throws(AnswerRefusal) {
    guard id != 0, id == rounds.fault, rounds.phase == .asking else { throw .unknownFault(id) }
    rounds.fault = 0
    if code == 0 {
      log.drop(upTo: rounds.mark)
      map.committed = log.committed
      if trouble.commitFailed != 0 {
        trouble.commitFailed = 0
        refreshHealth()
      }
      endRound(0)
    } else {
      if log.flushFailed == 0 { noteCommit(code) }
      endRound(log.flushFailed == 0 ? code : EIO)
    }
  }

  /// A commit that failed short of a failed flush may be tried again.
  private func noteCommit(_ code: Int32) {
    trouble.commitFailed = code
    refreshHealth()
  }

  private func endRound(_ code: Int32) {
    rounds.phase = .idle
    let ended = rounds.current
    rounds.current.removeAll(keepingCapacity: true)
    for index in ended { complete(Int(index), code) }
    if code == 0 {
      requests.wake(.room)
    } else {
      requests.fail(waitingFor: .room, code)
    }
    startFlushRound()
  }
}
