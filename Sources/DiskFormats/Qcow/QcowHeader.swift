// SPDX-License-Identifier: Apache-2.0
// The header of a qcow image, version 1. The byte table and the commit order are in
// docs/formats/qcow.md; QcowHeader+Codec.swift reads and writes it.
//
// Invariants of a header that exists as a value (each checked on decoding): clusters of 512
// bytes to 64 KiB; L2 tables of 512 bytes to 64 KiB; an L1 table of 32 MiB at most; no
// encryption.

/// The header of a qcow image. Offsets and sizes are in bytes.
package struct QcowHeader: Sendable, Equatable {
  static let length = 48
  static let mostL1Entries: UInt64 = (32 << 20) / 8
  static let compressed: UInt64 = 1 << 63

  /// Length of the disk.
  package var size: UInt64
  /// The logarithm of the cluster size.
  package var clusterBits: UInt8
  /// The logarithm of an L2 table's entries.
  package var l2Bits: UInt8
  /// Where the L1 table begins.
  package var l1Offset: UInt64
  /// The base's path, nil when there is none.
  package var basePath: String?
  /// Where the header and a base's path that follows it end: nothing of the disk lies before.
  var end = UInt64(Self.length)
  /// The bytes of the base's path.
  var pathRange: Range<UInt64> = 0..<0
  /// What a header names, in bytes: nothing of the disk lies there.
  var reserved: [Range<UInt64>] {
    [0..<end, l1Offset..<(l1Offset + l1Entries * 8)] + (pathRange.isEmpty ? [] : [pathRange])
  }

  /// Bytes of a cluster, which is the disk's block.
  package var clusterSize: UInt64 { 1 << UInt64(clusterBits) }
  var l2Entries: UInt64 { 1 << UInt64(l2Bits) }
  /// Entries of the L1 table.
  var l1Entries: UInt64 {
    let reach = clusterSize * l2Entries
    return size / reach + (size % reach == 0 ? 0 : 1)
  }
}
