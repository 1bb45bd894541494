// SPDX-License-Identifier: Apache-2.0
// The footer and the dynamic header of a VHD image, and the geometry that follows from them.
// The byte tables and the commit order are in docs/formats/vhd.md; VhdHeader+Codec.swift reads
// and writes them.
//
// Invariants of a header that exists as a value (each checked on decoding):
// - both checksums were right;
// - the disk's size is a multiple of 512, above 0 and at most 2^50;
// - with a table: blocks are a power of two from 4 KiB to 256 MiB, and the table has an entry
//   for each block, of 2^24 at most, begins at a sector and lies within the file.

/// What a VHD image is.
package enum VhdKind: UInt32, Sendable {
  /// The disk's bytes, and a footer.
  case fixed = 2
  /// Blocks where they are needed.
  case dynamic = 3
  /// The blocks that differ from a base.
  case differencing = 4
}

/// A parent locator: where one form of the base's path stands. Offsets and sizes are in bytes.
struct VhdLocator: Sendable, Equatable {
  /// Four characters that say how the path is written.
  var code: [UInt8]
  var offset: UInt64
  /// Bytes of the path.
  var length: UInt64
  /// Bytes that are kept for it.
  var space: UInt64

  /// The sectors that hold the path.
  var data: Range<UInt64> { offset..<(offset + (length + 511) / 512 * 512) }
  /// The sectors that are kept for it, its path in any case.
  var room: Range<UInt64> { offset..<max(data.upperBound, offset + space) }
}

/// XenServer's map of the blocks whose sectors are all the image's own; it stands behind the
/// table. Offsets are in bytes.
///
/// A bit promises that the block's own bitmap is all ones; a clear bit promises nothing, so
/// blocks that fill up leave the map as it is.
struct VhdBatmap: Sendable, Equatable {
  static let cookie = Array("tdbatmap".utf8)
  /// The version of the images from which on libvhd refuses an image without a batmap.
  static let promisedFrom: UInt32 = 0x0001_0002
  /// The version of a creator `tap` that promises none.
  static let unpromised: UInt32 = 0x0001_0000

  /// Where its header stands, one sector.
  var headerOffset: UInt64
  /// Where the bits stand.
  var offset: UInt64
  /// Bytes of them, whole sectors.
  var size: UInt64
  /// The sum that the header has.
  var checksum: UInt32
}

/// The footer of a VHD image and its dynamic header, if it has one. Sizes are in bytes.
package struct VhdHeader: Sendable, Equatable {
  static let footerSize: UInt64 = 512
  static let dynamicSize: UInt64 = 1024
  static let largestDisk: UInt64 = 1 << 50
  static let mostEntries: UInt32 = 1 << 24
  /// A table entry of a block that has no place.
  static let unused: UInt32 = .max

  /// What it is.
  package var kind: VhdKind
  /// Length of the disk.
  package var size: UInt64
  /// Sixteen bytes that tell images apart.
  package var uuid: [UInt8]
  /// Who made it, four bytes.
  package var creator: [UInt8]
  /// The version of who made it. Of `tap` it says whether there is a batmap.
  package var creatorVersion: UInt32 = VhdBatmap.unpromised
  /// Seconds since 2000.
  package var timestamp: UInt32
  /// Where the table of blocks begins; 0 in a fixed image.
  package var tableOffset: UInt64 = 0
  /// Entries of the table.
  package var tableEntries: UInt32 = 0
  /// Bytes of a block of the table.
  package var tableBlock: UInt64 = 0
  /// Where the dynamic header begins.
  package var headerOffset: UInt64 = 0
  /// The base's identity; zeroes when it has none.
  package var baseUUID = [UInt8](repeating: 0, count: 16)
  /// The base's paths, of a differencing image, the preferred one first.
  package var basePaths: [String] = []
  /// The first of the base's paths.
  package var basePath: String? { basePaths.first }
  /// Whether the base has no identity: it is raw then, whatever it begins with.
  package var isBaseRaw: Bool { kind == .differencing && baseUUID.allSatisfy { $0 == 0 } }
  /// The base's format by name: a base with an identity is a VHD image.
  package var baseFormat: String? {
    guard kind == .differencing else { return nil }
    return isBaseRaw ? RawFormat.name : VhdFormat.name
  }
  /// Where the base's paths stand.
  var locators: [VhdLocator] = []
  /// XenServer's map, if there is one.
  var batmap: VhdBatmap?
  /// The footer as it was read, so that a rewrite keeps what it does not know.
  var footer: [UInt8] = []

  /// Bytes of the table, whole sectors.
  var tableSize: UInt64 { (UInt64(tableEntries) * 4 + 511) / 512 * 512 }

  /// Everything but blocks and the footer at the end: what no block may lie over.
  var structures: [(range: Range<UInt64>, name: String)] {
    guard kind != .fixed else { return [] }
    var found: [(range: Range<UInt64>, name: String)] = [
      (0..<Self.footerSize, "the footer's copy"),
      (headerOffset..<(headerOffset + Self.dynamicSize), "the dynamic header"),
      (tableOffset..<(tableOffset + tableSize), "the table"),
    ]
    for locator in locators where locator.length > 0 {
      found.append((locator.data, "a locator of the base"))
    }
    if let batmap {
      found.append((batmap.headerOffset..<(batmap.headerOffset + 512), "the batmap's header"))
      found.append((batmap.offset..<(batmap.offset + batmap.size), "the batmap"))
    }
    return found
  }

  /// Where all that the headers name ends, the room that is kept for locators with it: new
  /// blocks go behind that.
  var structuresEnd: UInt64 {
    max(
      structures.map(\.range.upperBound).max() ?? 0,
      locators.map(\.room.upperBound).max() ?? 0)
  }

  /// Bytes of the bitmap before each block.
  var bitmapSize: UInt64 { (tableBlock / 512 / 8 + 511) / 512 * 512 }
  /// Bytes of a block of the disk. In a fixed image a power of two that divides the disk, so
  /// that no block reaches into the footer.
  package var blockSize: UInt32 {
    guard kind == .fixed else { return UInt32(tableBlock) }
    return UInt32(1 << min(16, size.trailingZeroBitCount))
  }
}
