// SPDX-License-Identifier: Apache-2.0
// What a worker asks of an image format, and what a format asks to have written.
//
// Invariants, for every format:
// - A format sees byte stores, never paths or descriptors, and writes to a store only by
//   the commit plans that it hands out (tools that create or repair write directly).
// - `place` changes nothing on the medium. A placement becomes durable by a commit plan
//   that covers its mark, and a plan is run only after the data it points to is durable.
// - Every size and offset read from a store is checked before use.

package import BlockIO
package import DiskModel
import SystemIO

/// Writes that make placements durable: stages in order, the store flushed after each.
package struct CommitPlan: Sendable {
  /// Bytes to write at an offset of the store.
  package struct Write: Sendable {
    /// Offset in bytes.
    package let offset: UInt64
    /// The bytes.
    package let bytes: [UInt8]
    /// When there are no bytes: so many zeroes.
    package let zeroes: UInt64

    /// A write from its parts.
    package init(offset: UInt64, bytes: [UInt8]) {
      self.offset = offset
      self.bytes = bytes
      self.zeroes = 0
    }

    /// A run of zeroes, within the store's length.
    package init(offset: UInt64, zeroes: UInt64) {
      self.offset = offset
      self.bytes = []
      self.zeroes = zeroes
    }
  }

  /// The mark up to which placements are durable once the plan has run.
  package let upTo: Mark
  /// The stages. No stage: nothing to do.
  package let stages: [[Write]]

  /// What the plan is run on when that is not the image's store: an image whose tables are in
  /// other files.
  package let target: (any ByteStore)?

  /// A plan from its parts.
  package init(upTo: Mark, stages: [[Write]], target: (any ByteStore)? = nil) {
    self.upTo = upTo
    self.stages = stages
    self.target = target
  }

  /// Runs the plan, on its own target if it has one. Blocks; may run on any thread, one plan
  /// at a time for a store.
  package func run(on store: any ByteStore) throws(CommitFailure) {
    let store = target ?? store
    for stage in stages {
      do throws(IOError) {
        for write in stage {
          if write.zeroes > 0 {
            try store.zero(at: write.offset, count: write.zeroes)
          } else {
            try store.write(write.bytes, at: write.offset)
          }
        }
      } catch { throw .write(error) }
      do throws(IOError) { try store.flush() } catch { throw .flush(error) }
    }
  }

  /// `run`, where whoever asked ends with the failure whichever it was.
  /// - Throws: `io`.
  func carryOut(on store: any ByteStore) throws(ImageError) {
    do throws(CommitFailure) { try run(on: store) } catch { throw ImageError(error.error) }
  }
}

/// How a format answers a discard or a write-zeroes of whole blocks.
package enum DiscardAnswer: Sendable, Equatable {
  /// Zero the blocks at their place, which is (or from now on shall be) this extent.
  case zero(Extent)
  /// So many blocks from the first need nothing done.
  case nothing(blocks: UInt64)
}

/// An image that is open as a disk. Used from one thread.
package protocol ImageFormat: AnyObject {
  /// Length of the disk in bytes, a multiple of 512.
  var size: UInt64 { get }
  /// Bytes of a block, a power of two from 512 on.
  var blockSize: UInt32 { get }
  /// Blocks that have a place in the store, committed or not.
  var allocatedBlocks: UInt64 { get }

  /// The backing devices by the numbers that extents bear, when the format has more or others
  /// than the store (0) and the base (1) that it was opened with; nil when it has just those.
  /// Device 0 is where first writes go. The list stays the same while the image is open. Some
  /// devices have no descriptor: they read through user space (compressed clusters, a base that
  /// is itself an image) and are never written.
  var devices: [any ByteStore]? { get }

  /// Whether what is written to may be written past the page cache by whoever has a block's
  /// place: its files keep their lengths while the image is open, and no page of 4096 bytes
  /// holds both a block and what the format itself writes.
  var isFixed: Bool { get }

  /// Where a block lives for reading: the longest run from it on that is mapped alike, up to
  /// `limit` blocks. `writable` when writes may go there without asking.
  func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent

  /// A place for a first write to a run of blocks, `whole` when the write covers them. The
  /// answer starts at the first block and may be shorter. A placement that is made now bears
  /// a new mark; a place that is there already, committed or not, bears 0.
  func place(_ blocks: BlockRange, whole: Bool) throws(ImageError) -> Placement

  /// A discard, or with `zeroing` a demand to read as zeroes from now on. Marks as in `place`.
  func discard(_ blocks: BlockRange, zeroing: Bool) throws(ImageError) -> DiscardAnswer

  /// What has to be written to make every placement up to a mark durable.
  func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan

  /// The plan up to this mark has run: its placements are durable.
  func committed(upTo mark: Mark)

  /// Space for first writes that a target may place by itself, if there is any that needs no
  /// more thought: each block of it, as long as `find` has it for reading only, goes there as
  /// `place` would have it, the rest of the block carried along. Asked only after `takeMarks`.
  func grant() -> Grant?

  /// The like where a block's place is not known beforehand: room for some first writes, which is the
  /// target's until it tells of them (`granted`). Asked for more when half of it is used; nil: there
  /// is none, and every first write is asked for. Throws as `place`. Asked only after `takeMarks`.
  func pool() throws(ImageError) -> Pool?

  /// From now on the target gives the marks: those of `place` and `discard` are provisional, greater
  /// than all others, and no plan has such placements until `marked` says which they have. False: it
  /// gives its own.
  func takeMarks() -> Bool

  /// The target has taken the placement with this provisional mark, under another.
  func marked(_ provisional: Mark, as mark: Mark)

  /// The mapping as a layer, where each block has one place that never changes; else nil.
  var layered: (any LayeredMapping)? { get }

  /// The target has placed blocks as granted, uncommitted under the extent's mark. Of blocks of a
  /// layer what was told before is no news.
  func granted(_ extent: Extent) throws(ImageError)

  /// A placement that came to nothing; its block is where it was before.
  func abandon(_ mark: Mark)

  /// Whether tables of the format's own, that are not at fixed places, lie in one of these ranges
  /// of bytes of device 0: another program may have put them where nothing was.
  func usesForTables(_ ranges: [Range<UInt64>]) throws(ImageError) -> Bool

  /// Placements that a former worker made and did not commit, in the order of their marks.
  func restore(_ extents: [Extent]) throws(ImageError)

  /// Gives the disk another length, rounded up to 512. Nothing may be uncommitted, and no target
  /// may serve the disk.
  ///
  /// - Throws: `badRequest` when it cannot be that long, `unsupported` when it can have no other
  ///   length; `io`.
  func resize(to newSize: UInt64) throws(ImageError)
}

extension ImageFormat {
  /// The store and the base, as they were given.
  package var devices: [any ByteStore]? { nil }
  /// Not known to be.
  package var isFixed: Bool { false }
  /// Other programs put tables behind whatever the file holds, placements included.
  package func usesForTables(_ ranges: [Range<UInt64>]) throws(ImageError) -> Bool { false }
  /// It cannot.
  package func resize(to newSize: UInt64) throws(ImageError) {
    throw ImageError(
      .unsupported, "a disk of \(size) bytes cannot be given another length: convert it")
  }
  /// Not known to be one.
  package var layered: (any LayeredMapping)? { nil }
  /// Every first write is asked for.
  package func grant() -> Grant? { nil }
  /// Every first write is asked for.
  package func pool() throws(ImageError) -> Pool? { nil }
  /// It gives its own.
  package func takeMarks() -> Bool { false }
  /// It gives its own.
  package func marked(_ provisional: Mark, as mark: Mark) {}
  /// Nothing was granted.
  package func granted(_ extent: Extent) throws(ImageError) {
    throw ImageError(
      .badRequest, "blocks \(extent.blocks.first)+\(extent.blocks.count) were not granted")
  }
}

/// A mapping of which only has to be known whether each block is in its place, and what is read
/// where it is not.
package protocol LayeredMapping: AnyObject {
  /// The blocks and their places.
  var layer: Layer { get }
  /// What lies under a block: the longest run from it on that does so alike, up to `limit`.
  func under(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent
  /// Reads which blocks are in their places, durably: from `block` on, a multiple of 64, the lowest bit
  /// of the first word being the first's. Bits past the last block are 0.
  func readPresent(
    from block: UInt64, into words: UnsafeMutableBufferPointer<UInt64>
  ) throws(ImageError)
}

/// An image that is only read: all that it has to know is where its blocks are.
package protocol ReadOnlyImage: ImageFormat {}

extension ReadOnlyImage {
  private var refusal: ImageError {
    ImageError(.badRequest, "the store is open for reading only")
  }

  /// All of them.
  package var allocatedBlocks: UInt64 { blockCount }
  /// Throws `badRequest`.
  package func place(_ blocks: BlockRange, whole: Bool) throws(ImageError) -> Placement {
    throw refusal
  }
  /// Throws `badRequest`.
  package func discard(
    _ blocks: BlockRange, zeroing: Bool
  ) throws(ImageError) -> DiscardAnswer { throw refusal }
  /// There is nothing to commit.
  package func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan {
    CommitPlan(upTo: mark, stages: [])
  }
  /// There is nothing to commit.
  package func committed(upTo mark: Mark) {}
  /// Nothing was placed.
  package func abandon(_ mark: Mark) {}
  /// Throws `badRequest` for any extent: it makes no placements.
  package func restore(_ extents: [Extent]) throws(ImageError) {
    guard extents.isEmpty else { throw refusal }
  }
}
