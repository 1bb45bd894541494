// SPDX-License-Identifier: Apache-2.0
// Where the blocks of a VHD disk live, and what a commit writes.
//
// A block of the table that has a place is preceded there by a bitmap of its sectors, the first
// sector in the highest bit. Over a base the disk's blocks are pieces of those, of 64 KiB: a first
// write copies no more than that. Without a base they are the table's: QEMU does not look at the
// bitmaps, and reads what stands under a clear bit.
//
// A piece whose bits are all set is mapped to its place; one with none set is in the base; one with
// some ("mixed", as blktap leaves them) is read through user space, and made whole at its own place
// by the first write.
//
// Commit: 1. the bits of what was placed, all of a new block's bitmap, zeroes for what of the last
// block lies past the disk's end, and the footer at the new end; 2. entries of the table for blocks
// that had no place. A bit is set when its data is durable, and never cleared, so that a bitmap of
// which some sectors are written is right. The copy of the footer at the start always holds.
//
// Invariants: new blocks go behind everything that a header names, everything that a block has,
// and whatever stands before a footer at the end of a file, their data at a multiple of 4096; the
// file is long enough for every block that was placed, and for the footer. The footer of a store
// whose length is fixed (a device) stands in its last sector, and blocks end before it. No block
// lies over a header, a table, a locator, a batmap or another block: such an image is refused.

package import BlockIO
package import DiskModel
import Glibc
import SystemIO

/// A VHD image that is open as a disk. Used from one thread; its plans run on any.
package final class Vhd: RunImage, PooledImage {
  /// The device number of the store, of the base, and of the mixed blocks.
  private static let mixedDevice: UInt16 = 2
  /// Bytes of a piece of a block that is over a base, at most and unless it is said otherwise.
  package static let largestPiece: UInt64 = 64 << 10
  static let blocksPerFind: UInt64 = 4096
  private typealias Run = PendingPlacements.Run
  /// A plan that is being run: what it writes, the blocks that the table names then, the bitmaps
  /// that it writes anew, and the footer.
  private struct Flight {
    let mark: Mark
    let draft: CommitDraft
    let named: [UInt64]
    let bitmaps: [Range<UInt64>]
    let footer: UInt64?
  }

  /// The header, as it is now.
  package internal(set) var header: VhdHeader
  let store: any ByteStore
  private let base: BaseView
  let cache: MetadataCache
  let isWritable: Bool
  var pending: PendingPlacements
  var pooled = PooledPlaces()
  private var inFlight: Flight?
  /// Where the data of blocks goes that the table does not name yet, by their number there.
  private var newPlaces: [UInt64: UInt64] = [:]
  /// Blocks of the disk in one of the table.
  private let pieces: UInt64
  /// Where everything ended that the image named when it was opened.
  private let surveyedEnd: UInt64
  /// Where the next block may go.
  var end: UInt64
  /// Where a footer is known to stand; nil when there may be none, or an old one.
  var footerPlace: UInt64?
  private let durableBlocks: UInt64

  init(
    store: any ByteStore, base: (any ByteStore)?, header: VhdHeader, writable: Bool,
    piece: UInt64 = largestPiece
  ) throws(ImageError) {
    self.store = store
    self.header = header
    isWritable = writable
    cache = MetadataCache(store)
    let mixed = VhdMixedBlocks(store, base, header)
    let blockSize =
      header.kind == .differencing
      ? min(header.tableBlock, piece) : UInt64(header.blockSize)
    self.blockSize = UInt32(blockSize)
    pieces = header.kind == .fixed ? 1 : header.tableBlock / blockSize
    self.base = BaseView(base, blockSize: blockSize, store: store, own: [mixed])
    pending = PendingPlacements(blocksPerGroup: pieces, blockSize: blockSize)
    surveyedEnd = try Self.surveyBlocks(store, header)
    end = surveyedEnd
    if writable, !store.isFixedSize, header.kind != .fixed, store.size >= VhdHeader.footerSize,
      let last = try VhdHeader.endFooter(of: store), VhdHeader.isFooter(last)
    {
      // What stands between the last block and the footer may be somebody's.
      end = max(end, (store.size - VhdHeader.footerSize + 511) / 512 * 512)
    }
    let bytes = try io { () throws(IOError) in try store.allocatedBytes() }
    durableBlocks = bytes / blockSize
  }

  /// Length of the disk in bytes.
  package var size: UInt64 { header.size }
  /// Bytes of a block of the disk; over a base not those of the table's blocks.
  package let blockSize: UInt32
  /// See `ImageFormat`.
  package var devices: [any ByteStore]? { base.devices }
  /// A fixed one; the footer behind its disk is not written.
  package var isFixed: Bool { header.kind == .fixed }
  /// Estimated from the space that the image takes, save for a fixed one.
  package var allocatedBlocks: UInt64 {
    let all = (size + UInt64(blockSize) - 1) / UInt64(blockSize)
    return isFixed ? all : min(all, durableBlocks + pending.placed)
  }

  /// Looks at the whole table.
  ///
  /// - Returns: where everything that the image names ends.
  /// - Throws: `corrupt` for a block over a structure or another block, or past the end of the
  ///   file; `io`.
  static func surveyBlocks(
    _ store: any ByteStore, _ header: VhdHeader
  ) throws(ImageError) -> UInt64 {
    guard header.kind != .fixed else { return header.size }
    let fileSize = store.size
    func refuse(_ block: UInt64, _ words: String) -> ImageError {
      ImageError(.corrupt, "store \(store.name): block \(block) \(words)")
    }
    let structures = header.structures
    let stride = header.bitmapSize + header.tableBlock
    // Sectors fit 32 bits, blocks 24: sixteen million of them take 128 MiB.
    var places: [UInt64] = []
    try header.forEachBlock(of: store) { block, offset throws(ImageError) in
      let range = offset..<(offset + stride)
      if let hit = structures.first(where: { $0.range.overlaps(range) }) {
        throw refuse(block, "lies over \(hit.name), at byte \(offset): restore it from a backup")
      }
      // The disk may end within its last block, and the file there.
      let used = min(header.tableBlock, header.size - min(header.size, block * header.tableBlock))
      guard used == 0 || offset + header.bitmapSize + used <= fileSize else {
        throw refuse(
          block,
          "lies at byte \(offset), and the file has \(fileSize) bytes: it has been cut short: "
            + "copy it again or restore it from a backup")
      }
      places.append((offset / 512) << 24 | block)
    }
    places.sort()
    for (one, next) in zip(places, places.dropFirst())
    where (next >> 24) * 512 < (one >> 24) * 512 + stride {
      let block = one & 0xFF_FFFF
      throw refuse(next & 0xFF_FFFF, "lies over block \(block): restore it from a backup")
    }
    return max(header.structuresEnd, places.last.map { ($0 >> 24) * 512 + stride } ?? 0)
  }

  /// Where the bitmap of a block of the table begins, by the table; nil when it has no place.
  func place(of entry: UInt64) throws(ImageError) -> UInt64? {
    let sector = try cache.big(UInt32.self, at: header.tableOffset + entry * 4)
    return sector == VhdHeader.unused ? nil : UInt64(sector) * 512
  }

  private enum Bits { case none, some, all }

  /// A sector of a bitmap by its number, as it was read last.
  private typealias BitmapSector = (index: UInt64, bytes: [UInt8])

  /// The bits of a block of the disk, in the bitmap at a byte of the store.
  private func bits(
    of block: UInt64, at offset: UInt64, _ sector: inout BitmapSector
  ) throws(ImageError) -> Bits {
    // A block has at least eight sectors.
    let count = UInt64(blockSize) / 512 / 8
    let first = block % pieces * count
    var found: UInt8?
    for byte in first..<(first + count) {
      let index = (offset + byte) / 512
      if sector.index != index { sector = (index, try cache.sector(index)) }
      let bits = sector.bytes[Int(byte % 512)]
      guard bits == 0 || bits == 0xFF, bits == found ?? bits else { return .some }
      found = bits
    }
    return found == 0xFF ? .all : Bits.none
  }

  /// The longest run from a block on that is mapped alike, within one block of the table.
  func run(_ block: UInt64, _ limit: UInt64) throws(ImageError) -> Extent {
    if header.kind == .fixed {
      let place = Place.device(0, sector: block * UInt64(blockSize) / 512)
      return Extent(BlockRange(block, limit), place, writable: isWritable)
    }
    let (run, next) = pending.find(block)
    if let run {
      let place = Place.device(0, sector: pending.offset(of: block, in: run) / 512)
      let count = min(limit, run.blocks.end - block)
      return Extent(BlockRange(block, count), place, writable: isWritable, mark: run.mark)
    }
    let end = min(block + limit, block / pieces * pieces + pieces, next ?? .max)
    guard let offset = try place(of: block / pieces) else { return try below(block, end) }
    var sector: BitmapSector = (.max, [])
    let state = try bits(of: block, at: offset, &sector)
    var stop = block + 1
    while stop < end, try bits(of: stop, at: offset, &sector) == state { stop += 1 }
    switch state {
    case .all:
      let place = Place.device(0, sector: (offset + header.bitmapSize + ahead(of: block)) / 512)
      return Extent(BlockRange(block, stop - block), place, writable: isWritable)
    case .some:
      let place = Place.device(Self.mixedDevice, sector: block * UInt64(blockSize) / 512)
      return Extent(BlockRange(block, stop - block), place, writable: false)
    case .none: return try below(block, stop)
    }
  }

  private func below(_ block: UInt64, _ end: UInt64) throws(ImageError) -> Extent {
    let (place, count) = try base.run(from: block, limit: end - block)
    return Extent(BlockRange(block, count), place, writable: false)
  }

  /// Bytes of its block of the table that lie before a block.
  private func ahead(of block: UInt64) -> UInt64 { block % pieces * UInt64(blockSize) }

  func assign(_ range: BlockRange) throws(ImageError) -> Extent {
    let entry = range.first / pieces
    let start: UInt64
    if let own = try place(of: entry) {
      start = own + header.bitmapSize
    } else if let new = newPlaces[entry] {
      start = new
    } else {
      start = try newPlace()
      newPlaces[entry] = start
    }
    let offset = start + ahead(of: range.first)
    let mark = pending.place(range, at: offset)
    return Extent(range, .device(0, sector: offset / 512), writable: true, mark: mark)
  }

  /// A pool has so many blocks at most: what of it is not used is lost with the worker.
  private static let pooledBlocks: UInt64 = 8

  /// Behind everything, as every block. None over a base, where blocks of the disk are pieces of the
  /// table's and go where those are.
  func takeRoom(_ wanted: UInt64) throws(ImageError) -> PoolRoom? {
    guard header.kind == .dynamic else { return nil }
    let count = min(wanted, Self.pooledBlocks)
    return PoolRoom(first: try newPlace(count: count), stride: stride, count: count)
  }

  /// A block may have had a place before, with no bit set: it has another one then.
  func placed(_ block: UInt64, at offset: UInt64) { newPlaces[block] = offset }

  /// From the data of one new block to that of the next.
  private var stride: UInt64 { (header.tableBlock + header.bitmapSize + 4095) / 4096 * 4096 }

  /// Room for blocks in a row behind everything; the first byte of the first one's data.
  func newPlace(count: UInt64 = 1) throws(ImageError) -> UInt64 {
    let length = (count - 1) * stride + header.tableBlock
    // The data, not the bitmap, shall begin at a page.
    var start = (end + header.bitmapSize + 4095) / 4096 * 4096
    if let footer = inFlight?.footer, start + length > footer,
      start - header.bitmapSize < footer + VhdHeader.footerSize
    {
      // A plan that is being run writes that sector.
      start = (footer + VhdHeader.footerSize + header.bitmapSize + 4095) / 4096 * 4096
    }
    let stop = start + length
    guard stop / 512 < UInt64(VhdHeader.unused) else {
      throw ImageError(
        .io, "\(store.name): the image can grow no further",
        cause: IOError(ENOSPC, "place", store.name))
    }
    if store.isFixedSize || store.size < stop + VhdHeader.footerSize {
      try io { () throws(IOError) in try store.resize(to: stop + VhdHeader.footerSize) }
    }
    if footerPlace != footerOffset { footerPlace = nil }
    if let footer = footerPlace, footer < stop { footerPlace = nil }
    end = stop
    return start
  }

  /// Where the footer at the end belongs.
  var footerOffset: UInt64 { max(end, (store.size - VhdHeader.footerSize) / 512 * 512) }

  /// What makes every placement up to a mark durable; see the head of this file.
  package func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan {
    let groups = pending.runs(upTo: mark)
    guard !groups.isEmpty else { return CommitPlan(upTo: mark, stages: []) }
    var draft = CommitDraft(cache, clusterSize: 512)
    var first: [CommitPlan.Write] = []
    var named: [(entry: UInt64, start: UInt64)] = []
    var bitmaps: [Range<UInt64>] = []
    for (entry, runs) in groups {
      first += runs.flatMap { tail(of: $0.blocks, at: $0.offset) }
      if newPlaces[entry] == nil, let own = try place(of: entry) {
        for run in runs { try set(run.blocks, at: own, in: &draft) }
        continue
      }
      // What stands there is nothing, so that it needs no pins: before the table names it, what is
      // pending is all that it has.
      let start = runs[0].offset - ahead(of: runs[0].blocks.first) - header.bitmapSize
      var bytes = [UInt8](repeating: 0, count: Int(header.bitmapSize))
      for run in runs {
        let own = bits(of: run.blocks)
        // Of a block of the disk's own all bits are set, those with it that stand for nothing.
        let range = pieces == 1 ? bytes.indices : Int(own.lowerBound)..<Int(own.upperBound)
        for byte in range { bytes[byte] = 0xFF }
      }
      first.append(CommitPlan.Write(offset: start, bytes: bytes))
      bitmaps.append(start..<(start + header.bitmapSize))
      named.append((entry, start))
    }
    let place = footerOffset
    if footerPlace != place { try draft.put(sectors: header.footer, at: place) }
    draft.seal()
    first += draft.stages.flatMap { $0 }
    let sealed = draft.stages.count
    for (entry, start) in named {
      try draft.putBig(UInt32(start / 512), at: header.tableOffset + entry * 4)
    }
    draft.seal()
    inFlight = Flight(
      mark: mark, draft: draft, named: named.map(\.entry), bitmaps: bitmaps,
      footer: footerPlace == place ? nil : place)
    return CommitPlan(upTo: mark, stages: [first] + draft.stages.dropFirst(sealed))
  }

  /// The bytes of its bitmap that stand for blocks of one block of the table.
  private func bits(of blocks: BlockRange) -> Range<UInt64> {
    let (first, count) = (ahead(of: blocks.first), blocks.count * UInt64(blockSize))
    return (first / 4096)..<((first + count) / 4096)
  }

  /// Sets the bits of blocks in the bitmap at a byte of the store.
  private func set(
    _ blocks: BlockRange, at offset: UInt64, in draft: inout CommitDraft
  ) throws(ImageError) {
    let range = bits(of: blocks)
    var byte = range.lowerBound
    while byte < range.upperBound {
      let end = min(range.upperBound, (byte / 512 + 1) * 512)
      let count = Int(end - byte)
      try draft.change(at: offset + byte) { sector, start in
        for at in start..<(start + count) { sector[at] = 0xFF }
      }
      byte = end
    }
  }

  /// The plan up to this mark has run.
  package func committed(upTo mark: Mark) {
    guard let plan = inFlight, plan.mark == mark else { return }
    inFlight = nil
    if let footer = plan.footer, footer == footerOffset { footerPlace = footer }
    cache.unpin(sectors: plan.draft.sectors.keys, fresh: plan.draft.fresh, size: 512)
    for range in plan.bitmaps { cache.drop(from: range.lowerBound, to: range.upperBound) }
    for entry in plan.named { newPlaces[entry] = nil }
    pending.commit(upTo: mark)
  }

  /// A placement that came to nothing: its space is lost until the image is opened again.
  package func abandon(_ mark: Mark) { pending.remove { $0.mark == mark } }

  /// Takes over the uncommitted placements of a former worker. Throws `badRequest` for one
  /// that this format cannot have made; the image must then not be used.
  package func restore(_ extents: [Extent]) throws(ImageError) {
    try checkWritable()
    for extent in extents {
      let blocks = extent.blocks
      let none = ImageError(
        .badRequest, "an uncommitted placement of block \(blocks.first) is not one")
      try checkBounds(blocks)
      guard header.kind != .fixed, blocks.first / pieces == (blocks.end - 1) / pieces,
        extent.writable, extent.mark > pending.lastMark, case .device(0, let sector) = extent.place,
        sector < 1 << 41
      else { throw none }
      try restore(blocks, at: sector * 512)
      let run = Run(blocks: blocks, offset: sector * 512, mark: extent.mark)
      guard pending.insert(run) else { throw none }
    }
    let starts = newPlaces.values.sorted()
    for (one, next) in zip(starts, starts.dropFirst())
    where next < one + header.tableBlock + header.bitmapSize {
      throw ImageError(.badRequest, "an uncommitted placement at sector \(next / 512)")
    }
  }

  /// Sees to it that a block of the table has its place where one of its blocks has.
  private func restore(_ blocks: BlockRange, at offset: UInt64) throws(ImageError) {
    let entry = blocks.first / pieces
    let refusal = ImageError(.badRequest, "an uncommitted placement at sector \(offset / 512)")
    guard offset >= ahead(of: blocks.first) + header.bitmapSize else { throw refusal }
    let start = offset - ahead(of: blocks.first)
    if let own = try place(of: entry), start == own + header.bitmapSize || pieces > 1 {
      guard start == own + header.bitmapSize else { throw refusal }
    } else if let new = newPlaces[entry] {
      guard start == new else { throw refusal }
    } else {
      guard start % 4096 == 0, start - header.bitmapSize >= surveyedEnd else { throw refusal }
      newPlaces[entry] = start
      end = max(end, start + header.tableBlock)
      footerPlace = nil
    }
  }
}

/// The disk as far as its durable table and bitmaps say, sector by sector: for blocks of which
/// some sectors are the image's own and some the base's. Without state, so safe anywhere.
final class VhdMixedBlocks: ReadOnlyStore {
  private let store: any ByteStore
  private let base: (any ByteStore)?
  private let header: VhdHeader
  let name: String
  let size: UInt64
  let isMade = true

  init(_ store: any ByteStore, _ base: (any ByteStore)?, _ header: VhdHeader) {
    self.store = store
    self.base = base
    self.header = header
    name = store.name
    size = header.size
  }

  /// Fills the buffer from any byte on.
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    var done = 0
    while done < buffer.count {
      let position = offset + UInt64(done)
      let left = header.tableBlock - position % header.tableBlock
      let count = Int(min(UInt64(buffer.count - done), left))
      try read(
        within: UnsafeMutableRawBufferPointer(rebasing: buffer[done..<(done + count)]), position)
      done += count
    }
  }

  /// Reads bytes of one block, in runs that lie on one side.
  private func read(
    within buffer: UnsafeMutableRawBufferPointer, _ position: UInt64
  ) throws(IOError) {
    let index = position / header.tableBlock
    let entry = try store.read(at: header.tableOffset + index * 4, count: 4).big(UInt32.self, at: 0)
    let place = UInt64(entry) * 512
    let ahead = position % header.tableBlock
    let first = ahead / 512
    let end = (ahead + UInt64(buffer.count) + 511) / 512
    let isNone = entry == VhdHeader.unused
    let bytes = Int((end + 7) / 8 - first / 8)
    let bits = try isNone ? [] : store.read(at: place + first / 8, count: bytes)
    func isOwn(_ sector: UInt64) -> Bool {
      !isNone && bits[Int(sector / 8 - first / 8)] >> UInt8(7 - sector % 8) & 1 == 1
    }
    var sector = first
    while sector < end {
      let start = sector
      let own = isOwn(start)
      while sector < end, isOwn(sector) == own { sector += 1 }
      // The first sector and the last one may be asked for in part.
      let from = Int(max(start * 512, ahead) - ahead)
      let part = UnsafeMutableRawBufferPointer(
        rebasing: buffer[from..<min(buffer.count, Int(sector * 512 - ahead))])
      if own {
        try store.read(part, at: place + header.bitmapSize + ahead + UInt64(from))
      } else if let base {
        try base.read(part, at: position + UInt64(from))
      } else {
        part.initializeMemory(as: UInt8.self, repeating: 0)
      }
    }
  }
}
