// SPDX-License-Identifier: Apache-2.0
// Where the blocks of a dscow disk live, and what a commit writes.
//
// Block b has one place it can ever have: sector (firstBlock + b * blockSize) / 512 of the
// store. What changes is whether it is there: its bit. A bit is only ever set, and only
// after the block's data is durable; a commit therefore is one stage of whole bitmap pages,
// and a page that a power cut tears holds some of its new bits, each of them true.
//
// Invariants:
// - A block is pending (uncommitted), durable (its bit is set), or in the base.
// - A pending run is looked at before the durable bits: while a plan is being written, the
//   page on the store may already hold its bits.
// - A block without a bit may have stale bytes at its place, from a write that a power cut
//   kept from being committed. A placement is therefore always prepared in full.

package import BlockIO
package import DiskModel
import SystemIO

/// A dscow store that is open as a disk. Used from one thread; its plans run on any.
package final class Dscow: MarkedImage {
  /// The device number of the store in extents.
  package static let storeDevice: UInt16 = 0
  /// The device number of the base in extents.
  package static let baseDevice: UInt16 = 1
  /// A `find` looks at no more than so many bitmap pages.
  private static let pagesPerFind = 16

  /// The header, as it was when the store was opened.
  package let header: DscowHeader
  /// What was found of the header's two copies.
  package let copies: DscowHeader.CopyState
  /// Whether placements may be asked for.
  package let isWritable: Bool

  let store: any ByteStore
  private let blocks: UInt64
  /// Blocks from this one on have nothing in the base and read as zeroes.
  private let baseEnd: UInt64
  /// The base when it is itself an image.
  private let view: BaseView?
  private var bitmap: DscowBitmap
  var pending: PendingPlacements
  private let durableBlocks: UInt64

  /// `baseSize` is the base's length in bytes, 0 without one; `base` is needed only when it
  /// is itself an image; `durableBlocks` is how many bits are set, or an estimate of it.
  init(
    store: any ByteStore, baseSize: UInt64, base: (any ByteStore)?, header: DscowHeader,
    copies: DscowHeader.CopyState, writable: Bool, durableBlocks: UInt64
  ) {
    self.store = store
    self.header = header
    self.copies = copies
    self.isWritable = writable
    self.blocks = header.blocks
    self.bitmap = DscowBitmap(store: store, header: header)
    self.durableBlocks = durableBlocks
    pending = PendingPlacements(
      blocksPerGroup: DscowBitmap.blocksPerPage, blockSize: UInt64(header.blockSize))
    view = base?.mapped.map {
      BaseView($0, blockSize: UInt64(header.blockSize), store: store)
    }
    self.baseEnd = baseSize == 0 ? 0 : (baseSize - 1) / UInt64(header.blockSize) + 1
  }

  /// See `ImageFormat`.
  package var devices: [any ByteStore]? { view?.devices }
  /// A store is made as long as it can become, its blocks apart from the rest.
  package var isFixed: Bool { blockSize >= 4096 && header.firstBlock % 4096 == 0 }
  /// Length of the disk in bytes.
  package var size: UInt64 { header.size }
  /// Bytes of a block.
  package var blockSize: UInt32 { header.blockSize }
  /// Blocks with a place in the store. Exact while the part of the bitmap that is no hole has
  /// up to 32 MiB; beyond that the start is an estimate, from the space that the store takes.
  package var allocatedBlocks: UInt64 { durableBlocks + pending.placed }

  private func storeOffset(_ block: UInt64) -> UInt64 {
    header.firstBlock + block * UInt64(blockSize)
  }

  private func storePlace(_ block: UInt64) -> Place {
    .device(Self.storeDevice, sector: storeOffset(block) / 512)
  }

  private func basePlace(_ block: UInt64) -> Place {
    block < baseEnd
      ? .device(Self.baseDevice, sector: block * UInt64(blockSize) / 512) : .zero
  }

  /// The longest run from a block on, within its bitmap page, that is mapped alike.
  private func run(_ block: UInt64, _ limit: UInt64) throws(ImageError) -> Extent {
    let (run, next) = pending.find(block)
    if let run {
      let count = min(limit, run.blocks.end - block)
      return Extent(
        BlockRange(block, count), storePlace(block), writable: isWritable, mark: run.mark)
    }
    var limit = next.map { min(limit, $0 - block) } ?? limit
    let (isSet, count) = try bitmap.run(from: block, limit: limit)
    limit = count
    if isSet {
      return Extent(BlockRange(block, limit), storePlace(block), writable: isWritable)
    }
    return try runBelow(block, limit)
  }

  /// What of the base is at a block, and how far.
  private func runBelow(_ block: UInt64, _ limit: UInt64) throws(ImageError) -> Extent {
    guard block < baseEnd else {
      return Extent(BlockRange(block, limit), basePlace(block), writable: false)
    }
    let limit = min(limit, baseEnd - block)
    if let view {
      let (place, count) = try view.run(from: block, limit: limit)
      return Extent(BlockRange(block, count), place, writable: false)
    }
    return Extent(BlockRange(block, limit), basePlace(block), writable: false)
  }

  /// Where a block lives for reading; see `ImageFormat`. Looks at 16 bitmap pages at most,
  /// so a run may go on after the extent.
  package func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    try merged(block, limit: limit, while: { _, pages in pages < Self.pagesPerFind }, run)
  }

  /// A place for a first write; see `ImageFormat`. The answer does not cross a bitmap page.
  package func place(_ range: BlockRange, whole: Bool) throws(ImageError) -> Placement {
    try checkWritable()
    try checkBounds(range)
    return try placement(
      of: known(try run(range.first, range.count)), whole: whole, assign)
  }

  /// A discard; see `ImageFormat`. The answer does not cross a bitmap page.
  package func discard(
    _ range: BlockRange, zeroing: Bool
  ) throws(ImageError) -> DiscardAnswer {
    try checkWritable()
    try checkBounds(range)
    return try discardAnswer(
      of: known(try run(range.first, range.count)), zeroing: zeroing, assign)
  }

  /// A place that is there already, as an answer: a mark in an answer is always a new one.
  private func known(_ extent: Extent) -> Extent {
    Extent(extent.blocks, extent.place, writable: extent.writable)
  }

  /// Places a run that has no place, under a new mark.
  private func assign(_ range: BlockRange) -> Extent {
    let mark = pending.place(range, at: storeOffset(range.first))
    return Extent(range, storePlace(range.first), writable: true, mark: mark)
  }

  /// The bitmap pages that make every placement up to a mark durable: one stage, since a
  /// bit never depends on another. Bits of later placements are not in it.
  package func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan {
    var writes: [CommitPlan.Write] = []
    for (page, runs) in pending.runs(upTo: mark) {
      let bytes = try bitmap.bytes(ofPage: page, adding: runs)
      writes.append(CommitPlan.Write(offset: bitmap.place(ofPage: page), bytes: bytes))
    }
    return CommitPlan(upTo: mark, stages: writes.isEmpty ? [] : [writes])
  }

  /// The plan up to this mark has run.
  package func committed(upTo mark: Mark) {
    for (page, runs) in pending.runs(upTo: mark) {
      bitmap.set(runs, inPage: page)
    }
    pending.commit(upTo: mark)
  }

  /// A placement that came to nothing.
  package func abandon(_ mark: Mark) {
    pending.remove { $0.mark == mark }
  }

  /// See `ImageFormat`.
  package var layered: (any LayeredMapping)? { isWritable ? self : nil }

  /// The whole disk: a block's place is known before it is asked for.
  package func grant() -> Grant? {
    guard isWritable else { return nil }
    return Grant(BlockRange(0, blocks), storePlace(0))
  }

  /// See `ImageFormat`. Throws `badRequest` for what is none of what was granted.
  package func granted(_ extent: Extent) throws(ImageError) {
    try checkBounds(extent.blocks)
    guard pending.isMarkedLater, extent.place == storePlace(extent.blocks.first), extent.writable,
      extent.mark > 0
    else { throw notOurs(extent) }
    let page = extent.blocks.first / DscowBitmap.blocksPerPage
    if (extent.blocks.end - 1) / DscowBitmap.blocksPerPage == page,
      pending.insert(try pendingRun(of: extent))
    {
      return
    }
    // A block has no other place, so that what is pending already is this.
    var block = extent.blocks.first
    while block < extent.blocks.end {
      let (run, next) = pending.find(block)
      if let run {
        block = min(run.blocks.end, extent.blocks.end)
        continue
      }
      let end = (block / DscowBitmap.blocksPerPage + 1) * DscowBitmap.blocksPerPage
      let count = min(extent.blocks.end, end, next ?? .max) - block
      pending.insert(
        try pendingRun(
          of: Extent(
            BlockRange(block, count), storePlace(block), writable: true, mark: extent.mark)))
      block += count
    }
  }

  private func notOurs(_ extent: Extent) -> ImageError {
    ImageError(
      .badRequest,
      "an uncommitted placement of blocks \(extent.blocks.first)+\(extent.blocks.count) "
        + "is not one of this store")
  }

  /// Takes over the uncommitted placements of a former worker. Throws `badRequest` for one
  /// that this format cannot have made, and then has taken in none.
  package func restore(_ extents: [Extent]) throws(ImageError) {
    try checkWritable()
    var runs: [PendingPlacements.Run] = []
    var mark: Mark = 1
    for extent in extents {
      try checkBounds(extent.blocks)
      guard extent.place == storePlace(extent.blocks.first), extent.writable,
        extent.mark >= mark, extent.mark > pending.lastMark
      else { throw notOurs(extent) }
      mark = extent.mark
      try forEachRun(of: extent) { runs.append($0) }
    }
    let ordered = runs.map(\.blocks).sorted { $0.first < $1.first }
    for (one, next) in zip(ordered, ordered.dropFirst()) where one.end > next.first {
      throw ImageError(.badRequest, "two uncommitted placements share block \(next.first)")
    }
    for run in runs { pending.insert(run) }
  }

  /// An extent cut at the borders of bitmap pages, its blocks without a bit counted.
  private func forEachRun(
    of extent: Extent, _ take: (PendingPlacements.Run) throws(ImageError) -> Void
  ) throws(ImageError) {
    var block = extent.blocks.first
    while block < extent.blocks.end {
      let end = (block / DscowBitmap.blocksPerPage + 1) * DscowBitmap.blocksPerPage
      let count = min(extent.blocks.end, end) - block
      try take(
        pendingRun(
          of: Extent(
            BlockRange(block, count), storePlace(block), writable: true, mark: extent.mark)))
      block += count
    }
  }

  /// An extent that crosses no border of a bitmap page, its blocks without a bit counted.
  private func pendingRun(of extent: Extent) throws(ImageError) -> PendingPlacements.Run {
    var run = PendingPlacements.Run(
      blocks: extent.blocks, offset: storeOffset(extent.blocks.first), mark: extent.mark,
      fresh: 0)
    var block = extent.blocks.first
    while block < extent.blocks.end {
      let (isSet, count) = try bitmap.run(from: block, limit: extent.blocks.end - block)
      if !isSet { run.fresh += count }
      block += count
    }
    return run
  }
}

// MARK: As a layer

extension Dscow: LayeredMapping {
  /// Every block's place in the store.
  package var layer: Layer { Layer(BlockRange(0, blocks), storePlace(0)) }

  /// What the base has, or zeroes.
  package func under(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    try merged(block, limit: limit, while: { _, runs in runs < 1024 }, runBelow)
  }

  /// The bitmap of the store, past the cache.
  package func readPresent(
    from block: UInt64, into words: UnsafeMutableBufferPointer<UInt64>
  ) throws(ImageError) {
    let offset = header.bitmapOffset + block / 8
    try io { () throws(IOError) in
      try store.read(UnsafeMutableRawBufferPointer(words), at: offset)
    }
    for index in words.indices {
      let left = Int64(clamping: blocks) - Int64(clamping: block) - Int64(index) * 64
      let word = UInt64(littleEndian: words[index])
      words[index] = left >= 64 ? word : left <= 0 ? 0 : word & ((1 << UInt64(left)) - 1)
    }
  }
}
