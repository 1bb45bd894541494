// SPDX-License-Identifier: Apache-2.0
// The contract between whoever serves a disk (the target) and whoever knows where its
// blocks live (the worker), as Swift types: docs/target.md in words, this in values.
//
// Invariants, for both engines:
// - A fault stays with the target until it is answered; an answer names its fault.
// - An answer that is wrong (unknown fault, blocks outside the disk, device number too
//   large) is refused and changes nothing.
// - A flush fault comes only when every write that it covers is complete on its device
//   and that device has been flushed.

/// Names one fault of one target, for as long as it is unanswered. Never 0.
package typealias FaultID = UInt64

/// A question from the target, or news that a worker has to know.
package enum Fault: Sendable, Equatable {
  /// A read found no mapping for `blocks.first`. `blocks` is what the request still wants,
  /// in a row; an answer must start at the first and may cover fewer or more.
  case read(FaultID, blocks: BlockRange)
  /// A write found no writable mapping. When `whole`, the write covers all of `blocks`
  /// entirely; otherwise `blocks` is one block, written in part.
  case write(FaultID, blocks: BlockRange, whole: Bool)
  /// A flush with uncommitted mappings: every mapping with a mark up to `upTo` has its data
  /// durable on its device and may now be made durable itself.
  case flush(FaultID, upTo: Mark)
  /// A discard (`zeroing` false) or a write-zeroes (true) of whole blocks that are not
  /// waiting for another answer. `blocks` is what the request still wants.
  case discard(FaultID, blocks: BlockRange, zeroing: Bool)
  /// A placement with this mark came to nothing: its device failed with errno `code`.
  case mapError(block: UInt64, mark: Mark, code: Int32)
  /// The blocks have no mapping any more, and no request is under way to the old place.
  case invalidateDone(BlockRange)
  /// A first write went where a grant let it: the extent is uncommitted, under the mark after
  /// the last. Told before every fault that was raised after it. Of blocks of a layer it is told
  /// before the flush that covers it, or before a discard of blocks around it, and perhaps again.
  case placed(Extent)
  /// The target has taken the placement with this provisional mark, and the mark is another. Told
  /// before every fault that was raised after it.
  case marked(Mark, as: Mark)
}

extension Fault {
  /// The number that an answer has to name; nil for news.
  package var id: FaultID? {
    switch self {
    case .read(let id, _), .write(let id, _, _), .flush(let id, _), .discard(let id, _, _): id
    case .mapError, .invalidateDone, .placed, .marked: nil
    }
  }
}

/// What a worker says to its target.
package enum Answer: Sendable, Equatable {
  /// For a read, write or discard fault: the blocks are there. Remembered, unless
  /// `temporary`. The extent's mark, when not 0, makes it uncommitted: the next flush is
  /// held for it. For a discard fault the device's range is zeroed at that place.
  case map(FaultID, Placement, temporary: Bool = false)
  /// A mapping that was not asked for.
  case prime(Extent)
  /// For a discard fault: so many blocks from its first need nothing done.
  case done(FaultID, blocks: UInt64)
  /// For any fault: fail the waiting requests with this errno.
  case fail(FaultID, code: Int32)
  /// For a flush fault: every mapping up to its mark is durable.
  case flushDone(FaultID)
  /// Forget these blocks and say `invalidateDone` when nothing can reach the old place.
  case invalidate(BlockRange)
}

/// Why an answer was refused. Nothing has changed.
package enum AnswerRefusal: Error, Sendable, Equatable {
  /// No such fault is waiting, or it is of another kind.
  case unknownFault(FaultID)
  /// The blocks are not the ones asked for, or lie outside the disk.
  case badBlocks(BlockRange)
  /// There is no such backing device, or it may not be written.
  case badDevice(UInt16)
  /// The mark is not greater than every mark before it.
  case badMark(Mark)
  /// The mapping overlaps one that is not yet committed or is being prepared.
  case overlap(BlockRange)
}

/// What both engines offer to a worker. Everything happens on the worker's one thread.
package protocol TargetEngine: AnyObject {
  /// Bytes of a block.
  var blockSize: UInt32 { get }
  /// Length of the disk in 512-byte sectors.
  var sectors: UInt64 { get }
  /// Every uncommitted mapping, in the order of the marks: what a new worker starts from.
  func uncommitted() -> [Extent]
  /// The next fault that the worker has not seen yet.
  func nextFault() -> Fault?
  /// Whether it can place first writes by itself.
  var takesGrants: Bool { get }
  /// First writes to blocks that are mapped for reading may go where the grant says, without a
  /// fault, and are told as `placed`. The worker's own marks are provisional from then on.
  /// Takes the place of any grant before it; nil takes it back. It ends with the worker.
  func grant(_ grant: Grant?) throws(AnswerRefusal)
  /// As `grant`, the writes going to the places of a pool. One for the same blocks waits until the
  /// one before it is used up; while one waits there is no third.
  func pool(_ pool: Pool) throws(AnswerRefusal)
  /// Whether it gives the marks: a provisional one in an answer is told as `marked`, or as `mapError`.
  var givesMarks: Bool { get }
  /// Whether it can be told of a layer.
  var takesLayers: Bool { get }
  /// Each block of the disk has one place, and is there as soon as it is said to be (`present`, or
  /// by an answer) or has been written. What is primed with another place lies under it: it is the
  /// block's as long as it is not there. Stays so when the worker dies.
  func layer(_ layer: Layer) throws(AnswerRefusal)
  /// The blocks from `block` on, a multiple of 64, whose bits are set are there, the lowest bit of
  /// the first word being the first's.
  func present(from block: UInt64, _ words: UnsafeBufferPointer<UInt64>) throws(AnswerRefusal)
  /// Takes an answer.
  func answer(_ answer: Answer) throws(AnswerRefusal)
}

extension TargetEngine {
  /// It does not, unless it says otherwise.
  package var givesMarks: Bool { false }
  /// Refuses any.
  package func pool(_ pool: Pool) throws(AnswerRefusal) { throw .badBlocks(pool.blocks) }
  /// It cannot, unless it says otherwise.
  package var takesGrants: Bool { false }
  /// It cannot, unless it says otherwise.
  package var takesLayers: Bool { false }
  /// Refuses any.
  package func layer(_ layer: Layer) throws(AnswerRefusal) { throw .badBlocks(layer.blocks) }
  /// There is no layer.
  package func present(
    from block: UInt64, _ words: UnsafeBufferPointer<UInt64>
  ) throws(AnswerRefusal) { throw .badBlocks(BlockRange(block)) }
  /// Refuses any.
  package func grant(_ grant: Grant?) throws(AnswerRefusal) {
    if let grant { throw .badBlocks(grant.blocks) }
  }
}
