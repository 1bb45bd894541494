// SPDX-License-Identifier: Apache-2.0
// A write's placement from its question to its entry in the map: room in the log, the worker's
// answer, the data at its new place, the record.
//
// The steps of a slot:
//
//     none ──reserve──► asked ──take: the answer──► answered ──begin──┬── covered by the write,
//      ▲                  │                          ▲    │           │   or nothing to copy
//      │                  │       parks for an       └────┤           ▼
//      │                  │       invalidation or         │        placing ─────────┐
//      │                  │       for a buffer            │                         │
//      │                  │                               └─► reading ◄─┐           │
//      │                  │                                      │      │ the next  │
//      │                  │                                      ▼      │ piece     │
//      │                  │                                   writing ──┘           │
//      │                  │                                      │ the last piece   │
//      └─────letGo────────┴─────────────◄── abandon: it failed ──┴── record ◄───────┘
//
// What a crash of the worker leaves after each step: before `record` the block is where it was, so
// a copy that ends half-way has changed nothing, and the request is made again; after it the
// placement is in the log, and its data is in the page cache.
//
// Invariants:
// 1. From `reserve` to `letGo` a slot holds its blocks, and room for one record in the log.
// 2. A placement enters the log and the map after its data is written, and before its request is
//    acknowledged.
// 3. The mark of a placement is greater than those of all placements before it. Placements may
//    be recorded in any order.
// 4. A block is put together in pieces, in one buffer: memory does not grow with the block.

import BlockIO
import DiskModel
import Glibc

/// The placements under way. Used from one thread.
final class Placer {
  private enum Step: UInt8 {
    case none
    /// The worker is asked.
    case asked
    /// The answer is there, and the placement is to be begun.
    case answered
    /// Reading a piece of what a partial write does not cover.
    case reading
    /// Writing a piece of a block that is put together.
    case writing
    /// Writing a placement that the request covers, or zeroing one.
    case placing
  }

  /// What becomes of room for a record.
  enum Room {
    case kept
    /// A flush has to make room first.
    case full
    /// No flush will ever make room, since a failed one stands.
    case never
  }

  /// How far a placement has come.
  enum Outcome: Equatable {
    /// A backing operation is under way, or the slot is parked.
    case waits
    /// All data is written: to be recorded.
    case written
    /// The device has failed: to be abandoned.
    case failed(Int32)
  }

  /// A placement under way and what precedes it.
  private struct Placing {
    var run = Run(first: 0, end: 0, place: Run.zero, mark: 0, writable: false)
    /// The question was for whole blocks.
    var isWhole = false
    /// It is used once and not remembered.
    var isTemporary = false
    /// What the write does not cover comes from `source`.
    var copies = false
    var source: UInt64 = Run.zero
    /// A piece of the block.
    var scratch: UnsafeMutableRawPointer?
    /// The piece, in bytes of the block: everything before it is at its new place.
    var copied: UInt64 = 0
    var copyEnd: UInt64 = 0
  }

  private let mappings: Mappings
  private let requests: RequestTable
  private let io: DeviceIO
  private let faults: FaultQueue
  /// By slot; a placement only from `reserve` to `letGo`.
  private let steps: UnsafeMutablePointer<Step>
  private let placings: UnsafeMutablePointer<Placing>

  /// The highest mark of an answer so far.
  private(set) var highestMark: Mark = 0
  /// The highest mark whose placement is recorded.
  private(set) var recordedMark: Mark = 0
  /// Slots that have room in the log.
  private(set) var reserved = 0
  /// Blocks that were put together from a copy and a write.
  private(set) var copies: UInt64 = 0
  private var scratchFree: [UnsafeMutableRawPointer] = []
  private var scratchUsed = 0
  private let scratchLimit: Int
  /// Bytes of each buffer for putting blocks together.
  private let scratchSize: Int

  private var geometry: DiskGeometry { mappings.geometry }
  private var locks: BlockLocks { mappings.locks }
  private var log: PendingLog { mappings.log }

  /// Places writes for the slots of a table. What is in the log is mapped at once.
  init(
    _ mappings: Mappings, _ requests: RequestTable, _ io: DeviceIO, _ faults: FaultQueue,
    limits: TargetLimits
  ) {
    self.mappings = mappings
    self.requests = requests
    self.io = io
    self.faults = faults
    scratchSize = min(Int(mappings.geometry.blockSize), limits.piece)
    scratchLimit = max(2, limits.scratch / scratchSize)
    steps = .allocate(capacity: limits.requests)
    steps.initialize(repeating: .none, count: limits.requests)
    placings = .allocate(capacity: limits.requests)
    for extent in mappings.log.extents() {
      mappings.map.set(mappings.geometry.run(extent))
      highestMark = max(highestMark, extent.mark)
    }
    recordedMark = highestMark
  }

  deinit {
    for pointer in scratchFree { pointer.deallocate() }
    steps.deallocate()
    placings.deallocate()
  }

  /// Bytes of all buffers for putting blocks together.
  var scratchBytes: Int { scratchUsed * scratchSize }

  /// Whether the log is so full that a flush should make room before it is full.
  var isLogFilling: Bool {
    log.count >= PendingLog.maximumCapacity * 3 / 4 && log.flushFailed == 0
  }

  // MARK: Where a slot stands

  /// Whether a slot's placement is to be begun.
  @inline(__always)
  func isAnswered(_ index: Int) -> Bool { steps[index] == .answered }

  /// Whether a slot has a placement, asked for or under way.
  @inline(__always)
  func isPlacing(_ index: Int) -> Bool { steps[index] != .none }

  /// Whether a slot's last operation was the read of a copy.
  func isReading(_ index: Int) -> Bool { steps[index] == .reading }

  /// Whether what a slot asked for is to discard or zero whole blocks, rather than to write.
  func isDiscard(_ index: Int) -> Bool {
    switch requests[index].pointee.operation {
    case .discard: true
    case .zero: placings[index].isWhole
    default: false
    }
  }

  /// Whether a placement of some of these blocks is answered: it can be flushed, not forgotten.
  func isPlacing(_ range: BlockRange) -> Bool {
    for position in 0..<locks.count {
      let hold = locks[position]
      guard !hold.isRead, hold.first < range.end, range.first < hold.end else { continue }
      let index = Int(hold.slot)
      if steps[index] == .answered || placings[index].run.mark != 0 { return true }
    }
    return false
  }

  /// How many placements with marks up to this one are not written.
  func unwritten(upTo mark: Mark) -> Int {
    var count = 0
    for position in 0..<locks.count where !locks[position].isRead {
      let placed = placings[Int(locks[position].slot)].run.mark
      if placed != 0, placed <= mark { count += 1 }
    }
    return count
  }

  // MARK: The question and its answer

  /// Keeps room in the log for a placement of this slot, which is about to ask for whole blocks or
  /// for a part of one.
  func reserve(_ index: Int, whole: Bool) -> Room {
    if log.flushFailed != 0, log.count + reserved >= PendingLog.maximumCapacity / 2 {
      return .never
    }
    guard log.makeRoom(for: reserved + 1) else { return .full }
    reserved += 1
    placings[index] = Placing()
    placings[index].isWhole = whole
    steps[index] = .asked
    return .kept
  }

  /// Takes the answer to a slot's question, which begins at the blocks asked for and is of this
  /// disk. The slot goes on.
  func take(_ index: Int, _ placement: Placement, isTemporary: Bool) throws(AnswerRefusal) {
    let extent = placement.extent
    let isDiscard = isDiscard(index)
    if isDiscard { try checkDiscard(placement) } else { try checkWrite(placement) }
    var isNew = isDiscard
    var source: UInt64?
    if !isDiscard {
      switch placement.preparation {
      case .none: break
      case .zero: source = Run.zero
      case .copy(let from):
        try mappings.check(Extent(BlockRange(extent.blocks.first), from, writable: false))
        source = Run.pack(from)
      }
      try checkMark(extent, isTemporary)
      isNew = extent.mark != 0 || source != nil
    }
    guard !isNew || extent.blocks.end <= locks.blocks(of: index).end else {
      throw .badBlocks(extent.blocks)
    }
    if isDiscard { try checkMark(extent, isTemporary) }
    let run = geometry.run(extent)
    guard mappings.agrees(run) else { throw .overlap(extent.blocks) }
    placings[index].copies = source != nil
    placings[index].source = source ?? Run.zero
    placings[index].run = run
    placings[index].isTemporary = isTemporary
    steps[index] = .answered
    highestMark = max(highestMark, run.mark)
    requests.endFault(index)
    requests.makeReady(index)
  }

  private func checkWrite(_ placement: Placement) throws(AnswerRefusal) {
    let extent = placement.extent
    guard case .device(let device, _) = extent.place, extent.writable else {
      throw .badBlocks(extent.blocks)
    }
    guard mappings.executor.isWritable(device) else { throw .badDevice(device) }
  }

  private func checkDiscard(_ placement: Placement) throws(AnswerRefusal) {
    let extent = placement.extent
    if case .copy = placement.preparation { throw .badBlocks(extent.blocks) }
    if case .device(let device, _) = extent.place {
      guard extent.writable, mappings.executor.isWritable(device) else { throw .badDevice(device) }
    }
  }

  /// A mark of a new placement is greater than all before it, and leaves room to count on.
  private func checkMark(_ extent: Extent, _ isTemporary: Bool) throws(AnswerRefusal) {
    let mark = extent.mark
    guard mark != 0 else { return }
    guard mark > highestMark, mark < UInt64.max >> 1, !isTemporary else { throw .badMark(mark) }
  }

  // MARK: The data

  /// Begins what an answer has asked for, or parks the slot.
  func begin(_ index: Int) -> Outcome {
    let slot = requests[index]
    let placing = placings + index
    if locks.hasInvalidations,
      locks.isInvalidating(locks.blocks(of: index).first, placing.pointee.run.end)
    {
      requests.park(index, for: .invalidation)
      return .waits
    }
    let isDiscard = isDiscard(index)
    if !isDiscard, placing.pointee.copies, !placing.pointee.isWhole {
      guard let scratch = takeScratch() else {
        requests.park(index, for: .scratch)
        return .waits
      }
      placing.pointee.scratch = scratch
      placing.pointee.copied = 0
      copies += 1
    }
    let run = placing.pointee.run
    slot.pointee.pieceEnd = geometry.pieceEnd(slot.pointee.end, before: run.end)
    if placing.pointee.scratch != nil { return copy(index) }
    steps[index] = .placing
    guard isDiscard else { return placed(io.put(index, run)) }
    guard !run.isZero else { return .written }
    let length = Int(min(run.end << geometry.shift, geometry.size) - run.first << geometry.shift)
    return placed(io.zero(index, run.device, run.sector << 9, length))
  }

  private func placed(_ progress: DeviceIO.Progress) -> Outcome {
    switch progress {
    case .done: .written
    case .pending: .waits
    case .failed(let code): .failed(code)
    }
  }

  /// The backing operation of a slot's placement has ended well.
  func ended(_ index: Int) -> Outcome {
    switch steps[index] {
    case .reading: copied(index, overlay(index))
    case .writing: copied(index, .done)
    case .placing: .written
    case .none, .asked, .answered: preconditionFailure("a placement that was not begun")
    }
  }

  /// Puts a block together from where it has come to. The block is held and has no mapping of its
  /// own yet, so nobody sees how far that is.
  private func copy(_ index: Int) -> Outcome {
    let length = geometry.length(of: placings[index].run.first)
    while placings[index].copied < length {
      switch movePiece(index, length) {
      case .done: placings[index].copied = placings[index].copyEnd
      case .pending: return .waits
      case .failed(let code): return .failed(code)
      }
    }
    return .written
  }

  /// Goes on after a piece, or waits for it, or fails with it.
  private func copied(_ index: Int, _ progress: DeviceIO.Progress) -> Outcome {
    guard case .done = progress else { return placed(progress) }
    placings[index].copied = placings[index].copyEnd
    return copy(index)
  }

  /// Moves the next piece of a block of `length` bytes.
  private func movePiece(_ index: Int, _ length: UInt64) -> DeviceIO.Progress {
    let placing = placings + index
    let first = placing.pointee.copied
    let end = min(length, first + UInt64(scratchSize))
    placing.pointee.copyEnd = end
    let written = written(index)
    if written.lowerBound <= first, end <= written.upperBound { return overlay(index) }
    let run = placing.pointee.run
    let from = Run(
      first: run.first, end: run.end, place: placing.pointee.source, mark: 0, writable: false)
    let place = from.sector << 9 + first
    if from.isZero || place >= io.end(from.device) {
      if end <= written.lowerBound || written.upperBound <= first {
        // Up to the write, or from it on; devices zero whole pages.
        let gap = first < written.lowerBound ? written.lowerBound & ~4095 : length
        return zeroGap(index, end: max(end, gap))
      }
      if let scratch = placing.pointee.scratch { memset(scratch, 0, Int(end - first)) }
      return overlay(index)
    }
    steps[index] = .reading
    // The first piece may be all there is; others let the loop go on meanwhile.
    let progress = io.transfer(
      index, .read, from.device, place, Int(end - first), placing.pointee.scratch,
      atOnce: first == 0)
    guard case .done = progress else { return progress }
    return overlay(index)
  }

  /// The bytes of its block that a write covers.
  private func written(_ index: Int) -> Range<UInt64> {
    let slot = requests[index]
    let start = placings[index].run.first << geometry.shift
    return (slot.pointee.cursor - start)..<(slot.pointee.pieceEnd - start)
  }

  /// Zeroes what comes before or after the write, where there is nothing to copy.
  private func zeroGap(_ index: Int, end: UInt64) -> DeviceIO.Progress {
    let run = placings[index].run
    let first = placings[index].copied
    placings[index].copyEnd = end
    steps[index] = .writing
    return io.transfer(
      index, .zero, run.device, run.sector << 9 + first, Int(end - first), nil)
  }

  /// Lays the write over a piece of the copy and writes the piece.
  private func overlay(_ index: Int) -> DeviceIO.Progress {
    let slot = requests[index]
    let placing = placings[index]
    guard let scratch = placing.scratch else { preconditionFailure("a copy without room") }
    let run = placing.run
    let (first, end) = (placing.copied, placing.copyEnd)
    let written = written(index).clamped(to: first..<end)
    if !written.isEmpty {
      let into = scratch + Int(written.lowerBound - first)
      if slot.pointee.operation == .write, let buffer = slot.pointee.buffer {
        let ahead = run.first << geometry.shift + written.lowerBound - slot.pointee.offset
        memcpy(into, buffer + Int(ahead), written.count)
      } else {
        memset(into, 0, written.count)
      }
    }
    steps[index] = .writing
    return io.transfer(
      index, .write, run.device, run.sector << 9 + first, Int(end - first), scratch,
      atOnce: first == 0)
  }

  // MARK: The end

  /// The data of a placement is written: from now on it is the mapping, unless it is for once.
  /// Returns its mark, 0: it has none. `letGo` follows.
  func record(_ index: Int) -> Mark {
    let placing = placings + index
    let run = placing.pointee.run
    guard !placing.pointee.isTemporary else { return 0 }
    guard run.mark != 0 else {
      if !locks.isInvalidating(run.first, run.end) { mappings.learn(run, except: index) }
      return 0
    }
    log.append(
      Extent(
        BlockRange(run.first, run.end - run.first), run.unpacked, writable: run.writable,
        mark: run.mark))
    recordedMark = max(recordedMark, run.mark)
    mappings.map.set(run)
    return run.mark
  }

  /// A placement came to nothing: tells the worker, and lets go. Returns its mark.
  func abandon(_ index: Int, _ code: Int32) -> Mark {
    let run = placings[index].run
    if run.mark != 0 {
      faults.tell(.mapError(block: run.first, mark: run.mark, code: code))
    }
    letGo(index)
    return run.mark
  }

  /// Lets go of the blocks, the room in the log and the buffer.
  func letGo(_ index: Int) {
    precondition(steps[index] != .none, "a slot without a placement")
    steps[index] = .none
    reserved -= 1
    if let scratch = placings[index].scratch {
      scratchFree.append(scratch)
      placings[index].scratch = nil
      requests.wake(.scratch)
    }
    locks.release(index)
  }

  private func takeScratch() -> UnsafeMutableRawPointer? {
    if let pointer = scratchFree.popLast() { return pointer }
    guard scratchUsed < scratchLimit else { return nil }
    scratchUsed += 1
    return .allocate(byteCount: scratchSize, alignment: 4096)
  }
}
