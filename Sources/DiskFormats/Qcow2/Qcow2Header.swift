// SPDX-License-Identifier: Apache-2.0
// The header of a qcow2 image and the geometry that follows from it. The byte table and the
// commit order are in docs/formats/qcow2.md; Qcow2Header+Codec.swift reads and writes it.
//
// Invariants of a header that exists as a value (each checked on decoding):
// - the cluster size is a power of two from 512 bytes to 2 MiB;
// - the L1 table, the refcount table and the snapshot table begin at clusters within 56 bits,
//   and are no longer than 32 MiB, 8 MiB and 65536 entries;
// - the L1 table is long enough for the disk;
// - no incompatible feature is set that this program does not know.

/// How compressed clusters are compressed.
package enum Qcow2Compression: UInt8, Sendable {
  /// Raw deflate.
  case zlib = 0
  /// Zstandard.
  case zstd = 1
}

/// The bitmaps extension of a header.
package struct Qcow2BitmapsExtension: Sendable, Equatable {
  /// How many bitmaps there are.
  package var count: UInt32
  /// Bytes of their directory.
  package var directorySize: UInt64
  /// Where it begins.
  package var directoryOffset: UInt64
}

/// The header of a qcow2 image. Offsets and sizes are in bytes unless they say otherwise.
package struct Qcow2Header: Sendable, Equatable {
  /// "QFI" and 0xFB.
  package static let magic: UInt32 = 0x5146_49FB
  /// Incompatible features.
  package enum Incompatible {
    /// Refcounts may be wrong.
    package static let dirty: UInt64 = 1
    /// Anything may be wrong; may not be written to.
    package static let corrupt: UInt64 = 2
    /// Data lives in a file of its own.
    package static let dataFile: UInt64 = 4
    /// Another compression than zlib.
    package static let compression: UInt64 = 8
    /// Subclusters.
    package static let extendedL2: UInt64 = 16
    /// What this program knows.
    package static let known: UInt64 = 31
  }
  /// Compatible features.
  package enum Compatible {
    /// Refcounts may be written late. This program does not make use of the leave.
    package static let lazyRefcounts: UInt64 = 1
  }
  /// Features that whoever does not know them clears before writing.
  package enum Autoclear {
    /// The bitmaps are consistent.
    package static let bitmaps: UInt64 = 1
    /// The data file is a raw image of the disk.
    package static let rawDataFile: UInt64 = 2
    /// What this program knows.
    package static let known: UInt64 = 3
  }
  static let mostL1Entries: UInt64 = (32 << 20) / 8
  static let largestRefcountTable: UInt64 = 8 << 20
  static let mostSnapshots: UInt32 = 65536
  static let longestPath = 1023

  /// 2 or 3.
  package var version: UInt32 = 3
  /// The logarithm of the cluster size.
  package var clusterBits: UInt32 = 16
  /// Length of the disk as the header says; `diskSize` is what counts.
  package var size: UInt64 = 0
  /// Entries of the active L1 table.
  package var l1Size: UInt32 = 0
  /// Where the active L1 table begins.
  package var l1Offset: UInt64 = 0
  /// Where the refcount table begins.
  package var refcountTableOffset: UInt64 = 0
  /// How many clusters it has.
  package var refcountTableClusters: UInt32 = 0
  /// How many internal snapshots there are.
  package var snapshotCount: UInt32 = 0
  /// Where their table begins.
  package var snapshotsOffset: UInt64 = 0
  /// See `Incompatible`.
  package var incompatible: UInt64 = 0
  /// See `Compatible`.
  package var compatible: UInt64 = 0
  /// See `Autoclear`.
  package var autoclear: UInt64 = 0
  /// The logarithm of a refcount's width in bits.
  package var refcountOrder: UInt32 = 4
  /// Bytes of the fixed part.
  package var headerLength: UInt32 = 112
  /// How compressed clusters are compressed.
  package var compression: Qcow2Compression = .zlib
  /// The base's path, nil when there is none.
  package var basePath: String?
  /// The base's format by QEMU's name, if it is said.
  package var baseFormat: String?
  /// The data file's path, if it is said.
  package var dataFilePath: String?
  /// The bitmaps, if there are any.
  package var bitmaps: Qcow2BitmapsExtension?
  /// Extensions that this program does not know: type and data.
  package var unknownExtensions: [UInt32] = []

  /// Bytes of a cluster.
  package var clusterSize: UInt64 { 1 << UInt64(clusterBits) }
  /// Length of the disk: whole sectors.
  package var diskSize: UInt64 { size / 512 * 512 }
  /// Whether entries of L2 tables speak of subclusters.
  package var hasSubclusters: Bool { incompatible & Incompatible.extendedL2 != 0 }
  /// Whether data lives in a file of its own.
  package var hasDataFile: Bool { incompatible & Incompatible.dataFile != 0 }
  /// Bytes of an L2 entry.
  var entrySize: UInt64 { hasSubclusters ? 16 : 8 }
  /// Entries of an L2 table.
  var l2Entries: UInt64 { clusterSize / entrySize }
  /// Blocks of a cluster.
  var subclusters: UInt64 { hasSubclusters ? 32 : 1 }
  /// Bytes of a block: a cluster, or a subcluster where there are such.
  package var blockSize: UInt32 { UInt32(clusterSize / subclusters) }
  /// Refcounts in one block of them.
  var refcountsPerBlock: UInt64 { (clusterSize * 8) >> UInt64(refcountOrder) }
  /// L1 entries that a disk needs.
  func l1Entries(for size: UInt64) -> UInt64 {
    let reach = clusterSize * l2Entries
    return size / reach + (size % reach == 0 ? 0 : 1)
  }

  /// A header of defaults.
  init() {}

  /// Checks that fields fit each other. Throws `corrupt` or `unsupported`.
  func check() throws(ImageError) {
    guard clusterBits >= (hasSubclusters ? 14 : 9), clusterBits <= 21 else {
      throw ImageError(.corrupt, "clusters of 2^\(clusterBits) bytes")
    }
    guard refcountOrder <= 6 else {
      throw ImageError(.corrupt, "refcounts of 2^\(refcountOrder) bits")
    }
    guard size <= 1 << 61, l1Entries(for: size) <= Self.mostL1Entries else {
      throw ImageError(.unsupported, "a disk of \(size) bytes needs too long an L1 table")
    }
    guard UInt64(l1Size) <= Self.mostL1Entries, UInt64(l1Size) >= l1Entries(for: size) else {
      throw ImageError(.corrupt, "an L1 table of \(l1Size) entries for \(size) bytes")
    }
    try check(table: "L1", at: l1Offset, isEmpty: l1Size == 0)
    let refcountBytes = UInt64(refcountTableClusters) * clusterSize
    guard refcountTableClusters > 0, refcountBytes <= Self.largestRefcountTable else {
      throw ImageError(.corrupt, "a refcount table of \(refcountTableClusters) clusters")
    }
    try check(table: "refcount", at: refcountTableOffset, isEmpty: false)
    guard snapshotCount <= Self.mostSnapshots else {
      throw ImageError(.corrupt, "\(snapshotCount) internal snapshots")
    }
    try check(table: "snapshot", at: snapshotsOffset, isEmpty: snapshotCount == 0)
    if hasDataFile, snapshotCount > 0 {
      throw ImageError(.corrupt, "internal snapshots beside an external data file")
    }
    if autoclear & Autoclear.rawDataFile != 0, !hasDataFile {
      throw ImageError(.corrupt, "a raw data file that is none")
    }
  }

  private func check(table: String, at offset: UInt64, isEmpty: Bool) throws(ImageError) {
    guard offset % clusterSize == 0, offset < 1 << 56, isEmpty || offset > 0 else {
      throw ImageError(.corrupt, "the header places the \(table) table at \(offset)")
    }
  }
}
