// SPDX-License-Identifier: Apache-2.0
// A write's placement from the worker's answer to its entry in the map: read what the write
// does not cover, put the block together at its new place piece by piece, record it. Until it
// is recorded the block is where it was, so that a copy that ends half-way has changed nothing.

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
      requests.park(index, for: .room)
      rounds.wantRoom()
      startRound()
      return false
    }
    reserved += 1
    return true
  }

  /// Begins what an answer has asked for. The slot holds its blocks.
  func begin(_ index: Int) {
    let slot = requests[index]
    if locks.hasInvalidations,
      locks.isInvalidating(locks.blocks(of: index).first, slot.pointee.placement.end)
    {
      slot.pointee.isAnswered = true
      requests.park(index, for: .invalidation)
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
    let slot = requests[index]
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
    let slot = requests[index]
    guard let scratch = takeScratch() else {
      slot.pointee.isAnswered = true
      requests.park(index, for: .scratch)
      return
    }
    slot.pointee.scratch = scratch
    slot.pointee.copied = 0
    counted.copies += 1
    slot.pointee.pieceEnd = pieceEnd(slot.pointee, before: slot.pointee.placement.end)
    copyPiece(index)
  }

  /// Bytes of a block that lie within the disk.
  private func blockLength(_ block: UInt64) -> UInt64 {
    min(UInt64(blockSize), size - block << shift)
  }

  /// Puts the next piece of a block together. The block is held and has no mapping of its own
  /// yet, so nobody sees how far it has come.
  private func copyPiece(_ index: Int) {
    let slot = requests[index]
    let run = slot.pointee.placement
    let length = blockLength(run.first)
    let first = slot.pointee.copied
    guard first < length else {
      placed(index)
      return
    }
    let end = min(length, first + UInt64(scratchSize))
    slot.pointee.copyEnd = end
    let written = written(slot.pointee)
    if written.lowerBound <= first, end <= written.upperBound {
      overlay(index)
      return
    }
    let from = Run(
      first: run.first, end: run.end, place: slot.pointee.source, mark: 0, writable: false)
    let place = from.sector << 9 + first
    if slot.pointee.source == Run.zero || place >= executor.end(from.device) {
      if end <= written.lowerBound || written.upperBound <= first {
        // Up to the write, or from it on; devices zero whole pages.
        let gap = first < written.lowerBound ? written.lowerBound & ~4095 : length
        zeroGap(index, end: max(end, gap))
      } else if let scratch = slot.pointee.scratch {
        memset(scratch, 0, Int(end - first))
        overlay(index)
      }
      return
    }
    // The first piece may be all there is; others let the loop go on meanwhile.
    switch transfer(
      index, .read, from.device, place, Int(end - first), slot.pointee.scratch, .copyRead,
      atOnce: first == 0)
    {
    case .done: overlay(index)
    case .pending: break
    case .failed(let code): failIO(index, code)
    }
  }

  /// The bytes of its block that a write covers.
  private func written(_ slot: Slot) -> Range<UInt64> {
    let start = slot.placement.first << shift
    return (slot.cursor - start)..<(slot.pieceEnd - start)
  }

  /// Zeroes what comes before or after the write, where there is nothing to copy.
  private func zeroGap(_ index: Int, end: UInt64) {
    let slot = requests[index]
    let run = slot.pointee.placement
    slot.pointee.copyEnd = end
    let first = slot.pointee.copied
    copiedAfter(
      index,
      transfer(
        index, .zero, run.device, run.sector << 9 + first, Int(end - first), nil, .copyWrite))
  }

  /// Lays the write over a piece of the copy and writes the piece.
  func overlay(_ index: Int) {
    let slot = requests[index]
    guard let scratch = slot.pointee.scratch else { preconditionFailure("a copy without room") }
    let run = slot.pointee.placement
    let (first, end) = (slot.pointee.copied, slot.pointee.copyEnd)
    let written = written(slot.pointee).clamped(to: first..<end)
    if !written.isEmpty {
      let into = scratch + Int(written.lowerBound - first)
      if slot.pointee.operation == .write, let buffer = slot.pointee.buffer {
        let ahead = run.first << shift + written.lowerBound - slot.pointee.offset
        memcpy(into, buffer + Int(ahead), written.count)
      } else {
        memset(into, 0, written.count)
      }
    }
    copiedAfter(
      index,
      transfer(
        index, .write, run.device, run.sector << 9 + first, Int(end - first), scratch,
        .copyWrite, atOnce: first == 0))
  }

  private func copiedAfter(_ index: Int, _ progress: Progress) {
    switch progress {
    case .done: copiedPiece(index)
    case .pending: break
    case .failed(let code): failIO(index, code)
    }
  }

  /// A piece is at its new place.
  func copiedPiece(_ index: Int) {
    requests[index].pointee.copied = requests[index].pointee.copyEnd
    copyPiece(index)
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
    let slot = requests[index]
    let run = slot.pointee.placement
    if !slot.pointee.isTemporary {
      if run.mark != 0 {
        log.append(
          Extent(
            BlockRange(run.first, run.end - run.first), run.unpacked, writable: run.writable,
            mark: run.mark))
        recordedMark = max(recordedMark, run.mark)
        map.set(run)
        if trouble.space != 0 { spaceFound() }
      } else if !locks.isInvalidating(run.first, run.end) {
        learn(run, except: index)
      }
    }
    slot.pointee.cursor = slot.pointee.pieceEnd
    letGo(index)
    settle(rounds.written(run.mark))
    if log.count >= PendingLog.maximumCapacity * 3 / 4, log.flushFailed == 0 {
      rounds.wantRoom()
      startRound()
    }
    requests.makeReady(index)
  }

  /// A placement came to nothing.
  func abandon(_ index: Int, _ code: Int32) {
    let run = requests[index].pointee.placement
    if run.mark != 0 {
      faults.tell(.mapError(block: run.first, mark: run.mark, code: code))
    }
    letGo(index)
    settle(rounds.written(run.mark))
  }

  /// Lets go of the blocks, the room in the log and the buffer.
  func letGo(_ index: Int) {
    let slot = requests[index]
    slot.pointee.placement = Run(first: 0, end: 0, place: Run.zero, mark: 0, writable: false)
    slot.pointee.isAnswered = false
    slot.pointee.isTemporary = false
    slot.pointee.copies = false
    if !slot.pointee.isRead { reserved -= 1 }
    if let scratch = slot.pointee.scratch {
      scratchFree.append(scratch)
      slot.pointee.scratch = nil
      requests.wake(.scratch)
    }
    locks.release(index)
  }

  private func takeScratch() -> UnsafeMutableRawPointer? {
    if let pointer = scratchFree.popLast() { return pointer }
    guard scratchUsed < max(2, limits.scratch / scratchSize) else { return nil }
    scratchUsed += 1
    return .allocate(byteCount: scratchSize, alignment: 4096)
  }
}
