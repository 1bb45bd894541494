// SPDX-License-Identifier: Apache-2.0
// The header of a sparse extent of a VMDK image: of hosted products (`KDMV`) and of ESX
// (`COWD`). The byte tables and the commit order are in docs/formats/vmdk.md; VmdkHeader+Codec.swift
// reads and writes them.
//
// Invariants of a header that exists as a value (each checked on decoding): grains are a
// power of two from 512 bytes to 2 MiB; tables have a power of two of entries, 512 at most
// (4096 for ESX); the directories have 2^23 entries at most and lie below sector 2^32.

/// The header of a sparse extent. Places and lengths are in sectors of 512 bytes.
package struct VmdkHeader: Sendable, Equatable {
  /// Flags of a hosted sparse extent.
  enum Flag {
    static let newlines: UInt32 = 1
    static let redundant: UInt32 = 2
    static let zeroGrains: UInt32 = 4
    static let compressed: UInt32 = 1 << 16
    static let markers: UInt32 = 1 << 17
    /// What this program knows of those that nobody may ignore.
    static let known: UInt32 = 0x3_FFFF
  }
  static let magic = Array("KDMV".utf8)
  static let esxMagic = Array("COWD".utf8)
  /// The place of the directory when the header at the end of the file has it.
  static let atEnd = UInt64.max
  static let mostTables: UInt64 = 1 << 23
  static let mostSectors: UInt64 = 1 << 32

  /// Whether it is ESX's kind.
  package var isESX = false
  /// 1 to 3.
  package var version: UInt32 = 1
  var flags: UInt32 = Flag.newlines | Flag.redundant
  /// Length of the extent.
  package var capacity: UInt64
  /// Length of a grain.
  package var grain: UInt64 = 128
  /// Where the descriptor is, 0 for none.
  var descriptorOffset: UInt64 = 0
  var descriptorSectors: UInt64 = 0
  /// Entries of a grain table.
  var tableEntries: UInt64 = 512
  /// Where the second directory is, 0 for none.
  var redundantOffset: UInt64 = 0
  /// Where the directory is.
  var directoryOffset: UInt64 = 0
  /// Sectors before the first grain.
  var overhead: UInt64 = 128

  /// Whether grains are compressed: then nothing is ever written in place.
  package var isCompressed: Bool { flags & Flag.compressed != 0 }
  /// Whether an entry of 1 means a grain of zeroes.
  var hasZeroGrains: Bool { flags & Flag.zeroGrains != 0 }
  /// Entries of the directory.
  var tables: UInt64 {
    let reach = grain * tableEntries
    return capacity / reach + (capacity % reach == 0 ? 0 : 1)
  }

  /// No grain begins before this sector: header and descriptor are not the disk's to write.
  var leastGrain: UInt64 { max(1, descriptorOffset + descriptorSectors) }

  init(capacity: UInt64) { self.capacity = capacity }
}
