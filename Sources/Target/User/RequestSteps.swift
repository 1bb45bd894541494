// SPDX-License-Identifier: Apache-2.0
// The steps of a request: look a block up, move a piece, ask the worker, or wait for who asks
// already.
//
// | the block is | a read | a write, or zeroes over a part | a discard, or zeroes, of whole blocks |
// |---|---|---|---|
// | being invalidated | waits | waits | waits |
// | mapped, may be written | reads | writes | asks |
// | mapped otherwise | reads | asks, or waits for a holder | asks, or waits for a holder |
// | not mapped | asks, or waits for a holder | the same | the same |
//
// After each piece the request goes on with the next; an answer or the end of an operation brings
// it back through the queue of those that are ready.

import DiskModel
import Glibc

/// How far a request goes at once. Used from one thread; has no state of its own.
final class RequestSteps {
  /// What comes next for a request.
  enum Next {
    /// Its next piece.
    case goesOn
    /// It has a backing operation or a fault, or is parked.
    case waits
    /// It has been served, or fails with an errno.
    case ends(Int32)
    /// A device has failed under it.
    case failed(Int32)
    /// It is parked until a flush makes room in the log.
    case wantsRoom
  }

  private let geometry: DiskGeometry
  private let requests: RequestTable
  private let locks: BlockLocks
  private let map: ExtentMap
  private let io: DeviceIO
  private let placer: Placer
  private let faults: FaultQueue
  private let watch: HealthWatch

  init(
    _ mappings: Mappings, _ requests: RequestTable, _ io: DeviceIO, _ placer: Placer,
    _ faults: FaultQueue, _ watch: HealthWatch
  ) {
    geometry = mappings.geometry
    locks = mappings.locks
    map = mappings.map
    self.requests = requests
    self.io = io
    self.placer = placer
    self.faults = faults
    self.watch = watch
  }

  /// Takes a request from its cursor on as far as it can go.
  func proceed(_ index: Int) -> Next {
    let slot = requests[index]
    while slot.pointee.cursor < slot.pointee.end {
      let block = slot.pointee.cursor >> geometry.shift
      if locks.hasInvalidations, locks.isInvalidating(block) {
        requests.park(index, for: .invalidation)
        return .waits
      }
      let next: Next
      switch slot.pointee.operation {
      case .read, .status: next = read(index, block)
      case .write: next = write(index, block)
      case .zero: next = zero(index, block)
      case .discard: next = discard(index, block)
      case .flush: preconditionFailure("a flush is not stepped")
      }
      guard case .goesOn = next else { return next }
    }
    return .ends(0)
  }

  /// The piece under way is done.
  @inline(__always)
  func endPiece(_ index: Int) {
    let slot = requests[index]
    slot.pointee.cursor = slot.pointee.pieceEnd
    if slot.pointee.isProbe { watch.foundSpace() }
  }

  private func after(_ index: Int, _ progress: DeviceIO.Progress) -> Next {
    switch progress {
    case .done:
      endPiece(index)
      return .goesOn
    case .pending: return .waits
    case .failed(let code): return .failed(code)
    }
  }

  // MARK: Reads

  private func read(_ index: Int, _ block: UInt64) -> Next {
    guard let run = map.find(block) else { return askRead(index, block) }
    return read(index, from: run)
  }

  /// Reads a piece from where it lives, or tells what it is made of.
  func read(_ index: Int, from run: Run) -> Next {
    let slot = requests[index]
    slot.pointee.pieceEnd = geometry.pieceEnd(slot.pointee.end, before: run.end)
    if slot.pointee.operation == .status {
      io.tellStatus(index, run)
      return .goesOn
    }
    return after(index, io.read(index, run))
  }

  /// A read of a block that nothing is known of.
  private func askRead(_ index: Int, _ block: UInt64) -> Next {
    if locks.parks(index, at: block) { return .waits }
    let last = (requests[index].pointee.end - 1) >> geometry.shift
    var end = locks.nextHeld(block, last + 1)
    if let next = map.findOrNext(block) { end = min(end, next.first) }
    locks.hold(index, block, end)
    let id = faults.number(slot: index)
    requests.ask(index, id)
    faults.ask(.read(id, blocks: BlockRange(block, end - block)))
    return .waits
  }

  // MARK: Writes

  private func write(_ index: Int, _ block: UInt64) -> Next {
    if let run = map.find(block), run.writable, !run.isZero { return put(index, run) }
    return askWrite(index, block)
  }

  /// Writes a piece to where it may be written.
  private func put(_ index: Int, _ run: Run) -> Next {
    let slot = requests[index]
    slot.pointee.pieceEnd = geometry.pieceEnd(slot.pointee.end, before: run.end)
    return after(index, io.put(index, run))
  }

  /// A write to a block that may not be written where it is.
  private func askWrite(_ index: Int, _ block: UInt64) -> Next {
    if locks.parks(index, at: block) { return .waits }
    let slot = requests[index]
    let covered = geometry.coveredEnd(slot.pointee.end)
    // Zeroes over whole blocks are a discard fault; what is left of them here is in part.
    let isWhole =
      slot.pointee.operation == .write && geometry.isAligned(slot.pointee.cursor)
      && block < covered
    if let next = reserve(index, whole: isWhole) { return next }
    var last = block + 1
    if isWhole {
      last = locks.nextHeld(block, covered)
      if let run = map.findOrNext(block) {
        // A run of its own kind only: what is mapped writable needs no answer.
        if run.first > block { last = min(last, run.first) } else { last = min(last, run.end) }
      }
    }
    locks.hold(index, block, last)
    let id = faults.number(slot: index)
    requests.ask(index, id)
    faults.ask(.write(id, blocks: BlockRange(block, last - block), whole: isWhole))
    return .waits
  }

  /// Keeps room in the log for what a slot is about to ask; what comes instead if there is none.
  private func reserve(_ index: Int, whole: Bool) -> Next? {
    switch placer.reserve(index, whole: whole) {
    case .kept: return nil
    case .full:
      requests.park(index, for: .room)
      return .wantsRoom
    case .never: return .ends(EIO)
    }
  }

  // MARK: Zeroes and discards

  private func zero(_ index: Int, _ block: UInt64) -> Next {
    let slot = requests[index]
    let covered = geometry.coveredEnd(slot.pointee.end)
    if geometry.isAligned(slot.pointee.cursor), block < covered {
      return askDiscard(index, block, covered)
    }
    let end = geometry.pieceEnd(slot.pointee.end, before: block + 1)
    if let run = map.find(block) {
      if run.isZero, !slot.pointee.keepsSpace {
        slot.pointee.cursor = end
        return .goesOn
      }
      if run.writable, !run.isZero {
        slot.pointee.pieceEnd = end
        return after(index, io.put(index, run))
      }
    }
    return askWrite(index, block)
  }

  private func discard(_ index: Int, _ block: UInt64) -> Next {
    let slot = requests[index]
    let covered = geometry.coveredEnd(slot.pointee.end)
    if geometry.isAligned(slot.pointee.cursor), block < covered {
      return askDiscard(index, block, covered)
    }
    // Parts of blocks keep what they have.
    slot.pointee.cursor = geometry.pieceEnd(slot.pointee.end, before: block + 1)
    return .goesOn
  }

  private func askDiscard(_ index: Int, _ block: UInt64, _ covered: UInt64) -> Next {
    if locks.parks(index, at: block) { return .waits }
    if let next = reserve(index, whole: true) { return next }
    let last = locks.nextHeld(block, covered)
    locks.hold(index, block, last)
    let id = faults.number(slot: index)
    requests.ask(index, id)
    let zeroing = requests[index].pointee.operation == .zero
    faults.ask(.discard(id, blocks: BlockRange(block, last - block), zeroing: zeroing))
    return .waits
  }
}
