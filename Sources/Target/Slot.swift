// SPDX-License-Identifier: Apache-2.0
// A request that could not be served at once.

import Posix

/// The state of one request under way. Lives in a fixed table; named by its index.
struct Slot {
  /// Where a request stands. It has at most one backing operation or fault at a time.
  enum State: UInt8 {
    /// The slot is in no use.
    case free
    /// Earlier requests to the same bytes go first.
    case blocked
    /// To be stepped.
    case ready
    /// A backing operation is under way.
    case io
    /// A fault is unanswered.
    case fault
    /// Waits for what `waitsFor` says.
    case parked
    /// All done but the flush.
    case flushing
  }

  /// What the backing operation under way is for.
  enum Phase: UInt8 {
    /// A piece of the request at a place that is mapped, or answered for once.
    case piece
    /// Reading a piece of what a partial write does not cover.
    case copyRead
    /// Writing a piece of a block that is put together.
    case copyWrite
    /// Writing a placement that the request covers.
    case placedWrite
    /// Zeroing a placement or a discarded range.
    case zeroing
  }

  var state = State.free
  var phase = Phase.piece
  /// The device of the backing operation that was begun last.
  var device: UInt16 = 0
  /// It looks whether there is space, for all that wait for some.
  var isProbe = false
  var operation = TargetRequest.Operation.read
  var isForced = false
  var keepsSpace = false
  /// A write fault asked for whole blocks.
  var isWhole = false
  /// The fault was answered and the placement is to be begun.
  var isAnswered = false
  /// The placement is used once and not remembered.
  var isTemporary = false
  /// In the order of requests (see `Order`).
  var isOrdered = false

  /// Who is told, and by what tag; -1: a flush of our own.
  var owner: Int32 = -1
  var tag: UInt64 = 0
  var sequence: UInt64 = 0
  /// Earlier requests that go first.
  var blockers: Int32 = 0
  /// What a parked slot waits for: the slot that holds the block, or a `Wait`.
  var waitsFor: Int32 = 0

  var buffer: UnsafeMutableRawPointer?
  var offset: UInt64 = 0
  var end: UInt64 = 0
  /// Everything before this byte of the disk is done.
  var cursor: UInt64 = 0
  /// The end of the piece under way.
  var pieceEnd: UInt64 = 0

  /// The fault that is unanswered, 0: none.
  var fault: FaultID = 0
  /// The blocks that a fault or a placement holds; empty: none.
  var holdFirst: UInt64 = 0
  var holdEnd: UInt64 = 0
  /// The placement under way and what precedes it.
  var placement = Run(first: 0, end: 0, place: Run.zero, mark: 0, writable: false)
  var copies = false
  var source: UInt64 = Run.zero
  /// A piece of a block that is put together.
  var scratch: UnsafeMutableRawPointer?
  /// The piece, in bytes of the block: everything before it is at its new place.
  var copied: UInt64 = 0
  var copyEnd: UInt64 = 0

  /// What a slot may wait for beside a slot that holds a block.
  enum Wait {
    static let invalidation: Int32 = -1
    static let room: Int32 = -2
    static let scratch: Int32 = -3
    static let space: Int32 = -4
  }
}

/// The byte range of a request in the order of arrival, kept apart from the slots since it
/// is looked through for each request that arrives while others are under way.
struct Order {
  var offset: UInt64
  var end: UInt64
  var sequence: UInt64
  var slot: Int32
  var isRead: Bool

  /// Whether one of two requests has to wait for the other.
  @inline(__always)
  func conflicts(_ other: Order) -> Bool {
    offset < other.end && other.offset < end && !(isRead && other.isRead)
  }
}

/// Blocks that a fault or a placement holds.
struct Hold {
  var first: UInt64
  var end: UInt64
  var slot: Int32
  /// Only a read asks for them: nothing is being written there.
  var isRead: Bool
}
