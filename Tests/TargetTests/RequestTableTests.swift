// SPDX-License-Identifier: Apache-2.0
// The table of requests against a list that is looked through from its start for everything.

import DiskModel
import Glibc
import Testing
import TestSupport

@testable import Target

/// What a table of requests should do, said slowly.
private struct RequestModel {
  enum State: Equatable {
    case blocked
    case ready
    case io(index: Int)
    case fault(index: Int, FaultID)
    case parked(index: Int, Wait)
    case flushing(index: Int)
  }
  struct Entry {
    let tag: UInt64
    let bytes: Range<UInt64>
    let isRead: Bool
    var state = State.blocked
    var isOrdered = true
    var failure: Int32 = 0
    /// The bytes of the piece that moves.
    var piece: Range<UInt64>
  }

  /// In the order of arrival.
  var entries: [Entry] = []
  /// Slots that wait, in the order in which they began to.
  var parked: [UInt64] = []
  /// Who is to be stepped: those of a set in any order, one set after the other.
  var ready: [Set<UInt64>] = []

  func place(_ tag: UInt64) -> Int {
    guard let found = entries.firstIndex(where: { $0.tag == tag }) else {
      preconditionFailure("no request \(tag)")
    }
    return found
  }

  func conflict(_ bytes: Range<UInt64>, isRead: Bool, before place: Int) -> Bool {
    entries[..<place].contains {
      $0.isOrdered && $0.bytes.overlaps(bytes) && !($0.isRead && isRead)
    }
  }

  mutating func makeReady(_ tags: Set<UInt64>) {
    guard !tags.isEmpty else { return }
    for tag in tags { entries[place(tag)].state = .ready }
    ready.append(tags)
  }

  /// Whoever is blocked by nobody goes on.
  mutating func unblock() {
    makeReady(
      Set(
        entries.indices.filter {
          entries[$0].state == .blocked
            && !conflict(entries[$0].bytes, isRead: entries[$0].isRead, before: $0)
        }.map { entries[$0].tag }))
  }

  func waiting(_ what: Wait) -> [UInt64] {
    parked.filter {
      if case .parked(_, what) = entries[place($0)].state { true } else { false }
    }
  }

  mutating func wake(_ tags: [UInt64]) {
    for tag in tags {
      parked.removeAll { $0 == tag }
      makeReady([tag])
    }
  }

  func isMoving(_ bytes: Range<UInt64>, _ blockSize: UInt64) -> Bool {
    entries.contains { entry in
      guard case .io = entry.state else { return false }
      let first = entry.piece.lowerBound / blockSize * blockSize
      let end = (entry.piece.upperBound + blockSize - 1) / blockSize * blockSize
      return first < bytes.upperBound && bytes.lowerBound < end
    }
  }
}

/// A table and its model, moved alike at random.
private struct RequestWalk {
  static let capacity = 12
  static let waits: [Wait] = [.invalidation, .room, .scratch, .space, .blocks(heldBy: 3)]
  let table = RequestTable(capacity: capacity)
  var model = RequestModel()
  var random: SplitMix64
  var lastTag: UInt64 = 0
  var lastFault: UInt64 = 0

  init(seed: UInt64) { random = SplitMix64(seed: seed) }

  mutating func bytes() -> Range<UInt64> {
    let first = UInt64(random.below(60))
    return first..<(first + 1 + UInt64(random.below(12)))
  }

  mutating func admit() {
    let bytes = bytes()
    lastTag += 1
    let kinds: [TargetRequest.Operation] = [.read, .write, .status, .zero, .discard, .write]
    let operation = kinds[random.below(kinds.count)]
    let isRead = operation == .read || operation == .status
    let request = TargetRequest(
      operation, offset: bytes.lowerBound, count: UInt64(bytes.count), tag: lastTag)
    let isContended = model.conflict(bytes, isRead: isRead, before: model.entries.count)
    #expect(
      table.isContended(bytes.lowerBound, bytes.upperBound, isRead: isRead) == isContended)
    let isFull = model.entries.count == Self.capacity
    #expect(table.admit(request, owner: 7, cursor: bytes.lowerBound) == !isFull)
    guard !isFull else { return }
    model.entries.append(
      RequestModel.Entry(tag: lastTag, bytes: bytes, isRead: isRead, piece: bytes))
    if !isContended { model.makeReady([lastTag]) }
  }

  mutating func admitFlush() {
    lastTag += 1
    let index = table.admitFlush(TargetRequest(.flush, tag: lastTag), owner: -1)
    #expect((index == nil) == (model.entries.count == Self.capacity))
    guard let index else { return }
    var entry = RequestModel.Entry(tag: lastTag, bytes: 0..<0, isRead: false, piece: 0..<0)
    entry.state = .flushing(index: index)
    entry.isOrdered = false
    model.entries.append(entry)
  }

  /// Steps all that is ready, each at random.
  mutating func drain() {
    #expect(table.beginSteps())
    while let index = table.nextReady() {
      #expect(!table.beginSteps(), "a step within a step")
      let tag = table[index].pointee.tag
      guard model.ready.first?.contains(tag) == true else {
        Issue.record("request \(tag) is stepped, not one of \(model.ready.first ?? [])")
        return
      }
      model.ready[0].remove(tag)
      if model.ready[0].isEmpty { model.ready.removeFirst() }
      let place = model.place(tag)
      let failure = table.takeFailure(index)
      #expect(failure == model.entries[place].failure && table.takeFailure(index) == 0)
      #expect(table[index].pointee.offset == model.entries[place].bytes.lowerBound)
      step(index, place, ends: failure != 0)
      check()
    }
    #expect(model.ready.isEmpty, "\(model.ready) were not stepped")
  }

  private mutating func step(_ index: Int, _ place: Int, ends: Bool) {
    let tag = model.entries[place].tag
    switch ends ? 9 : random.below(10) {
    case 0..<2:
      let first = model.entries[place].bytes.lowerBound
      let piece = first..<(first + 1 + UInt64(random.below(model.entries[place].bytes.count)))
      table[index].pointee.pieceEnd = piece.upperBound
      table.startIO(index)
      model.entries[place].piece = piece
      model.entries[place].state = .io(index: index)
    case 2..<4:
      lastFault += 1
      let fault = lastFault << RequestTable.slotBits | UInt64(index)
      table.ask(index, fault)
      model.entries[place].state = .fault(index: index, fault)
    case 4..<7:
      let what = Self.waits[random.below(Self.waits.count)]
      table.park(index, for: what)
      model.entries[place].state = .parked(index: index, what)
      model.parked.append(tag)
    case 7:
      table.leave(index)
      table.awaitFlush(index)
      model.entries[place].isOrdered = false
      model.entries[place].state = .flushing(index: index)
      model.unblock()
    default:
      table.leave(index)
      table.free(index)
      model.entries.remove(at: place)
      model.unblock()
    }
  }

  /// Something that a slot waited for comes to pass.
  mutating func move() {
    guard !model.entries.isEmpty else { return }
    let place = random.below(model.entries.count)
    switch model.entries[place].state {
    case .io(let index):
      table.endIO(index)
      table.makeReady(index)
      model.makeReady([model.entries[place].tag])
    case .fault(let index, let fault):
      #expect(table.asker(fault) == index)
      #expect(table.asker(fault + 1 << RequestTable.slotBits) == nil && table.asker(0) == nil)
      table.endFault(index)
      #expect(table.asker(fault) == nil)
      table.makeReady(index)
      model.makeReady([model.entries[place].tag])
    case .flushing(let index):
      table.free(index)
      model.entries.remove(at: place)
    default: break
    }
  }

  mutating func wake() {
    let what = Self.waits[random.below(Self.waits.count)]
    let waiting = model.waiting(what)
    switch random.below(3) {
    case 0:
      table.wake(what)
      model.wake(waiting)
    case 1:
      table.fail(waitingFor: what, ENOSPC)
      for tag in waiting { model.entries[model.place(tag)].failure = ENOSPC }
      model.wake(waiting)
    default:
      let index = table.wakeFirst(what)
      #expect(index.map { table[$0].pointee.tag } == waiting.first)
      model.wake(Array(waiting.prefix(1)))
    }
  }

  mutating func check() {
    #expect(table.count == model.entries.count)
    #expect(table.isIdle == !model.entries.contains(where: \.isOrdered))
    let bytes = bytes()
    #expect(
      table.isMoving(bytes.lowerBound, bytes.upperBound, blockSize: 8)
        == model.isMoving(bytes, 8))
  }
}

@Suite struct RequestTableTests {
  @Test(arguments: Depth.seeds(30)) func agreesWithAList(seed: UInt64) {
    var walk = RequestWalk(seed: seed)
    for _ in 0..<500 {
      switch walk.random.below(10) {
      case 0..<4: walk.admit()
      case 4: walk.admitFlush()
      case 5..<7: walk.drain()
      case 7..<9: walk.move()
      default: walk.wake()
      }
      walk.check()
    }
  }

  /// A slot is as new when it is taken again.
  @Test func nothingIsLeftInASlot() throws {
    let table = RequestTable(capacity: 1)
    var request = TargetRequest(.zero, offset: 512, count: 1024, tag: 5)
    request.isForced = true
    request.keepsSpace = true
    #expect(table.admit(request, owner: 3, cursor: 1024))
    #expect(table.beginSteps())
    let index = try #require(table.nextReady())
    #expect(table[index].pointee.cursor == 1024 && table[index].pointee.end == 1536)
    #expect(table[index].pointee.isForced && table[index].pointee.keepsSpace)
    table[index].pointee.isProbe = true
    table.park(index, for: .space)
    table.fail(waitingFor: .space, EIO)
    table.leave(index)
    table.free(index)
    #expect(table.nextReady() == nil)
    #expect(table.admit(TargetRequest(.read, count: 512, tag: 6), owner: 4, cursor: 0))
    let slot = table[index].pointee
    #expect(slot.operation == .read && !slot.isForced && !slot.keepsSpace && !slot.isProbe)
    #expect(slot.owner == 4 && slot.tag == 6 && table.takeFailure(index) == 0)
  }
}
