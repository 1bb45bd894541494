// SPDX-License-Identifier: Apache-2.0
// Slots: taking and freeing them, the order of requests, waiting and going on.

import Glibc
import Posix

extension UserTarget {
  func takeSlot() -> Int? {
    if let index = freeSlots.popLast() { return Int(index) }
    guard slotsUsed < limits.requests else { return nil }
    slots[slotsUsed] = Slot()
    slotsUsed += 1
    return slotsUsed - 1
  }

  func fill(_ index: Int, _ request: TargetRequest, _ owner: Int32, _ cursor: UInt64) {
    var slot = Slot()
    slot.operation = request.operation
    slot.isForced = request.isForced
    slot.keepsSpace = request.keepsSpace
    slot.owner = owner
    slot.tag = request.tag
    slot.buffer = request.buffer
    slot.offset = request.offset
    slot.end = request.offset + request.count
    slot.cursor = cursor
    slots[index] = slot
    outstanding += 1
  }

  /// Puts a request into the order of arrival; it goes on when nothing stands before it.
  func enter(_ index: Int) {
    let slot = slots + index
    lastSequence += 1
    slot.pointee.sequence = lastSequence
    slot.pointee.isOrdered = true
    let isRead = slot.pointee.operation == .read || slot.pointee.operation == .status
    let mine = Order(
      offset: slot.pointee.offset, end: slot.pointee.end, sequence: lastSequence,
      slot: Int32(index), isRead: isRead)
    var blockers: Int32 = 0
    for other in 0..<orderCount where order[other].conflicts(mine) { blockers += 1 }
    order[orderCount] = mine
    orderCount += 1
    slot.pointee.blockers = blockers
    if blockers == 0 { makeReady(index) } else { slot.pointee.state = .blocked }
  }

  /// Takes a request out of the order; those that waited for it alone go on.
  private func leave(_ index: Int) {
    guard slots[index].isOrdered else { return }
    slots[index].isOrdered = false
    var position = 0
    while order[position].slot != Int32(index) { position += 1 }
    let mine = order[position]
    orderCount -= 1
    order[position] = order[orderCount]
    for other in 0..<orderCount
    where order[other].sequence > mine.sequence && order[other].conflicts(mine) {
      let waiting = Int(order[other].slot)
      slots[waiting].blockers -= 1
      if slots[waiting].blockers == 0 { makeReady(waiting) }
    }
  }

  func makeReady(_ index: Int) {
    slots[index].state = .ready
    ready.append(Int32(index))
  }

  /// Steps whatever is ready. Steps make others ready, so this is a loop and not a recursion.
  func drain() {
    guard !isDraining else { return }
    isDraining = true
    var position = 0
    while position < ready.count {
      let index = Int(ready[position])
      position += 1
      step(index)
    }
    ready.removeAll(keepingCapacity: true)
    isDraining = false
  }

  // MARK: Waiting

  func park(_ index: Int, for what: Int32) {
    slots[index].state = .parked
    slots[index].waitsFor = what
    parked.append(Int32(index))
  }

  /// Lets go on, in the order of arrival, whoever waits for this.
  func wake(_ what: Int32) {
    guard !parked.isEmpty else { return }
    var kept = 0
    for position in 0..<parked.count {
      let index = parked[position]
      if slots[Int(index)].waitsFor == what {
        makeReady(Int(index))
      } else {
        parked[kept] = index
        kept += 1
      }
    }
    parked.removeLast(parked.count - kept)
  }

  /// Ends with an errno whoever waits for this.
  func fail(waitingFor what: Int32, _ code: Int32) {
    for index in parked where slots[Int(index)].waitsFor == what {
      failed[index] = code
    }
    wake(what)
  }

  // MARK: Waiting for space

  /// Whether time may change something: to be told of by `tick` every second.
  package var wantsTicks: Bool { trouble.isPassing }

  /// A second has passed: one of the requests that wait for space tries again, or all fail when
  /// they have waited too long. After `quiet` seconds without one, errors are forgotten.
  package func tick(quiet: UInt32) {
    trouble.settle(after: quiet)
    if trouble.space != 0, space.timeout > 0, !trouble.spaceExpired,
      DiskTrouble.now() - trouble.spaceSince >= Int64(space.timeout) * 1000
    {
      trouble.spaceExpired = true
      endWaiting(ENOSPC)
    }
    refreshHealth()
    let first = parked.firstIndex { slots[Int($0)].waitsFor == Slot.Wait.space }
    guard let first else { return }
    let index = Int(parked.remove(at: first))
    slots[index].isProbe = true
    makeReady(index)
    drain()
  }

  /// There is space: whoever waits for some goes on.
  func spaceFound() {
    trouble.endShortage()
    refreshHealth()
    wake(Slot.Wait.space)
  }

  /// Fails whatever waits for space with an errno.
  package func endWaiting(_ code: Int32) {
    fail(waitingFor: Slot.Wait.space, code)
    drain()
  }

  // MARK: Holding blocks

  func hold(_ index: Int, _ first: UInt64, _ end: UInt64) {
    slots[index].holdFirst = first
    slots[index].holdEnd = end
    let isRead = slots[index].operation == .read || slots[index].operation == .status
    holds[holdCount] = Hold(first: first, end: end, slot: Int32(index), isRead: isRead)
    holdCount += 1
  }

  func release(_ index: Int) {
    guard slots[index].holdFirst < slots[index].holdEnd else { return }
    slots[index].holdEnd = slots[index].holdFirst
    var position = 0
    while holds[position].slot != Int32(index) { position += 1 }
    holdCount -= 1
    holds[position] = holds[holdCount]
    wake(Int32(index))
  }

  /// The slot that holds a block.
  func holder(of block: UInt64) -> Int32? {
    for position in 0..<holdCount
    where holds[position].first <= block && block < holds[position].end {
      return holds[position].slot
    }
    return nil
  }

  /// The first block from `first` on, before `end`, that is held; else `end`.
  func nextHold(_ first: UInt64, _ end: UInt64) -> UInt64 {
    var found = end
    for position in 0..<holdCount
    where holds[position].end > first && holds[position].first < found {
      found = max(first, holds[position].first)
    }
    return found
  }

  // MARK: The end

  /// A request has been served, or has failed with an errno.
  func finish(_ index: Int, _ code: Int32) {
    leave(index)
    if code == 0, slots[index].isForced {
      slots[index].state = .flushing
      joinFlush(index)
      return
    }
    complete(index, code)
  }

  /// Tells the owner and frees the slot.
  func complete(_ index: Int, _ code: Int32) {
    let owner = slots[index].owner
    let tag = slots[index].tag
    slots[index].state = .free
    freeSlots.append(Int32(index))
    outstanding -= 1
    if code != 0 { counters.errors += 1 }
    if owner >= 0 { owners[Int(owner)]?.completed(tag: tag, code: code) } else { told(tag, code) }
  }
}
