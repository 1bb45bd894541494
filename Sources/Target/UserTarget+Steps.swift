// SPDX-License-Identifier: Apache-2.0
// The steps of a request: look up, move a piece, ask, wait.

import Glibc
import Posix

extension UserTarget {
  /// What came of starting a piece of I/O.
  enum Progress {
    case done
    case pending
    case failed(Int32)
  }

  /// Takes a ready slot as far as it can go.
  func step(_ index: Int) {
    let slot = requests[index]
    let code = requests.takeFailure(index)
    guard code == 0 else { return finish(index, code) }
    if slot.pointee.isAnswered {
      begin(index)
      return
    }
    proceed(index)
  }

  /// From the cursor on.
  func proceed(_ index: Int) {
    let slot = requests[index]
    while slot.pointee.cursor < slot.pointee.end {
      let block = slot.pointee.cursor >> shift
      if locks.hasInvalidations, locks.isInvalidating(block) {
        requests.park(index, for: .invalidation)
        return
      }
      let goesOn: Bool
      switch slot.pointee.operation {
      case .read: goesOn = stepRead(index, block)
      case .write: goesOn = stepWrite(index, block)
      case .zero: goesOn = stepZero(index, block)
      case .discard: goesOn = stepDiscard(index, block)
      case .status: goesOn = stepStatus(index, block)
      case .flush: preconditionFailure("a flush is not stepped")
      }
      guard goesOn else { return }
    }
    finish(index, 0)
  }

  /// The end of the request's piece from the cursor up to a block's end.
  func pieceEnd(_ slot: Slot, before block: UInt64) -> UInt64 {
    block >= blocks ? slot.end : min(slot.end, block << shift)
  }

  private func stepRead(_ index: Int, _ block: UInt64) -> Bool {
    guard let run = map.find(block) else { return askRead(index, block) }
    return moveRead(index, run)
  }

  /// Reads a piece from where it lives. True when the request may go on at once.
  func moveRead(_ index: Int, _ run: Run) -> Bool {
    let slot = requests[index]
    let end = pieceEnd(slot.pointee, before: run.end)
    if slot.pointee.operation == .status {
      return tellStatus(index, run, end)
    }
    guard let buffer = slot.pointee.buffer else { preconditionFailure("a read without a buffer") }
    let pointer = buffer + Int(slot.pointee.cursor - slot.pointee.offset)
    let length = Int(end - slot.pointee.cursor)
    slot.pointee.pieceEnd = end
    if run.isZero {
      memset(pointer, 0, length)
      slot.pointee.cursor = end
      return true
    }
    return proceedAfter(
      index,
      transfer(index, .read, run.device, address(run, slot.pointee.cursor), length, pointer, .piece)
    )
  }

  /// A read of a block that nothing is known of: ask, or wait for who asks already.
  func askRead(_ index: Int, _ block: UInt64) -> Bool {
    if locks.parks(index, at: block) { return false }
    let slot = requests[index]
    let last = (slot.pointee.end - 1) >> shift
    var end = locks.nextHeld(block, last + 1)
    if let next = map.findOrNext(block) { end = min(end, next.first) }
    locks.hold(index, block, end)
    let id = nextFaultID(index)
    faults.ask(.read(id, blocks: BlockRange(block, end - block)))
    return false
  }

  private func stepWrite(_ index: Int, _ block: UInt64) -> Bool {
    if let run = map.find(block), run.writable, !run.isZero { return moveWrite(index, run) }
    return askWrite(index, block)
  }

  /// Writes a piece to where it may be written.
  func moveWrite(_ index: Int, _ run: Run) -> Bool {
    let slot = requests[index]
    let end = pieceEnd(slot.pointee, before: run.end)
    slot.pointee.pieceEnd = end
    return proceedAfter(index, put(index, run, end, .piece))
  }

  /// Writes the request's bytes from the cursor up to `end` to a run; zeroes for a request
  /// that zeroes.
  func put(_ index: Int, _ run: Run, _ end: UInt64, _ phase: Slot.Phase) -> Progress {
    let slot = requests[index]
    let length = Int(end - slot.pointee.cursor)
    let to = address(run, slot.pointee.cursor)
    guard slot.pointee.operation == .write, let buffer = slot.pointee.buffer else {
      let operation: BackingIO.Operation = slot.pointee.keepsSpace ? .zero : .punch
      return transfer(index, operation, run.device, to, length, nil, phase)
    }
    let pointer = buffer + Int(slot.pointee.cursor - slot.pointee.offset)
    return transfer(index, .write, run.device, to, length, pointer, phase)
  }

  /// A write to a block that may not be written where it is.
  func askWrite(_ index: Int, _ block: UInt64) -> Bool {
    if locks.parks(index, at: block) { return false }
    guard keepRoom(index) else { return false }
    let slot = requests[index]
    let end = slot.pointee.end
    // The last block of the disk may be short, and is covered whole up to the disk's end.
    let covered = end == size ? blocks : end >> shift
    let isAligned = slot.pointee.cursor & (UInt64(blockSize) - 1) == 0
    var last = block + 1
    // Zeroes over whole blocks are a discard fault; what is left of them here is in part.
    let isWhole = slot.pointee.operation == .write && isAligned && block < covered
    if isWhole {
      last = locks.nextHeld(block, covered)
      if let run = map.findOrNext(block) {
        // A run of its own kind only: what is mapped writable needs no answer.
        if run.first > block { last = min(last, run.first) } else { last = min(last, run.end) }
      }
    }
    slot.pointee.isWhole = isWhole
    locks.hold(index, block, last)
    let id = nextFaultID(index)
    faults.ask(.write(id, blocks: BlockRange(block, last - block), whole: isWhole))
    return false
  }

  private func stepZero(_ index: Int, _ block: UInt64) -> Bool {
    let slot = requests[index]
    let covered = slot.pointee.end == size ? blocks : slot.pointee.end >> shift
    let isAligned = slot.pointee.cursor & (UInt64(blockSize) - 1) == 0
    if isAligned, block < covered { return askDiscard(index, block, covered) }
    let end = pieceEnd(slot.pointee, before: block + 1)
    if let run = map.find(block) {
      if run.isZero, !slot.pointee.keepsSpace {
        slot.pointee.cursor = end
        return true
      }
      if run.writable, !run.isZero {
        slot.pointee.pieceEnd = end
        return proceedAfter(index, put(index, run, end, .piece))
      }
    }
    return askWrite(index, block)
  }

  private func stepDiscard(_ index: Int, _ block: UInt64) -> Bool {
    let slot = requests[index]
    let covered = slot.pointee.end == size ? blocks : slot.pointee.end >> shift
    let isAligned = slot.pointee.cursor & (UInt64(blockSize) - 1) == 0
    if isAligned, block < covered { return askDiscard(index, block, covered) }
    // Parts of blocks keep what they have.
    slot.pointee.cursor = pieceEnd(slot.pointee, before: block + 1)
    return true
  }

  private func askDiscard(_ index: Int, _ block: UInt64, _ covered: UInt64) -> Bool {
    if locks.parks(index, at: block) { return false }
    guard keepRoom(index) else { return false }
    let last = locks.nextHeld(block, covered)
    requests[index].pointee.isWhole = true
    locks.hold(index, block, last)
    let id = nextFaultID(index)
    let zeroing = requests[index].pointee.operation == .zero
    faults.ask(.discard(id, blocks: BlockRange(block, last - block), zeroing: zeroing))
    return false
  }

  // MARK: Backing I/O

  /// Moves bytes at once if that is possible and wanted, else starts it.
  func transfer(
    _ index: Int, _ operation: BackingIO.Operation, _ device: UInt16, _ offset: UInt64,
    _ count: Int, _ buffer: UnsafeMutableRawPointer?, _ phase: Slot.Phase, atOnce: Bool = true
  ) -> Progress {
    var io = BackingIO(
      operation, device: device, offset: offset, count: count, buffer: buffer,
      token: UInt32(index))
    requests[index].pointee.device = device
    requests[index].pointee.phase = phase
    if operation != .read { rounds.noteWrite() }
    while io.count > 0 {
      let done = atOnce ? executor.attempt(io) : -Int(EAGAIN)
      if done <= 0 {
        guard done == -Int(EAGAIN) else { return .failed(Int32(-done)) }
        requests.startIO(index)
        executor.start(io)
        return .pending
      }
      io.offset += UInt64(done)
      io.count -= done
      io.buffer = io.buffer.map { $0 + done }
    }
    return .done
  }

  /// The request goes on after its piece, or waits for it, or fails with it.
  private func proceedAfter(_ index: Int, _ progress: Progress) -> Bool {
    switch progress {
    case .done:
      requests[index].pointee.cursor = requests[index].pointee.pieceEnd
      if requests[index].pointee.isProbe { spaceFound() }
      return true
    case .pending: return false
    case .failed(let code):
      failIO(index, code)
      return false
    }
  }

  /// A backing operation that was started has ended.
  func operationEnded(_ token: UInt32, _ code: Int32) {
    if token == FlushRounds.token {
      settle(rounds.deviceFlushed(code))
    } else {
      let index = Int(token)
      requests.endIO(index)
      if requests[index].pointee.operation != .read { rounds.noteWrite() }
      resume(index, code)
      // What goes on with its next piece still reaches its old place.
      if locks.hasInvalidations { settleInvalidations() }
    }
    drain()
  }

  private func resume(_ index: Int, _ code: Int32) {
    guard code == 0 else {
      failIO(index, code)
      return
    }
    switch requests[index].pointee.phase {
    case .piece:
      requests[index].pointee.cursor = requests[index].pointee.pieceEnd
      if requests[index].pointee.isProbe { spaceFound() }
      // Through the queue, so that a long request does not shut out the others.
      requests.makeReady(index)
    case .copyRead: overlay(index)
    case .copyWrite: copiedPiece(index)
    case .placedWrite, .zeroing: placed(index)
    }
  }

  /// A backing device has failed under a request. One that finds no space may wait for some:
  /// its place comes to nothing, and it asks anew.
  func failIO(_ index: Int, _ code: Int32) {
    let mayWait = note(code, index)
    if locks.isHolding(index) { abandon(index, code) }
    guard mayWait else { return finish(index, code) }
    requests[index].pointee.isProbe = false
    requests.park(index, for: .space)
  }

  /// Counts a failure. Whether its request waits for space.
  private func note(_ code: Int32, _ index: Int) -> Bool {
    let isRead =
      requests[index].pointee.operation == .read || requests[index].pointee.phase == .copyRead
    let device = requests[index].pointee.device
    if !isRead, SpacePolicy.isShortage(code) || code == EFBIG {
      trouble.noteShortage(code)
    } else {
      trouble.count(device, executor.name(device), isRead: isRead, code)
    }
    refreshHealth()
    return !isRead && space.waits && !trouble.spaceExpired && SpacePolicy.isShortage(code)
  }

  // MARK: What a range is made of

  private func stepStatus(_ index: Int, _ block: UInt64) -> Bool {
    guard let run = map.find(block) else { return askRead(index, block) }
    return moveRead(index, run)
  }

  /// Adds what lies before `end` to the request's list; the request ends when it is full.
  private func tellStatus(_ index: Int, _ run: Run, _ end: UInt64) -> Bool {
    let slot = requests[index]
    guard let buffer = slot.pointee.buffer else { preconditionFailure("a status without a list") }
    let list = buffer.assumingMemoryBound(to: StatusList.self)
    while slot.pointee.cursor < end {
      let limit = end - slot.pointee.cursor
      let found: (isHole: Bool, count: UInt64)
      if run.isZero {
        found = (true, limit)
      } else {
        found = executor.hole(run.device, at: address(run, slot.pointee.cursor), limit: limit)
      }
      guard list.pointee.add(found.count, isHole: found.isHole) else {
        slot.pointee.cursor = slot.pointee.end
        return true
      }
      slot.pointee.cursor += found.count
    }
    return true
  }
}
