// SPDX-License-Identifier: Apache-2.0
// Where the blocks of a VHD disk live, and what a commit writes.
//
// A block that has a place is preceded there by a bitmap of its sectors, the first sector in
// the highest bit. A block whose bits are all set is mapped to its place; one with none set is
// in the base; one with some ("mixed", as blktap leaves them) is read through user space, and
// made whole at its own place by the first write.
//
// Commit: 1. the bitmaps of the blocks, all set, zeroes for what of the last block lies past the
// disk's end, and the footer at the new end; 2. entries of
// the table for blocks that had no place. The copy of the footer at the start always holds.
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
package final class Vhd: RunImage {
  /// The device number of the store, of the base, and of the mixed blocks.
  private static let mixedDevice: UInt16 = 2
  static let blocksPerFind: UInt64 = 4096
  private typealias Run = PendingPlacements.Run

  /// The header, as it is now.
  package internal(set) var header: VhdHeader
  let store: any ByteStore
  private let base: BaseView
  let cache: MetadataCache
  let isWritable: Bool
  private(set) var pending: PendingPlacements
  private var inFlight: (mark: Mark, draft: CommitDraft, runs: [Run], footer: UInt64?)?
  /// Where everything ended that the image named when it was opened.
  private let surveyedEnd: UInt64
  /// Where the next block may go.
  var end: UInt64
  /// Where a footer is known to stand; nil when there may be none, or an old one.
  var footerPlace: UInt64?
  private let durableBlocks: UInt64

  init(
    store: any ByteStore, base: (any ByteStore)?, header: VhdHeader, writable: Bool
  ) throws(ImageError) {
    self.store = store
    self.header = header
    isWritable = writable
    cache = MetadataCache(store)
    let mixed = VhdMixedBlocks(store, base, header)
    self.base = BaseView(
      base, blockSize: UInt64(header.blockSize), store: store, own: [mixed])
    pending = PendingPlacements(blocksPerGroup: 1024, blockSize: UInt64(header.blockSize))
    surveyedEnd = try Self.surveyBlocks(store, header)
    end = surveyedEnd
    if writable, !store.isFixedSize, header.kind != .fixed, store.size >= VhdHeader.footerSize,
      let last = try VhdHeader.endFooter(of: store), VhdHeader.isFooter(last)
    {
      // What stands between the last block and the footer may be somebody's.
      end = max(end, (store.size - VhdHeader.footerSize + 511) / 512 * 512)
    }
    let bytes = try io { () throws(IOError) in try store.allocatedBytes() }
    durableBlocks = bytes / UInt64(header.blockSize)
  }

  /// Length of the disk in bytes.
  package var size: UInt64 { header.size }
  /// Bytes of a block.
  package var blockSize: UInt32 { header.blockSize }
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

  /// Where a block's bitmap begins, by the table; nil when it has no place.
  func place(of block: UInt64) throws(ImageError) -> UInt64? {
    let entry = try cache.big(UInt32.self, at: header.tableOffset + block * 4)
    return entry == VhdHeader.unused ? nil : UInt64(entry) * 512
  }

  private enum Bits { case none, some, all }

  private func bits(at offset: UInt64) throws(ImageError) -> Bits {
    let sectors = Int(header.tableBlock / 512)
    var first: UInt8?
    for start in stride(from: 0, to: (sectors + 7) / 8, by: 512) {
      let bytes = try cache.sector(offset / 512 + UInt64(start) / 512)
      for byte in bytes[..<min(512, sectors / 8 - start)] {
        if byte != 0, byte != 0xFF { return .some }
        if let first, first != byte { return .some }
        first = byte
      }
    }
    return first == 0xFF ? .all : Bits.none
  }

  /// The longest run from a block on that is mapped alike.
  func run(_ block: UInt64, _ limit: UInt64) throws(ImageError) -> Extent {
    if header.kind == .fixed {
      let place = Place.device(0, sector: block * UInt64(blockSize) / 512)
      return Extent(BlockRange(block, limit), place, writable: isWritable)
    }
    if let run = pending.find(block).run {
      let place = Place.device(0, sector: run.offset / 512)
      return Extent(BlockRange(block), place, writable: isWritable, mark: run.mark)
    }
    if let offset = try place(of: block) {
      switch try bits(at: offset) {
      case .all:
        let place = Place.device(0, sector: (offset + header.bitmapSize) / 512)
        return Extent(BlockRange(block), place, writable: isWritable)
      case .some:
        let place = Place.device(
          Self.mixedDevice, sector: block * UInt64(blockSize) / 512)
        return Extent(BlockRange(block), place, writable: false)
      case .none: break
      }
    }
    let (place, _) = try base.run(from: block, limit: 1)
    return Extent(BlockRange(block), place, writable: false)
  }

  func assign(_ range: BlockRange) throws(ImageError) -> Extent {
    let block = range.first
    let offset: UInt64
    if let own = try place(of: block) {
      offset = own + header.bitmapSize
    } else {
      offset = try newPlace()
    }
    let mark = pending.place(BlockRange(block), at: offset)
    return Extent(
      BlockRange(block), .device(0, sector: offset / 512), writable: true, mark: mark)
  }

  /// Room for a block behind everything; the first byte of its data.
  func newPlace() throws(ImageError) -> UInt64 {
    // The data, not the bitmap, shall begin at a page.
    var start = (end + header.bitmapSize + 4095) / 4096 * 4096
    if let footer = inFlight?.footer, start + UInt64(blockSize) > footer,
      start - header.bitmapSize < footer + VhdHeader.footerSize
    {
      // A plan that is being run writes that sector.
      start = (footer + VhdHeader.footerSize + header.bitmapSize + 4095) / 4096 * 4096
    }
    let stop = start + UInt64(blockSize)
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
    let runs = groups.flatMap(\.runs)
    // One array for all of them: a block of 256 MiB has a bitmap of 64 KiB. They need no pins,
    // since what is pending is looked at before the bitmaps.
    let ones = [UInt8](repeating: 0xFF, count: Int(header.bitmapSize))
    let bitmaps =
      runs.map { CommitPlan.Write(offset: $0.offset - header.bitmapSize, bytes: ones) }
      + runs.flatMap { tail(of: $0.blocks, at: $0.offset) }
    let place = footerOffset
    if footerPlace != place { try draft.put(sectors: header.footer, at: place) }
    draft.seal()
    let footer = draft.stages.flatMap { $0 }
    for run in runs {
      let start = run.offset - header.bitmapSize
      let entry = header.tableOffset + run.blocks.first * 4
      try draft.putBig(UInt32(start / 512), at: entry)
    }
    draft.seal()
    inFlight = (mark, draft, runs, footerPlace == place ? nil : place)
    let entries = draft.stages.dropFirst(footer.isEmpty ? 0 : 1)
    return CommitPlan(upTo: mark, stages: [bitmaps + footer] + entries)
  }

  /// The plan up to this mark has run.
  package func committed(upTo mark: Mark) {
    guard let plan = inFlight, plan.mark == mark else { return }
    inFlight = nil
    if let footer = plan.footer, footer == footerOffset { footerPlace = footer }
    cache.unpin(sectors: plan.draft.sectors.keys, fresh: plan.draft.fresh, size: 512)
    for run in plan.runs {
      cache.drop(from: run.offset - header.bitmapSize, to: run.offset)
    }
    pending.commit(upTo: mark)
  }

  /// A placement that came to nothing: its space is lost until the image is opened again.
  package func abandon(_ mark: Mark) { pending.remove { $0.mark == mark } }

  /// Takes over the uncommitted placements of a former worker. Throws `badRequest` for one
  /// that this format cannot have made; the image must then not be used.
  package func restore(_ extents: [Extent]) throws(ImageError) {
    try checkWritable()
    for extent in extents {
      try checkBounds(extent.blocks)
      let block = extent.blocks.first
      guard header.kind != .fixed, extent.blocks.count == 1, extent.writable,
        extent.mark > pending.lastMark, case .device(0, let sector) = extent.place,
        sector < 1 << 41,
        pending.find(block).run == nil
      else {
        throw ImageError(.badRequest, "an uncommitted placement of block \(block) is not one")
      }
      let own = try place(of: block)
      let expected = own.map { $0 + header.bitmapSize }
      guard expected == sector * 512 || (own == nil && sector % 8 == 0) else {
        throw ImageError(.badRequest, "an uncommitted placement at sector \(sector)")
      }
      if own == nil {
        let start = sector * 512 - min(sector * 512, header.bitmapSize)
        guard start >= surveyedEnd else {
          throw ImageError(.badRequest, "an uncommitted placement at sector \(sector)")
        }
        end = max(end, sector * 512 + UInt64(blockSize))
        footerPlace = nil
      }
      pending.insert(
        PendingPlacements.Run(
          blocks: extent.blocks, offset: sector * 512, mark: extent.mark))
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
