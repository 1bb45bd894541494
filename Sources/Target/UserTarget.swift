// SPDX-License-Identifier: Apache-2.0
// The engine of the contract in user space: what the device-mapper target does in the
// kernel, done for the requests of an NBD client.
//
// How a request goes: what can be done without waiting (a mapped range in the page cache)
// is done within `submit` and leaves no trace. Everything else takes a slot, and goes on in
// steps: look the block up, do a piece of I/O, ask the worker, wait.
//
// Invariants:
// - One thread. Nothing here is locked.
// - A slot has at most one backing operation or one fault at a time, and is stepped only
//   when it has neither.
// - Requests whose bytes overlap, unless both only read, are served in the order of arrival.
//   A block that is being moved is held: who needs it otherwise waits and looks again.
// - A placement enters the map and the pending log after its data has been written and
//   before its request is acknowledged.
// - The room for its record is kept from the moment a write fault is raised.

package import Posix
import Glibc

/// Bounds of a target's memory.
package struct TargetLimits: Sendable {
  /// Runs of blocks to remember; committed ones beyond are forgotten.
  package var extents = 32768
  /// Requests under way at once.
  package var requests = 4096
  /// Bytes for putting blocks together; room for two pieces at least.
  package var scratch = 2 << 20
  /// A block is put together in pieces of at most so many bytes, however large it is.
  package var piece = 1 << 20

  /// The defaults.
  package init() {}
}

/// The contract in user space: one disk over its backing devices.
package final class UserTarget: TargetEngine {
  /// What has happened since the start.
  package struct Counters: Sendable, Equatable {
    /// Requests of each kind.
    package var reads: UInt64 = 0
    /// Write requests.
    package var writes: UInt64 = 0
    /// Flush requests, forced writes not included.
    package var flushes: UInt64 = 0
    /// Discards and write-zeroes.
    package var discards: UInt64 = 0
    /// Bytes that reads asked for.
    package var bytesRead: UInt64 = 0
    /// Bytes that writes brought.
    package var bytesWritten: UInt64 = 0
    /// Questions to the worker, flushes included.
    package var faults: UInt64 = 0
    /// Blocks that were put together from a copy and a write.
    package var copies: UInt64 = 0
    /// Requests that failed.
    package var errors: UInt64 = 0
  }

  /// How the disk is.
  package enum Health: Sendable, Equatable {
    /// All is well.
    case ready
    /// The store has no space for new blocks; goes by itself once it has. `isWaiting`: writes
    /// wait for space, otherwise they fail.
    case noSpace(Int32, isWaiting: Bool)
    /// Something failed with this errno; an admin has to act.
    case degraded(Int32, String)
  }

  // MARK: What is known from the start

  /// Bytes of a block.
  package let blockSize: UInt32
  /// Length in 512-byte sectors.
  package var sectors: UInt64 { size / 512 }
  /// Length in bytes.
  package let size: UInt64
  /// Whether writes are refused.
  package let isReadOnly: Bool
  let shift: UInt64
  let sectorShift: UInt64
  let blocks: UInt64
  let limits: TargetLimits
  let executor: any IOExecutor
  let log: PendingLog

  // MARK: What changes

  /// Counts since the start.
  package var counters: Counters {
    var all = counted
    all.faults = faults.asked
    return all
  }
  var counted = Counters()
  /// How the disk is.
  package internal(set) var health = Health.ready
  var trouble = DiskTrouble()
  /// What becomes of a write that finds no space.
  package var space = SpacePolicy(waits: false) {
    didSet {
      trouble.waits = space.waits
      refreshHealth()
    }
  }
  let map: ExtentMap
  let requests: RequestTable
  /// Requests under way.
  package var outstanding: Int { requests.count }
  let locks: BlockLocks
  /// Holds on blocks.
  var holdCount: Int { locks.count }
  let faults = FaultQueue()
  var owners: [(any RequestOwner)?] = []
  var scratchFree: [UnsafeMutableRawPointer] = []
  var scratchUsed = 0
  /// Bytes of each buffer for putting blocks together.
  var scratchSize: Int { min(Int(blockSize), limits.piece) }
  /// Write and discard faults that may yet need a record in the log.
  var reserved = 0
  var highestMark: Mark = 0
  var recordedMark: Mark = 0
  let rounds: FlushRounds

  /// A target of a disk of `size` bytes. Placements in the log are mapped at once. Throws
  /// when the log holds what cannot be of this disk. `executor` has at least the store.
  package init(
    size: UInt64, blockSize: UInt32, executor: any IOExecutor, log: PendingLog,
    readOnly: Bool = false, limits: TargetLimits = TargetLimits()
  ) throws(PendingLogError) {
    precondition(blockSize >= 512 && blockSize & (blockSize - 1) == 0, "a block's size")
    precondition(size > 0 && size % 512 == 0 && size < 1 << 56, "a disk's size")
    self.size = size
    self.blockSize = blockSize
    self.executor = executor
    self.log = log
    self.limits = limits
    isReadOnly = readOnly
    shift = UInt64(blockSize.trailingZeroBitCount)
    sectorShift = shift - 9
    blocks = (size + UInt64(blockSize) - 1) >> shift
    map = ExtentMap(sectorShift: sectorShift, cap: limits.extents)
    requests = RequestTable(capacity: limits.requests)
    locks = BlockLocks(requests, shift: shift, capacity: limits.requests)
    rounds = FlushRounds(log: log, map: map, executor: executor, faults: faults)
    map.committed = log.committed
    for extent in log.extents() {
      map.set(run(extent))
      highestMark = max(highestMark, extent.mark)
    }
    recordedMark = highestMark
    refreshHealth()
    executor.completion = { [unowned self] token, code in operationEnded(token, code) }
  }

  deinit {
    for pointer in scratchFree { pointer.deallocate() }
  }

  /// Placements that are not committed, in the log.
  package var uncommittedCount: Int { log.count }

  /// Every uncommitted mapping, in the order of the marks.
  package func uncommitted() -> [Extent] { log.extents() }

  /// An admin has seen to the store: flushes may succeed again, and errors are forgotten.
  package func clearFailure() {
    log.clearFlushFailure()
    trouble.clear()
    refreshHealth()
  }

  /// What a worker has found out of the flush in which its predecessor died: 0 when nothing was
  /// lost by it, else the errno with which flushes fail from now on.
  package func judgeFlush(_ code: Int32) {
    log.judge(code)
    refreshHealth()
  }

  /// Whether it is not known what became of the flush in which the worker before died.
  package var isSuspect: Bool { log.isSuspect }

  /// Has the health follow from what is known.
  func refreshHealth() {
    trouble.flushFailed = log.flushFailed
    trouble.flushReason = UserTarget.flushReason
    health = trouble.health
  }

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

  /// Runs a commit off the loop's thread, then `then` with its result on it. A flush that
  /// fails in it stands, as any failed flush of the store does.
  package func run(
    _ work: @escaping @Sendable () -> CommitFailure?, then: @escaping (CommitFailure?) -> Void
  ) {
    log.beginFlush()
    executor.run(work) { [unowned self] error in
      let failed = error?.flushCode ?? 0
      log.endFlush(failed)
      if failed != 0 { flushFailed(failed) }
      then(error)
    }
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
      cursor = serveAtOnce(request)
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

  /// Does what can be done without waiting and without asking: how far it came.
  private func serveAtOnce(_ request: TargetRequest) -> UInt64 {
    guard let buffer = request.buffer else { return request.offset }
    let end = request.offset + request.count
    var cursor = request.offset
    while cursor < end {
      guard let run = map.find(cursor >> shift) else { return cursor }
      let pieceEnd = min(end, run.end << shift)
      let pointer = buffer + Int(cursor - request.offset)
      let length = Int(pieceEnd - cursor)
      let isRead = request.operation == .read
      if run.isZero || (isRead && address(run, cursor) >= executor.end(run.device)) {
        guard isRead else { return cursor }
        memset(pointer, 0, length)
        cursor = pieceEnd
        continue
      }
      guard isRead || run.writable else { return cursor }
      if !isRead { rounds.noteWrite() }
      let done = executor.attempt(
        BackingIO(
          isRead ? .read : .write, device: run.device, offset: address(run, cursor),
          count: length, buffer: pointer))
      guard done > 0 else { return cursor }
      cursor += UInt64(done)
    }
    return cursor
  }

  /// Whether a range is known, without asking anybody, to read as zeroes.
  func isHole(offset: UInt64, count: UInt64) -> Bool {
    guard requests.isIdle, count > 0, let run = map.find(offset >> shift),
      (offset + count - 1) >> shift < run.end
    else { return false }
    return run.isZero || address(run, offset) >= executor.end(run.device)
  }

  /// The byte of its device where a byte of the disk lives.
  @inline(__always)
  func address(_ run: Run, _ byte: UInt64) -> UInt64 {
    run.sector << 9 + (byte - run.first << shift)
  }

  func run(_ extent: Extent) -> Run {
    Run(
      first: extent.blocks.first, end: extent.blocks.end, place: Run.pack(extent.place),
      mark: extent.mark, writable: extent.writable)
  }
}
