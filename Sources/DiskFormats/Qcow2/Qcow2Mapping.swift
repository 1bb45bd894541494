// SPDX-License-Identifier: Apache-2.0
// Where the blocks of a qcow2 disk live. What a commit writes is in Qcow2Commit.swift.
//
// A block is a cluster, or a subcluster where the image has them. Devices: 0 the data (the
// store, or the data file), 1 the base, 2 the compressed clusters, then the base's own.
//
// Invariants:
// - A block is pending (placed, uncommitted) or as the durable tables say; pending first.
// - A cluster that is shared with a snapshot, or compressed, is never written: its block gets
//   a new place. With subclusters the rest of such a cluster is copied when the first of its
//   blocks is placed, into space that nothing refers to yet; from then on a cluster has one
//   pending place.
// - Space that a commit frees is given out only after that commit has run.

package import BlockIO
package import DiskModel
import SystemIO

/// A qcow2 image that is open as a disk. Used from one thread; its plans run on any.
package final class Qcow2: StoredImage {
  /// The device number of the data: the store, or the data file.
  package static let dataDevice: UInt16 = 0
  /// The device number of the base as a whole.
  package static let baseDevice: UInt16 = 1
  /// The device number of the compressed clusters.
  package static let compressedDevice: UInt16 = 2
  /// A `find` looks at no more tables.
  private static let tablesPerFind = 16

  /// The header, as it was when the image was opened, save what has been changed since.
  package internal(set) var header: Qcow2Header
  /// Whether placements may be asked for.
  package let isWritable: Bool
  /// Length of the disk in bytes.
  package internal(set) var size: UInt64
  /// Bytes of a block.
  package let blockSize: UInt32

  let store: any ByteStore
  let data: any ByteStore
  let base: BaseView
  let cache: MetadataCache
  let refcounts: Qcow2Refcounts
  let decompressor: CompressedStore
  /// Blocks that one L2 table speaks of.
  let blocksPerTable: UInt64
  /// The L1 table in use: the active one, or a snapshot's.
  var l1: (offset: UInt64, entries: UInt64)
  var pending: PendingPlacements
  var planned = Qcow2Planned()
  var inFlight: Qcow2InFlight?
  var pooled = PooledPlaces()
  let durableBlocks: UInt64
  /// Where the files ended when that was last looked at, rounded up to clusters: tables lie in
  /// the store, blocks in the data. They may end within their last cluster.
  private var tablesEnd: UInt64
  private var dataEnd: UInt64
  /// Blocks of which a write came to nothing after its place got their old bytes, by the byte of
  /// that place: they get them again before their cluster is committed.
  var spoiled: [UInt64: UInt64] = [:]
  /// What of the header every look at a table needs: a copy of all of it costs more than that.
  private let clusterSize: UInt64
  private let l2Entries: UInt64
  /// Whether an entry of 8 bytes says all of a cluster in the image itself.
  private let isPlain: Bool

  /// `snapshot` is one of the image's own, whose disk is then what is open.
  init(
    store: any ByteStore, data: any ByteStore, base: (any ByteStore)?, header: Qcow2Header,
    writable: Bool, snapshot: Qcow2Snapshot? = nil
  ) throws(ImageError) {
    self.store = store
    self.data = data
    self.header = header
    isWritable = writable
    blockSize = header.blockSize
    clusterSize = header.clusterSize
    l2Entries = header.l2Entries
    isPlain = !header.hasSubclusters && !header.hasDataFile
    blocksPerTable = header.l2Entries * header.subclusters
    size = snapshot?.diskSize ?? header.diskSize
    l1 = (
      snapshot?.l1Offset ?? header.l1Offset, UInt64(snapshot?.l1Size ?? header.l1Size)
    )
    cache = MetadataCache(store)
    refcounts = Qcow2Refcounts(store, cache, header)
    decompressor = CompressedStore(
      store, clusterBits: header.clusterBits, compression: header.compression)
    self.base = BaseView(
      base, blockSize: UInt64(header.blockSize), store: data, own: [decompressor])
    pending = PendingPlacements(
      blocksPerGroup: blocksPerTable, blockSize: UInt64(header.blockSize))
    tablesEnd = Self.rounded(store.size, header)
    dataEnd = Self.rounded(data.size, header)
    guard l1.offset + l1.entries * 8 <= tablesEnd else {
      throw ImageError(
        .corrupt, "store \(store.name): cut short: its \(store.size) bytes end before its L1 table")
    }
    let bytes = try io { () throws(IOError) in try data.allocatedBytes() }
    let whole = (size + UInt64(header.blockSize) - 1) / UInt64(header.blockSize)
    durableBlocks = min(bytes / UInt64(header.blockSize), whole)
  }

  private static func rounded(_ size: UInt64, _ header: Qcow2Header) -> UInt64 {
    (size + header.clusterSize - 1) / header.clusterSize * header.clusterSize
  }

  /// Throws `corrupt` for a table or data past the end of its file, which has been cut short.
  private func checkEnd(_ end: UInt64, isTable: Bool = false) throws(ImageError) {
    guard end > (isTable ? tablesEnd : dataEnd) else { return }
    // It may have grown since.
    tablesEnd = Self.rounded(store.size, header)
    dataEnd = Self.rounded(data.size, header)
    guard end > (isTable ? tablesEnd : dataEnd) else { return }
    throw ImageError(
      .corrupt,
      "cut short: \(isTable ? "a table" : "data") ends at byte \(end), and there are "
        + "\((isTable ? store : data).size): copy it again or restore it from a backup")
  }

  /// See `ImageFormat`.
  package var devices: [any ByteStore]? { base.devices }
  /// Estimated, when the image was opened, from the space that it takes; and what was placed
  /// since.
  package var allocatedBlocks: UInt64 { min(blockCount, durableBlocks + pending.placed) }

  // MARK: The durable tables

  /// An entry of the L1 table: where the L2 table is (0: none), and whether it is ours alone.
  func table(_ index: UInt64) throws(ImageError) -> (offset: UInt64, owned: Bool) {
    guard index < l1.entries else { return (0, true) }
    let entry = try cache.big(UInt64.self, at: l1.offset + index * 8)
    let offset = entry & Qcow2Bits.offset
    guard offset % clusterSize == 0 else {
      throw ImageError(.corrupt, "\(store.name): L2 table \(index) at byte \(offset)")
    }
    return (offset, entry & Qcow2Bits.copied != 0)
  }

  /// The L2 entry of a cluster in a table.
  func entry(_ cluster: UInt64, table: UInt64) throws(ImageError) -> Qcow2Entry {
    guard table != 0 else { return Qcow2Entry(raw: 0) }
    let offset = table + cluster % header.l2Entries * header.entrySize
    let raw = try cache.big(UInt64.self, at: offset)
    guard header.hasSubclusters else { return Qcow2Entry(raw: raw) }
    return Qcow2Entry(raw: raw, bitmap: try cache.big(UInt64.self, at: offset + 8))
  }

  private func state(_ block: UInt64, table: UInt64) throws(ImageError) -> Qcow2State {
    let cluster = block / header.subclusters
    return try header.state(
      try entry(cluster, table: table), subcluster: block % header.subclusters,
      guestOffset: cluster * header.clusterSize)
  }

  /// The longest run from a block on, within its L2 table, that the tables map alike.
  func durable(
    _ block: UInt64, limit: UInt64
  ) throws(ImageError) -> (state: Qcow2State, count: UInt64) {
    let limit = min(limit, blocksPerTable - block % blocksPerTable)
    do throws(ImageError) {
      let table = try table(block / blocksPerTable).offset
      guard table != 0 else { return (.unallocated, limit) }
      try checkEnd(table + clusterSize, isTable: true)
      if isPlain, let run = try plainRun(block, table: table, limit: limit) { return run }
      let first = try state(block, table: table)
      var count: UInt64 = 1
      while count < limit,
        try state(block + count, table: table).continues(first, by: count * UInt64(blockSize))
      {
        count += 1
      }
      if case .data(let offset, _) = first { try checkEnd(offset + count * UInt64(blockSize)) }
      if case .data(let offset, true) = first, isWritable, !header.hasDataFile,
        refcounts.isProtected(offset, bytes: count * UInt64(blockSize))
      {
        throw ImageError(.corrupt, "the data of block \(block) lies among the tables")
      }
      return (first, count)
    } catch {
      throw ImageError(error.code, "\(store.name): \(error.message)", cause: error.cause)
    }
  }

  /// As `durable`, for entries that are what most are: none, or plain clusters in a row. nil for
  /// any other, and for what may be damaged.
  private func plainRun(
    _ block: UInt64, table: UInt64, limit: UInt64
  ) throws(ImageError) -> (state: Qcow2State, count: UInt64)? {
    let start = table + block % l2Entries * 8
    let first = try cache.big(UInt64.self, at: start)
    let step: UInt64
    if first == 0 {
      step = 0
    } else {
      let isData = first & ((clusterSize - 1) | Qcow2Bits.compressed) == 0
      guard isData, first & Qcow2Bits.offset != 0 else { return nil }
      step = clusterSize
    }
    var count: UInt64 = 1
    var expected = first &+ step
    while count < limit {
      let offset = start + count * 8
      let page = try cache.page(offset / MetadataCache.pageSize)
      let from = Int(offset % MetadataCache.pageSize)
      let most = min(Int(limit - count), (page.count - from) / 8)
      let alike = page.withUnsafeBytes { bytes -> Int in
        for index in 0..<most {
          let raw = bytes.loadUnaligned(fromByteOffset: from + index * 8, as: UInt64.self)
          guard UInt64(bigEndian: raw) == expected else { return index }
          expected &+= step
        }
        return most
      }
      count += UInt64(alike)
      if alike < most { break }
    }
    if first == 0 { return (.unallocated, count) }
    let (place, isOwned) = (first & Qcow2Bits.offset, first & Qcow2Bits.copied != 0)
    // The other way tells what is wrong.
    try checkEnd(place + count * clusterSize)
    if isWritable, isOwned, refcounts.isProtected(place, bytes: count * clusterSize) { return nil }
    return (.data(place, owned: isOwned), count)
  }

  /// The longest run from a block on that is mapped alike.
  private func run(_ block: UInt64, _ limit: UInt64) throws(ImageError) -> Extent {
    let (run, next) = pending.find(block)
    if let run {
      let count = min(limit, run.blocks.end - block)
      let place = Place.device(0, sector: pending.offset(of: block, in: run) / 512)
      return Extent(
        BlockRange(block, count), place, writable: isWritable, mark: run.mark)
    }
    var (state, count) = try durable(block, limit: next.map { min(limit, $0 - block) } ?? limit)
    switch state {
    case .zero: return Extent(BlockRange(block, count), .zero, writable: false)
    case .data(let offset, let owned):
      let place = Place.device(0, sector: offset / 512)
      return Extent(BlockRange(block, count), place, writable: owned && isWritable)
    case .compressed(let address):
      let place = Place.device(Self.compressedDevice, sector: address / 512)
      return Extent(BlockRange(block, count), place, writable: false)
    case .unallocated:
      let place: Place
      (place, count) = try base.run(from: block, limit: count)
      return Extent(BlockRange(block, count), place, writable: false)
    }
  }

  /// Where a block lives for reading; see `ImageFormat`. Looks at 16 tables at most, so a run
  /// may go on after the extent.
  package func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    // Within a table a run ends where something else begins, save that the base may know more.
    try merged(
      block, limit: limit,
      while: { found, tables in
        tables < Self.tablesPerFind
          && (found.blocks.end % blocksPerTable == 0 || found.isBelow)
      }, run)
  }

  // MARK: Placements

  /// A place for a first write; see `ImageFormat`. The answer does not cross an L2 table nor,
  /// where there are subclusters, a cluster.
  package func place(_ range: BlockRange, whole: Bool) throws(ImageError) -> Placement {
    try checkWritable()
    try checkBounds(range)
    let found = try run(range.first, range.count)
    guard !found.writable else { return Placement(found) }
    let extent = try assign(found.blocks)
    guard !whole, found.place != extent.place else { return Placement(extent) }
    switch found.place {
    case .zero: return Placement(extent, .zero)
    case .device: return Placement(extent, .copy(from: found.place))
    }
  }

  /// A discard; see `ImageFormat`. What is here is zeroed and keeps its place.
  package func discard(
    _ range: BlockRange, zeroing: Bool
  ) throws(ImageError) -> DiscardAnswer {
    try checkWritable()
    try checkBounds(range)
    let found = try run(range.first, range.count)
    if found.writable { return .zero(found) }
    guard zeroing, found.place != .zero else { return .nothing(blocks: found.blocks.count) }
    let extent = try assign(found.blocks)
    do throws(ImageError) { try lengthen(to: extent) } catch {
      abandon(extent.mark)
      throw error
    }
    return .zero(extent)
  }

  /// Makes the file reach to an extent's end: zeroing it does not, and what lies past the end of
  /// a file is taken for cut off.
  private func lengthen(to extent: Extent) throws(ImageError) {
    guard case .device(Self.dataDevice, let sector) = extent.place else { return }
    let end = sector * 512 + extent.blocks.count * UInt64(blockSize)
    guard !header.hasDataFile, end > dataEnd, end > store.size else { return }
    try io { () throws(IOError) in try store.resize(to: end) }
  }

  /// Places the beginning of a run that has no place of its own, under a new mark.
  private func assign(_ range: BlockRange) throws(ImageError) -> Extent {
    let left = blocksPerTable - range.first % blocksPerTable
    var range = BlockRange(range.first, min(range.count, left))
    let offset: UInt64
    if header.hasSubclusters {
      let inCluster = header.subclusters - range.first % header.subclusters
      range.count = min(range.count, inCluster)
      let cluster = try clusterPlace(range.first / header.subclusters)
      offset = cluster + range.first % header.subclusters * UInt64(blockSize)
    } else if header.hasDataFile {
      offset = range.first * UInt64(blockSize)
    } else if let own = try ownPlace(range.first) {
      range.count = 1
      offset = own
    } else {
      let (first, count) = try refcounts.allocate(upTo: range.count)
      range.count = count
      offset = first * header.clusterSize
    }
    let mark = pending.place(range, at: offset)
    return Extent(
      range, .device(Self.dataDevice, sector: offset / 512), writable: true, mark: mark)
  }

  /// Where a cluster lives already, though its blocks read as zeroes or from the base; nil
  /// when it has no place or shares it.
  private func ownPlace(_ cluster: UInt64) throws(ImageError) -> UInt64? {
    let (table, owned) = try table(cluster / header.l2Entries)
    guard table != 0, owned else { return nil }
    let entry = try entry(cluster, table: table)
    guard entry.isOwned, !entry.isCompressed, entry.offset != 0,
      entry.offset % header.clusterSize == 0,
      !refcounts.isProtected(entry.offset, bytes: header.clusterSize)
    else { return nil }
    return entry.offset
  }

  /// The byte where a cluster with subclusters lives or from now on shall live.
  private func clusterPlace(_ cluster: UInt64) throws(ImageError) -> UInt64 {
    guard !header.hasDataFile else { return cluster * header.clusterSize }
    let first = cluster * header.subclusters
    if let run = pending.first(in: BlockRange(first, header.subclusters)) {
      return pending.offset(of: run.blocks.first, in: run)
        - run.blocks.first % header.subclusters * UInt64(blockSize)
    }
    if let own = try ownPlace(cluster) { return own }
    let place = try refcounts.allocate(upTo: 1).first * header.clusterSize
    do throws(ImageError) {
      try copySiblings(of: cluster, to: place)
    } catch {
      refcounts.release((place / header.clusterSize)..<(place / header.clusterSize + 1))
      throw error
    }
    return place
  }

  /// Copies every subcluster that a cluster has of its own to a new place. Its entry can name
  /// one place only, so that what is not copied now would be lost by the commit.
  private func copySiblings(of cluster: UInt64, to place: UInt64) throws(ImageError) {
    let entry = try entry(cluster, table: try table(cluster / header.l2Entries).offset)
    for subcluster in 0..<header.subclusters {
      try copy(subcluster, of: cluster, entry, to: place + subcluster * UInt64(blockSize))
    }
  }

  /// Copies a subcluster, if the cluster has it, to a byte of the store.
  private func copy(
    _ subcluster: UInt64, of cluster: UInt64, _ entry: Qcow2Entry, to place: UInt64
  ) throws(ImageError) {
    let state = try header.state(
      entry, subcluster: subcluster, guestOffset: cluster * header.clusterSize)
    let from: (store: any ByteStore, offset: UInt64)
    switch state {
    case .unallocated, .zero: return
    case .data(let offset, _): from = (store, offset)
    case .compressed(let address): from = (decompressor, address)
    }
    // What lives there anyway is its own old bytes.
    guard from.store !== store || from.offset != place else { return }
    let size = Int(blockSize)
    try io { () throws(IOError) in
      try store.write(try from.store.read(at: from.offset, count: size), at: place)
    }
  }

  /// Puts the old bytes of blocks whose writes came to nothing to the new place of their
  /// cluster, where other blocks of it are about to be committed.
  func mendSpoiled(_ runs: [PendingPlacements.Run]) throws(ImageError) {
    guard !spoiled.isEmpty else { return }
    let clusters = Set(runs.map { $0.blocks.first / header.subclusters })
    for (block, place) in spoiled where clusters.contains(block / header.subclusters) {
      if pending.find(block).run == nil { try copyOld(block, to: place) }
    }
    spoiled = spoiled.filter { !clusters.contains($0.key / header.subclusters) }
  }

  private func copyOld(_ block: UInt64, to place: UInt64) throws(ImageError) {
    let cluster = block / header.subclusters
    let entry = try entry(cluster, table: try table(cluster / header.l2Entries).offset)
    try copy(block % header.subclusters, of: cluster, entry, to: place)
  }

  /// A placement that came to nothing: see `ImageFormat`.
  package func abandon(_ mark: Mark) {
    for run in pending.remove(where: { $0.mark == mark }) {
      release(run)
      guard header.hasSubclusters, !header.hasDataFile else { continue }
      for index in 0..<run.blocks.count {
        spoiled[run.blocks.first + index] = run.offset + index * UInt64(blockSize)
      }
    }
  }

  /// Gives back the space of a run that is no longer pending, unless it was durable before or
  /// other blocks of its cluster are still pending there.
  private func release(_ run: PendingPlacements.Run) {
    guard !header.hasDataFile else { return }
    let size = header.clusterSize
    let clusters =
      (run.offset / size)..<((run.offset + run.blocks.count * UInt64(blockSize) - 1) / size + 1)
    if header.hasSubclusters {
      let first = run.blocks.first / header.subclusters * header.subclusters
      guard pending.first(in: BlockRange(first, header.subclusters)) == nil else { return }
    }
    // For a place that the block had before this changes nothing: it is counted.
    refcounts.release(clusters)
  }

  /// Takes over the uncommitted placements of a former worker. Throws `badRequest` for one
  /// that this format cannot have made; the image must then not be used.
  package func restore(_ extents: [Extent]) throws(ImageError) {
    try checkWritable()
    for extent in extents {
      try checkBounds(extent.blocks)
      guard case .device(Self.dataDevice, let sector) = extent.place, extent.writable,
        extent.mark > pending.lastMark, sector < 1 << 47
      else {
        throw ImageError(
          .badRequest,
          "an uncommitted placement of blocks \(extent.blocks.first)+\(extent.blocks.count) "
            + "is not one of this store")
      }
      var block = extent.blocks.first
      while block < extent.blocks.end {
        let perPiece = header.hasSubclusters ? header.subclusters : blocksPerTable
        let count = min(extent.blocks.end - block, perPiece - block % perPiece)
        let offset = sector * 512 + (block - extent.blocks.first) * UInt64(blockSize)
        try restore(BlockRange(block, count), at: offset, mark: extent.mark)
        block += count
      }
      try lengthen(to: extent)
    }
  }

  private func restore(
    _ range: BlockRange, at offset: UInt64, mark: Mark
  ) throws(ImageError) {
    let (run, next) = pending.find(range.first)
    guard run == nil, next.map({ $0 >= range.end }) ?? true else {
      throw ImageError(.badRequest, "two uncommitted placements share block \(range.first)")
    }
    let ahead = range.first % header.subclusters * UInt64(blockSize)
    guard offset >= ahead, (offset - ahead) % header.clusterSize == 0 else {
      throw ImageError(.badRequest, "an uncommitted placement at byte \(offset)")
    }
    if header.hasDataFile {
      guard offset == range.first * UInt64(blockSize) else {
        throw ImageError(.badRequest, "an uncommitted placement at byte \(offset)")
      }
    } else if header.hasSubclusters {
      let cluster = range.first / header.subclusters
      let own = try ownPlace(cluster)
      let mates = pending.first(in: BlockRange(cluster * header.subclusters, header.subclusters))
      if let mates {
        let place =
          pending.offset(of: mates.blocks.first, in: mates)
          - mates.blocks.first % header.subclusters * UInt64(blockSize)
        guard place == offset - ahead else {
          throw ImageError(.badRequest, "two places for cluster \(cluster)")
        }
      } else if own != offset - ahead {
        let first = (offset - ahead) / header.clusterSize
        try refcounts.retake(first..<(first + 1))
      }
    } else {
      let first = offset / header.clusterSize
      for index in 0..<range.count
      where try ownPlace(range.first + index)
        != offset + index * header.clusterSize
      {
        try refcounts.retake((first + index)..<(first + index + 1))
      }
    }
    pending.insert(PendingPlacements.Run(blocks: range, offset: offset, mark: mark))
  }
}

extension Extent {
  /// Whether it may lie in a base.
  fileprivate var isBelow: Bool {
    switch place {
    case .zero: true
    case .device(let device, _): device != Qcow2.dataDevice && device != Qcow2.compressedDevice
    }
  }
}
