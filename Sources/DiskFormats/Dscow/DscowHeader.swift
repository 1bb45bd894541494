// SPDX-License-Identifier: Apache-2.0
// The header of a dscow store and the geometry that follows from it. The byte table and
// the commit order are in docs/formats/dscow.md; DscowHeader+Codec.swift reads and writes it.
//
// Invariants of a header that exists as a value (each checked on decoding):
// - the block size is a power of two from 4 KiB to 4 MiB; the size a multiple of 512, from
//   512 bytes to 64 TiB;
// - the bitmap begins after both header copies and ends, rounded up to 4096, at or before
//   the first block, or begins behind the last; both begin at multiples of 4096, so metadata
//   and data share no page;
// - the first block begins at a multiple of the block size, and the end of the last one
//   fits 63 bits.

/// What identifies the base that a store was made from.
package struct DscowBase: Sendable, Equatable {
  /// Its path, as it was given when the store was made.
  package var path: String
  /// Its length in bytes.
  package var size: UInt64
  /// Its modification time in nanoseconds since 1970; 0 when that means nothing.
  package var modified: UInt64
  /// CRC-32C of samples of its contents; see `Dscow.fingerprint`.
  package var fingerprint: UInt32

  /// A base from its parts.
  package init(path: String, size: UInt64, modified: UInt64, fingerprint: UInt32) {
    self.path = path
    self.size = size
    self.modified = modified
    self.fingerprint = fingerprint
  }
}

/// The header of a dscow store. Offsets and sizes are in bytes unless they say otherwise.
package struct DscowHeader: Sendable, Equatable {
  /// Bytes of one of the two copies, which stand at the start of the store.
  package static let copySize = 4096
  /// The smallest block in bytes.
  package static let smallestBlock: UInt32 = 4096
  /// The largest block in bytes.
  package static let largestBlock: UInt32 = 4 << 20
  /// The largest disk in bytes: 64 TiB.
  package static let largestDisk: UInt64 = 64 << 40
  /// The first block of a new store lies at a multiple of this, also where blocks are smaller: what a
  /// guest aligns stays aligned on what is below (stripes, chunks of a thin pool), and the blocks can
  /// become so large later.
  static let firstBlockUnit: UInt64 = 65536
  /// The bitmap is read and written in pages of so many bytes.
  static let pageSize: UInt64 = 4096
  /// A compatible feature: the store's blocks are being written into its base, which therefore
  /// may differ from what the store knows of it.
  static let committing: UInt64 = 1
  /// A flag of the stamp: the base was flushed, its inode too, before it was stamped, so that no
  /// power cut turns back what the stamp says.
  static let stampIsDurable: UInt32 = 1
  /// A flag of the stamp: while the store is committed, there is a checksum of what the commit
  /// leaves alone.
  static let hasUntouched: UInt32 = 2
  /// An incompatible feature: the bitmap lies behind the blocks.
  static let bitmapBehind: UInt64 = 1

  /// Counts the header's changes: of two valid copies the one with the greater number holds.
  package var sequence: UInt64
  /// Features that a program need not know to use the store.
  package var compatible: UInt64
  /// Features that a program must know to write to the store.
  package var readOnlyCompatible: UInt64
  /// Length of the disk.
  package let size: UInt64
  /// Bytes of a block.
  package let blockSize: UInt32
  /// Where block 0 lives in the store; block b lives b block sizes further on.
  package let firstBlock: UInt64
  /// Where the bitmap begins.
  package let bitmapOffset: UInt64
  /// The base, nil for a store that has none.
  package var base: DscowBase?
  /// Flags of the stamp.
  var stampFlags: UInt32 = 0
  /// CRC-32C of the samples of the base in blocks that the store does not have, while the store
  /// is committed into it.
  var untouched: UInt32 = 0
  /// The copy that this header was read from, so that a rewrite keeps what it does not know.
  var raw: [UInt8]

  /// How many blocks the disk has, the last of them perhaps in part.
  package var blocks: UInt64 { (size - 1) / UInt64(blockSize) + 1 }
  /// The bitmap's length in 32-bit words.
  package var bitmapCount: UInt64 { (blocks + 31) / 32 }
  /// The bitmap's length in bytes, whole pages.
  var bitmapBytes: UInt64 { (bitmapCount * 4 + Self.pageSize - 1) / Self.pageSize * Self.pageSize }
  /// Where the last block ends.
  var blocksEnd: UInt64 { blocksEnd(size: size, blockSize: blockSize) }
  /// Where the last block would end, with another size of the disk or of its blocks.
  func blocksEnd(size: UInt64, blockSize: UInt32) -> UInt64 {
    let unit = UInt64(blockSize)
    return firstBlock + ((max(size, 1) - 1) / unit + 1) * unit
  }
  /// Whether the bitmap lies behind the blocks.
  var isBitmapBehind: Bool { bitmapOffset >= blocksEnd }
  /// The length that a store must have.
  package var storeSize: UInt64 { max(blocksEnd, bitmapOffset + bitmapBytes) }
  /// Whether the store is being committed into its base.
  package var isCommitting: Bool { compatible & Self.committing != 0 }

  /// Lays out a disk. Throws `badRequest` for a size or block size outside the limits.
  init(size: UInt64, blockSize: UInt32, base: DscowBase?) throws(ImageError) {
    try Self.check(blockSize: blockSize, size: size, .badRequest)
    self.sequence = 1
    self.compatible = 0
    self.readOnlyCompatible = 0
    self.size = size
    self.blockSize = blockSize
    self.bitmapOffset = 2 * UInt64(Self.copySize)
    let blocks = (size - 1) / UInt64(blockSize) + 1
    // Within the limits nothing here comes near an overflow: the bitmap is 2 GiB at most.
    let metadata = self.bitmapOffset + (blocks + 7) / 8
    let unit = max(UInt64(blockSize), Self.firstBlockUnit)
    self.firstBlock = (metadata + unit - 1) / unit * unit
    self.base = base
    self.raw = [UInt8](repeating: 0, count: Self.copySize)
  }

  /// The same store with another size, its bitmap elsewhere, and, if that is said, other blocks.
  /// Throws `badRequest` for a size or a block size outside the limits.
  func with(
    size: UInt64, bitmapOffset: UInt64, blockSize: UInt32? = nil
  ) throws(ImageError) -> DscowHeader {
    let blockSize = blockSize ?? self.blockSize
    try Self.check(blockSize: blockSize, size: size, .badRequest)
    var changed = try DscowHeader(
      size: size, blockSize: blockSize, firstBlock: firstBlock, bitmapOffset: bitmapOffset,
      raw: raw)
    changed.sequence = sequence
    changed.compatible = compatible
    changed.readOnlyCompatible = readOnlyCompatible
    changed.base = base
    changed.stampFlags = stampFlags
    changed.untouched = untouched
    return changed
  }

  /// A header from fields that have been read. Throws `corrupt` when one contradicts the
  /// others.
  init(
    size: UInt64, blockSize: UInt32, firstBlock: UInt64, bitmapOffset: UInt64, raw: [UInt8]
  ) throws(ImageError) {
    try Self.check(blockSize: blockSize, size: size, .corrupt)
    self.sequence = 0
    self.compatible = 0
    self.readOnlyCompatible = 0
    self.size = size
    self.blockSize = blockSize
    self.firstBlock = firstBlock
    self.bitmapOffset = bitmapOffset
    self.raw = raw
    try checkPlaces()
  }

  /// Throws for a block size or a disk size outside the limits.
  static func check(
    blockSize: UInt32, size: UInt64, _ code: ImageError.Code
  ) throws(ImageError) {
    guard blockSize.nonzeroBitCount == 1, blockSize >= smallestBlock, blockSize <= largestBlock
    else {
      throw ImageError(
        code, "block size \(blockSize) is not a power of two from 4 KiB to 4 MiB")
    }
    guard size > 0, size % 512 == 0, size <= largestDisk else {
      throw ImageError(
        code, "disk size \(size) is not a multiple of 512 from 512 bytes to 64 TiB")
    }
  }

  private func checkPlaces() throws(ImageError) {
    let (bitmapEnd, overflow) = bitmapOffset.addingReportingOverflow(bitmapBytes)
    guard !overflow, bitmapEnd <= UInt64(Int64.max), bitmapOffset % Self.pageSize == 0,
      bitmapOffset >= 2 * UInt64(Self.copySize)
    else { throw ImageError(.corrupt, "the header places the bitmap at \(bitmapOffset)") }
    let dataSize = blocks * UInt64(blockSize)
    guard firstBlock % UInt64(blockSize) == 0, firstBlock >= 2 * UInt64(Self.copySize),
      firstBlock <= UInt64(Int64.max) - dataSize,
      firstBlock >= bitmapEnd || bitmapOffset >= firstBlock + dataSize
    else { throw ImageError(.corrupt, "the header places the first block at \(firstBlock)") }
  }
}
