// SPDX-License-Identifier: Apache-2.0
// How a disk is cut into blocks. All arithmetic between bytes, blocks and places of the engine in
// user space.

import DiskModel

/// The size of a disk and of its blocks.
struct DiskGeometry {
  /// Bytes of the disk.
  let size: UInt64
  /// Bytes of a block, and the exponents of that in bytes and in sectors.
  let blockSize: UInt64
  let shift: UInt64
  let sectorShift: UInt64
  /// Blocks, the last of which may be short.
  let blocks: UInt64

  init(size: UInt64, blockSize: UInt32) {
    precondition(blockSize >= 512 && blockSize & (blockSize - 1) == 0, "a block's size")
    precondition(size > 0 && size % 512 == 0 && size < 1 << 56, "a disk's size")
    self.size = size
    self.blockSize = UInt64(blockSize)
    shift = UInt64(blockSize.trailingZeroBitCount)
    sectorShift = shift - 9
    blocks = (size + UInt64(blockSize) - 1) >> shift
  }

  /// The byte of its device where a byte of the disk lives.
  @inline(__always)
  func address(_ run: Run, _ byte: UInt64) -> UInt64 {
    run.sector << 9 + (byte - run.first << shift)
  }

  /// The end of a piece that ends before a block and with its request, both in bytes of the disk.
  @inline(__always)
  func pieceEnd(_ end: UInt64, before block: UInt64) -> UInt64 {
    block >= blocks ? end : min(end, block << shift)
  }

  /// The block up to which a request that ends at this byte covers blocks wholly. The last block
  /// of the disk may be short, and is covered up to the disk's end.
  @inline(__always)
  func coveredEnd(_ end: UInt64) -> UInt64 {
    end == size ? blocks : end >> shift
  }

  /// Whether a block begins at a byte.
  @inline(__always)
  func isAligned(_ byte: UInt64) -> Bool { byte & (blockSize - 1) == 0 }

  /// Bytes of a block that lie within the disk.
  func length(of block: UInt64) -> UInt64 { min(blockSize, size - block << shift) }

  /// Whether blocks are some, and of the disk.
  func contains(_ range: BlockRange) -> Bool {
    range.count > 0 && range.first < blocks && range.count <= blocks - range.first
  }

  /// An extent as the map keeps it.
  func run(_ extent: Extent) -> Run {
    Run(
      first: extent.blocks.first, end: extent.blocks.end, place: Run.pack(extent.place),
      mark: extent.mark, writable: extent.writable)
  }
}
