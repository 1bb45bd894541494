// The footer and the dynamic header of a VHD image, and the geometry that follows from them.
// The byte tables and the commit order are in docs/formats/vhd.md; VhdHeader+Codec.swift reads
// and writes them.
//
// Invariants of a header that exists as a value (each checked on decoding):
// - both checksums were right;
// - the disk's size is a multiple of 512, above 0 and at most 2^50;
// - with a table: blocks are a power of two from 4 KiB to 256 MiB, and the table has an entry
//   for each block, of 2^24 at most, and begins at a sector.

/// What a VHD image is.
public enum VhdKind: UInt32, Sendable {
  /// The disk's bytes, and a footer.
  case fixed = 2
  /// Blocks where they are needed.
  case dynamic = 3
  /// The blocks that differ from a base.
  case differencing = 4
}

/// The footer of a VHD image and its dynamic header, if it has one. Sizes are in bytes.
public struct VhdHeader: Sendable, Equatable {
  static let footerSize: UInt64 = 512
  static let largestDisk: UInt64 = 1 << 50
  static let mostEntries: UInt32 = 1 << 24
  /// A table entry of a block that has no place.
  static let unused: UInt32 = .max

  /// What it is.
  public var kind: VhdKind
  /// Length of the disk.
  public var size: UInt64
  /// Sixteen bytes that tell images apart.
  public var uuid: [UInt8]
  /// Who made it, four bytes.
  public var creator: [UInt8]
  /// Seconds since 2000.
  public var timestamp: UInt32
  /// Where the table of blocks begins; 0 in a fixed image.
  public var tableOffset: UInt64 = 0
  /// Entries of the table.
  public var tableEntries: UInt32 = 0
  /// Bytes of a block of the table.
  public var tableBlock: UInt64 = 0
  /// Where the dynamic header begins.
  public var headerOffset: UInt64 = 0
  /// The base's identity; zeroes when it has none.
  public var baseUUID = [UInt8](repeating: 0, count: 16)
  /// The base's path, of a differencing image.
  public var basePath: String?
  /// Where the base's path stands, in bytes of the file.
  var locators: [Range<UInt64>] = []
  /// The footer as it was read, so that a rewrite keeps what it does not know.
  var footer: [UInt8] = []

  /// Bytes of the bitmap before each block.
  var bitmapSize: UInt64 { (tableBlock / 512 / 8 + 511) / 512 * 512 }
  /// Bytes of a block of the disk. In a fixed image a power of two that divides the disk, so
  /// that no block reaches into the footer.
  public var blockSize: UInt32 {
    guard kind == .fixed else { return UInt32(tableBlock) }
    return UInt32(1 << min(16, size.trailingZeroBitCount))
  }
}
