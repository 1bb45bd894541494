// SPDX-License-Identifier: Apache-2.0
// The smallest format there can be: block b of the store lies at b + 1, and a set of
// committed blocks is all its metadata. With it, a worker that answers late, in any order,
// and sometimes takes its mappings back.

import BlockIO
package import DiskModel
import Glibc
package import Synchronization
import SystemIO
package import Target
import TestSupport

/// What the format has on its medium, and survives it.
package final class ShiftMedium: Sendable {
  package init() {}

  /// The blocks that are committed.
  package let committed = Mutex<Set<UInt64>>([])
}

/// A worker of the format. A new one starts from the medium and what the target remembers.
package final class ShiftWorker {
  package let target: UserTarget
  package let medium: ShiftMedium
  private var placed: [UInt64: Mark] = [:]
  private var lastMark: Mark = 0
  private var waiting: [Fault] = []
  private var random: SplitMix64
  /// Answers that are late, in percent.
  package let lateness: Int
  /// Ranges that were invalidated and not yet told of.
  package private(set) var invalidating: [BlockRange] = []

  package init(target: UserTarget, medium: ShiftMedium, lateness: Int, seed: UInt64) {
    self.target = target
    self.medium = medium
    self.lateness = lateness
    random = SplitMix64(seed: seed)
    for extent in target.uncommitted() {
      precondition(extent.mark > lastMark, "marks go backwards")
      for block in extent.blocks.first..<extent.blocks.end {
        precondition(placed[block] == nil, "a block is uncommitted twice")
        placed[block] = extent.mark
      }
      lastMark = extent.mark
    }
  }

  package func isPlaced(_ block: UInt64) -> Bool {
    placed[block] != nil || medium.committed.withLock { $0.contains(block) }
  }

  private func extent(_ first: UInt64, _ count: UInt64, mark: Mark = 0) -> Extent {
    let sectors = UInt64(target.blockSize) / 512
    return Extent(
      BlockRange(first, count), .device(0, sector: (first + 1) * sectors), writable: true,
      mark: mark)
  }

  /// Takes the faults that are there and answers some. True when anything was done.
  package func pump() throws -> Bool {
    // Questions may be answered late and in any order; news is news when it comes.
    while let fault = target.nextFault() {
      switch fault {
      case .mapError, .invalidateDone: try handle(fault)
      default: waiting.append(fault)
      }
    }
    guard !waiting.isEmpty, !random.chance(lateness) else { return false }
    try handle(waiting.remove(at: random.below(waiting.count)))
    return true
  }

  package var isIdle: Bool { waiting.isEmpty }

  private func handle(_ fault: Fault) throws {
    switch fault {
    case .read(let id, let blocks): try target.answer(.map(id, Placement(find(blocks.first))))
    case .write(let id, let blocks, let whole): try place(id, blocks, whole)
    case .discard(let id, let blocks, let zeroing): try discard(id, blocks, zeroing)
    case .flush(let id, let upTo): commit(id, upTo)
    case .mapError(_, let mark, _):
      for (block, other) in placed where other == mark { placed[block] = nil }
    case .invalidateDone(let range):
      guard let index = invalidating.firstIndex(of: range) else {
        preconditionFailure("an invalidation that was not asked for")
      }
      invalidating.remove(at: index)
    case .placed(let extent): preconditionFailure("nothing was granted: \(extent)")
    case .marked(let mark, _): preconditionFailure("no mark was left out: \(mark)")
    }
  }

  private func find(_ first: UInt64) -> Extent {
    let blocks = target.blocks
    let isHere = isPlaced(first)
    var count: UInt64 = 1
    while first + count < blocks, isPlaced(first + count) == isHere, count < 5 { count += 1 }
    if isHere { return extent(first, count) }
    let sectors = UInt64(target.blockSize) / 512
    return Extent(BlockRange(first, count), .device(1, sector: first * sectors), writable: false)
  }

  private func place(_ id: FaultID, _ blocks: BlockRange, _ whole: Bool) throws {
    if isPlaced(blocks.first) {
      try target.answer(.map(id, Placement(extent(blocks.first, 1))))
      return
    }
    var count: UInt64 = 1
    while count < blocks.count, !isPlaced(blocks.first + count), !random.chance(10) { count += 1 }
    lastMark += 1 + UInt64(random.below(2))
    for block in blocks.first..<(blocks.first + count) { placed[block] = lastMark }
    let sectors = UInt64(target.blockSize) / 512
    let source = Place.device(1, sector: blocks.first * sectors)
    let preparation: Preparation = whole ? .none : .copy(from: source)
    try target.answer(
      .map(id, Placement(extent(blocks.first, count, mark: lastMark), preparation)))
  }

  private func discard(_ id: FaultID, _ blocks: BlockRange, _ zeroing: Bool) throws {
    if isPlaced(blocks.first) {
      try target.answer(.map(id, Placement(extent(blocks.first, 1), .zero)))
    } else if zeroing {
      lastMark += 1
      placed[blocks.first] = lastMark
      try target.answer(.map(id, Placement(extent(blocks.first, 1, mark: lastMark), .zero)))
    } else {
      try target.answer(.done(id, blocks: 1))
    }
  }

  private func commit(_ id: FaultID, _ upTo: Mark) {
    let blocks = placed.filter { $0.value <= upTo }.keys.sorted()
    let medium = medium
    target.run(
      {
        medium.committed.withLock { $0.formUnion(blocks) }
        return nil
      },
      then: { [unowned self] error in
        do throws(AnswerRefusal) {
          if let error {
            try target.answer(.fail(id, code: error.error.code))
            return
          }
          for block in blocks { placed[block] = nil }
          try target.answer(.flushDone(id))
        } catch {
          preconditionFailure("refused: \(error)")
        }
      })
  }

  /// Takes a mapping back at random. What is uncommitted may not be, and is not.
  package func invalidateSomething() {
    let first = UInt64(random.below(Int(target.blocks)))
    let count = UInt64(1 + random.below(Int(target.blocks - first)))
    let range = BlockRange(first, min(count, 3))
    do throws(AnswerRefusal) {
      try target.answer(.invalidate(range))
      invalidating.append(range)
    } catch {
      precondition(error == .overlap(range), "refused: \(error)")
    }
  }
}
