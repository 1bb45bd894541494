// SPDX-License-Identifier: Apache-2.0
// Who has which blocks in hand: holds of faults and placements, and invalidations that have
// not ended.
//
// A block:
//
//     free ──hold, by a read's fault──────────► held: another request for it parks
//      ▲ └───hold, by a write's fault─────────► held: the same, and what a worker tells of the
//      │                                        block meanwhile is not taken in
//      └─────release: whoever parked at it looks again ◄─────┘
//
// An invalidation:
//
//     invalidate ──nothing moves there──────────────► ended
//          └───────backing I/O is under way──► waits ──endInvalidations, when it has ended──► ended
//
// Invariants:
// 1. The blocks of two holds do not overlap; a slot has one hold at most.
// 2. A read holds its blocks while its fault is unanswered; a write, until its placement is
//    recorded or abandoned.
// 3. While an invalidation waits, no request begins anything with its blocks.

import DiskModel

/// The holds on a disk's blocks. Used from one thread.
final class BlockLocks {
  /// Blocks that a fault or a placement has in hand.
  struct Hold {
    var first: UInt64
    var end: UInt64
    var slot: Int32
    /// Only a read asks for them: nothing is being written there.
    var isRead: Bool
  }

  private let requests: RequestTable
  private let shift: UInt64
  private let holds: UnsafeMutablePointer<Hold>
  /// Where the hold of a slot is in `holds`, if that one is its own.
  private let positions: UnsafeMutablePointer<Int32>
  private var invalidations: [BlockRange] = []
  /// Holds.
  private(set) var count = 0

  /// The locks of blocks of 2^shift bytes, for the slots of a table of `capacity`.
  init(_ requests: RequestTable, shift: UInt64, capacity: Int) {
    self.requests = requests
    self.shift = shift
    holds = .allocate(capacity: capacity)
    positions = .allocate(capacity: capacity)
    positions.initialize(repeating: 0, count: capacity)
  }

  deinit {
    holds.deallocate()
    positions.deallocate()
  }

  // MARK: Holds

  /// One of the holds, which are `count` in no order.
  @inline(__always)
  subscript(_ position: Int) -> Hold {
    precondition(position < count)
    return holds[position]
  }

  /// Gives a slot blocks that nobody holds. It holds no others.
  func hold(_ index: Int, _ first: UInt64, _ end: UInt64) {
    holds[count] = Hold(
      first: first, end: end, slot: Int32(index), isRead: requests[index].pointee.isRead)
    positions[index] = Int32(count)
    count += 1
  }

  /// Whether a slot holds blocks.
  @inline(__always)
  func isHolding(_ index: Int) -> Bool {
    let position = Int(positions[index])
    return position < count && holds[position].slot == Int32(index)
  }

  /// The blocks of a slot that holds some.
  func blocks(of index: Int) -> (first: UInt64, end: UInt64) {
    precondition(isHolding(index), "a slot without blocks")
    let hold = holds[Int(positions[index])]
    return (hold.first, hold.end)
  }

  /// Takes a slot's blocks back. Whoever waits for them looks again.
  func release(_ index: Int) {
    precondition(isHolding(index), "a slot without blocks")
    let position = Int(positions[index])
    count -= 1
    holds[position] = holds[count]
    positions[Int(holds[position].slot)] = Int32(position)
    requests.wake(.blocks(heldBy: Int32(index)))
  }

  /// Parks a slot if another one holds a block that it needs. Whether it did.
  func parks(_ index: Int, at block: UInt64) -> Bool {
    for position in 0..<count
    where holds[position].first <= block && block < holds[position].end {
      requests.park(index, for: .blocks(heldBy: holds[position].slot))
      return true
    }
    return false
  }

  /// The first block from `first` on, before `end`, that is held; else `end`.
  func nextHeld(_ first: UInt64, _ end: UInt64) -> UInt64 {
    var found = end
    for position in 0..<count
    where holds[position].end > first && holds[position].first < found {
      found = max(first, holds[position].first)
    }
    return found
  }

  /// If a write other than slot `index` holds a block: the end of what it holds.
  func writerEnd(_ block: UInt64, except index: Int) -> UInt64? {
    for position in 0..<count
    where !holds[position].isRead && holds[position].slot != Int32(index)
      && holds[position].first <= block && block < holds[position].end
    {
      return holds[position].end
    }
    return nil
  }

  /// The first block after `first`, before `end`, from which on a write other than slot `index`
  /// holds blocks; else `end`.
  func nextWriter(_ first: UInt64, _ end: UInt64, except index: Int) -> UInt64 {
    var found = end
    for position in 0..<count
    where !holds[position].isRead && holds[position].slot != Int32(index)
      && holds[position].first > first
    {
      found = min(found, holds[position].first)
    }
    return found
  }

  // MARK: Invalidations

  /// Whether any waits.
  @inline(__always)
  var hasInvalidations: Bool { !invalidations.isEmpty }

  /// Whether a block is being invalidated.
  func isInvalidating(_ block: UInt64) -> Bool {
    for range in invalidations where range.contains(block) { return true }
    return false
  }

  /// Whether any block from `first` up to `end` is being invalidated.
  func isInvalidating(_ first: UInt64, _ end: UInt64) -> Bool {
    for range in invalidations where range.first < end && first < range.end { return true }
    return false
  }

  /// Begins an invalidation. True when it has ended already, since nothing moves there.
  func invalidate(_ range: BlockRange) -> Bool {
    guard isMoving(range) else { return true }
    invalidations.append(range)
    return false
  }

  /// The invalidations that have ended by now. If there are any, whoever waits for one looks
  /// again.
  func endInvalidations() -> [BlockRange] {
    let ended = invalidations.filter { !isMoving($0) }
    guard !ended.isEmpty else { return [] }
    invalidations.removeAll { !isMoving($0) }
    requests.wake(.invalidation)
    return ended
  }

  private func isMoving(_ range: BlockRange) -> Bool {
    requests.isMoving(range.first << shift, range.end << shift, blockSize: 1 << shift)
  }
}
