// SPDX-License-Identifier: Apache-2.0
// Where the blocks of a qcow disk (version 1) live, and what a commit writes.
//
// There are no refcounts: what no table names is free, and new clusters go to the end of the
// file. Devices: 0 the store, 1 the base, 2 the compressed clusters, then the base's own.
//
// Commit: 1. new L2 tables with their entries; 2. entries of L2 tables that are there, and of
// the L1 table. A power cut leaves at most space that nothing names.

package import BlockIO
package import DiskModel
import Glibc
import SystemIO

/// A qcow image of version 1 that is open as a disk. Used from one thread.
package final class Qcow: RunImage, PooledImage {
  private static let compressedDevice: UInt16 = 2
  static let blocksPerFind: UInt64 = 65536

  /// The header, as it is now.
  package internal(set) var header: QcowHeader
  let store: any ByteStore
  private let base: BaseView
  let cache: MetadataCache
  let isWritable: Bool
  var pending: PendingPlacements
  var pooled = PooledPlaces()
  private var planned: [UInt64: UInt64] = [:]
  private var inFlight: (mark: Mark, draft: CommitDraft, tables: [UInt64])?
  /// Where the next cluster goes.
  private var end: UInt64
  /// Bytes that the file has.
  private var limit: UInt64
  /// Sectors that are not the disk's: the header, the base's path, tables.
  private var reserved = HostRuns()
  private let durableBlocks: UInt64

  init(
    store: any ByteStore, base: (any ByteStore)?, header: QcowHeader, writable: Bool
  ) throws(ImageError) {
    self.store = store
    self.header = header
    isWritable = writable
    cache = MetadataCache(store)
    let decompressor = CompressedStore(
      store, clusterBits: UInt32(header.clusterBits), compression: .zlib)
    self.base = BaseView(
      base, blockSize: header.clusterSize, store: store, own: [decompressor])
    pending = PendingPlacements(
      blocksPerGroup: header.l2Entries, blockSize: header.clusterSize)
    let bytes = try io { () throws(IOError) in try store.allocatedBytes() }
    let tables = header.l1Offset + header.l1Entries * 8
    guard tables <= store.size else {
      throw ImageError(
        .corrupt,
        "store \(store.name): cut short: its \(store.size) bytes end before its L1 table")
    }
    for range in header.reserved { reserved.insert(Self.sectors(range)) }
    // Everything that any table names lies within the file.
    let unit = max(header.clusterSize, 4096)
    limit = store.size
    end = (store.size + unit - 1) / unit * unit
    durableBlocks = bytes / header.clusterSize
    let used = try survey(tablesOnly: !writable)
    if store.isFixedSize { end = (used + unit - 1) / unit * unit }
  }

  /// Nothing of the disk may lie there from now on.
  func protect(_ range: Range<UInt64>) { reserved.insert(Self.sectors(range)) }

  private static func sectors(_ range: Range<UInt64>) -> Range<UInt64> {
    (range.lowerBound / 512)..<((range.upperBound + 511) / 512)
  }

  /// Looks at all tables, and unless `tablesOnly` at what they name.
  ///
  /// - Returns: where that ends.
  /// - Throws: `corrupt` for a cluster over the header, the base's path or a table; `io`.
  private func survey(tablesOnly: Bool) throws(ImageError) -> UInt64 {
    var used = header.reserved.map(\.upperBound).max() ?? 0
    var tables: [UInt64] = []
    for index in 0..<header.l1Entries {
      let table = try table(index)
      guard table != 0 else { continue }
      let range = table..<(table + header.l2Entries * 8)
      reserved.insert(Self.sectors(range))
      used = max(used, range.upperBound)
      tables.append(table)
    }
    guard !tablesOnly else { return used }
    for table in tables {
      let bytes = try io { () throws(IOError) in
        try store.read(at: table, count: Int(header.l2Entries) * 8)
      }
      for item in 0..<Int(header.l2Entries) {
        let entry = bytes.big(UInt64.self, at: item * 8)
        guard entry != 0 else { continue }
        if entry & QcowHeader.compressed != 0 {
          let bits = UInt64(63 - header.clusterBits)
          let count = (entry & ~QcowHeader.compressed) >> bits & (header.clusterSize - 1)
          used = max(used, entry & ((1 << bits) - 1) + count)
          continue
        }
        guard entry < 1 << 56 else { continue }
        try checkPlace(entry, count: 1)
        used = max(used, entry + header.clusterSize)
      }
    }
    return used
  }

  /// Throws `corrupt` for clusters over what is not the disk's to write, or past the end of the
  /// file.
  private func checkPlace(_ offset: UInt64, count: UInt64) throws(ImageError) {
    let range = offset..<(offset + count * header.clusterSize)
    guard !reserved.overlaps(Self.sectors(range)) else {
      throw ImageError(
        .corrupt,
        "store \(store.name): a cluster at byte \(offset) lies over the header, the base's path "
          + "or a table: restore it from a backup")
    }
    // The file may end within its last cluster.
    guard range.upperBound - header.clusterSize < limit else {
      throw ImageError(
        .corrupt,
        "store \(store.name): cut short: it has \(limit) bytes, and a cluster lies at byte "
          + "\(range.upperBound - header.clusterSize)")
    }
  }

  /// Length of the disk in bytes.
  package var size: UInt64 { header.size }
  /// Bytes of a block: a cluster.
  package var blockSize: UInt32 { UInt32(header.clusterSize) }
  /// See `ImageFormat`.
  package var devices: [any ByteStore]? { base.devices }
  /// Estimated from the space that the image takes.
  package var allocatedBlocks: UInt64 { min(blockCount, durableBlocks + pending.placed) }

  func table(_ index: UInt64) throws(ImageError) -> UInt64 {
    let offset = try cache.big(UInt64.self, at: header.l1Offset + index * 8)
    guard offset % 512 == 0, offset < 1 << 56 else {
      throw ImageError(.corrupt, "\(store.name): L2 table \(index) at byte \(offset)")
    }
    guard offset == 0 || offset + header.l2Entries * 8 <= limit else {
      throw ImageError(
        .corrupt,
        "store \(store.name): cut short: it has \(limit) bytes, and L2 table \(index) lies at byte "
          + "\(offset)")
    }
    return offset
  }

  /// The longest run from a block on that is mapped alike, within its table.
  func run(_ block: UInt64, _ limit: UInt64) throws(ImageError) -> Extent {
    let (run, next) = pending.find(block)
    if let run {
      let count = min(limit, run.blocks.end - block)
      let place = Place.device(0, sector: pending.offset(of: block, in: run) / 512)
      return Extent(BlockRange(block, count), place, writable: isWritable, mark: run.mark)
    }
    let left = header.l2Entries - block % header.l2Entries
    let limit = min(limit, next.map { min(left, $0 - block) } ?? left)
    let table = try table(block / header.l2Entries)
    var entry: UInt64 = 0
    var count = limit
    if table != 0 {
      let at = table + block % header.l2Entries * 8
      entry = try cache.big(UInt64.self, at: at)
      count = 1
      while count < limit {
        let next = try cache.big(UInt64.self, at: at + count * 8)
        guard next == (entry == 0 ? 0 : entry &+ count * header.clusterSize),
          entry & QcowHeader.compressed == 0
        else { break }
        count += 1
      }
    }
    if entry == 0 {
      let (place, count) = try base.run(from: block, limit: count)
      return Extent(BlockRange(block, count), place, writable: false)
    }
    if entry & QcowHeader.compressed != 0 {
      let offset = entry & ((1 << UInt64(63 - header.clusterBits)) - 1)
      let address = offset << UInt64(header.clusterBits)
      guard offset < 1 << UInt64(56 - header.clusterBits) else {
        throw ImageError(.corrupt, "\(store.name): compressed data at \(offset)")
      }
      let place = Place.device(Self.compressedDevice, sector: address / 512)
      return Extent(BlockRange(block), place, writable: false)
    }
    guard entry % 512 == 0, entry < 1 << 56, entry >= header.end else {
      throw ImageError(.corrupt, "\(store.name): block \(block) at byte \(entry)")
    }
    try checkPlace(entry, count: count)
    let place = Place.device(0, sector: entry / 512)
    return Extent(BlockRange(block, count), place, writable: isWritable)
  }

  /// Room at the end of the file; its first byte there.
  func take(_ bytes: UInt64) throws(ImageError) -> UInt64 {
    let start = end
    guard start + bytes < 1 << UInt64(56 - header.clusterBits) else {
      throw ImageError(
        .io, "\(store.name): the image can grow no further",
        cause: IOError(ENOSPC, "place", store.name))
    }
    try io { () throws(IOError) in try store.resize(to: start + bytes) }
    end = start + bytes
    limit = max(limit, end)
    return start
  }

  /// A pool has so many clusters at most: what of it is not used is lost with the worker.
  private static let pooledClusters: UInt64 = 64

  /// At the end of the file, as every cluster.
  func takeRoom(_ wanted: UInt64) throws(ImageError) -> PoolRoom? {
    let (size, count) = (header.clusterSize, min(wanted, Self.pooledClusters))
    return PoolRoom(first: try take(count * size), stride: size, count: count)
  }

  func assign(_ range: BlockRange) throws(ImageError) -> Extent {
    let left = header.l2Entries - range.first % header.l2Entries
    let range = BlockRange(range.first, min(range.count, left))
    let offset = try take(range.count * header.clusterSize)
    let mark = pending.place(range, at: offset)
    return Extent(range, .device(0, sector: offset / 512), writable: true, mark: mark)
  }

  /// What makes every placement up to a mark durable; see the head of this file.
  package func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan {
    let groups = pending.runs(upTo: mark)
    guard !groups.isEmpty else { return CommitPlan(upTo: mark, stages: []) }
    // Tables are no smaller than 512 bytes and begin at multiples of that.
    let unit = header.l2Entries * 8
    var draft = CommitDraft(cache, clusterSize: 512)
    var late: [(offset: UInt64, value: UInt64)] = []
    var tables: [UInt64] = []
    for (index, runs) in groups {
      let old = try table(index)
      var target = old
      if old == 0 {
        if let table = planned[index] { target = table } else { target = try take(unit) }
        planned[index] = target
        tables.append(index)
        for start in stride(from: target, to: target + unit, by: 512) {
          draft.begin(cluster: start)
        }
        late.append((header.l1Offset + index * 8, target))
      }
      for run in runs {
        for item in 0..<run.blocks.count {
          let at = target + (run.blocks.first + item) % header.l2Entries * 8
          let value = run.offset + item * header.clusterSize
          if old == 0 { try draft.putBig(value, at: at) } else { late.append((at, value)) }
        }
      }
    }
    draft.seal()
    for (offset, value) in late { try draft.putBig(value, at: offset) }
    draft.seal()
    inFlight = (mark, draft, tables)
    let tails = groups.flatMap(\.runs).flatMap { tail(of: $0.blocks, at: $0.offset) }
    let first = tails.isEmpty ? [] : [tails]
    return CommitPlan(upTo: mark, stages: first + draft.stages)
  }

  /// The plan up to this mark has run.
  package func committed(upTo mark: Mark) {
    guard let plan = inFlight, plan.mark == mark else { return }
    inFlight = nil
    for index in plan.tables {
      guard let table = planned[index] else { continue }
      reserved.insert(Self.sectors(table..<(table + header.l2Entries * 8)))
    }
    cache.unpin(sectors: plan.draft.sectors.keys, fresh: plan.draft.fresh, size: 512)
    for index in plan.tables { planned[index] = nil }
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
      guard extent.writable, extent.mark > pending.lastMark,
        case .device(0, let sector) = extent.place,
        sector < 1 << 40, sector > 0, pending.first(in: range) == nil,
        range.first / header.l2Entries == (range.end - 1) / header.l2Entries
      else {
        throw ImageError(.badRequest, "an uncommitted placement of block \(range.first)")
      }
      let bytes = range.count * header.clusterSize
      end = max(end, sector * 512 + bytes)
      limit = max(limit, store.size)
      guard !reserved.overlaps(sector..<(sector + bytes / 512)) else {
        throw ImageError(.badRequest, "an uncommitted placement at sector \(sector)")
      }
      pending.insert(
        PendingPlacements.Run(blocks: range, offset: sector * 512, mark: extent.mark))
    }
  }
}
