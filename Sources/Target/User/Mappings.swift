// SPDX-License-Identifier: Apache-2.0
// What a worker's word may do to the map. Nothing that a worker says is believed before it is
// checked, and of uncommitted blocks, and of those that a write has in hand, more is known here
// than the worker could say.
//
// Invariants:
// - No answer maps an uncommitted block elsewhere, or takes its mark from it.
// - Nothing is learned of a block that a write holds.

import BlockIO
import DiskModel

/// The map, as far as answers may change it. Used from one thread.
final class Mappings {
  let geometry: DiskGeometry
  let executor: any IOExecutor
  let log: PendingLog
  let map: ExtentMap
  let locks: BlockLocks

  init(
    _ geometry: DiskGeometry, _ executor: any IOExecutor, _ log: PendingLog, _ map: ExtentMap,
    _ locks: BlockLocks
  ) {
    self.geometry = geometry
    self.executor = executor
    self.log = log
    self.map = map
    self.locks = locks
  }

  /// Whether an extent is of the disk and of its devices.
  func check(_ extent: Extent) throws(AnswerRefusal) {
    let range = extent.blocks
    guard geometry.contains(range) else { throw .badBlocks(range) }
    guard case .device(let device, let sector) = extent.place else { return }
    guard Int(device) < executor.deviceCount, !extent.writable || executor.isWritable(device)
    else { throw .badDevice(device) }
    let length = range.count << geometry.sectorShift
    guard sector < 1 << Run.sectorBits, length < 1 << Run.sectorBits - sector else {
      throw .badBlocks(range)
    }
  }

  /// Whether a run contradicts no uncommitted mapping. A new placement of a block that is
  /// uncommitted elsewhere would leave that one without an owner.
  func agrees(_ run: Run) -> Bool {
    guard log.count > 0 else { return true }
    var block = run.first
    while block < run.end, let known = map.findOrNext(block), known.first < run.end {
      block = max(block, known.first)
      if known.mark > map.committed {
        let theirs = known.place(of: block, sectorShift: geometry.sectorShift)
        if run.place(of: block, sectorShift: geometry.sectorShift) != theirs || run.mark != 0 {
          return false
        }
      }
      block = known.end
    }
    return true
  }

  /// Remembers a run, but for blocks that are uncommitted or held by a write of another slot
  /// than `index`.
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
      piece.place = run.place(of: first, sectorShift: geometry.sectorShift)
      piece.first = first
      piece.end = end
      map.set(piece)
      first = end
    }
  }

  /// Takes in a mapping that nobody asked for.
  func prime(_ extent: Extent) throws(AnswerRefusal) {
    try check(extent)
    guard extent.mark == 0 else { throw .badMark(extent.mark) }
    let run = geometry.run(extent)
    guard agrees(run), !locks.isInvalidating(run.first, run.end) else {
      throw .overlap(extent.blocks)
    }
    learn(run, except: -1)
  }

  /// Whether blocks are of the disk and may be forgotten: what is uncommitted can be flushed, but
  /// not forgotten.
  func checkForgettable(_ range: BlockRange) throws(AnswerRefusal) {
    guard geometry.contains(range) else { throw .badBlocks(range) }
    var block = range.first
    while block < range.end, let known = map.findOrNext(block), known.first < range.end {
      guard known.mark <= map.committed else { throw .overlap(range) }
      block = known.end
    }
  }
}
