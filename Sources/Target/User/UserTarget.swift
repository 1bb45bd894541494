// SPDX-License-Identifier: Apache-2.0
// The engine of the contract in user space: what the device-mapper target does in the
// kernel, done for the requests of an NBD client.
//
// How a request goes: what can be done without waiting (a mapped range in the page cache)
// is done within `submit` and leaves no trace. Everything else takes a slot, and goes on in
// steps: look the block up, do a piece of I/O, ask the worker, wait.
//
// UserTarget owns none of that. It hands the events from outside (a request, an answer, the end
// of an operation, a second) to those who know what they mean, and what they return to whom it
// concerns:
//
// | type | what it alone knows | its diagram is of |
// |---|---|---|
// | RequestTable | slots, the order of arrival, who is ready and who waits | a slot |
// | BlockLocks | who holds which block, invalidations that wait | a block, an invalidation |
// | RequestSteps | nothing: what to do next with a request | (a table) |
// | Placer | placements under way, room in the log, marks, buffers | a placement |
// | FlushRounds | the round under way, whether the store is dirty | a round |
// | DeviceIO | the operation of each slot | a transfer |
// | Mappings | nothing: what answers may do to the map | |
// | HealthWatch | what has gone wrong, the policy of space | space |
// | FaultQueue | questions and news that the worker has not seen | |
//
// They call each other down this chain, and nobody calls UserTarget:
//
//     RequestTable, FaultQueue ◄ BlockLocks ◄ Mappings ◄ Placer ◄ RequestSteps ◄ UserTarget
//                              ◄ FlushRounds ◄ DeviceIO ◄─┘           │
//                              ◄ HealthWatch ◄────────────────────────┘
//
// Invariants:
// - One thread. Nothing here is locked.
// - Requests whose bytes overlap, unless both only read, are served in the order of arrival.
//   A block that is being moved is held: who needs it otherwise waits and looks again.
// - A placement enters the map and the pending log after its data has been written and
//   before its request is acknowledged.

package import BlockIO
package import DiskModel
import Glibc

/// The contract in user space: one disk over its backing devices.
package final class UserTarget: TargetEngine {
  // MARK: What is known from the start

  /// Bytes of a block.
  package let blockSize: UInt32
  /// Length in bytes.
  package let size: UInt64
  /// Whether writes are refused.
  package let isReadOnly: Bool
  private let geometry: DiskGeometry
  private let executor: any IOExecutor
  private let log: PendingLog

  // MARK: Who knows what

  private let map: ExtentMap
  private let requests: RequestTable
  private let locks: BlockLocks
  private let faults = FaultQueue()
  private let rounds: FlushRounds
  private let io: DeviceIO
  private let mappings: Mappings
  private let placer: Placer
  private let watch: HealthWatch
  private let steps: RequestSteps
  private var counted = TargetCounters()
  private var owners: [(any RequestOwner)?] = []

  /// A target of a disk of `size` bytes. Placements in the log are mapped at once. Throws
  /// when the log holds what cannot be of this disk. `executor` has at least the store.
  package init(
    size: UInt64, blockSize: UInt32, executor: any IOExecutor, log: PendingLog,
    readOnly: Bool = false, limits: TargetLimits = TargetLimits()
  ) throws(PendingLogError) {
    self.size = size
    self.blockSize = blockSize
    self.executor = executor
    self.log = log
    isReadOnly = readOnly
    geometry = DiskGeometry(size: size, blockSize: blockSize)
    map = ExtentMap(sectorShift: geometry.sectorShift, cap: limits.extents)
    map.committed = log.committed
    requests = RequestTable(capacity: limits.requests)
    locks = BlockLocks(requests, shift: geometry.shift, capacity: limits.requests)
    rounds = FlushRounds(log: log, map: map, executor: executor, faults: faults)
    io = DeviceIO(executor, geometry, requests, rounds, capacity: limits.requests)
    mappings = Mappings(geometry, executor, log, map, locks)
    placer = Placer(mappings, requests, io, faults, limits: limits)
    watch = HealthWatch(log, requests)
    steps = RequestSteps(mappings, requests, io, placer, faults, watch)
    executor.completion = { [unowned self] token, code in operationEnded(token, code) }
  }

  // MARK: What others ask

  /// Length in 512-byte sectors.
  package var sectors: UInt64 { size / 512 }
  /// Blocks, the last of which may be short.
  package var blocks: UInt64 { geometry.blocks }
  /// Counts since the start.
  package var counters: TargetCounters {
    var all = counted
    all.faults = faults.asked
    all.copies = placer.copies
    return all
  }
  /// Requests under way.
  package var outstanding: Int { requests.count }
  /// Holds on blocks, room kept in the log, and bytes for putting blocks together.
  var holdCount: Int { locks.count }
  var reserved: Int { placer.reserved }
  var scratchBytes: Int { placer.scratchBytes }
  /// Placements that are not committed, in the log.
  package var uncommittedCount: Int { log.count }
  /// Every uncommitted mapping, in the order of the marks.
  package func uncommitted() -> [Extent] { log.extents() }

  /// Whether a range of bytes is known, without asking anybody, to read as zeroes.
  package func isHole(offset: UInt64, count: UInt64) -> Bool {
    requests.isIdle && io.isHole(offset, count, by: map)
  }

  // MARK: How the disk is

  /// How the disk is.
  package var health: DiskHealth { watch.health }
  /// What becomes of a write that finds no space.
  package var space: SpacePolicy {
    get { watch.space }
    set { watch.space = newValue }
  }

  /// An admin has seen to the store: flushes may succeed again, and errors are forgotten.
  package func clearFailure() { watch.clear() }

  /// What a worker has found out of the flush in which its predecessor died: 0 when nothing was
  /// lost by it, else the errno with which flushes fail from now on.
  package func judgeFlush(_ code: Int32) { watch.judgeFlush(code) }

  /// Whether it is not known what became of the flush in which the worker before died.
  package var isSuspect: Bool { log.isSuspect }

  /// Whether time may change something: to be told of by `tick` every second.
  package var wantsTicks: Bool { watch.isPassing }

  /// A second has passed: one of the requests that wait for space tries again, or all fail when
  /// they have waited too long. After `quiet` seconds without one, errors are forgotten.
  package func tick(quiet: UInt32) {
    if watch.tick(quiet: quiet) { endWaiting(ENOSPC) }
    watch.probe()
    drain()
  }

  /// Fails whatever waits for space with an errno.
  package func endWaiting(_ code: Int32) {
    watch.endWaiting(code)
    drain()
  }

  // MARK: Owners

  /// Names an owner for `submit`. It is kept alive until dismissed.
  package func enroll(_ owner: any RequestOwner) -> Int32 {
    if let index = owners.firstIndex(where: { $0 == nil }) {
      owners[index] = owner
      return Int32(index)
    }
    owners.append(owner)
    return Int32(owners.count - 1)
  }

  /// Forgets an owner that has no request under way.
  package func dismiss(_ owner: Int32) {
    owners[Int(owner)] = nil
  }

  // MARK: Requests

  /// Takes a request. The errno when it is complete, 0 for success; nil when the owner will
  /// be told. The buffer is lent until then.
  package func submit(_ request: TargetRequest, owner: Int32) -> Int32? {
    count(request)
    if request.operation == .flush { return submitFlush(request, owner) }
    if let code = refusal(request) {
      if code != 0 { counted.errors += 1 }
      return code
    }
    var cursor = request.offset
    if request.operation.rawValue <= TargetRequest.Operation.write.rawValue, !request.isForced,
      requests.isIdle || !isContended(request)
    {
      cursor = io.serve(request, by: map)
      if cursor == request.offset + request.count { return 0 }
    }
    guard requests.admit(request, owner: owner, cursor: cursor) else {
      counted.errors += 1
      return ENOMEM
    }
    drain()
    return nil
  }

  private func count(_ request: TargetRequest) {
    switch request.operation {
    case .read:
      counted.reads += 1
      counted.bytesRead += request.count
    case .write:
      counted.writes += 1
      counted.bytesWritten += request.count
    case .discard, .zero: counted.discards += 1
    case .flush: counted.flushes += 1
    case .status: break
    }
  }

  private func refusal(_ request: TargetRequest) -> Int32? {
    let writes = request.operation != .read && request.operation != .status
    if writes && isReadOnly { return EROFS }
    guard request.offset <= size, request.count <= size - request.offset else {
      return request.operation == .write ? ENOSPC : EINVAL
    }
    return request.count == 0 && !request.isForced ? 0 : nil
  }

  private func isContended(_ request: TargetRequest) -> Bool {
    if locks.hasInvalidations { return true }
    return requests.isContended(
      request.offset, request.offset + request.count, isRead: request.operation == .read)
  }

  // MARK: Going on

  /// Steps whatever is ready.
  private func drain() {
    guard requests.beginSteps() else { return }
    while let index = requests.nextReady() {
      let code = requests.takeFailure(index)
      if code != 0 {
        finish(index, code)
      } else if placer.isAnswered(index) {
        follow(index, placer.begin(index))
      } else {
        follow(index, steps.proceed(index))
      }
    }
  }

  @inline(__always)
  private func follow(_ index: Int, _ next: RequestSteps.Next) {
    switch next {
    case .goesOn: requests.makeReady(index)
    case .waits: break
    case .ends(let code): finish(index, code)
    case .failed(let code): failIO(index, code)
    case .wantsRoom:
      rounds.wantRoom()
      startRound()
    }
  }

  private func follow(_ index: Int, _ outcome: Placer.Outcome) {
    switch outcome {
    case .waits: break
    case .written: placed(index)
    case .failed(let code): failIO(index, code)
    }
  }

  /// A backing operation that was started has ended.
  private func operationEnded(_ token: UInt32, _ code: Int32) {
    if token == FlushRounds.token {
      settle(rounds.deviceFlushed(code))
    } else {
      let index = Int(token)
      requests.endIO(index)
      if requests[index].pointee.operation != .read { rounds.noteWrite() }
      if code != 0 {
        failIO(index, code)
      } else if placer.isPlacing(index) {
        follow(index, placer.ended(index))
      } else {
        steps.endPiece(index)
        // Through the queue, so that a long request does not shut out the others.
        requests.makeReady(index)
      }
      // What goes on with its next piece still reaches its old place.
      if locks.hasInvalidations {
        for range in locks.endInvalidations() { faults.tell(.invalidateDone(range)) }
      }
    }
    drain()
  }

  /// The data of a placement is written.
  private func placed(_ index: Int) {
    let mark = placer.record(index)
    if mark != 0, watch.isShort { watch.foundSpace() }
    requests[index].pointee.cursor = requests[index].pointee.pieceEnd
    placer.letGo(index)
    settle(rounds.written(mark))
    if placer.isLogFilling {
      rounds.wantRoom()
      startRound()
    }
    requests.makeReady(index)
  }

  /// A backing device has failed under a request. One that finds no space may wait for some:
  /// its place comes to nothing, and it asks anew.
  private func failIO(_ index: Int, _ code: Int32) {
    let isRead = requests[index].pointee.isRead || placer.isReading(index)
    let device = io.device(of: index)
    let mayWait = watch.note(code, device, executor.name(device), isRead: isRead)
    if placer.isPlacing(index) { settle(rounds.written(placer.abandon(index, code))) }
    guard mayWait else { return finish(index, code) }
    requests[index].pointee.isProbe = false
    requests.park(index, for: .space)
  }

  /// A request has been served, or has failed with an errno.
  private func finish(_ index: Int, _ code: Int32) {
    requests.leave(index)
    if code == 0, requests[index].pointee.isForced {
      requests.awaitFlush(index)
      rounds.join(index)
      startRound()
      return
    }
    complete(index, code)
  }

  /// Tells the owner and frees the slot.
  private func complete(_ index: Int, _ code: Int32) {
    let owner = requests[index].pointee.owner
    let tag = requests[index].pointee.tag
    requests.free(index)
    if code != 0 { counted.errors += 1 }
    if owner >= 0 {
      owners[Int(owner)]?.completed(tag: tag, code: code)
    } else {
      rounds.tell(tag, code)
    }
  }

  // MARK: Flushes

  /// A flush of the worker's own, with the errno of its end, 0 for success.
  package func flush(_ done: @escaping (Int32) -> Void) {
    let tag = rounds.tag(done)
    if let code = submitFlush(TargetRequest(.flush, tag: tag), -1) { rounds.tell(tag, code) }
  }

  /// Runs a commit off the loop's thread, then `then` with its result on it. A flush that
  /// fails in it stands, as any failed flush of the store does.
  package func run(
    _ work: @escaping @Sendable () -> CommitFailure?, then: @escaping (CommitFailure?) -> Void
  ) {
    log.beginFlush()
    executor.run(work) { [unowned self] error in
      let failed = error?.flushCode ?? 0
      log.endFlush(failed)
      if failed != 0 { watch.flushFailed(failed) }
      then(error)
    }
  }

  private func submitFlush(_ request: TargetRequest, _ owner: Int32) -> Int32? {
    if log.flushFailed != 0 { return EIO }
    if rounds.isClean(recorded: placer.recordedMark) { return 0 }
    guard let index = requests.admitFlush(request, owner: owner) else { return ENOMEM }
    rounds.join(index)
    startRound()
    drain()
    return nil
  }

  /// Starts a round of flushes if one is wanted.
  private func startRound() {
    guard rounds.wantsRound else { return }
    let recorded = placer.recordedMark
    settle(rounds.start(recorded: recorded, unwritten: placer.unwritten(upTo: recorded)))
  }

  /// If a round has ended: ends its flushes, and begins the next one.
  private func settle(_ end: FlushRounds.End?) {
    guard let end else { return }
    watch.noteRound(end)
    for index in end.slots { complete(Int(index), end.code) }
    if end.code == 0 {
      requests.wake(.room)
    } else {
      requests.fail(waitingFor: .room, end.code)
    }
    startRound()
  }

  // MARK: Faults and answers

  /// The next fault that the worker has not seen yet.
  package func nextFault() -> Fault? { faults.next() }

  /// Takes an answer. Throws what is wrong with it, and then nothing has changed.
  package func answer(_ answer: Answer) throws(AnswerRefusal) {
    switch answer {
    case .map(let id, let placement, let temporary):
      try take(id, placement, isTemporary: temporary)
    case .prime(let extent): try mappings.prime(extent)
    case .done(let id, let count): try done(id, count)
    case .fail(let id, let code): try fail(id, code > 0 ? code : EIO)
    case .flushDone(let id): settle(try rounds.answered(id, 0))
    case .invalidate(let range): try invalidate(range)
    }
    drain()
  }

  private func asker(_ id: FaultID) throws(AnswerRefusal) -> Int {
    guard let index = requests.asker(id) else { throw .unknownFault(id) }
    return index
  }

  private func take(
    _ id: FaultID, _ placement: Placement, isTemporary: Bool
  ) throws(AnswerRefusal) {
    let index = try asker(id)
    let extent = placement.extent
    try mappings.check(extent)
    guard extent.blocks.first == locks.blocks(of: index).first else {
      throw .badBlocks(extent.blocks)
    }
    if requests[index].pointee.isRead {
      try takeRead(index, placement, isTemporary: isTemporary)
    } else {
      try placer.take(index, placement, isTemporary: isTemporary)
    }
  }

  private func takeRead(
    _ index: Int, _ placement: Placement, isTemporary: Bool
  ) throws(AnswerRefusal) {
    let extent = placement.extent
    guard case .none = placement.preparation else { throw .badBlocks(extent.blocks) }
    // An old placement may come along with what is found; a new one comes with a write.
    guard extent.mark <= placer.highestMark else { throw .badMark(extent.mark) }
    var run = geometry.run(extent)
    run.mark = 0
    guard isTemporary || mappings.agrees(run) else { throw .overlap(extent.blocks) }
    let asked = locks.blocks(of: index).end
    requests.endFault(index)
    locks.release(index)
    if !isTemporary { mappings.learn(run, except: index) }
    // The answer itself serves this request, whether or not the map has kept it; but only the
    // blocks that were asked for, since those beyond may be in the hands of a write whose
    // data is not at their place yet.
    run.end = min(run.end, asked)
    if locks.isInvalidating(run.first, run.end) {
      requests.makeReady(index)
    } else {
      follow(index, steps.read(index, from: run))
    }
  }

  private func done(_ id: FaultID, _ count: UInt64) throws(AnswerRefusal) {
    let index = try asker(id)
    guard placer.isDiscard(index) else { throw .unknownFault(id) }
    let asked = locks.blocks(of: index)
    let range = BlockRange(asked.first, count)
    guard count > 0, count <= asked.end - asked.first else { throw .badBlocks(range) }
    requests.endFault(index)
    let slot = requests[index]
    slot.pointee.cursor = geometry.pieceEnd(slot.pointee.end, before: range.end)
    placer.letGo(index)
    requests.makeReady(index)
  }

  private func fail(_ id: FaultID, _ code: Int32) throws(AnswerRefusal) {
    if rounds.isAsking(id) { return settle(try rounds.answered(id, code)) }
    let index = try asker(id)
    requests.endFault(index)
    if placer.isPlacing(index) { placer.letGo(index) } else { locks.release(index) }
    finish(index, code)
  }

  private func invalidate(_ range: BlockRange) throws(AnswerRefusal) {
    try mappings.checkForgettable(range)
    guard !placer.isPlacing(range) else { throw .overlap(range) }
    map.remove(range.first, range.end)
    if locks.invalidate(range) { faults.tell(.invalidateDone(range)) }
  }
}
