// SPDX-License-Identifier: Apache-2.0
// Making a qcow2 image, and opening one.
//
// Order of creation: the first cluster is made unreadable and that is flushed; then the
// tables are written and flushed; then the header. What a power cut left half made is no
// qcow2 image.

package import BlockIO
import Glibc
import SystemIO

/// How much of a new image is laid out at once.
package enum Preallocation: String, Sendable {
  /// Nothing but the tables that an image must have.
  case off
  /// All tables: every cluster has a place, the file stays sparse.
  case metadata
  /// Tables, and the file's space; as `full`, since a byte store has no other way.
  case falloc
  /// Tables, and zeroes written everywhere.
  case full
}

/// What a new qcow2 image shall be like.
package struct Qcow2Options: Sendable {
  /// 2 or 3.
  package var version: UInt32 = 3
  /// Bytes of a cluster: a power of two from 512 to 2 MiB.
  package var clusterSize: UInt64 = 65536
  /// Bits of a refcount: a power of two from 1 to 64; version 2 has 16.
  package var refcountBits: UInt32 = 16
  /// Whether others may write refcounts late.
  package var lazyRefcounts = false
  /// Whether there are subclusters.
  package var extendedL2 = false
  /// How clusters are compressed by those who do.
  package var compression: Qcow2Compression = .zlib
  /// How much is laid out at once.
  package var preallocation: Preallocation = .off
  /// The base's path and the name of its format.
  package var base: (path: String, format: String?)?
  /// The data file's path.
  package var dataFile: String?
  /// Whether the data file shall be a raw image of the disk.
  package var dataFileRaw = false

  /// The usual.
  package init() {}

  func header(_ size: UInt64) throws(ImageError) -> Qcow2Header {
    func refuse(_ words: String) -> ImageError { ImageError(.badRequest, words) }
    guard clusterSize.nonzeroBitCount == 1, clusterSize >= 512, clusterSize <= 2 << 20 else {
      throw refuse("cluster size \(clusterSize) is not a power of two from 512 bytes to 2 MiB")
    }
    guard refcountBits.nonzeroBitCount == 1, refcountBits <= 64 else {
      throw refuse("refcount width \(refcountBits) is not a power of two from 1 to 64 bits")
    }
    guard version == 3 || version == 2 else { throw refuse("version \(version) is not 2 or 3") }
    guard
      version == 3
        || (refcountBits == 16 && !lazyRefcounts && !extendedL2 && compression == .zlib
          && dataFile == nil)
    else { throw refuse("version 2 has none of the features asked for: use version 3") }
    guard !extendedL2 || clusterSize >= 16384 else {
      throw refuse("subclusters need clusters of 16 KiB or more")
    }
    guard !dataFileRaw || (dataFile != nil && base == nil) else {
      throw refuse("a raw data file needs a data file and no base")
    }
    var header = Qcow2Header()
    header.version = version
    header.clusterBits = UInt32(clusterSize.trailingZeroBitCount)
    header.size = size
    header.refcountOrder = UInt32(refcountBits.trailingZeroBitCount)
    header.compression = compression
    if version == 2 { header.headerLength = 72 }
    if lazyRefcounts { header.compatible |= Qcow2Header.Compatible.lazyRefcounts }
    if extendedL2 { header.incompatible |= Qcow2Header.Incompatible.extendedL2 }
    if compression != .zlib { header.incompatible |= Qcow2Header.Incompatible.compression }
    if let dataFile {
      header.incompatible |= Qcow2Header.Incompatible.dataFile
      header.dataFilePath = dataFile
      if dataFileRaw { header.autoclear |= Qcow2Header.Autoclear.rawDataFile }
    }
    header.basePath = base?.path
    header.baseFormat = base?.format
    guard size <= 1 << 61, header.l1Entries(for: size) <= Qcow2Header.mostL1Entries else {
      throw refuse("\(size) bytes are too many for clusters of \(clusterSize): choose larger ones")
    }
    return header
  }
}

extension Qcow2 {
  /// Makes an image.
  ///
  /// - Parameters:
  ///   - store: written to and flushed; whatever it holds is lost.
  ///   - dataFile: the data file when `options` names one; is given the disk's length.
  ///   - size: length of the disk in bytes; is rounded up to 512.
  /// - Throws: `badRequest`, or `io` when a store fails.
  @discardableResult
  package static func create(
    store: any ByteStore, size: UInt64, options: Qcow2Options = Qcow2Options(),
    dataFile: (any ByteStore)? = nil
  ) throws(ImageError) -> Qcow2Header {
    var header = try options.header(roundedUp(size, to: 512) ?? .max)
    guard (dataFile != nil) == header.hasDataFile else {
      throw ImageError(.badRequest, "a data file has to be both named and given")
    }
    // A raw data file shows everything, so everything has its place from the start.
    let lays = options.preallocation != .off || options.dataFileRaw
    let layout = try Qcow2Layout(&header, layingOut: lays)
    let bytes = try header.encoded()
    try io { () throws(IOError) in
      try store.zero(at: 0, count: header.clusterSize)
      try store.flush()
      try store.resize(to: 0)
      try store.resize(to: layout.end)
      // A device keeps what it held.
      try store.zero(at: 0, count: layout.tablesEnd)
      try layout.write(header, to: store)
      if let dataFile { try dataFile.resize(to: header.size) }
      if options.preallocation == .full || options.preallocation == .falloc {
        let target = dataFile ?? store
        let (start, end) = dataFile == nil ? (layout.tablesEnd, layout.end) : (0, header.size)
        var isReserved = false
        if options.preallocation == .falloc {
          isReserved = try reserve(target, from: start, to: end)
        }
        if !isReserved { try target.fill(from: start, to: end) }
        try target.flush()
      } else if lays {
        // What has a place and is not written shows what was there.
        if let dataFile {
          try dataFile.zero(at: 0, count: header.size)
        } else {
          try store.zero(at: layout.tablesEnd, count: layout.end - layout.tablesEnd)
        }
      }
      try store.flush()
      // What does not fit the first sector comes first: that one makes it an image.
      if bytes.count > 512 {
        try store.write([UInt8](bytes[512...]), at: 512)
        try store.flush()
      }
      try store.write([UInt8](bytes.prefix(512)), at: 0)
      try store.flush()
    }
    return header
  }

  /// Gives a range zeroes and their space; false where the store cannot.
  private static func reserve(
    _ store: any ByteStore, from start: UInt64, to end: UInt64
  ) throws(IOError) -> Bool {
    guard let file = store.file, !file.isBlockDevice else { return false }
    try file.zero(at: start, count: end - start)
    do throws(IOError) {
      try file.allocate(at: start, count: end - start)
      return true
    } catch {
      guard error.code == EOPNOTSUPP else { throw error }
      return false
    }
  }

  /// Opens an image as a disk.
  ///
  /// - Parameters:
  ///   - base: the base that the header names; a base that is itself an image as `ImageStore`.
  ///   - dataFile: the data file, when the header says that there is one.
  ///   - writable: the store may then be written here: features that this program does not
  ///     keep up are cleared, bitmaps are marked as in use, and an image that was not closed
  ///     is counted anew.
  ///   - snapshot: the internal snapshot to open instead of the disk, by id or name; only for
  ///     reading.
  /// - Throws: what `Qcow2Header.read(from:)` throws; `baseMissing`; `badRequest`.
  package static func open(
    store: any ByteStore, base: (any ByteStore)? = nil, dataFile: (any ByteStore)? = nil,
    writable: Bool, snapshot: String? = nil
  ) throws(ImageError) -> Qcow2 {
    let header = try Qcow2Header.read(from: store)
    if let path = header.basePath, base == nil {
      throw ImageError(.baseMissing, "store \(store.name) needs its base \(path): give it")
    }
    return try open(
      alone: store, over: header.basePath == nil ? nil : base, dataFile: dataFile,
      writable: writable, snapshot: snapshot)
  }

  /// As the other, over whatever is given, base or not.
  static func open(
    alone store: any ByteStore, over base: (any ByteStore)?, dataFile: (any ByteStore)?,
    writable: Bool, snapshot: String?
  ) throws(ImageError) -> Qcow2 {
    var header = try Qcow2Header.read(from: store)
    if header.hasDataFile, dataFile == nil {
      throw ImageError(
        .baseMissing,
        "store \(store.name) needs its data file \(header.dataFilePath ?? "of which it has no name"): give it"
      )
    }
    let data = header.hasDataFile ? dataFile ?? store : store
    var found: Qcow2Snapshot?
    if let snapshot {
      guard !writable else {
        throw ImageError(.badRequest, "a snapshot can be opened for reading only")
      }
      let all = try Qcow2SnapshotTable(store, header).snapshots
      found = all.first { $0.id == snapshot } ?? all.first { $0.name == snapshot }
      guard found != nil else {
        throw ImageError(.badRequest, "store \(store.name) has no snapshot '\(snapshot)'")
      }
    }
    if writable { header = try prepareForWriting(store, data, header) }
    return try Qcow2(
      store: store, data: data, base: base, header: header, writable: writable,
      snapshot: found)
  }

  private static func prepareForWriting(
    _ store: any ByteStore, _ data: any ByteStore, _ header: Qcow2Header
  ) throws(ImageError) -> Qcow2Header {
    guard store.isWritable, data.isWritable else {
      throw ImageError(.badRequest, "\(store.name) is open for reading only")
    }
    guard header.incompatible & Qcow2Header.Incompatible.corrupt == 0 else {
      throw ImageError(
        .corrupt, "store \(store.name) is marked as corrupt: repair it ('check -r all') first")
    }
    var header = header
    if header.incompatible & Qcow2Header.Incompatible.dirty != 0 {
      try repair(store: store, .all)
      header = try Qcow2Header.read(from: store)
    }
    let unknown = header.autoclear & ~Qcow2Header.Autoclear.known
    if unknown != 0 {
      header.autoclear &= Qcow2Header.Autoclear.known
      let autoclear = header.autoclear
      try io { () throws(IOError) in
        var bytes: [UInt8] = []
        bytes.appendBig(autoclear)
        try store.write(bytes, at: 88)
        try store.flush()
      }
    }
    try Qcow2Bitmaps.markInUse(store, header)
    return header
  }

  /// The internal snapshots.
  package static func snapshots(
    of store: any ByteStore
  ) throws(ImageError) -> [Qcow2Snapshot] {
    try Qcow2SnapshotTable(store, try Qcow2Header.read(from: store)).snapshots
  }
}

/// Where the parts of a new image go: header, refcount table, refcount blocks, L1 table, and
/// when everything is laid out L2 tables and data.
private struct Qcow2Layout {
  let blocks: UInt64
  let l1Clusters: UInt64
  let tables: UInt64
  /// Clusters of data that are laid out.
  let data: UInt64
  /// Where tables end and data begins; where all of it ends.
  let tablesEnd: UInt64
  let end: UInt64

  init(_ header: inout Qcow2Header, layingOut: Bool) throws(ImageError) {
    let size = header.clusterSize
    func clusters(_ bytes: UInt64) -> UInt64 { bytes / size + (bytes % size == 0 ? 0 : 1) }
    let entries = header.l1Entries(for: header.size)
    l1Clusters = max(1, clusters(entries * 8))
    tables = layingOut ? entries : 0
    data = layingOut ? clusters(header.size) : 0
    let fixed = 1 + l1Clusters + tables + (header.hasDataFile ? 0 : data)
    var table: UInt64 = 1
    var blocks: UInt64 = 1
    while true {
      let total = fixed + table + blocks
      let needed = (total + header.refcountsPerBlock - 1) / header.refcountsPerBlock
      let longer = max(table, clusters(needed * 8))
      if needed <= blocks, longer == table { break }
      blocks = max(blocks, needed)
      table = longer
    }
    guard table * size <= Qcow2Header.largestRefcountTable else {
      throw ImageError(.badRequest, "too large for its refcounts: choose larger clusters")
    }
    self.blocks = blocks
    header.refcountTableOffset = size
    header.refcountTableClusters = UInt32(table)
    header.l1Offset = (1 + table + blocks) * size
    header.l1Size = UInt32(entries)
    tablesEnd = (1 + table + blocks + l1Clusters + tables) * size
    end = tablesEnd + (header.hasDataFile ? 0 : data * size)
  }

  func write(_ header: Qcow2Header, to store: any ByteStore) throws(IOError) {
    let size = header.clusterSize
    let firstBlock = header.refcountTableOffset + UInt64(header.refcountTableClusters) * size
    var table: [UInt8] = []
    for index in 0..<blocks { table.appendBig(firstBlock + index * size) }
    try store.write(table, at: header.refcountTableOffset)
    let width = Qcow2RefcountWidth(order: header.refcountOrder)
    let used = end / size
    for index in 0..<blocks {
      var bytes = [UInt8](repeating: 0, count: Int(size))
      let first = index * header.refcountsPerBlock
      guard first < used else { break }
      for item in 0..<min(header.refcountsPerBlock, used - first) {
        width.put(1, &bytes, Int(item))
      }
      try store.write(bytes, at: firstBlock + index * size)
    }
    guard tables > 0 else { return }
    let firstTable = header.l1Offset + l1Clusters * size
    var l1: [UInt8] = []
    for index in 0..<tables { l1.appendBig((firstTable + index * size) | Qcow2Bits.copied) }
    try store.write(l1, at: header.l1Offset)
    let dataStart = header.hasDataFile ? 0 : tablesEnd
    for index in 0..<tables {
      var bytes: [UInt8] = []
      let first = index * header.l2Entries
      for cluster in first..<min(first + header.l2Entries, data) {
        bytes.appendBig((dataStart + cluster * size) | Qcow2Bits.copied)
        if header.hasSubclusters { bytes.appendBig(UInt64(0xFFFF_FFFF)) }
      }
      try store.write(bytes, at: firstTable + index * size)
    }
  }
}
