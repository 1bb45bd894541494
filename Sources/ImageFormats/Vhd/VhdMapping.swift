// Where the blocks of a VHD disk live, and what a commit writes.
//
// A block that has a place is preceded there by a bitmap of its sectors, the first sector in
// the highest bit. A block whose bits are all set is mapped to its place; one with none set is
// in the base; one with some ("mixed", as blktap leaves them) is read through user space, and
// made whole at its own place by the first write.
//
// Commit: 1. the bitmaps of the blocks, all set, and the footer at the new end; 2. entries of
// the table for blocks that had no place. The copy of the footer at the start always holds.
//
// Invariants: new blocks go to the end, their data at a multiple of 4096; the file is long
// enough for every block that was placed, and for the footer.

public import Posix

/// A VHD image that is open as a disk. Used from one thread; its plans run on any.
public final class Vhd: ImageFormat {
  /// The device number of the store, of the base, and of the mixed blocks.
  private static let mixedDevice: UInt16 = 2
  private static let blocksPerFind: UInt64 = 4096

  /// The header, as it is now.
  public internal(set) var header: VhdHeader
  let store: any ByteStore
  private let base: BaseView
  let cache: MetadataCache
  let isWritable: Bool
  private(set) var pending: PendingPlacements
  private var inFlight: (mark: Mark, draft: CommitDraft, newEnd: UInt64)?
  private var lastMark: Mark = 0
  /// Where the last block ends; nil until it is needed.
  var end: UInt64?
  /// Blocks from here on in the store had no place when the last plan ran.
  private var firstNew: UInt64 = 0
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
    let bytes = try io { () throws(IOError) in try store.allocatedBytes() }
    let blocks = (header.size + UInt64(header.blockSize) - 1) / UInt64(header.blockSize)
    durableBlocks = header.kind == .fixed ? blocks : min(blocks, bytes / UInt64(header.blockSize))
  }

  /// Length of the disk in bytes.
  public var size: UInt64 { header.size }
  /// Bytes of a block.
  public var blockSize: UInt32 { header.blockSize }
  /// See `ImageFormat`.
  public var devices: [any ByteStore]? { base.devices }
  /// A fixed one; the footer behind its disk is not written.
  public var isFixed: Bool { header.kind == .fixed }
  /// Estimated from the space that the image takes, save for a fixed one.
  public var allocatedBlocks: UInt64 { durableBlocks + pending.blocks }

  private func checkWritable() throws(ImageError) {
    guard isWritable else {
      throw ImageError(.badRequest, "\(store.name) is open for reading only")
    }
  }

  /// Where a block's bitmap begins, by the table; nil when it has no place.
  func place(of block: UInt64) throws(ImageError) -> UInt64? {
    let entry = try cache.big(UInt32.self, at: header.tableOffset + block * 4)
    guard entry != VhdHeader.unused else { return nil }
    let offset = UInt64(entry) * 512
    guard offset >= 512 else {
      throw ImageError(.corrupt, "\(store.name): block \(block) lies over the header")
    }
    return offset
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
  private func run(_ block: UInt64, _ limit: UInt64) throws(ImageError) -> Extent {
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

  /// Where a block lives for reading; see `ImageFormat`.
  public func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    try merged(block, limit: limit, most: Self.blocksPerFind, run)
  }

  /// A place for a first write, of one block; see `ImageFormat`.
  public func place(_ range: BlockRange, whole: Bool) throws(ImageError) -> Placement {
    try checkWritable()
    try checkBounds(range)
    return try placement(of: try run(range.first, range.count), whole: whole, assign)
  }

  /// A discard; see `ImageFormat`. What is here is zeroed and keeps its place.
  public func discard(
    _ range: BlockRange, zeroing: Bool
  ) throws(ImageError) -> DiscardAnswer {
    try checkWritable()
    try checkBounds(range)
    return try discardAnswer(of: try run(range.first, range.count), zeroing: zeroing, assign)
  }

  private func assign(_ range: BlockRange) throws(ImageError) -> Extent {
    let block = range.first
    let offset: UInt64
    if let own = try place(of: block) {
      offset = own + header.bitmapSize
    } else {
      // The data, not the bitmap, shall begin at a page.
      let start = (try findEnd() + header.bitmapSize + 4095) / 4096 * 4096
      let stop = start + UInt64(blockSize)
      guard stop / 512 < UInt64(VhdHeader.unused) else {
        throw ImageError(
          .io, "\(store.name): the image can grow no further",
          cause: IOError(28, "place", store.name))
      }
      if store.size < stop + VhdHeader.footerSize {
        try io { () throws(IOError) in try store.resize(to: stop + VhdHeader.footerSize) }
      }
      end = stop
      offset = start
    }
    lastMark += 1
    pending.insert(
      PendingPlacements.Run(blocks: BlockRange(block), offset: offset, mark: lastMark))
    return Extent(
      BlockRange(block), .device(0, sector: offset / 512), writable: true, mark: lastMark)
  }

  /// Where the last block of the table ends, or the table and its header where there is none.
  func findEnd() throws(ImageError) -> UInt64 {
    if let end { return end }
    var found = max(
      header.tableOffset + UInt64(header.tableEntries) * 4, header.headerOffset + 1024,
      VhdHeader.locatorOffset + 512)
    for block in 0..<UInt64(header.tableEntries) {
      guard let offset = try place(of: block) else { continue }
      found = max(found, offset + header.bitmapSize + header.tableBlock)
    }
    end = found
    return found
  }

  /// What makes every placement up to a mark durable; see the head of this file.
  public func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan {
    let groups = pending.runs(upTo: mark)
    guard !groups.isEmpty else { return CommitPlan(upTo: mark, stages: []) }
    var draft = CommitDraft(cache, clusterSize: 512)
    let ones = [UInt8](repeating: 0xFF, count: Int(header.bitmapSize))
    let runs = groups.flatMap(\.runs)
    for run in runs { try draft.put(sectors: ones, at: run.offset - header.bitmapSize) }
    var footerEnd: UInt64 = 0
    if runs.contains(where: { $0.offset >= firstNew }) {
      let footer = max(try findEnd(), (store.size - 512) / 512 * 512)
      try draft.put(sectors: header.footer, at: footer)
      // Blocks that are placed while the plan runs must not share its sector.
      footerEnd = footer + VhdHeader.footerSize
      end = footerEnd
    }
    draft.seal()
    for run in runs {
      let start = run.offset - header.bitmapSize
      let entry = header.tableOffset + run.blocks.first * 4
      try draft.putBig(UInt32(start / 512), at: entry)
    }
    draft.seal()
    inFlight = (mark, draft, footerEnd)
    return CommitPlan(upTo: mark, stages: draft.stages)
  }

  /// The plan up to this mark has run.
  public func committed(upTo mark: Mark) {
    guard let plan = inFlight, plan.mark == mark else { return }
    inFlight = nil
    firstNew = max(firstNew, plan.newEnd)
    cache.unpin(sectors: plan.draft.sectors.keys, fresh: plan.draft.fresh, size: 512)
    pending.remove { $0.mark <= mark }
  }

  /// A placement that came to nothing: its space is lost until the image is opened again.
  public func abandon(_ mark: Mark) { pending.remove { $0.mark == mark } }

  /// Takes over the uncommitted placements of a former worker. Throws `badRequest` for one
  /// that this format cannot have made; the image must then not be used.
  public func restore(_ extents: [Extent]) throws(ImageError) {
    try checkWritable()
    for extent in extents {
      try checkBounds(extent.blocks)
      let block = extent.blocks.first
      guard header.kind != .fixed, extent.blocks.count == 1, extent.writable,
        extent.mark > lastMark, case .device(0, let sector) = extent.place, sector < 1 << 41,
        pending.find(block).run == nil
      else {
        throw ImageError(.badRequest, "an uncommitted placement of block \(block) is not one")
      }
      let own = try place(of: block)
      let expected = own.map { $0 + header.bitmapSize }
      guard expected == sector * 512 || (own == nil && sector % 8 == 0) else {
        throw ImageError(.badRequest, "an uncommitted placement at sector \(sector)")
      }
      if own == nil { end = max(try findEnd(), sector * 512 + UInt64(blockSize)) }
      pending.insert(
        PendingPlacements.Run(
          blocks: extent.blocks, offset: sector * 512, mark: extent.mark))
      lastMark = extent.mark
    }
  }
}

/// The disk as far as its durable table and bitmaps say, sector by sector: for blocks of which
/// some sectors are the image's own and some the base's. Without state, so safe anywhere.
final class VhdMixedBlocks: ByteStore {
  private let store: any ByteStore
  private let base: (any ByteStore)?
  private let header: VhdHeader
  let name: String
  let size: UInt64
  let isWritable = false

  init(_ store: any ByteStore, _ base: (any ByteStore)?, _ header: VhdHeader) {
    self.store = store
    self.base = base
    self.header = header
    name = store.name
    size = header.size
  }

  /// Nothing that anybody could know again.
  func identity() -> StoreIdentity { StoreIdentity(size: size, modified: 0) }
  /// None of its own.
  func allocatedBytes() -> UInt64 { 0 }

  /// Reads whole sectors.
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    let block = header.tableBlock
    for start in stride(from: 0, to: buffer.count, by: 512) {
      let position = offset + UInt64(start)
      let piece = UnsafeMutableRawBufferPointer(
        rebasing: buffer[start..<min(start + 512, buffer.count)])
      let entry = try store.read(at: header.tableOffset + position / block * 4, count: 4)
        .big(UInt32.self, at: 0)
      let place = UInt64(entry) * 512
      let sector = position % block / 512
      var isOwn = false
      if entry != VhdHeader.unused {
        let byte = try store.read(at: place + sector / 8, count: 1)[0]
        isOwn = byte >> UInt8(7 - sector % 8) & 1 == 1
      }
      if isOwn {
        try store.read(piece, at: place + header.bitmapSize + position % block)
      } else if let base {
        try base.read(piece, at: position)
      } else {
        piece.initializeMemory(as: UInt8.self, repeating: 0)
      }
    }
  }

  /// Throws EBADF.
  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    throw IOError(9, "write", name)
  }
  /// Throws EBADF.
  func zero(at offset: UInt64, count: UInt64) throws(IOError) { throw IOError(9, "zero", name) }
  /// Throws EBADF.
  func resize(to size: UInt64) throws(IOError) { throw IOError(9, "resize", name) }
  /// There is nothing to flush.
  func flush() {}
}
