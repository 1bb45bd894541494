// The engine of the contract in the kernel: the same words, said to /dev/dmu/NAME.
//
// Invariants:
// - One thread. The module checks every answer; what it refuses has changed nothing.
// - The module counts marks on across workers, a format starts from what it restores. Marks
//   beyond those of the dump are therefore moved by `shift`, both ways.
// - A node that fails (the device is gone) yields no more faults; `failure` says why.

public import DMU
import Glibc
public import Posix

/// The contract over the device-mapper target `userspace`.
public final class KernelTarget: TargetEngine {
  /// Bytes of a block.
  public let blockSize: UInt32
  /// Length in 512-byte sectors.
  public let sectors: UInt64
  /// Why the node is of no use any more.
  public private(set) var failure: IOError?
  /// The descriptor to wait on: readable when there are faults.
  public var descriptor: Int32 { node.descriptor.raw }

  private let node: Node
  private var restored: [Extent] = []
  /// The greatest mark of the dump, and how far later ones are moved.
  private var dumped: Mark = 0
  private var shift: Mark = 0
  private var highest: Mark = 0
  /// Unanswered discards: their answers are said otherwise.
  private var discards: Set<FaultID> = []

  /// Shakes hands with the module and takes up what a former worker left. Throws: what the
  /// node says; EPROTO when it speaks another version.
  public init(_ node: Node) throws(IOError) {
    self.node = node
    let results = try node.answer([.getVersion, .dump])
    guard results == [0, 0] else {
      throw IOError(results.first { $0 != 0 } ?? EPROTO, "shake hands with", "a dmu node")
    }
    var geometry: Message.Geometry?
    var last: Mark?
    var found: [Extent] = []
    while last == nil || geometry == nil {
      guard let message = try node.next(within: 10_000) else {
        throw IOError(ETIMEDOUT, "shake hands with", "a dmu node")
      }
      switch message {
      case .version(let it): geometry = it
      case .uncommitted(let it): found.append(Self.extent(it))
      case .dumpDone(let mark): last = mark
      default: break
      }
    }
    guard let geometry, geometry.version == 1 else {
      throw IOError(EPROTO, "shake hands with", "a dmu node")
    }
    blockSize = geometry.blockSectors * 512
    sectors = geometry.sectors
    restored = found
    dumped = found.last?.mark ?? 0
    highest = dumped
    shift = (last ?? 0) - dumped
  }

  private static func extent(_ it: Message.Uncommitted) -> Extent {
    let place: Place =
      it.device == DMU.Answer.zeroDevice ? .zero : .device(it.device, sector: it.sector)
    return Extent(
      BlockRange(it.block, it.count), place, writable: it.writable, mark: it.mark)
  }

  /// What the module had uncommitted when this worker came.
  public func uncommitted() -> [Extent] { restored }

  private func toKernel(_ mark: Mark) -> Mark { mark > dumped ? mark + shift : mark }
  private func fromKernel(_ mark: Mark) -> Mark {
    mark > dumped + shift ? mark - shift : min(mark, dumped)
  }

  /// The next fault; nil when there is none now, or when the node has failed.
  public func nextFault() -> Fault? {
    guard failure == nil else { return nil }
    do throws(IOError) {
      while let message = try node.next() {
        if let fault = fault(of: message) { return fault }
      }
    } catch {
      failure = error
    }
    return nil
  }

  private func fault(of message: Message) -> Fault? {
    switch message {
    case .fault(let id, let block, let count, let write, let whole):
      let blocks = BlockRange(block, count)
      return write ? .write(id, blocks: blocks, whole: whole) : .read(id, blocks: blocks)
    case .flush(let id, let mark): return .flush(id, upTo: fromKernel(mark))
    case .discard(let id, let block, let count, let zeroing):
      discards.insert(id)
      return .discard(id, blocks: BlockRange(block, count), zeroing: zeroing)
    case .mapError(let block, let mark, let code):
      return .mapError(block: block, mark: fromKernel(mark), code: code)
    case .invalidateDone(let block, let count): return .invalidateDone(BlockRange(block, count))
    case .syncDone, .version, .statistic, .uncommitted, .dumpDone, .unknown: return nil
    }
  }

  /// Gives an answer. Throws what the module had against it, and then nothing has changed.
  public func answer(_ answer: Answer) throws(AnswerRefusal) {
    let code: Int32
    do throws(IOError) {
      code = try give(answer)
    } catch {
      failure = error
      throw refusal(answer, error.code)
    }
    guard code == 0 else { throw refusal(answer, code) }
    switch answer {
    case .map(let id, _, _), .done(let id, _), .fail(let id, _): discards.remove(id)
    case .prime, .flushDone, .invalidate: break
    }
    if let mark = Self.extent(of: answer)?.mark { highest = max(highest, mark) }
  }

  /// An answer that finds no memory in the kernel is given again.
  private func give(_ answer: Answer) throws(IOError) -> Int32 {
    let said = said(answer)
    var code = try node.answer(said)
    var tries = 0
    while code == ENOMEM || code == ENOBUFS, tries < 1000 {
      usleep(1000)
      tries += 1
      code = try node.answer(said)
    }
    return code
  }

  private func said(_ answer: Answer) -> DMU.Answer {
    switch answer {
    case .map(let id, let placement, let temporary):
      let preparation = discards.contains(id) ? .none : placement.preparation
      return map(id, placement.extent, preparation, temporary)
    case .prime(let extent): return map(0, extent, .none, false)
    case .done(let id, let blocks): return .done(id: id, count: blocks)
    case .fail(let id, let code): return .fail(id: id, code: code)
    case .flushDone(let id): return .flushDone(id: id)
    case .invalidate(let blocks): return .invalidate(block: blocks.first, count: blocks.count)
    }
  }

  private func map(
    _ id: FaultID, _ extent: Extent, _ preparation: Preparation, _ temporary: Bool
  ) -> DMU.Answer {
    let first: DMU.Answer.Preparation =
      switch preparation {
      case .none: .none
      case .zero: .zero
      case .copy(let from): .copy(from: Self.place(from))
      }
    // An old placement may come along with what is found: the module knows it.
    let mark = extent.mark > highest ? toKernel(extent.mark) : 0
    return .map(
      id: id, block: extent.blocks.first, count: extent.blocks.count,
      at: Self.place(extent.place), writable: extent.writable, preparation: first, mark: mark,
      temporary: temporary)
  }

  private static func place(_ place: Place) -> DMU.Answer.Place {
    switch place {
    case .device(let number, let sector): .init(device: number, sector: sector)
    case .zero: .zero
    }
  }

  private static func extent(of answer: Answer) -> Extent? {
    switch answer {
    case .map(_, let placement, _): placement.extent
    case .prime(let extent): extent
    default: nil
    }
  }

  /// What the contract calls the module's errno.
  private func refusal(_ answer: Answer, _ code: Int32) -> AnswerRefusal {
    let extent = Self.extent(of: answer)
    let blocks =
      if case .invalidate(let range) = answer { range } else { extent?.blocks ?? BlockRange(0, 0) }
    switch code {
    case ENXIO, EROFS:
      if case .device(let number, _)? = extent?.place { return .badDevice(number) }
      return .badBlocks(blocks)
    case EEXIST: return .overlap(blocks)
    case ENOENT, ENODEV:
      switch answer {
      case .map(let id, _, _), .done(let id, _), .fail(let id, _), .flushDone(let id):
        return .unknownFault(id)
      case .prime, .invalidate: return .badBlocks(blocks)
      }
    default: return .badBlocks(blocks)
    }
  }
}
