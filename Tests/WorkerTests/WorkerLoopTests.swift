// SPDX-License-Identifier: Apache-2.0
import BlockIO
import DiskFormats
import DiskModel
import Fakes
import Glibc
import SystemIO
import Target
import Testing
import TestSupport
import Worker
import WorkerLink

/// A target that asks what a test wants and remembers what it is told.
private final class ScriptedTarget: TargetEngine {
  let blockSize: UInt32 = 4096
  let sectors: UInt64 = 8000
  var left: [Extent] = []
  var faults: [Fault] = []
  var answers: [Answer] = []
  var refusing = false
  var takesGrants = false
  var givesMarks: Bool { takesGrants }
  var grants: [Grant?] = []
  var pools: [Pool] = []
  /// Answers for more than one block that find something in their way.
  var crowded = false

  func grant(_ grant: Grant?) throws(AnswerRefusal) { grants.append(grant) }
  func pool(_ pool: Pool) throws(AnswerRefusal) {
    if refusing { throw .badBlocks(pool.blocks) }
    pools.append(pool)
  }
  func uncommitted() -> [Extent] { left }
  func nextFault() -> Fault? { faults.isEmpty ? nil : faults.removeFirst() }
  func answer(_ answer: Answer) throws(AnswerRefusal) {
    answers.append(answer)
    if refusing, case .map = answer { throw .badBlocks(BlockRange(0)) }
    if crowded, case .map(_, let placement, _) = answer, placement.extent.blocks.count > 1 {
      throw .overlap(placement.extent.blocks)
    }
  }
}

/// A format whose block b lives at sector 1000 + 8 b, with errors on demand.
private final class ScriptedFormat: ImageFormat {
  let size: UInt64 = 4_096_000
  let blockSize: UInt32 = 4096
  var allocatedBlocks: UInt64 = 0
  var mark: Mark = 0
  var failure: ImageError?
  var restored: [Extent] = []
  var abandoned: [Mark] = []
  var durable: Mark = 0
  var plansEmpty = false
  var grantedExtents: [Extent] = []

  /// What there is for pools; nil: it has grants.
  var poolRoom: UInt32?
  var marked: [[Mark]] = []

  func takeMarks() -> Bool { true }
  func marked(_ provisional: Mark, as mark: Mark) { marked.append([provisional, mark]) }
  func grant() -> Grant? {
    poolRoom == nil ? Grant(BlockRange(0, 1000), .device(0, sector: 1000)) : nil
  }
  func pool() throws(ImageError) -> Pool? {
    guard let room = poolRoom, room > 0 else { throw ImageError(IOError(ENOSPC, "place", "store")) }
    poolRoom = room - 1
    return Pool(BlockRange(0, 1000), .device(0, sector: UInt64(room)), stride: 8, count: 4)
  }
  func granted(_ extent: Extent) throws(ImageError) {
    try fail()
    grantedExtents.append(extent)
  }

  private func fail() throws(ImageError) {
    if let failure { throw failure }
  }
  private func extent(_ blocks: BlockRange, _ mark: Mark) -> Extent {
    Extent(blocks, .device(0, sector: 1000 + 8 * blocks.first), writable: true, mark: mark)
  }
  func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    try fail()
    return extent(BlockRange(block, min(limit, 1000 - block)), 0)
  }
  func place(_ blocks: BlockRange, whole: Bool) throws(ImageError) -> Placement {
    try fail()
    mark += 1
    return Placement(extent(blocks, mark), whole ? .none : .zero)
  }
  func discard(_ blocks: BlockRange, zeroing: Bool) throws(ImageError) -> DiscardAnswer {
    try fail()
    return zeroing ? .zero(extent(blocks, 0)) : .nothing(blocks: blocks.count)
  }
  func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan {
    try fail()
    let write = CommitPlan.Write(offset: mark * 8, bytes: [UInt8(mark)])
    return CommitPlan(upTo: mark, stages: plansEmpty ? [] : [[write]])
  }
  func committed(upTo mark: Mark) { durable = mark }
  func abandon(_ mark: Mark) { abandoned.append(mark) }
  func restore(_ extents: [Extent]) throws(ImageError) {
    try fail()
    restored = extents
  }
}

/// Work that is to be done elsewhere, kept until the test does it.
private final class Elsewhere {
  var waiting: [(work: @Sendable () -> CommitFailure?, then: (CommitFailure?) -> Void)] = []

  func runNext() {
    let (work, then) = waiting.removeFirst()
    then(work())
  }
}

@Suite("The worker's loop") struct WorkerLoopTests {
  private let target = ScriptedTarget()
  private let format = ScriptedFormat()
  private let elsewhere = Elsewhere()
  private let store = MemoryStore("store")
  private let worker: Worker

  init() {
    let elsewhere = elsewhere
    worker = Worker(
      target: target, format: format, store: store, log: Log(level: .error, journal: false),
      offload: { elsewhere.waiting.append(($0, $1)) })
  }

  @Test func everyFaultIsAnswered() {
    target.faults = [
      .read(1, blocks: BlockRange(5, 2)), .write(2, blocks: BlockRange(7), whole: false),
      .discard(3, blocks: BlockRange(8, 4), zeroing: false),
      .discard(4, blocks: BlockRange(8, 4), zeroing: true),
      .mapError(block: 7, mark: 1, code: EIO), .mapError(block: 9, mark: 0, code: EIO),
      .invalidateDone(BlockRange(1)),
    ]
    #expect(worker.pump())
    #expect(!worker.pump())
    let block = { (first: UInt64, count: UInt64, mark: Mark) in
      Extent(
        BlockRange(first, count), .device(0, sector: 1000 + 8 * first), writable: true, mark: mark)
    }
    #expect(
      target.answers == [
        .map(1, Placement(block(5, 995, 0))), .map(2, Placement(block(7, 1, 1), .zero)),
        .done(3, blocks: 4), .map(4, Placement(block(8, 4, 0), .zero)),
      ])
    #expect(format.abandoned == [1])
    #expect(worker.condition == .ready)
    #expect(worker.faults == 7)
  }

  @Test func aFlushIsConfirmedOnlyAfterItsPlanHasRun() {
    target.faults = [.flush(1, upTo: 3), .flush(2, upTo: 5)]
    _ = worker.pump()
    #expect(target.answers.isEmpty && format.durable == 0)
    #expect(elsewhere.waiting.count == 1, "one plan at a time")
    elsewhere.runNext()
    #expect(target.answers == [.flushDone(1)] && format.durable == 3)
    #expect(elsewhere.waiting.count == 1 && worker.isCommitting)
    elsewhere.runNext()
    #expect(target.answers == [.flushDone(1), .flushDone(2)] && format.durable == 5)
    #expect(!worker.isCommitting)
  }

  @Test func nothingToWriteIsNotSentElsewhere() {
    format.plansEmpty = true
    target.faults = [.flush(1, upTo: 3)]
    _ = worker.pump()
    #expect(target.answers == [.flushDone(1)] && format.durable == 3)
  }

  @Test(arguments: [ENOSPC, EIO]) func aFailedCommitFailsTheFlushAndKeepsItsMarks(_ code: Int32) {
    let failing = FailingCommit(code)
    let elsewhere = elsewhere
    let worker = Worker(
      target: target, format: format, store: failing, log: Log(level: .error, journal: false),
      offload: { elsewhere.waiting.append(($0, $1)) })
    target.faults = [.flush(1, upTo: 3)]
    _ = worker.pump()
    elsewhere.runNext()
    #expect(target.answers == [.fail(1, code: code)] && format.durable == 0)
    #expect(worker.condition.state == (code == ENOSPC ? .noSpace : .degraded))
    failing.failing = false
    target.faults = [.flush(2, upTo: 3)]
    _ = worker.pump()
    elsewhere.runNext()
    #expect(target.answers.last == .flushDone(2) && format.durable == 3)
    // Room comes back; a failure of another kind is for an admin to look at.
    #expect(worker.condition.state == (code == ENOSPC ? .ready : .degraded))
  }

  @Test(arguments: 0..<2) func aFlushThatFailsInACommitStandsWhateverItsErrno(_ step: Int) {
    let elsewhere = elsewhere
    let worker = Worker(
      target: target, format: format,
      store: FailingStore(MemoryStore("store"), failAt: step, code: ENOSPC),
      log: Log(level: .error, journal: false),
      offload: { elsewhere.waiting.append(($0, $1)) })
    target.faults = [.flush(1, upTo: 3)]
    _ = worker.pump()
    elsewhere.runNext()
    // The write is the plan's first step, its flush the second.
    #expect(target.answers == [.fail(1, code: step == 0 ? ENOSPC : EIO)])
    #expect(worker.condition.state == (step == 0 ? .noSpace : .degraded))
  }

  @Test func whatTheFormatCannotAnswerFailsWithItsErrno() {
    format.failure = ImageError(.io, "cannot read store", cause: IOError(ENOMEM, "read", "store"))
    target.faults = [.read(1, blocks: BlockRange(5)), .flush(2, upTo: 1)]
    _ = worker.pump()
    format.failure = ImageError(.corrupt, "a bitmap that lies")
    target.faults = [
      .write(3, blocks: BlockRange(5), whole: true),
      .discard(4, blocks: BlockRange(5), zeroing: true),
    ]
    _ = worker.pump()
    #expect(
      target.answers == [
        .fail(1, code: ENOMEM), .fail(2, code: ENOMEM), .fail(3, code: EIO), .fail(4, code: EIO),
      ])
    #expect(worker.condition.state == .degraded)
    #expect(worker.condition.reason == "block 5: cannot read store", "the first reason stays")
  }

  @Test func aRefusedPlacementIsTakenBack() {
    target.refusing = true
    target.faults = [
      .write(1, blocks: BlockRange(5), whole: true), .read(2, blocks: BlockRange(5)),
    ]
    _ = worker.pump()
    #expect(format.abandoned == [1])
    #expect(target.answers.last == .fail(2, code: EIO))
    #expect(worker.condition.state == .degraded)
  }

  @Test func whatWasPlacedAsGrantedIsTakenUp() {
    worker.grant()
    #expect(target.grants.isEmpty, "this target takes none")
    target.takesGrants = true
    worker.grant()
    #expect(target.grants == [format.grant()])
    let placed = { (block: UInt64, mark: Mark) in
      Extent(
        BlockRange(block), .device(0, sector: 1000 + 8 * block), writable: true, mark: mark)
    }
    target.faults = [.placed(placed(5, 1)), .placed(placed(9, 2)), .flush(1, upTo: 2)]
    _ = worker.pump()
    elsewhere.runNext()
    #expect(format.grantedExtents == [placed(5, 1), placed(9, 2)])
    #expect(target.answers == [.flushDone(1)] && format.durable == 2)
    // What the format could not take up must not look durable, nor anything after it.
    format.failure = ImageError(.badRequest, "no")
    target.faults = [.placed(placed(6, 3))]
    _ = worker.pump()
    format.failure = nil
    target.faults = [.placed(placed(7, 4)), .flush(2, upTo: 2), .flush(3, upTo: 4)]
    _ = worker.pump()
    elsewhere.runNext()
    #expect(target.answers == [.flushDone(1), .flushDone(2), .fail(3, code: EIO)])
    #expect(worker.condition.state == .degraded)
  }

  /// Another pool comes when half of the last is used, and never a third.
  @Test func poolsAreGivenAsTheyAreUsed() {
    target.takesGrants = true
    format.poolRoom = 3
    func use(_ blocks: Range<UInt64>) {
      target.faults = blocks.map {
        .placed(Extent(BlockRange($0), .device(0, sector: 8 * $0), writable: true, mark: $0))
      }
      _ = worker.pump()
    }
    func sectors() -> [UInt64] {
      target.pools.map { if case .device(_, let sector) = $0.place { sector } else { 0 } }
    }
    worker.grant()
    #expect(target.grants.isEmpty && sectors() == [3])
    use(1..<2)
    #expect(sectors() == [3])
    use(2..<3)
    #expect(sectors() == [3, 2])
    use(3..<5)
    #expect(sectors() == [3, 2], "the second has all of its places")
    use(5..<7)
    #expect(sectors() == [3, 2, 1])
    use(7..<11)
    #expect(sectors() == [3, 2, 1] && worker.condition == .ready, "there is no room for a fourth")
    // It is tried again when a first write that asks has found some.
    format.poolRoom = 9
    format.mark = 100
    use(11..<12)
    #expect(sectors() == [3, 2, 1])
    target.faults = [.write(1, blocks: BlockRange(50), whole: true)]
    _ = worker.pump()
    #expect(sectors() == [3, 2, 1, 9])
    // A target that refuses one is given no other.
    target.refusing = true
    use(12..<20)
    target.refusing = false
    use(20..<30)
    #expect(sectors() == [3, 2, 1, 9] && worker.condition == .ready)
  }

  @Test func aMarkThatIsGivenReachesTheFormat() {
    target.takesGrants = true
    worker.grant()
    target.faults = [.marked(Mark.firstProvisional + 1, as: 7), .flush(1, upTo: 7)]
    _ = worker.pump()
    #expect(format.marked == [[Mark.firstProvisional + 1, 7]])
    #expect(worker.faults == 1, "it is no question")
  }

  @Test func aReadIsAnsweredBesideBlocksPlacedMeanwhile() {
    target.takesGrants = true
    target.crowded = true
    target.faults = [.read(1, blocks: BlockRange(5))]
    _ = worker.pump()
    let found = Extent(BlockRange(5), .device(0, sector: 1040), writable: true)
    #expect(target.answers.last == .map(1, Placement(found)))
    #expect(worker.condition == .ready)
  }

  @Test func whatAFormerWorkerLeftIsTakenUp() throws {
    target.left = [Extent(BlockRange(3), .device(0, sector: 1024), writable: true, mark: 9)]
    try worker.restore()
    #expect(format.restored == target.left)
    format.failure = ImageError(.badRequest, "no")
    #expect(throws: ImageError.self) { try worker.restore() }
  }
}

/// A store whose writes fail until told otherwise.
private final class FailingCommit: ByteStore, @unchecked Sendable {
  // Used from one thread only: the test's.
  var failing = true
  let code: Int32
  let name = "store"
  let size: UInt64 = 1 << 20
  let isWritable = true

  init(_ code: Int32) { self.code = code }
  func identity() throws(IOError) -> StoreIdentity { StoreIdentity(size: size, modified: 0) }
  func allocatedBytes() throws(IOError) -> UInt64 { 0 }
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {}
  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    if failing { throw IOError(code, "write", name) }
  }
  func zero(at offset: UInt64, count: UInt64) throws(IOError) {}
  func resize(to size: UInt64) throws(IOError) {}
  func flush() throws(IOError) {}
}
