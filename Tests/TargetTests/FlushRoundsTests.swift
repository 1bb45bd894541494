// SPDX-License-Identifier: Apache-2.0
// Rounds of flushes: each way through their states, and random ones against a list.

import DiskModel
import Fakes
import Glibc
import Testing
import TestSupport

@testable import Target

/// Rounds over a store, moved by hand.
private final class Rounds {
  static let size: UInt64 = 1 << 24
  let log: PendingLog
  let map = ExtentMap(sectorShift: 3, cap: 1000)
  let executor: SimulatedExecutor
  let faults = FaultQueue()
  let rounds: FlushRounds
  /// How device flushes have ended that nobody has seen, and what came of those seen.
  var ended: [FlushRounds.End?] = []
  var recorded: Mark = 0

  init(seed: UInt64 = 1) throws {
    log = try PendingLog(anonymousFor: Self.size, blockSize: 4096)
    executor = SimulatedExecutor(devices: [MemoryStore("store", size: Self.size)], seed: seed)
    rounds = FlushRounds(log: log, map: map, executor: executor, faults: faults)
    executor.completion = { [unowned self] token, code in
      #expect(token == FlushRounds.token)
      ended.append(rounds.deviceFlushed(code))
    }
  }

  /// A placement whose data is written.
  func record(_ mark: Mark) {
    let block = mark % (Self.size / 4096)
    precondition(log.makeRoom(for: 1))
    log.append(
      Extent(BlockRange(block), .device(0, sector: 8 * block), writable: true, mark: mark))
    recorded = max(recorded, mark)
    rounds.noteWrite()
  }

  /// Ends the device's flush and returns what came of it.
  func flushDevice(failing: Bool = false) -> FlushRounds.End?? {
    executor.manners.failingFlush = failing ? 100 : 0
    #expect(log.isFlushUnderWay)
    guard executor.step() else { return nil }
    #expect(!log.isFlushUnderWay)
    return ended.removeFirst()
  }

  func question() -> (FaultID, Mark)? {
    guard case .flush(let id, let mark)? = faults.next() else { return nil }
    return (id, mark)
  }
}

extension PendingLog {
  /// Whether the file says that a flush is under way.
  fileprivate var isFlushUnderWay: Bool { base.load(fromByteOffset: 52, as: UInt32.self) == 1 }
}

@Suite struct FlushRoundsTests {
  @Test func aCleanStoreIsNotFlushedTwice() throws {
    let all = try Rounds()
    let rounds = all.rounds
    // A former worker may have written.
    #expect(!rounds.isClean(recorded: 0) && !rounds.wantsRound && !rounds.isAsking(0))
    rounds.join(3)
    #expect(rounds.wantsRound)
    #expect(rounds.start(recorded: 0, unwritten: 9) == nil)
    #expect(!rounds.wantsRound && !rounds.isClean(recorded: 0))
    rounds.join(4)
    #expect(!rounds.wantsRound, "one round at a time")
    #expect(all.flushDevice() == FlushRounds.End(slots: [3], code: 0, commit: nil))
    #expect(rounds.isClean(recorded: 0) && !rounds.isClean(recorded: 1))
    // Nothing was written meanwhile.
    #expect(rounds.wantsRound)
    let end = rounds.start(recorded: 0, unwritten: 0)
    #expect(end == FlushRounds.End(slots: [4], code: 0, commit: nil))
    #expect(all.executor.waiting == 0 && all.faults.next() == nil)
    rounds.noteWrite()
    #expect(!rounds.isClean(recorded: 0))
  }

  @Test func dataThenDeviceThenCommit() throws {
    let all = try Rounds()
    let rounds = all.rounds
    all.record(2)
    rounds.join(0)
    rounds.join(1)
    #expect(rounds.start(recorded: 2, unwritten: 2) == nil)
    // One that is no placement, and one that is later, are not waited for.
    #expect(rounds.written(0) == nil && rounds.written(3) == nil && rounds.written(1) == nil)
    #expect(all.executor.waiting == 0)
    #expect(rounds.written(2) == nil)
    #expect(all.executor.waiting == 1 && all.faults.next() == nil)
    all.record(3)
    #expect(all.flushDevice() == .some(nil))
    let (id, mark) = try #require(all.question())
    #expect(mark == 2 && all.faults.next() == nil && rounds.isAsking(id))
    #expect(!rounds.isAsking(id + 1) && !rounds.isAsking(0))
    #expect(throws: AnswerRefusal.unknownFault(id + 1)) { try rounds.answered(id + 1, 0) }
    #expect(all.map.committed == 0 && all.log.count == 2)
    #expect(try rounds.answered(id, 0) == FlushRounds.End(slots: [0, 1], code: 0, commit: 0))
    #expect(all.map.committed == 2 && all.log.extents().map(\.mark) == [3])
    #expect(!rounds.isAsking(id))
    #expect(throws: AnswerRefusal.unknownFault(id)) { try rounds.answered(id, 0) }
    // What came in the middle of the flush is dirt for the next.
    #expect(!rounds.isClean(recorded: 3))
  }

  @Test func aFailedCommitIsTriedAgain() throws {
    let all = try Rounds()
    all.record(1)
    all.rounds.join(5)
    #expect(all.rounds.start(recorded: 1, unwritten: 0) == nil)
    #expect(all.flushDevice() == .some(nil))
    let (id, _) = try #require(all.question())
    let end = try all.rounds.answered(id, ENOSPC)
    #expect(end == FlushRounds.End(slots: [5], code: ENOSPC, commit: ENOSPC))
    #expect(all.map.committed == 0 && all.log.count == 1)
    all.rounds.join(6)
    // Clean, but not committed: the worker is asked at once.
    #expect(all.rounds.start(recorded: 1, unwritten: 0) == nil)
    let (again, mark) = try #require(all.question())
    #expect(again != id && mark == 1)
    #expect(
      try all.rounds.answered(again, 0) == FlushRounds.End(slots: [6], code: 0, commit: 0))
  }

  @Test func aFailedFlushStands() throws {
    let all = try Rounds()
    all.record(1)
    all.rounds.join(5)
    #expect(all.rounds.start(recorded: 1, unwritten: 0) == nil)
    #expect(
      all.flushDevice(failing: true) == FlushRounds.End(slots: [5], code: EIO, commit: nil))
    #expect(all.log.flushFailed == EIO && all.faults.next() == nil)
    all.rounds.join(6)
    let end = all.rounds.start(recorded: 1, unwritten: 1)
    #expect(end == FlushRounds.End(slots: [6], code: EIO, commit: nil))
    all.log.clearFlushFailure()
    all.rounds.noteWrite()
    all.rounds.join(7)
    #expect(all.rounds.start(recorded: 1, unwritten: 0) == nil)
    #expect(all.flushDevice() == .some(nil))
    // A flush of a commit plan fails meanwhile: that is what the guest hears of.
    let (id, _) = try #require(all.question())
    all.log.failFlush(ENOSPC)
    #expect(
      try all.rounds.answered(id, ENOSPC) == FlushRounds.End(slots: [7], code: EIO, commit: nil))
  }

  /// A flush of a commit plan fails while the store is flushed: no commit is asked for.
  @Test func aFlushElsewhereFails() throws {
    let all = try Rounds()
    all.record(1)
    all.rounds.join(5)
    #expect(all.rounds.start(recorded: 1, unwritten: 0) == nil)
    all.log.failFlush(EIO)
    #expect(all.flushDevice() == FlushRounds.End(slots: [5], code: EIO, commit: nil))
    #expect(all.faults.next() == nil)
  }

  @Test func aRoundWithoutAnybody() throws {
    let all = try Rounds()
    all.record(1)
    all.rounds.wantRoom()
    #expect(all.rounds.wantsRound)
    #expect(all.rounds.start(recorded: 1, unwritten: 0) == nil && !all.rounds.wantsRound)
    #expect(all.flushDevice() == .some(nil))
    let (id, _) = try #require(all.question())
    #expect(try all.rounds.answered(id, 0) == FlushRounds.End(slots: [], code: 0, commit: 0))
    #expect(!all.rounds.wantsRound)
  }

  @Test func theWorkersOwn() throws {
    let rounds = try Rounds().rounds
    var results: [Int32] = []
    let first = rounds.tag { results.append($0) }
    let second = rounds.tag { results.append($0 + 100) }
    rounds.tell(second, 5)
    rounds.tell(first, 0)
    rounds.tell(first, 7)
    #expect(results == [105, 0])
  }

  /// Every flush ends once, with a round that began after it, and after what it covers.
  @Test(arguments: Depth.seeds(60)) func anyOrder(seed: UInt64) throws {
    let all = try Rounds(seed: seed)
    var random = SplitMix64(seed: seed)
    var lastMark: Mark = 0
    var unwritten: [Mark] = []
    var waiting: [(slot: Int32, upTo: Mark)] = []
    var inRound: [(slot: Int32, upTo: Mark)] = []
    var slot: Int32 = 0
    var question: (FaultID, Mark)?
    func settle(_ end: FlushRounds.End?) {
      guard let end else { return }
      #expect(end.slots == inRound.map(\.slot), "DMU_SEED=\(seed)")
      if end.code == 0 {
        for flush in inRound { #expect(flush.upTo <= all.map.committed) }
      } else {
        #expect(end.code == EDQUOT && end.commit == EDQUOT)
      }
      inRound = []
    }
    for _ in 0..<400 {
      switch random.below(7) {
      case 0:
        lastMark += 1
        unwritten.append(lastMark)
      case 1 where !unwritten.isEmpty:
        let mark = unwritten.remove(at: random.below(unwritten.count))
        if random.chance(80) { all.record(mark) }
        settle(all.rounds.written(mark))
      case 2:
        slot += 1
        all.rounds.join(Int(slot))
        waiting.append((slot, all.recorded))
      case 3 where all.rounds.wantsRound:
        #expect(inRound.isEmpty)
        (inRound, waiting) = (waiting, [])
        let late = unwritten.count { $0 <= all.recorded }
        settle(all.rounds.start(recorded: all.recorded, unwritten: late))
      case 4 where all.executor.waiting > 0:
        if let end = all.flushDevice() { settle(end) }
      case 5:
        if let asked = all.question() {
          question = asked
          #expect(unwritten.allSatisfy { $0 > asked.1 }, "a commit before the data")
          #expect(all.executor.waiting == 0, "a commit before the flush")
        }
      default:
        guard let asked = question else { continue }
        question = nil
        settle(try all.rounds.answered(asked.0, random.chance(30) ? EDQUOT : 0))
      }
    }
  }
}
