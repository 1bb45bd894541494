// SPDX-License-Identifier: Apache-2.0
// The words in which formats and targets speak of where blocks live.

/// A run of blocks: `count` of them from block `first` on. The unit is the disk's block.
package struct BlockRange: Sendable, Hashable {
  /// The first block.
  package var first: UInt64
  /// How many blocks; at least one wherever a range is used.
  package var count: UInt64
  /// The block after the last.
  package var end: UInt64 { first + count }

  /// A run from its start and its length in blocks.
  package init(_ first: UInt64, _ count: UInt64 = 1) {
    self.first = first
    self.count = count
  }

  /// Whether a block lies in the run.
  package func contains(_ block: UInt64) -> Bool { block >= first && block < end }
}

/// Where a run of blocks lives, given for its first block; the others follow it.
package enum Place: Sendable, Hashable {
  /// A backing device by number (0 the store, 1 the base), from a 512-byte sector on. A
  /// device reads as zeroes past its end.
  case device(UInt16, sector: UInt64)
  /// Nowhere: the blocks read as zeroes.
  case zero

  /// The place `sectors` further on.
  package func advanced(by sectors: UInt64) -> Place {
    switch self {
    case .device(let number, let sector): .device(number, sector: sector + sectors)
    case .zero: .zero
    }
  }
}

/// The order in which placements were made: a mark is given to each uncommitted one, each
/// greater than all before it. 0 means committed.
package typealias Mark = UInt64

extension Mark {
  /// From here on marks are provisional: see `ImageFormat.takeMarks`.
  package static let firstProvisional: Mark = 1 << 63

  /// Whether it only tells a placement from others until the target gives it a mark.
  package var isProvisional: Bool { self >= Self.firstProvisional }
}

/// A run of blocks that are mapped alike.
package struct Extent: Sendable, Hashable {
  /// The blocks of the disk.
  package var blocks: BlockRange
  /// Where the first of them lives.
  package var place: Place
  /// Whether writes may go there; reads always may.
  package var writable: Bool
  /// The mark of an uncommitted extent, 0 of a committed one.
  package var mark: Mark

  /// An extent from its parts.
  package init(_ blocks: BlockRange, _ place: Place, writable: Bool, mark: Mark = 0) {
    self.blocks = blocks
    self.place = place
    self.writable = writable
    self.mark = mark
  }
}

/// Space handed over in advance: where first writes to a run of blocks go. Whoever makes them
/// gives each placement the mark after the last that was made.
package struct Grant: Sendable, Hashable {
  /// The blocks.
  package var blocks: BlockRange
  /// Where the first of them goes; the others follow it.
  package var place: Place

  /// A grant from its parts.
  package init(_ blocks: BlockRange, _ place: Place) {
    self.blocks = blocks
    self.place = place
  }
}

/// Space handed over in advance, piece by piece: each first write to a run of blocks goes to the
/// next of some places, whichever of the blocks it is to.
package struct Pool: Sendable, Hashable {
  /// The blocks.
  package var blocks: BlockRange
  /// The first of the places, each long enough for a block.
  package var place: Place
  /// From one place to the next, in sectors.
  package var stride: UInt64
  /// How many places.
  package var count: UInt32

  /// A pool from its parts.
  package init(_ blocks: BlockRange, _ place: Place, stride: UInt64, count: UInt32) {
    self.blocks = blocks
    self.place = place
    self.stride = stride
    self.count = count
  }
}

/// The blocks of a disk of which each has one place where it is, if it is there at all.
package struct Layer: Sendable, Hashable {
  /// All blocks of the disk.
  package var blocks: BlockRange
  /// Where the first of them has its place; the others follow it.
  package var place: Place

  /// A layer from its parts.
  package init(_ blocks: BlockRange, _ place: Place) {
    self.blocks = blocks
    self.place = place
  }
}

/// What must happen to a block's place before a first write may reach it.
package enum Preparation: Sendable, Hashable {
  /// Nothing: the place holds the block, or the write covers it whole.
  case none
  /// Copy what the write does not cover from there.
  case copy(from: Place)
  /// Zero what the write does not cover.
  case zero
}

/// A format's answer to a fault: where the blocks go, and what must be done first.
package struct Placement: Sendable, Hashable {
  /// The run of blocks that is answered; its first block is the one asked for.
  package var extent: Extent
  /// What precedes the write.
  package var preparation: Preparation

  /// A placement from its parts.
  package init(_ extent: Extent, _ preparation: Preparation = .none) {
    self.extent = extent
    self.preparation = preparation
  }
}
