// SPDX-License-Identifier: Apache-2.0
// Where the blocks of a VMDK disk live, and what a commit writes.
//
// The disk is its extents in a row. A flat extent is its own bytes. A sparse one has
// directories of tables of grains; new grains go to the end of its file. With one sparse
// extent device 0 is its file; with several it is all of their files as one range of bytes.
//
// Commit: zeroes for what of the last grain lies past the disk's end; then 1. grain tables that are new, with their entries; 2. entries of tables that are
// there, in both copies, and of the directories. A power cut leaves at most space that nothing
// names, and copies that differ in what no flush had confirmed.

package import BlockIO
package import DiskModel
import Glibc
import SystemIO

/// A VMDK image that is open as a disk. Used from one thread; its plans run on any.
package final class Vmdk: RunImage, PooledImage {
  static let blocksPerFind: UInt64 = 65536
  private static let groupBlocks: UInt64 = 4096

  /// An extent of the disk.
  struct Piece {
    enum Kind {
      case flat(device: UInt16, sector: UInt64)
      case zero
      case sparse(Int)
    }
    /// Where it lies in the disk, in sectors.
    var sectors: Range<UInt64>
    var kind: Kind
    var isWritable: Bool
  }

  /// A sparse extent.
  struct Sparse {
    let header: VmdkHeader
    let store: any ByteStore
    /// Its first sector in `primary`, where its tables and, unless compressed, grains are.
    let base: UInt64
    /// Where the grains are: device 0, or the one that decompresses.
    let device: UInt16
    /// The byte of its file where the next grain goes.
    var end: UInt64
    /// Bytes that its file has.
    var limit: UInt64
  }

  private struct InFlight {
    var mark: Mark
    var draft: CommitDraft
    var tables: [UInt64] = []
  }

  /// What the image is made of, as it was when it was opened.
  package let layout: VmdkLayout
  /// Length of the disk in bytes.
  package internal(set) var size: UInt64
  /// Bytes of a block: a grain, where writing is possible.
  package let blockSize: UInt32
  let store: any ByteStore
  /// The sparse extents as one store, or the only one.
  let primary: any ByteStore
  let isWritable: Bool
  var pieces: [Piece]
  var sparse: [Sparse]
  let cache: MetadataCache
  private let base: BaseView
  var pending: PendingPlacements
  var pooled = PooledPlaces()
  /// Tables that a commit has to make, kept until a plan with them has run: the place of each
  /// in `primary` by the place of its entry in the directory, in bytes.
  private var planned: [UInt64: UInt64] = [:]
  private var inFlight: InFlight?
  private let durableBytes: UInt64

  init(_ parts: VmdkParts, base: (any ByteStore)?, writable: Bool) throws(ImageError) {
    layout = parts.layout
    store = parts.store
    primary = parts.primary
    isWritable = writable
    size = parts.layout.size
    blockSize = UInt32(parts.blockSectors * 512)
    pieces = parts.pieces
    sparse = parts.sparse
    cache = MetadataCache(parts.primary)
    self.base = BaseView(
      base, blockSize: parts.blockSectors * 512, store: parts.primary, own: parts.own)
    pending = PendingPlacements(
      blocksPerGroup: Self.groupBlocks, blockSize: parts.blockSectors * 512)
    var bytes: UInt64 = 0
    for store in parts.stores {
      bytes += try io { () throws(IOError) in try store.allocatedBytes() }
    }
    durableBytes = bytes
  }

  /// See `ImageFormat`.
  package var devices: [any ByteStore]? { base.devices }
  /// Estimated from the space that the image takes.
  package var allocatedBlocks: UInt64 {
    min(blockCount, durableBytes / UInt64(blockSize) + pending.placed)
  }
  /// A flat one, whose extents begin at pages.
  package var isFixed: Bool {
    sparse.isEmpty
      && pieces.allSatisfy { piece in
        if case .flat(_, let sector) = piece.kind { return sector % 8 == 0 }
        return true
      } && layout.header == nil
  }
  private var blockSectors: UInt64 { UInt64(blockSize) / 512 }

  /// The extent that holds a sector of the disk.
  private func piece(at sector: UInt64) -> Piece {
    var low = 0
    var high = pieces.count - 1
    while low < high {
      let middle = (low + high) / 2
      if pieces[middle].sectors.upperBound <= sector { low = middle + 1 } else { high = middle }
    }
    return pieces[low]
  }

  /// The place of a table in `primary`, in bytes, by its entry's place; nil for none.
  func table(entry: UInt64, _ sparse: Sparse) throws(ImageError) -> UInt64? {
    let sector = try cache.little(UInt32.self, at: entry)
    guard sector != 0 else { return nil }
    let end = UInt64(sector) * 512 + sparse.header.tableEntries * 4
    guard end <= sparse.limit else { throw cut(sparse, "a grain table ends at byte \(end)") }
    return (sparse.base + UInt64(sector)) * 512
  }

  private func cut(_ sparse: Sparse, _ words: String) -> ImageError {
    ImageError(
      .corrupt,
      "store \(sparse.store.name): cut short: it has \(sparse.limit) bytes, and \(words): copy "
        + "it again or restore it from a backup")
  }

  /// The place of a directory's entry for a grain of a sparse extent, in bytes of `primary`.
  func directoryEntry(_ grain: UInt64, _ sparse: Sparse, copy: Bool = false) -> UInt64 {
    let start = copy ? sparse.header.redundantOffset : sparse.header.directoryOffset
    return (sparse.base + start) * 512 + grain / sparse.header.tableEntries * 4
  }

  /// The longest run from a block on that is mapped alike.
  func run(_ block: UInt64, _ limit: UInt64) throws(ImageError) -> Extent {
    let (run, next) = pending.find(block)
    if let run {
      let count = min(limit, run.blocks.end - block)
      let place = Place.device(0, sector: pending.offset(of: block, in: run) / 512)
      return Extent(BlockRange(block, count), place, writable: isWritable, mark: run.mark)
    }
    let sector = block * blockSectors
    let piece = piece(at: sector)
    let left = (piece.sectors.upperBound - sector + blockSectors - 1) / blockSectors
    let count = min(limit, left, next.map { $0 - block } ?? left)
    let local = sector - piece.sectors.lowerBound
    switch piece.kind {
    case .zero: return Extent(BlockRange(block, count), .zero, writable: false)
    case .flat(let device, let start):
      return Extent(
        BlockRange(block, count), .device(device, sector: start + local),
        writable: isWritable && piece.isWritable)
    case .sparse(let index):
      return try self.run(block, count, sparse[index], local, piece.isWritable)
    }
  }

  private func run(
    _ block: UInt64, _ limit: UInt64, _ sparse: Sparse, _ sector: UInt64, _ mayWrite: Bool
  ) throws(ImageError) -> Extent {
    let header = sparse.header
    let grain = sector / header.grain
    let within = sector % header.grain
    let leftInTable = header.tableEntries - grain % header.tableEntries
    var count = min(limit, (leftInTable * header.grain - within) / blockSectors)
    var entry: UInt32 = 0
    if let table = try table(entry: directoryEntry(grain, sparse), sparse) {
      (entry, count) = try entries(
        at: table + grain % header.tableEntries * 4, header, within, limit: count)
    }
    let blocks = BlockRange(block, count)
    if entry == 0 {
      let (place, count) = try base.run(from: block, limit: count)
      return Extent(BlockRange(block, count), place, writable: false)
    }
    if entry == 1, header.hasZeroGrains { return Extent(blocks, .zero, writable: false) }
    guard UInt64(entry) >= header.leastGrain else {
      throw ImageError(.corrupt, "\(store.name): block \(block) at sector \(entry)")
    }
    if header.isCompressed {
      let start = UInt64(entry) * CompressedStore.vmdkStride(header) / 512
      let place = Place.device(sparse.device, sector: start + within)
      return Extent(blocks, place, writable: false)
    }
    // The disk may end within its last grain, and the file there.
    let sectors = min(count * blockSectors, header.capacity - min(header.capacity, sector))
    let end = (UInt64(entry) + within + sectors) * 512
    guard end <= sparse.limit else { throw cut(sparse, "block \(block) ends at byte \(end)") }
    let place = Place.device(sparse.device, sector: sparse.base + UInt64(entry) + within)
    return Extent(blocks, place, writable: isWritable && mayWrite)
  }

  /// An entry of a grain table, and for how many blocks it and those after it say the like.
  private func entries(
    at place: UInt64, _ header: VmdkHeader, _ within: UInt64, limit: UInt64
  ) throws(ImageError) -> (entry: UInt32, count: UInt64) {
    let first = try cache.little(UInt32.self, at: place)
    let perGrain = header.grain / blockSectors
    let isZero = first == 0 || (first == 1 && header.hasZeroGrains)
    var grains: UInt64 = 1
    var count = perGrain - within / blockSectors
    while count < limit, isZero || !header.isCompressed {
      let step = isZero ? 0 : grains * header.grain
      guard UInt64(try cache.little(UInt32.self, at: place + grains * 4)) == UInt64(first) + step
      else { break }
      grains += 1
      count += perGrain
    }
    return (first, min(limit, count))
  }

  /// The sparse extent of a block that may be placed in it, and how many blocks it has left.
  private func target(of block: UInt64) throws(ImageError) -> (index: Int, left: UInt64) {
    let sector = block * blockSectors
    let piece = piece(at: sector)
    guard case .sparse(let index) = piece.kind, piece.isWritable else {
      throw ImageError(
        .io, "\(store.name): the extent of block \(block) is read-only",
        cause: IOError(30, "write", store.name))
    }
    return (index, (piece.sectors.upperBound - sector + blockSectors - 1) / blockSectors)
  }

  /// Room at the end of a sparse extent's file; its first byte there.
  func take(_ bytes: UInt64, in index: Int) throws(ImageError) -> UInt64 {
    let start = sparse[index].end
    guard (start + bytes) / 512 < VmdkHeader.mostSectors else {
      throw ImageError(
        .io, "\(sparse[index].store.name): the extent can grow no further",
        cause: IOError(ENOSPC, "place", store.name))
    }
    let store = sparse[index].store
    try io { () throws(IOError) in try store.resize(to: start + bytes) }
    sparse[index].end = start + bytes
    sparse[index].limit = max(sparse[index].limit, start + bytes)
    return start
  }

  /// A pool has so many grains at most: what of it is not used is lost with the worker.
  private static let pooledGrains: UInt64 = 64

  /// At the end of the file, as every grain; none where the disk is more than one sparse extent.
  func takeRoom(_ wanted: UInt64) throws(ImageError) -> PoolRoom? {
    guard pieces.count == 1, pieces[0].isWritable, case .sparse(let index) = pieces[0].kind else {
      return nil
    }
    let count = min(wanted, Self.pooledGrains)
    let start = try take(count * UInt64(blockSize), in: index)
    return PoolRoom(
      first: sparse[index].base * 512 + start, stride: UInt64(blockSize), count: count)
  }

  func assign(_ range: BlockRange) throws(ImageError) -> Extent {
    let (index, left) = try target(of: range.first)
    let inGroup = Self.groupBlocks - range.first % Self.groupBlocks
    let range = BlockRange(range.first, min(range.count, left, inGroup))
    let start = try take(range.count * UInt64(blockSize), in: index)
    let offset = sparse[index].base * 512 + start
    let mark = pending.place(range, at: offset)
    return Extent(range, .device(0, sector: offset / 512), writable: true, mark: mark)
  }

  // MARK: Commit

  /// What makes every placement up to a mark durable; see the head of this file.
  package func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan {
    let groups = pending.runs(upTo: mark)
    guard !groups.isEmpty else { return CommitPlan(upTo: mark, stages: []) }
    var plan = InFlight(mark: mark, draft: CommitDraft(cache, clusterSize: 512))
    var late: [(offset: UInt64, value: UInt32)] = []
    for run in groups.flatMap(\.runs) {
      for item in 0..<run.blocks.count {
        let place = run.offset + item * UInt64(blockSize)
        try enter(run.blocks.first + item, at: place, in: &plan, &late)
      }
    }
    plan.draft.seal()
    for (offset, value) in late { try plan.draft.putLittle(value, at: offset) }
    plan.draft.seal()
    inFlight = plan
    let tails = groups.flatMap(\.runs).flatMap { tail(of: $0.blocks, at: $0.offset) }
    let first = tails.isEmpty ? [] : [tails]
    return CommitPlan(upTo: mark, stages: first + plan.draft.stages, target: primary)
  }

  /// Enters a block in both copies of its table: at once in new ones, else later.
  private func enter(
    _ block: UInt64, at place: UInt64, in plan: inout InFlight,
    _ late: inout [(offset: UInt64, value: UInt32)]
  ) throws(ImageError) {
    let (index, _) = try target(of: block)
    let header = sparse[index].header
    let first = sparse[index].base
    let value = UInt32(place / 512 - first)
    let grain =
      (block * blockSectors - piece(at: block * blockSectors).sectors.lowerBound)
      / header.grain
    let entry = grain % header.tableEntries * 4
    for copy in header.redundantOffset == 0 ? [false] : [false, true] {
      let directory = directoryEntry(grain, sparse[index], copy: copy)
      if let table = try table(entry: directory, sparse[index]) {
        late.append((table + entry, value))
        continue
      }
      let table = try newTable(directory, index)
      if !plan.tables.contains(directory) {
        plan.tables.append(directory)
        for start in stride(from: table, to: table + header.tableEntries * 4, by: 512) {
          plan.draft.begin(cluster: start)
        }
        late.append((directory, UInt32(table / 512 - first)))
      }
      try plan.draft.putLittle(value, at: table + entry)
    }
  }

  private func newTable(_ directory: UInt64, _ index: Int) throws(ImageError) -> UInt64 {
    if let table = planned[directory] { return table }
    let bytes = (sparse[index].header.tableEntries * 4 + 4095) / 4096 * 4096
    let table = sparse[index].base * 512 + (try take(bytes, in: index))
    planned[directory] = table
    return table
  }

  /// The plan up to this mark has run.
  package func committed(upTo mark: Mark) {
    guard let plan = inFlight, plan.mark == mark else { return }
    inFlight = nil
    cache.unpin(sectors: plan.draft.sectors.keys, fresh: plan.draft.fresh, size: 512)
    for directory in plan.tables { planned[directory] = nil }
    pending.commit(upTo: mark)
  }

  /// A placement that came to nothing: its space stays unused.
  package func abandon(_ mark: Mark) { pending.remove { $0.mark == mark } }

  /// Takes over the uncommitted placements of a former worker. Throws `badRequest` for one
  /// that this format cannot have made; the image must then not be used.
  package func restore(_ extents: [Extent]) throws(ImageError) {
    try checkWritable()
    for extent in extents {
      try checkBounds(extent.blocks)
      let range = extent.blocks
      let (index, left) = try target(of: range.first)
      guard extent.writable, extent.mark > pending.lastMark,
        case .device(0, let sector) = extent.place,
        sector > sparse[index].base, pending.first(in: range) == nil, range.count <= left,
        range.first / Self.groupBlocks == (range.end - 1) / Self.groupBlocks,
        sector - sparse[index].base + range.count * blockSectors < VmdkHeader.mostSectors
      else {
        throw ImageError(.badRequest, "an uncommitted placement of block \(range.first)")
      }
      let start = (sector - sparse[index].base) * 512
      sparse[index].end = max(sparse[index].end, start + range.count * UInt64(blockSize))
      sparse[index].limit = max(sparse[index].limit, sparse[index].store.size)
      pending.insert(
        PendingPlacements.Run(blocks: range, offset: sector * 512, mark: extent.mark))
    }
  }
}
