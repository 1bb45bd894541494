// SPDX-License-Identifier: Apache-2.0
// A raw image: a file or a device whose bytes are the disk's. Block b lives at b block sizes;
// everything is there and may be written, so nothing is ever placed or committed. The page is
// docs/formats/raw.md.

package import BlockIO
package import DiskModel

/// A file or a device as a disk. As a store it has no base.
package final class Raw: StoredImage {
  /// Length of the disk in bytes: that of the store, rounded up to 512.
  package let size: UInt64
  /// Bytes of a block, which means nothing here but the unit of questions.
  package let blockSize: UInt32 = 65536
  /// It has nothing but blocks.
  package let isFixed = true
  let store: any ByteStore
  let isWritable: Bool

  /// Opens a file or a device.
  ///
  /// - Throws: `badRequest` when it is empty, too long, or shall be written and cannot.
  package init(store: any ByteStore, writable: Bool) throws(ImageError) {
    if writable, !store.isWritable {
      throw ImageError(.badRequest, "\(store.name) is open for reading only")
    }
    guard let size = roundedUp(store.size, to: 512), size > 0, size < 1 << 62 else {
      throw ImageError(.badRequest, "\(store.name) has \(store.size) bytes, which is no disk")
    }
    self.store = store
    self.size = size
    isWritable = writable
  }

  /// All of them: what a sparse file leaves out is its file system's to know.
  package var allocatedBlocks: UInt64 { blockCount }

  private func extent(_ range: BlockRange) -> Extent {
    let place = Place.device(0, sector: range.first * UInt64(blockSize) / 512)
    return Extent(range, place, writable: isWritable)
  }

  /// Where a block lives; see `ImageFormat`.
  package func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    try checkBounds(BlockRange(block, 1))
    return extent(BlockRange(block, min(max(limit, 1), blockCount - block)))
  }

  /// Where the blocks are anyway.
  package func place(_ blocks: BlockRange, whole: Bool) throws(ImageError) -> Placement {
    try checkWritable()
    try checkBounds(blocks)
    return Placement(extent(blocks))
  }

  /// Zeroed where they are.
  package func discard(
    _ blocks: BlockRange, zeroing: Bool
  ) throws(ImageError) -> DiscardAnswer {
    try checkWritable()
    try checkBounds(blocks)
    return .zero(extent(blocks))
  }

  /// There is nothing to commit.
  package func commitPlan(upTo mark: Mark) -> CommitPlan { CommitPlan(upTo: mark, stages: []) }
  /// There is nothing to commit.
  package func committed(upTo mark: Mark) {}
  /// Nothing was placed.
  package func abandon(_ mark: Mark) {}

  /// Throws `badRequest` for any extent: a raw image makes no placements.
  package func restore(_ extents: [Extent]) throws(ImageError) {
    guard extents.isEmpty else {
      throw ImageError(.badRequest, "a raw disk has no uncommitted placements")
    }
  }
}
