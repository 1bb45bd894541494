// SPDX-License-Identifier: Apache-2.0
// The words in which formats and targets speak of where blocks live.

/// A run of blocks: `count` of them from block `first` on. The unit is the disk's block.
public struct BlockRange: Sendable, Hashable {
  /// The first block.
  public var first: UInt64
  /// How many blocks; at least one wherever a range is used.
  public var count: UInt64
  /// The block after the last.
  public var end: UInt64 { first + count }

  /// A run from its start and its length in blocks.
  public init(_ first: UInt64, _ count: UInt64 = 1) {
    self.first = first
    self.count = count
  }

  /// Whether a block lies in the run.
  public func contains(_ block: UInt64) -> Bool { block >= first && block < end }
}

/// Where a run of blocks lives, given for its first block; the others follow it.
public enum Place: Sendable, Hashable {
  /// A backing device by number (0 the store, 1 the base), from a 512-byte sector on. A
  /// device reads as zeroes past its end.
  case device(UInt16, sector: UInt64)
  /// Nowhere: the blocks read as zeroes.
  case zero

  /// The place `sectors` further on.
  public func advanced(by sectors: UInt64) -> Place {
    switch self {
    case .device(let number, let sector): .device(number, sector: sector + sectors)
    case .zero: .zero
    }
  }
}

/// The order in which placements were made: a mark is given to each uncommitted one, each
/// greater than all before it. 0 means committed.
public typealias Mark = UInt64

/// A run of blocks that are mapped alike.
public struct Extent: Sendable, Hashable {
  /// The blocks of the disk.
  public var blocks: BlockRange
  /// Where the first of them lives.
  public var place: Place
  /// Whether writes may go there; reads always may.
  public var writable: Bool
  /// The mark of an uncommitted extent, 0 of a committed one.
  public var mark: Mark

  /// An extent from its parts.
  public init(_ blocks: BlockRange, _ place: Place, writable: Bool, mark: Mark = 0) {
    self.blocks = blocks
    self.place = place
    self.writable = writable
    self.mark = mark
  }
}

/// Space handed over in advance: where first writes to a run of blocks go. Whoever makes them
/// gives each placement the mark after the last that was made.
public struct Grant: Sendable, Hashable {
  /// More marks than are ever made by grants before a format hears of them: a format that has
  /// granted something leaves so many free after the last that it knows.
  public static let room: Mark = 1 << 20

  /// The blocks.
  public var blocks: BlockRange
  /// Where the first of them goes; the others follow it.
  public var place: Place

  /// A grant from its parts.
  public init(_ blocks: BlockRange, _ place: Place) {
    self.blocks = blocks
    self.place = place
  }
}

/// What must happen to a block's place before a first write may reach it.
public enum Preparation: Sendable, Hashable {
  /// Nothing: the place holds the block, or the write covers it whole.
  case none
  /// Copy what the write does not cover from there.
  case copy(from: Place)
  /// Zero what the write does not cover.
  case zero
}

/// A format's answer to a fault: where the blocks go, and what must be done first.
public struct Placement: Sendable, Hashable {
  /// The run of blocks that is answered; its first block is the one asked for.
  public var extent: Extent
  /// What precedes the write.
  public var preparation: Preparation

  /// A placement from its parts.
  public init(_ extent: Extent, _ preparation: Preparation = .none) {
    self.extent = extent
    self.preparation = preparation
  }
}
