// SPDX-License-Identifier: Apache-2.0
// A worker for traces, over any engine: the smallest format there can be, answering late, in
// any order, and taking its mappings back.
//
// The format: a block has two places in the store, and is in one of them or not placed at all.
// A set of committed blocks is all its metadata. What a discard does depends on the block
// alone, so that the contents of the disk follow from the requests.

import DiskModel
import Glibc
import Target
import TestSupport

/// What the format has on its medium, and survives its workers.
final class TraceMedium {
  var committed: Set<UInt64> = []
  /// Blocks that lie in their second place.
  var moved: Set<UInt64> = []
  /// Whether there is no second place, and the engine is told of a layer.
  let isLayered: Bool
  /// Blocks of the layer that workers were told of, as far as they knew them not.
  var told = 0

  init(isLayered: Bool) { self.isLayered = isLayered }
}

/// One life of the worker.
final class TraceWorker {
  /// Whether a discard of the block zeroes it; otherwise it does nothing.
  static func zeroes(_ block: UInt64) -> Bool { block % 2 == 0 }

  private let driver: any EngineDriver
  private let medium: TraceMedium
  private let blocks: UInt64
  private let perBlock: UInt64
  private let lateness: Int
  private var random: SplitMix64
  private var placed: [UInt64: Mark] = [:]
  private var lastMark: Mark = 0
  private var provisional: Mark = .firstProvisional
  /// Whether the engine gives the marks. One life gives all of its own, or none.
  private let isMarkedLater: Bool
  private var waiting: [Fault] = []
  private var invalidating: BlockRange?
  /// Blocks that an answer named since they were invalidated.
  private var touched: Set<UInt64> = []
  /// Whether first writes may be placed without a question.
  private var isGranting = false

  /// Starts from the medium and from what the engine remembers.
  init(_ driver: any EngineDriver, _ medium: TraceMedium, lateness: Int, seed: UInt64) throws {
    self.driver = driver
    self.medium = medium
    self.lateness = lateness
    let engine = driver.engine
    perBlock = UInt64(engine.blockSize) / 512
    blocks = (engine.sectors + perBlock - 1) / perBlock
    var random = SplitMix64(seed: seed)
    isMarkedLater = engine.givesMarks && random.chance(60)
    self.random = random
    for extent in engine.uncommitted() {
      // Blocks that one answer has placed have one mark.
      try expect(extent.mark >= lastMark, "marks go backwards: \(extent)")
      for block in extent.blocks.first..<extent.blocks.end {
        try expect(placed[block] == nil, "block \(block) is uncommitted twice")
        try expect(
          extent.place == self.extent(extent.blocks.first, 1).place, "another place: \(extent)")
        placed[block] = extent.mark
      }
      lastMark = extent.mark
    }
    if medium.isLayered {
      try layer()
    } else if engine.takesGrants, random.chance(60) {
      try grant()
    }
  }

  /// Tells of the blocks' places, of what lies under them and of which are there; and perhaps lets first
  /// writes go there without a question.
  private func layer() throws {
    let all = BlockRange(0, blocks)
    let place = Place.device(0, sector: perBlock)
    try engine.layer(Layer(all, place))
    try engine.answer(.prime(Extent(all, .device(1, sector: 0), writable: false)))
    var words = [UInt64](repeating: 0, count: Int((blocks + 63) / 64))
    for block in medium.committed { words[Int(block / 64)] |= 1 << (block % 64) }
    try words.withUnsafeBufferPointer { words throws(AnswerRefusal) in
      try engine.present(from: 0, words)
    }
    guard random.chance(80) else { return }
    try engine.grant(Grant(all, place))
    isGranting = true
    tell("  grants the layer")
  }

  /// The engine tells of blocks of the layer that are there.
  private func present(_ extent: Extent) throws {
    try expect(
      extent == self.extent(extent.blocks.first, extent.blocks.count, mark: extent.mark)
        && extent.mark > 0, "another place: \(extent)")
    for block in extent.blocks.first..<extent.blocks.end where !isPlaced(block) {
      placed[block] = extent.mark
      medium.told += 1
    }
    lastMark = max(lastMark, extent.mark)
  }

  /// Tells where unplaced blocks are read, and lets first writes to them, or to some, go without
  /// a question.
  private func grant() throws {
    for block in 0..<blocks where !isPlaced(block) && random.chance(80) {
      let extent = Extent(
        BlockRange(block), .device(1, sector: block * perBlock), writable: false)
      do throws(AnswerRefusal) {
        try engine.answer(.prime(extent))
      } catch {
        // It belongs to a discard of which a former worker's answer is still being done.
        guard case .overlap = error else { throw error }
      }
    }
    let first = random.chance(50) ? 0 : UInt64(random.below(Int(blocks)))
    let range = BlockRange(first, blocks - first)
    try engine.grant(Grant(range, .device(0, sector: (1 + first) * perBlock)))
    isGranting = true
    tell("  grants \(range)")
  }

  /// The engine has placed a block as granted.
  private func granted(_ extent: Extent) throws {
    if medium.isLayered { return try present(extent) }
    let block = extent.blocks.first
    try expect(
      isGranting && extent.blocks.count == 1 && !isPlaced(block)
        && extent == self.extent(block, 1, mark: extent.mark),
      "placed as nobody granted: \(extent)")
    touched.insert(block)
    placed[block] = extent.mark
    // A placement of ours may have come after it.
    lastMark = max(lastMark, extent.mark)
  }

  // Not kept: an engine may go only when nobody has it any more.
  private var engine: any TargetEngine { driver.engine }

  /// Whether it has no question in its hands.
  var isIdle: Bool { waiting.isEmpty }

  /// From one mark to the next.
  private var step: Mark { isGranting || medium.isLayered ? 1 << 20 : 1 }

  /// A mark of ours, or one that the engine will replace.
  private func newMark(_ more: UInt64 = 0) -> Mark {
    if isMarkedLater {
      provisional += 1
      return provisional
    }
    lastMark += step + more
    return lastMark
  }

  private func isPlaced(_ block: UInt64) -> Bool {
    placed[block] != nil || medium.committed.contains(block)
  }

  private func extent(_ first: UInt64, _ count: UInt64, mark: Mark = 0) -> Extent {
    let slot = 1 + first + (medium.moved.contains(first) ? blocks + 1 : 0)
    return Extent(
      BlockRange(first, count), .device(0, sector: slot * perBlock), writable: true, mark: mark)
  }

  /// Takes the questions that are there and answers one, perhaps. True when something was done.
  func pump() throws -> Bool {
    while let fault = driver.nextFault() {
      tell("  told \(fault)")
      switch fault {
      case .mapError, .invalidateDone, .placed, .marked: try handle(fault)
      default: waiting.append(fault)
      }
    }
    guard !waiting.isEmpty, !random.chance(lateness) else { return false }
    try handle(waiting.remove(at: random.below(waiting.count)))
    return true
  }

  private func handle(_ fault: Fault) throws {
    tell("  handles \(fault)")
    switch fault {
    case .read(let id, let range): try find(id, range.first)
    case .write(let id, let range, let whole): try place(id, range, whole)
    case .discard(let id, let range, let zeroing): try discard(id, range.first, zeroing)
    case .flush(let id, let upTo): try commit(id, upTo)
    case .mapError(_, let mark, _):
      for (block, other) in placed where other == mark { placed[block] = nil }
    case .invalidateDone(let range): try invalidated(range)
    case .placed(let extent): try granted(extent)
    case .marked(let provisional, let mark):
      for (block, other) in placed where other == provisional { placed[block] = mark }
      lastMark = max(lastMark, mark)
    }
  }

  private func find(_ id: FaultID, _ first: UInt64) throws {
    let isHere = isPlaced(first)
    let isMoved = medium.moved.contains(first)
    var count: UInt64 = 1
    while first + count < blocks, isPlaced(first + count) == isHere,
      !isHere || medium.moved.contains(first + count) == isMoved, count < 5
    { count += 1 }
    let temporary = random.chance(10)
    if temporary { count = 1 }
    func extent(_ count: UInt64) -> Extent {
      if isHere { return self.extent(first, count) }
      return Extent(
        BlockRange(first, count), .device(1, sector: first * perBlock), writable: false)
    }
    for block in first..<(first + count) { touched.insert(block) }
    do throws(AnswerRefusal) {
      try engine.answer(.map(id, Placement(extent(count)), temporary: temporary))
    } catch {
      guard case .overlap = error, count > 1 else { throw error }
      // The module takes a run as a whole or not at all.
      try engine.answer(.map(id, Placement(extent(1))))
    }
  }

  private func place(_ id: FaultID, _ range: BlockRange, _ whole: Bool) throws {
    let first = range.first
    touched.insert(first)
    if isPlaced(first) {
      try engine.answer(.map(id, Placement(extent(first, 1))))
      return
    }
    var count: UInt64 = 1
    while count < range.count, !isPlaced(first + count),
      medium.moved.contains(first + count) == medium.moved.contains(first), !random.chance(10)
    { count += 1 }
    let mark = newMark(UInt64(random.below(2)))
    for block in first..<(first + count) {
      placed[block] = mark
      touched.insert(block)
    }
    let from = Place.device(1, sector: first * perBlock)
    let preparation: Preparation = whole ? .none : .copy(from: from)
    try engine.answer(.map(id, Placement(extent(first, count, mark: mark), preparation)))
  }

  private func discard(_ id: FaultID, _ block: UInt64, _ zeroing: Bool) throws {
    touched.insert(block)
    guard zeroing || Self.zeroes(block) else {
      try engine.answer(.done(id, blocks: 1))
      return
    }
    if isPlaced(block) {
      try engine.answer(.map(id, Placement(extent(block, 1), .zero)))
      return
    }
    let mark = newMark()
    placed[block] = mark
    try engine.answer(.map(id, Placement(extent(block, 1, mark: mark), .zero)))
  }

  private func commit(_ id: FaultID, _ upTo: Mark) throws {
    try expect(upTo <= lastMark, "a flush up to \(upTo), but the last mark is \(lastMark)")
    let blocks = placed.filter { $0.value <= upTo }.keys
    medium.committed.formUnion(blocks)
    // A worker may die between the two.
    if random.chance(5) { throw TraceDeath() }
    for block in blocks { placed[block] = nil }
    try engine.answer(.flushDone(id))
  }

  /// Takes a mapping back. What is uncommitted is left alone.
  func invalidateSomething() throws {
    guard invalidating == nil, !medium.isLayered else { return }
    let first = UInt64(random.below(Int(blocks)))
    let range = BlockRange(first, min(blocks - first, 1 + UInt64(random.below(3))))
    guard !(range.first..<range.end).contains(where: { placed[$0] != nil }) else { return }
    do throws(AnswerRefusal) {
      try engine.answer(.invalidate(range))
    } catch {
      // A block of it is being placed, which is news to come.
      guard case .overlap = error else { throw error }
      return
    }
    tell("  invalidates \(range)")
    invalidating = range
    touched = []
    for fault in waiting {
      switch fault {
      case .read(_, let at), .write(_, let at, _), .discard(_, let at, _):
        touched.formUnion(at.first..<at.end)
      default: break
      }
    }
  }

  /// No request can reach the old places: some blocks go to their other one.
  private func invalidated(_ range: BlockRange) throws {
    try expect(invalidating == range, "an invalidation of \(range) that nobody asked for")
    invalidating = nil
    for block in range.first..<range.end {
      guard medium.committed.contains(block), placed[block] == nil, !touched.contains(block),
        random.chance(60)
      else { continue }
      let slots = [1 + block, 2 + block + blocks]
      let isMoved = medium.moved.contains(block)
      driver.moveStore(
        from: slots[isMoved ? 1 : 0] * perBlock, to: slots[isMoved ? 0 : 1] * perBlock,
        sectors: Int(perBlock))
      tell("  moves block \(block) \(isMoved ? "back" : "away")")
      if isMoved { medium.moved.remove(block) } else { medium.moved.insert(block) }
    }
  }
}

/// With DMU_VERBOSE in the environment, what happens in a trace.
func tell(_ what: @autoclosure () -> String) { if isVerbose { print(what()) } }
private let isVerbose = getenv("DMU_VERBOSE") != nil

/// The worker dies here.
struct TraceDeath: Error {}
