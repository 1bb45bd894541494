// SPDX-License-Identifier: Apache-2.0
// The requests that could not be served at once: a fixed table of slots, the order in which
// they arrived, and the queues of those that may go on and of those that wait.
//
// The states of a slot:
//
//                     an earlier request                   the last of them leaves
//             ┌──────► to the same bytes ──► blocked ────────────────────────┐
//      admit  │                                                              ▼
//     free ───┴─────────────────────────────────────────────────────────► ready ◄──────────┐
//      ▲ │                                              nextReady, a step │ │               │
//      │ │                           ┌──────────────┬──────────────┬──────┘ │               │
//      │ │                           ▼ startIO      ▼ ask          ▼ park   │               │
//      │ │                           io           fault         parked      │               │
//      │ │                           │ endIO        │ endFault     │ wake    │               │
//      │ │                           └──────────────┴──────────────┴────────┼───────────────┘
//      │ │ admitFlush                                                       │ all done
//      │ └─────────────────► flushing ◄──────── awaitFlush, if forced ──────┤
//      └────── free ────────────┴───────────────────────────────────────────┘
//
// Invariants:
// 1. A slot has at most one backing operation or one fault at a time, and is stepped only
//    when it has neither.
// 2. Of two requests whose bytes overlap, unless both only read, the later one is blocked until
//    the earlier one has left the order.
// 3. Who waits for the same thing goes on in the order in which it began to wait.
// 4. Nothing is allocated for a request beyond the growth of the queues.

import DiskModel

/// One request under way. Lives in a fixed table; named by its index.
struct Slot {
  /// Where a request stands.
  enum State: UInt8 {
    /// The slot is in no use.
    case free
    /// Earlier requests to the same bytes go first.
    case blocked
    /// To be stepped, or being stepped.
    case ready
    /// A backing operation is under way.
    case io
    /// A fault is unanswered.
    case fault
    /// Waits for something; see `Wait`.
    case parked
    /// All done but the flush.
    case flushing
  }

  fileprivate(set) var state = State.free
  /// What was asked for.
  fileprivate(set) var operation = TargetRequest.Operation.read
  fileprivate(set) var isForced = false
  fileprivate(set) var keepsSpace = false
  /// In the order of requests (see `Order`).
  fileprivate var isOrdered = false
  /// It looks whether there is space, for all that wait for some.
  var isProbe = false
  /// Who is told, and by what tag; -1: a flush of our own.
  fileprivate(set) var owner: Int32 = -1
  fileprivate(set) var tag: UInt64 = 0
  /// Earlier requests that go first.
  fileprivate var blockers: Int32 = 0
  fileprivate var waitsFor = Wait.invalidation
  /// It is ready only to fail with this errno; 0: it is not.
  fileprivate var failure: Int32 = 0
  /// The fault that is unanswered, 0: none.
  fileprivate var fault: FaultID = 0

  fileprivate(set) var buffer: UnsafeMutableRawPointer?
  /// The request's bytes.
  fileprivate(set) var offset: UInt64 = 0
  fileprivate(set) var end: UInt64 = 0
  /// Everything before this byte of the disk is done.
  var cursor: UInt64 = 0
  /// The end of the piece under way.
  var pieceEnd: UInt64 = 0

  /// Whether the request changes nothing.
  @inline(__always)
  var isRead: Bool { operation == .read || operation == .status }
}

/// What a parked slot waits for.
struct Wait: Equatable {
  private let code: Int32

  /// The end of an invalidation.
  static let invalidation = Wait(code: -1)
  /// Room in the pending log.
  static let room = Wait(code: -2)
  /// A buffer for putting a block together.
  static let scratch = Wait(code: -3)
  /// Space on a device.
  static let space = Wait(code: -4)
  /// The blocks that a slot holds.
  static func blocks(heldBy slot: Int32) -> Wait { Wait(code: slot) }
}

/// The table of the requests under way. Used from one thread.
final class RequestTable {
  /// The bytes of a request in the order of arrival, kept apart from the slots since they are
  /// looked through for each request that arrives while others are under way.
  private struct Order {
    var offset: UInt64
    var end: UInt64
    var sequence: UInt64
    var slot: Int32
    var isRead: Bool

    /// Whether one of two requests has to wait for the other.
    @inline(__always)
    func conflicts(_ other: Order) -> Bool {
      offset < other.end && other.offset < end && !(isRead && other.isRead)
    }
  }

  /// Fault numbers have the slot in so many low bits, so that an answer finds it at once.
  static let slotBits: UInt64 = 16

  private let capacity: Int
  private let slots: UnsafeMutablePointer<Slot>
  private var used = 0
  private let freeSlots: UnsafeMutablePointer<Int32>
  private var freeCount = 0
  private let order: UnsafeMutablePointer<Order>
  private var orderCount = 0
  private var lastSequence: UInt64 = 0
  private var ready: [Int32] = []
  private var readyTaken = 0
  private var isDraining = false
  private var parked: [Int32] = []

  /// Requests under way.
  private(set) var count = 0

  /// A table for at most `capacity` requests.
  init(capacity: Int) {
    precondition(capacity < 1 << RequestTable.slotBits - 1, "a slot's number in a fault's")
    self.capacity = capacity
    slots = .allocate(capacity: capacity)
    order = .allocate(capacity: capacity)
    freeSlots = .allocate(capacity: capacity)
  }

  deinit {
    slots.deallocate()
    order.deallocate()
    freeSlots.deallocate()
  }

  /// A request under way. The pointer is good for the table's life; the slot belongs to the
  /// request until `free`.
  @inline(__always)
  subscript(_ index: Int) -> UnsafeMutablePointer<Slot> { slots + index }

  // MARK: Arrival and end

  private func take(
    _ request: TargetRequest, _ owner: Int32, _ cursor: UInt64, _ state: Slot.State
  ) -> Int? {
    let index: Int
    if freeCount > 0 {
      freeCount -= 1
      index = Int(freeSlots[freeCount])
    } else {
      guard used < capacity else { return nil }
      index = used
      used += 1
    }
    var slot = Slot()
    slot.state = state
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
    count += 1
    return index
  }

  /// Takes a request of which everything before `cursor` is done. It goes on when no earlier one
  /// stands before it. False: the table is full.
  func admit(_ request: TargetRequest, owner: Int32, cursor: UInt64) -> Bool {
    guard let index = take(request, owner, cursor, .blocked) else { return false }
    let slot = slots + index
    lastSequence += 1
    slot.pointee.isOrdered = true
    let mine = Order(
      offset: slot.pointee.offset, end: slot.pointee.end, sequence: lastSequence,
      slot: Int32(index), isRead: slot.pointee.isRead)
    var blockers: Int32 = 0
    for other in 0..<orderCount where order[other].conflicts(mine) { blockers += 1 }
    order[orderCount] = mine
    orderCount += 1
    slot.pointee.blockers = blockers
    if blockers == 0 { makeReady(index) }
    return true
  }

  /// Takes a flush, which no order of bytes holds up. Nil: the table is full.
  func admitFlush(_ request: TargetRequest, owner: Int32) -> Int? {
    take(request, owner, 0, .flushing)
  }

  /// Whether no request that moves bytes is under way.
  @inline(__always)
  var isIdle: Bool { orderCount == 0 }

  /// Whether a request for these bytes would have to wait for an earlier one.
  func isContended(_ offset: UInt64, _ end: UInt64, isRead: Bool) -> Bool {
    let mine = Order(offset: offset, end: end, sequence: 0, slot: 0, isRead: isRead)
    for index in 0..<orderCount where order[index].conflicts(mine) { return true }
    return false
  }

  /// Whether backing I/O is under way for bytes from `first` up to `end`, counting whole blocks of
  /// this size, since a copy reads and writes the whole of its block.
  func isMoving(_ first: UInt64, _ end: UInt64, blockSize: UInt64) -> Bool {
    for position in 0..<orderCount {
      let slot = slots + Int(order[position].slot)
      guard slot.pointee.state == .io else { continue }
      let from = slot.pointee.cursor & ~(blockSize - 1)
      let to = (slot.pointee.pieceEnd + blockSize - 1) & ~(blockSize - 1)
      if from < end && first < to { return true }
    }
    return false
  }

  /// Takes a request out of the order; those that waited for it alone go on.
  func leave(_ index: Int) {
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

  /// A request that has left the order waits for a flush.
  func awaitFlush(_ index: Int) {
    slots[index].state = .flushing
  }

  /// Gives a slot back. The request has left the order.
  func free(_ index: Int) {
    slots[index].state = .free
    freeSlots[freeCount] = Int32(index)
    freeCount += 1
    count -= 1
  }

  // MARK: Going on

  /// Has a slot stepped, after those that are ready already.
  func makeReady(_ index: Int) {
    slots[index].state = .ready
    ready.append(Int32(index))
  }

  /// Whether the caller is the one to step what is ready: false within a step. Who is told true
  /// calls `nextReady` until it is nil, so that steps that make others ready are no recursion.
  @inline(__always)
  func beginSteps() -> Bool {
    guard !isDraining else { return false }
    isDraining = true
    return true
  }

  /// The next slot to be stepped; nil ends the steps.
  func nextReady() -> Int? {
    while readyTaken < ready.count {
      let index = Int(ready[readyTaken])
      readyTaken += 1
      if slots[index].state == .ready { return index }
    }
    ready.removeAll(keepingCapacity: true)
    readyTaken = 0
    isDraining = false
    return nil
  }

  /// The errno with which a ready slot has to end, once; 0: it goes on.
  @inline(__always)
  func takeFailure(_ index: Int) -> Int32 {
    let code = slots[index].failure
    if code != 0 { slots[index].failure = 0 }
    return code
  }

  // MARK: Backing operations and faults

  /// A backing operation of a slot begins.
  @inline(__always)
  func startIO(_ index: Int) {
    slots[index].state = .io
  }

  /// A backing operation of a slot has ended; the slot is being stepped.
  func endIO(_ index: Int) {
    precondition(slots[index].state == .io, "an operation that nobody started has ended")
    slots[index].state = .ready
  }

  /// A slot raises a fault, whose number has the slot in its low bits.
  func ask(_ index: Int, _ fault: FaultID) {
    slots[index].fault = fault
    slots[index].state = .fault
  }

  /// The slot whose fault has this number and is unanswered.
  func asker(_ fault: FaultID) -> Int? {
    let index = Int(fault & (1 << RequestTable.slotBits - 1))
    guard fault != 0, index < used, slots[index].fault == fault, slots[index].state == .fault
    else { return nil }
    return index
  }

  /// A slot's fault is answered; the slot is being stepped.
  func endFault(_ index: Int) {
    slots[index].fault = 0
    slots[index].state = .ready
  }

  // MARK: Waiting

  /// Lets a slot wait.
  func park(_ index: Int, for what: Wait) {
    slots[index].state = .parked
    slots[index].waitsFor = what
    parked.append(Int32(index))
  }

  /// Lets go on whoever waits for this.
  func wake(_ what: Wait) {
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

  /// Lets go on the first of those that wait for this.
  func wakeFirst(_ what: Wait) -> Int? {
    guard let first = parked.firstIndex(where: { slots[Int($0)].waitsFor == what }) else {
      return nil
    }
    let index = Int(parked.remove(at: first))
    makeReady(index)
    return index
  }

  /// Ends with an errno, in their next step, those that wait for this.
  func fail(waitingFor what: Wait, _ code: Int32) {
    for index in parked where slots[Int(index)].waitsFor == what {
      slots[Int(index)].failure = code
    }
    wake(what)
  }
}
