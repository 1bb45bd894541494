// SPDX-License-Identifier: Apache-2.0
// Faults and answers. Nothing that a worker says is believed before it is checked: a
// refused answer has changed nothing.

import Glibc
import Posix

extension UserTarget {
  func nextFaultID(_ index: Int) -> FaultID {
    let id = faults.number(slot: index)
    requests.ask(index, id)
    return id
  }

  /// The next fault that the worker has not seen yet.
  package func nextFault() -> Fault? { faults.next() }

  /// Takes an answer. Throws what is wrong with it, and then nothing has changed.
  package func answer(_ answer: Answer) throws(AnswerRefusal) {
    switch answer {
    case .map(let id, let placement, let temporary):
      try take(id, placement, isTemporary: temporary)
    case .prime(let extent): try prime(extent)
    case .done(let id, let count): try done(id, count)
    case .fail(let id, let code): try fail(id, code)
    case .flushDone(let id): settle(try rounds.answered(id, 0))
    case .invalidate(let range): try invalidate(range)
    }
    drain()
  }

  private func waiting(_ id: FaultID) throws(AnswerRefusal) -> Int {
    guard let index = requests.asker(id) else { throw .unknownFault(id) }
    return index
  }

  // MARK: What is checked

  private func check(_ extent: Extent) throws(AnswerRefusal) {
    let range = extent.blocks
    guard range.count > 0, range.first < blocks, range.count <= blocks - range.first else {
      throw .badBlocks(range)
    }
    guard case .device(let device, let sector) = extent.place else { return }
    guard Int(device) < executor.deviceCount, !extent.writable || executor.isWritable(device)
    else { throw .badDevice(device) }
    let length = range.count << sectorShift
    guard sector < 1 << Run.sectorBits, length < 1 << Run.sectorBits - sector else {
      throw .badBlocks(range)
    }
  }

  /// A mark of a new placement is greater than all before it, and leaves room to count on.
  private func check(mark: Mark) throws(AnswerRefusal) {
    guard mark > highestMark, mark < UInt64.max >> 1 else { throw .badMark(mark) }
  }

  // MARK: Mappings

  private func take(
    _ id: FaultID, _ placement: Placement, isTemporary: Bool
  ) throws(AnswerRefusal) {
    let index = try waiting(id)
    let extent = placement.extent
    try check(extent)
    guard extent.blocks.first == locks.blocks(of: index).first else {
      throw .badBlocks(extent.blocks)
    }
    switch requests[index].pointee.operation {
    case .read, .status: try takeRead(index, placement, isTemporary)
    case .write: try takeWrite(index, placement, isTemporary)
    case .zero where !requests[index].pointee.isWhole: try takeWrite(index, placement, isTemporary)
    case .zero, .discard: try takeDiscard(index, placement, isTemporary)
    case .flush: throw .unknownFault(id)
    }
  }

  private func takeRead(
    _ index: Int, _ placement: Placement, _ isTemporary: Bool
  ) throws(AnswerRefusal) {
    let extent = placement.extent
    guard case .none = placement.preparation else { throw .badBlocks(extent.blocks) }
    // An old placement may come along with what is found; a new one comes with a write.
    guard extent.mark <= highestMark else { throw .badMark(extent.mark) }
    var run = run(extent)
    run.mark = 0
    if !isTemporary {
      guard agrees(run) else { throw .overlap(extent.blocks) }
    }
    let asked = locks.blocks(of: index).end
    requests.endFault(index)
    locks.release(index)
    if !isTemporary { learn(run, except: index) }
    // The answer itself serves this request, whether or not the map has kept it; but only the
    // blocks that were asked for, since those beyond may be in the hands of a write whose
    // data is not at their place yet.
    run.end = min(run.end, asked)
    if locks.isInvalidating(run.first, run.end) || moveRead(index, run) {
      requests.makeReady(index)
    }
  }

  private func takeWrite(
    _ index: Int, _ placement: Placement, _ isTemporary: Bool
  ) throws(AnswerRefusal) {
    let extent = placement.extent
    guard case .device(let device, _) = extent.place, extent.writable else {
      throw .badBlocks(extent.blocks)
    }
    guard executor.isWritable(device) else { throw .badDevice(device) }
    var copies = true
    var source = Run.zero
    switch placement.preparation {
    case .none: copies = false
    case .zero: break
    case .copy(let from):
      try check(Extent(BlockRange(extent.blocks.first), from, writable: false))
      source = Run.pack(from)
    }
    if extent.mark != 0 {
      try check(mark: extent.mark)
      guard !isTemporary else { throw .badMark(extent.mark) }
    }
    let isNew = extent.mark != 0 || copies
    guard !isNew || extent.blocks.end <= locks.blocks(of: index).end else {
      throw .badBlocks(extent.blocks)
    }
    guard agrees(run(extent)) else { throw .overlap(extent.blocks) }
    requests[index].pointee.copies = copies
    requests[index].pointee.source = source
    accept(index, run(extent), isTemporary)
  }

  private func takeDiscard(
    _ index: Int, _ placement: Placement, _ isTemporary: Bool
  ) throws(AnswerRefusal) {
    let extent = placement.extent
    if case .copy = placement.preparation { throw .badBlocks(extent.blocks) }
    if case .device(let device, _) = extent.place {
      guard extent.writable, executor.isWritable(device) else { throw .badDevice(device) }
    }
    guard extent.blocks.end <= locks.blocks(of: index).end else { throw .badBlocks(extent.blocks) }
    if extent.mark != 0 {
      try check(mark: extent.mark)
      guard !isTemporary else { throw .badMark(extent.mark) }
    }
    guard agrees(run(extent)) else { throw .overlap(extent.blocks) }
    accept(index, run(extent), isTemporary)
  }

  private func accept(_ index: Int, _ run: Run, _ isTemporary: Bool) {
    requests.endFault(index)
    requests[index].pointee.placement = run
    requests[index].pointee.isTemporary = isTemporary
    requests[index].pointee.isAnswered = true
    highestMark = max(highestMark, run.mark)
    requests.makeReady(index)
  }

  /// Whether a run contradicts no uncommitted mapping. A new placement of a block that is
  /// uncommitted elsewhere would leave that one without an owner.
  private func agrees(_ run: Run) -> Bool {
    guard log.count > 0 else { return true }
    var block = run.first
    while block < run.end, let known = map.findOrNext(block), known.first < run.end {
      block = max(block, known.first)
      if known.mark > map.committed {
        let theirs = known.place(of: block, sectorShift: sectorShift)
        if run.place(of: block, sectorShift: sectorShift) != theirs || run.mark != 0 {
          return false
        }
      }
      block = known.end
    }
    return true
  }

  /// Remembers a run, but for blocks that are uncommitted or held by a write: of those more
  /// is known here than the worker could say.
  func learn(_ run: Run, except index: Int) {
    var first = run.first
    while first < run.end {
      if let end = locks.writerEnd(first, except: index) {
        first = end
        continue
      }
      if let known = map.find(first), known.mark > map.committed {
        first = known.end
        continue
      }
      var end = locks.nextWriter(first, run.end, except: index)
      var next = first
      while next < end, let known = map.findOrNext(next), known.first < end {
        if known.mark > map.committed { end = known.first } else { next = known.end }
      }
      var piece = run
      piece.place = run.place(of: first, sectorShift: sectorShift)
      piece.first = first
      piece.end = end
      map.set(piece)
      first = end
    }
  }

  private func prime(_ extent: Extent) throws(AnswerRefusal) {
    try check(extent)
    guard extent.mark == 0 else { throw .badMark(extent.mark) }
    let run = run(extent)
    guard agrees(run), !locks.isInvalidating(run.first, run.end) else {
      throw .overlap(extent.blocks)
    }
    learn(run, except: -1)
  }

  // MARK: Other answers

  private func done(_ id: FaultID, _ count: UInt64) throws(AnswerRefusal) {
    let index = try waiting(id)
    let slot = requests[index]
    let isDiscard =
      slot.pointee.operation == .discard
      || (slot.pointee.operation == .zero && slot.pointee.isWhole)
    guard isDiscard else { throw .unknownFault(id) }
    let asked = locks.blocks(of: index)
    let range = BlockRange(asked.first, count)
    guard count > 0, count <= asked.end - asked.first else { throw .badBlocks(range) }
    requests.endFault(index)
    slot.pointee.cursor = pieceEnd(slot.pointee, before: range.end)
    letGo(index)
    requests.makeReady(index)
  }

  private func fail(_ id: FaultID, _ code: Int32) throws(AnswerRefusal) {
    let code = code > 0 ? code : EIO
    if rounds.isAsking(id) { return settle(try rounds.answered(id, code)) }
    let index = try waiting(id)
    requests.endFault(index)
    if requests[index].pointee.isRead {
      locks.release(index)
    } else {
      letGo(index)
    }
    finish(index, code)
  }

  // MARK: Invalidation

  private func invalidate(_ range: BlockRange) throws(AnswerRefusal) {
    guard range.count > 0, range.first < blocks, range.count <= blocks - range.first else {
      throw .badBlocks(range)
    }
    // What is uncommitted, or being placed, can be flushed but not forgotten.
    var block = range.first
    while block < range.end, let known = map.findOrNext(block), known.first < range.end {
      guard known.mark <= map.committed else { throw .overlap(range) }
      block = known.end
    }
    for position in 0..<locks.count {
      let hold = locks[position]
      guard !hold.isRead, hold.first < range.end, range.first < hold.end else { continue }
      let slot = requests[Int(hold.slot)]
      guard slot.pointee.placement.mark == 0, !slot.pointee.isAnswered else {
        throw .overlap(range)
      }
    }
    map.remove(range.first, range.end)
    if locks.invalidate(range) { faults.tell(.invalidateDone(range)) }
  }

  /// An operation has ended: tell of the invalidations that waited for it.
  func settleInvalidations() {
    for range in locks.endInvalidations() { faults.tell(.invalidateDone(range)) }
  }
}
