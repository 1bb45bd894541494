// SPDX-License-Identifier: Apache-2.0
// A whole qcow2 image written from its first cluster to its last: what a conversion makes.
// Nobody sees the image before it is finished, so nothing has to be right before then: clusters
// are given out in a row, a table of them is written when the next one begins, refcounts, L1
// table and header come last.
//
//   header | L1 table | clusters and L2 tables as they come | refcount table | refcounts

package import BlockIO
import SystemIO

/// Builds a qcow2 image. Clusters are placed in the order of the disk, by one thread at a time.
package final class Qcow2Builder {
  /// The header of the image.
  package private(set) var header: Qcow2Header
  private let store: any ByteStore
  private let dataFile: (any ByteStore)?
  private let l1Clusters: UInt64
  private var l1: [UInt64]
  /// The entries of the table that is being filled, as they stand in the file, and its index.
  private var table: [UInt64]
  private var tableIndex: UInt64 = 0
  private var isTableUsed = false
  /// The next cluster to give out.
  private var next: UInt64
  /// How often each cluster is used, once clusters are shared by compressed ones.
  private var counts: [UInt32] = []
  /// Where the next compressed cluster begins; 0 when it needs a fresh cluster.
  private var packed: UInt64 = 0

  /// Where data goes: the image, or its data file.
  package var data: any ByteStore { dataFile ?? store }
  /// Clusters that the disk has.
  package var clusters: UInt64 { (header.size + header.clusterSize - 1) / header.clusterSize }

  /// Begins an image in an empty file, or on a device.
  ///
  /// - Throws: `badRequest`, `io`.
  package init(
    _ store: any ByteStore, size: UInt64, options: Qcow2Options, dataFile: (any ByteStore)?
  ) throws(ImageError) {
    header = try options.header(roundedUp(size, to: 512) ?? .max)
    guard (dataFile != nil) == header.hasDataFile else {
      throw ImageError(.badRequest, "a data file has to be both named and given")
    }
    self.store = store
    self.dataFile = dataFile
    let entries = header.l1Entries(for: header.size)
    l1 = [UInt64](repeating: 0, count: Int(entries))
    l1Clusters = max(1, (entries * 8 + header.clusterSize - 1) / header.clusterSize)
    table = [UInt64](repeating: 0, count: Int(header.clusterSize / 8))
    header.l1Offset = header.clusterSize
    header.l1Size = UInt32(entries)
    next = 1 + l1Clusters
    _ = try header.encoded()
    let (clusterSize, disk) = (header.clusterSize, header.size)
    try io { () throws(IOError) in
      try store.zero(at: 0, count: clusterSize)
      if let dataFile { try dataFile.resize(to: disk) }
    }
  }

  private func take(_ count: UInt64) -> UInt64 {
    defer { next += count }
    if !counts.isEmpty { counts += repeatElement(1, count: Int(count)) }
    return next
  }

  /// Turns to the table of a cluster of the disk, and writes the one before.
  private func turn(to cluster: UInt64) throws(ImageError) {
    let index = cluster / header.l2Entries
    guard index != tableIndex || !isTableUsed else { return }
    try writeTable()
    tableIndex = index
    isTableUsed = true
  }

  private func writeTable() throws(ImageError) {
    guard isTableUsed else { return }
    let place = take(1) * header.clusterSize
    l1[Int(tableIndex)] = (place | Qcow2Bits.copied).bigEndian
    try io { () throws(IOError) in try store.write(words: table, at: place) }
    for index in table.indices { table[index] = 0 }
    isTableUsed = false
  }

  private func put(_ entry: Qcow2Entry, _ cluster: UInt64) {
    let index = Int(cluster % header.l2Entries)
    guard header.hasSubclusters else {
      table[index] = entry.raw.bigEndian
      return
    }
    table[index * 2] = entry.raw.bigEndian
    table[index * 2 + 1] = entry.bitmap.bigEndian
  }

  /// Gives a place in `data` to a run of clusters of the disk: to as many of them as are
  /// returned, at least one. The caller writes them, whole.
  ///
  /// - Throws: `io` when a table cannot be written.
  package func place(
    _ cluster: UInt64, count: UInt64
  ) throws(ImageError) -> (offset: UInt64, count: UInt64) {
    try turn(to: cluster)
    let count = min(count, header.l2Entries - cluster % header.l2Entries)
    let first = header.hasDataFile ? cluster : take(count)
    for index in 0..<count {
      let place = (first + index) * header.clusterSize
      put(Qcow2Entry(raw: place | Qcow2Bits.copied, bitmap: 0xFFFF_FFFF), cluster + index)
    }
    return (first * header.clusterSize, count)
  }

  /// Gives a place in the store to a compressed cluster of so many bytes.
  ///
  /// - Throws: `io` when a table cannot be written.
  package func placeCompressed(_ cluster: UInt64, bytes: Int) throws(ImageError) -> UInt64 {
    try turn(to: cluster)
    if counts.isEmpty { counts = [UInt32](repeating: 1, count: Int(next)) }
    let size = header.clusterSize
    let most = Qcow2RefcountWidth(order: header.refcountOrder).most
    let left = packed % size == 0 ? 0 : size - packed % size
    // What does not fit goes on in the next cluster, if that is still to be had.
    let isNext = packed / size == next - 1
    let isFull = left > 0 && UInt64(counts[Int(packed / size)]) >= most
    if left == 0 || isFull || (UInt64(bytes) > left && !isNext) {
      packed = take(1) * size
      counts[Int(packed / size)] = 0
    }
    let start = packed
    let last = (start + UInt64(bytes) - 1) / size
    if last >= next { counts[Int(take(1))] = 0 }
    for used in (start / size)...last { counts[Int(used)] += 1 }
    packed = start + UInt64(bytes)
    let shift = UInt64(62 - (header.clusterBits - 8))
    let sectors = (start % 512 + UInt64(bytes) + 511) / 512 - 1
    put(Qcow2Entry(raw: Qcow2Bits.compressed | sectors << shift | start), cluster)
    return start
  }

  /// Makes a run of clusters read as zeroes, whatever is below.
  ///
  /// - Throws: `io`; `unsupported` for version 2, which has no such clusters.
  package func zero(_ cluster: UInt64, count: UInt64) throws(ImageError) {
    guard header.version >= 3 else {
      throw ImageError(
        .unsupported, "a version 2 image cannot hide its base's data: ask for compat=1.1")
    }
    for cluster in cluster..<(cluster + count) {
      try turn(to: cluster)
      put(
        header.hasSubclusters
          ? Qcow2Entry(raw: 0, bitmap: 0xFFFF_FFFF << 32) : Qcow2Entry(raw: Qcow2Bits.zero),
        cluster)
    }
  }

  /// Writes what is left: the last table, refcounts, L1 table and header. With `durable` the
  /// header is written after everything else has reached the medium, and is there on return.
  ///
  /// - Throws: `badRequest` for an image that is too large for its refcounts, `io`.
  package func finish(durable: Bool) throws(ImageError) {
    try writeTable()
    try writeCounts()
    let bytes = try header.encoded()
    let (l1, place, end) = (l1, header.l1Offset, next * header.clusterSize)
    try io { () throws(IOError) in
      try store.write(words: l1, at: place)
      if store.size < end { try store.resize(to: end) }
      if durable {
        try dataFile?.flush()
        try store.flush()
      }
      try store.write(bytes, at: 0)
      if durable { try store.flush() }
    }
  }

  private func writeCounts() throws(ImageError) {
    let size = header.clusterSize
    let used = next
    var (table, blocks): (UInt64, UInt64) = (1, 1)
    while true {
      let needed = (used + table + blocks + header.refcountsPerBlock - 1) / header.refcountsPerBlock
      let longer = max(table, (needed * 8 + size - 1) / size)
      if needed <= blocks, longer == table { break }
      blocks = max(blocks, needed)
      table = longer
    }
    guard table * size <= Qcow2Header.largestRefcountTable else {
      throw ImageError(.badRequest, "too large for its refcounts: choose larger clusters")
    }
    let first = take(table + blocks)
    header.refcountTableOffset = first * size
    header.refcountTableClusters = UInt32(table)
    let width = Qcow2RefcountWidth(order: header.refcountOrder)
    let places = (0..<blocks).map { ((first + table + $0) * size).bigEndian }
    var bytes = [UInt8](repeating: 0, count: Int(size))
    for item in 0..<Int(header.refcountsPerBlock) { width.put(1, &bytes, item) }
    try io { () throws(IOError) in
      try store.zero(at: first * size, count: table * size)
      try store.write(words: places, at: first * size)
      for index in 0..<blocks {
        let start = index * header.refcountsPerBlock
        let end = min(next, start + header.refcountsPerBlock)
        if !counts.isEmpty || end < start + header.refcountsPerBlock {
          for item in 0..<header.refcountsPerBlock {
            let cluster = start + item
            let count = cluster >= end ? 0 : counts.isEmpty ? 1 : UInt64(counts[Int(cluster)])
            width.put(count, &bytes, Int(item))
          }
        }
        try store.write(bytes, at: (first + table + index) * size)
      }
    }
  }
}

extension ByteStore {
  /// Writes 64-bit words as they stand in memory.
  func write(words: [UInt64], at offset: UInt64) throws(IOError) {
    var failure: IOError?
    words.withUnsafeBytes { buffer in
      do throws(IOError) { try write(buffer, at: offset) } catch { failure = error }
    }
    if let failure { throw failure }
  }
}
