// A write's placement from the worker's answer to its entry in the map: read what the write
// does not cover, put the block together, write it in one piece, record it.

import Glibc
import Posix

extension UserTarget {
  /// Keeps room in the log for a placement of this slot, or parks it and starts a flush.
  func keepRoom(_ index: Int) -> Bool {
    if log.flushFailed != 0, log.count + reserved >= PendingLog.maximumCapacity / 2 {
      // No flush will ever make room.
      finish(index, EIO)
      return false
    }
    guard log.makeRoom(for: reserved + 1) else {
      park(index, for: Slot.Wait.room)
      rounds.wantsRoom = true
      startFlushRound()
      return false
    }
    reserved += 1
    return true
  }

  /// Begins what an answer has asked for. The slot holds its blocks.
  func begin(_ index: Int) {
    let slot = slots + index
    if !invalidations.isEmpty, isInvalidating(slot.pointee.holdFirst, slot.pointee.placement.end) {
      slot.pointee.isAnswered = true
      park(index, for: Slot.Wait.invalidation)
      return
    }
    slot.pointee.isAnswered = false
    let isDiscard =
      slot.pointee.operation == .discard
      || (slot.pointee.operation == .zero && slot.pointee.isWhole)
    if isDiscard {
      beginZeroing(index)
    } else if slot.pointee.isWhole || !slot.pointee.copies {
      let run = slot.pointee.placement
      slot.pointee.pieceEnd = pieceEnd(slot.pointee, before: run.end)
      placedAfter(index, put(index, run, slot.pointee.pieceEnd, .placedWrite))
    } else {
      beginCopy(index)
    }
  }

  private func beginZeroing(_ index: Int) {
    let slot = slots + index
    let run = slot.pointee.placement
    slot.pointee.pieceEnd = pieceEnd(slot.pointee, before: run.end)
    if run.isZero {
      placed(index)
      return
    }
    let length = Int(min(run.end << shift, size) - run.first << shift)
    let operation: BackingIO.Operation = slot.pointee.keepsSpace ? .zero : .punch
    placedAfter(
      index, transfer(index, operation, run.device, run.sector << 9, length, nil, .zeroing))
  }

  private func beginCopy(_ index: Int) {
    let slot = slots + index
    guard let scratch = takeScratch() else {
      slot.pointee.isAnswered = true
      park(index, for: Slot.Wait.scratch)
      return
    }
    slot.pointee.scratch = scratch
    counters.copies += 1
    let run = slot.pointee.placement
    slot.pointee.pieceEnd = pieceEnd(slot.pointee, before: run.end)
    let length = blockLength(run.first)
    let source = slot.pointee.source
    if source == Run.zero {
      memset(scratch, 0, length)
      overlay(index)
      return
    }
    let from = Run(first: run.first, end: run.end, place: source, mark: 0, writable: false)
    if from.sector << 9 >= executor.end(from.device) {
      memset(scratch, 0, length)
      overlay(index)
      return
    }
    switch transfer(index, .read, from.device, from.sector << 9, length, scratch, .copyRead) {
    case .done: overlay(index)
    case .pending: break
    case .failed(let code): failIO(index, code)
    }
  }

  /// Bytes of a block that lie within the disk.
  private func blockLength(_ block: UInt64) -> Int {
    Int(min(UInt64(blockSize), size - block << shift))
  }

  /// Lays the write over the copy and writes the block in one piece.
  func overlay(_ index: Int) {
    let slot = slots + index
    guard let scratch = slot.pointee.scratch else { preconditionFailure("a copy without room") }
    let run = slot.pointee.placement
    let into = scratch + Int(slot.pointee.cursor - run.first << shift)
    let length = Int(slot.pointee.pieceEnd - slot.pointee.cursor)
    if slot.pointee.operation == .write, let buffer = slot.pointee.buffer {
      memcpy(into, buffer + Int(slot.pointee.cursor - slot.pointee.offset), length)
    } else {
      memset(into, 0, length)
    }
    placedAfter(
      index,
      transfer(
        index, .write, run.device, run.sector << 9, blockLength(run.first), scratch, .blockWrite))
  }

  private func placedAfter(_ index: Int, _ progress: Progress) {
    switch progress {
    case .done: placed(index)
    case .pending: break
    case .failed(let code): failIO(index, code)
    }
  }

  /// The data of a placement is written: from now on it is the mapping.
  func placed(_ index: Int) {
    let slot = slots + index
    let run = slot.pointee.placement
    if !slot.pointee.isTemporary {
      if run.mark != 0 {
        log.append(
          Extent(
            BlockRange(run.first, run.end - run.first), run.unpacked, writable: run.writable,
            mark: run.mark))
        recordedMark = max(recordedMark, run.mark)
        map.set(run)
        if case .noSpace = health { health = .ready }
      } else {
        learn(run, except: index)
      }
    }
    slot.pointee.cursor = slot.pointee.pieceEnd
    letGo(index)
    settlePlacement(run.mark)
    if log.count >= PendingLog.maximumCapacity * 3 / 4, log.flushFailed == 0 {
      rounds.wantsRoom = true
      startFlushRound()
    }
    makeReady(index)
  }

  /// A placement came to nothing.
  func abandon(_ index: Int, _ code: Int32) {
    let run = slots[index].placement
    if run.mark != 0 {
      faults.append(.mapError(block: run.first, mark: run.mark, code: code))
    }
    letGo(index)
    settlePlacement(run.mark)
  }

  /// Lets go of the blocks, the room in the log and the buffer.
  func letGo(_ index: Int) {
    let slot = slots + index
    slot.pointee.placement = Run(first: 0, end: 0, place: Run.zero, mark: 0, writable: false)
    slot.pointee.isAnswered = false
    slot.pointee.isTemporary = false
    slot.pointee.copies = false
    let operation = slot.pointee.operation
    if operation != .read, operation != .status { reserved -= 1 }
    if let scratch = slot.pointee.scratch {
      scratchFree.append(scratch)
      slot.pointee.scratch = nil
      wake(Slot.Wait.scratch)
    }
    release(index)
  }

  private func takeScratch() -> UnsafeMutableRawPointer? {
    if let pointer = scratchFree.popLast() { return pointer }
    guard scratchUsed < max(2, limits.scratch >> Int(shift)) else { return nil }
    scratchUsed += 1
    return .allocate(byteCount: Int(blockSize), alignment: 4096)
  }
}
