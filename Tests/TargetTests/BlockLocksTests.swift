// SPDX-License-Identifier: Apache-2.0
// The locks of blocks against a table with an entry for every block.

import DiskModel
import Testing
import TestSupport

@testable import Target

/// Locks over requests that hold, release and wait at random.
private struct LockWalk {
  static let blocks: UInt64 = 40
  static let shift: UInt64 = 12
  let requests = RequestTable(capacity: 24)
  let locks: BlockLocks
  var random: SplitMix64
  /// By block: the slot that holds it.
  var holder = [Int?](repeating: nil, count: Int(blocks))
  /// Slots that do nothing, that wait at a block (by whom it is held), that move bytes.
  var idle: [Int] = []
  var waiting: [Int: Int] = [:]
  var moving: [Int: Range<UInt64>] = [:]
  var invalidating: [BlockRange] = []

  init(seed: UInt64) {
    random = SplitMix64(seed: seed)
    locks = BlockLocks(requests, shift: Self.shift, capacity: 24)
    // Requests that do not overlap, so that only blocks are waited for.
    for tag in 0..<UInt64(24) {
      let operation: TargetRequest.Operation = tag % 2 == 0 ? .read : .write
      let request = TargetRequest(operation, offset: tag << 20, count: 512, tag: tag)
      #expect(requests.admit(request, owner: 0, cursor: request.offset))
    }
    takeReady()
    #expect(idle.count == 24)
  }

  func isRead(_ slot: Int) -> Bool { requests[slot].pointee.operation == .read }

  /// Whoever goes on does nothing until it is chosen.
  @discardableResult mutating func takeReady() -> [Int] {
    var found: [Int] = []
    #expect(requests.beginSteps())
    while let index = requests.nextReady() { found.append(index) }
    idle += found
    return found
  }

  mutating func takeIdle() -> Int? {
    idle.isEmpty ? nil : idle.remove(at: random.below(idle.count))
  }

  mutating func hold() {
    let first = random.below(Int(Self.blocks))
    let end = min(Int(Self.blocks), first + 1 + random.below(6))
    guard let index = takeIdle() else { return }
    guard !holder.contains(index) else { return idle.append(index) }
    if let other = holder[first] {
      #expect(locks.parks(index, at: UInt64(first)))
      waiting[index] = other
      return
    }
    #expect(!locks.parks(index, at: UInt64(first)))
    let limit = (first..<end).first { holder[$0] != nil } ?? end
    #expect(locks.nextHeld(UInt64(first), UInt64(end)) == UInt64(limit))
    locks.hold(index, UInt64(first), UInt64(limit))
    for block in first..<limit { holder[block] = index }
    idle.append(index)
  }

  mutating func release() {
    let holders = Array(Set(holder.compactMap { $0 })).sorted()
    guard !holders.isEmpty else { return }
    let index = holders[random.below(holders.count)]
    locks.release(index)
    for block in holder.indices where holder[block] == index { holder[block] = nil }
    let woken = Set(waiting.filter { $0.value == index }.keys)
    for slot in woken { waiting[slot] = nil }
    #expect(Set(takeReady()) == woken)
  }

  mutating func move() {
    if random.chance(50), let index = moving.keys.sorted().randomElement(using: &random) {
      moving[index] = nil
      requests.endIO(index)
      idle.append(index)
      let ended = invalidating.filter { !isMoving($0) }
      invalidating = invalidating.filter { isMoving($0) }
      #expect(locks.endInvalidations() == ended)
      return
    }
    guard let index = takeIdle() else { return }
    let first = UInt64(random.below(Int(Self.blocks) << Self.shift))
    let end = first + 1 + UInt64(random.below(3 << Self.shift))
    requests[index].pointee.cursor = first
    requests[index].pointee.pieceEnd = end
    requests.startIO(index)
    moving[index] = first >> Self.shift..<((end - 1) >> Self.shift + 1)
  }

  func isMoving(_ range: BlockRange) -> Bool {
    moving.values.contains { $0.overlaps(range.first..<range.end) }
  }

  mutating func invalidate() {
    let first = UInt64(random.below(Int(Self.blocks)))
    let range = BlockRange(first, 1 + UInt64(random.below(4)))
    let ends = !isMoving(range)
    #expect(locks.invalidate(range) == ends)
    if !ends { invalidating.append(range) }
  }

  mutating func check() {
    let except = random.below(25) - 1
    let writers = holder.map { slot in slot.flatMap { isRead($0) || $0 == except ? nil : $0 } }
    let wrong = holder.indices.filter { block in
      let end = writers[block].map { writer in
        (block..<holder.count).first { holder[$0] != writer } ?? holder.count
      }
      let isInvalidating = invalidating.contains { $0.contains(UInt64(block)) }
      return locks.writerEnd(UInt64(block), except: except) != end.map { UInt64($0) }
        || locks.isInvalidating(UInt64(block)) != isInvalidating
    }
    #expect(wrong.isEmpty)
    let first = random.below(Int(Self.blocks))
    let end = first + 1 + random.below(10)
    if writers[first] == nil {
      let next = (first..<min(end, writers.count)).first { writers[$0] != nil } ?? end
      #expect(
        locks.nextWriter(UInt64(first), UInt64(end), except: except) == UInt64(next))
    }
    #expect(
      locks.isInvalidating(UInt64(first), UInt64(end))
        == (first..<end).contains { block in
          invalidating.contains { $0.contains(UInt64(block)) }
        })
    #expect(locks.hasInvalidations == !invalidating.isEmpty)
    let holders = Set(holder.compactMap { $0 })
    #expect(locks.count == holders.count)
    #expect((0..<24).filter(locks.isHolding) == holders.sorted())
    for index in holders {
      let blocks = locks.blocks(of: index)
      let held = holder.indices.filter { holder[$0] == index }
      #expect(held.first == Int(blocks.first) && held.count == Int(blocks.end - blocks.first))
    }
    #expect(Set((0..<locks.count).map { Int(locks[$0].slot) }) == holders)
  }
}

@Suite struct BlockLocksTests {
  @Test(arguments: Depth.seeds(20)) func agreesWithATable(seed: UInt64) {
    var walk = LockWalk(seed: seed)
    for _ in 0..<300 {
      switch walk.random.below(10) {
      case 0..<5: walk.hold()
      case 5..<7: walk.release()
      case 7..<9: walk.move()
      default: walk.invalidate()
      }
      walk.check()
    }
  }

  /// Who waits for an invalidation goes on when any has ended, and not before.
  @Test func anInvalidationIsWaitedFor() {
    let requests = RequestTable(capacity: 2)
    let locks = BlockLocks(requests, shift: 12, capacity: 2)
    #expect(requests.admit(TargetRequest(.read, count: 4096, tag: 1), owner: 0, cursor: 0))
    #expect(requests.admit(TargetRequest(.read, count: 512, tag: 2), owner: 0, cursor: 0))
    #expect(requests.beginSteps())
    guard let mover = requests.nextReady(), let waiter = requests.nextReady() else {
      Issue.record("two reads do not wait for each other")
      return
    }
    requests[mover].pointee.pieceEnd = 4096
    requests.startIO(mover)
    #expect(!locks.invalidate(BlockRange(0, 2)))
    #expect(locks.invalidate(BlockRange(1)))
    requests.park(waiter, for: .invalidation)
    #expect(locks.endInvalidations() == [] && requests.nextReady() == nil)
    requests.endIO(mover)
    #expect(locks.endInvalidations() == [BlockRange(0, 2)])
    #expect(requests.beginSteps() && requests.nextReady() == waiter)
  }
}
