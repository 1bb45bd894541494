// SPDX-License-Identifier: Apache-2.0
// The engine of the contract in the kernel: the same words, said to /dev/dmu/NAME.
//
// Invariants:
// - One thread. The module checks every answer; what it refuses has changed nothing.
// - The module counts marks on across workers, a format starts from what it restores. Marks
//   beyond those of the dump are therefore moved by `shift`, both ways.
// - A placement with a provisional mark is given its mark in the moment in which the module lists it,
//   and the format hears of it before it hears of anything else. An older module gives none; then it
//   is the one after the last, since nobody else gives any.
// - A format that gives its own marks has them taken in their order: an answer that has to wait
//   (KernelTarget+Bytes) holds up those with later ones. Nothing is granted there.
// - What may be written lies within its file: see `cover`.
// - A node that fails (the device is gone) yields no more faults; `failure` says why.

import BlockIO
package import DiskModel
package import DMU
import Glibc
package import SystemIO

/// The contract over the device-mapper target `userspace`.
package final class KernelTarget: TargetEngine {
  /// Runs blocking work elsewhere, and `then` on the target's thread with its failure.
  package typealias Offload = (
    _ work: @escaping @Sendable () -> IOError?, _ then: @escaping (IOError?) -> Void
  ) -> Void

  /// Bytes of a block.
  package let blockSize: UInt32
  /// Length in 512-byte sectors.
  package let sectors: UInt64
  /// Whether it can place first writes by itself: this module does.
  package let takesGrants: Bool
  /// Whether it can be told of a layer: the same.
  package let takesLayers: Bool
  /// Always: see the head of this file.
  package let givesMarks = true
  /// Whether the module gives them.
  private let isMarking: Bool
  /// Why the node is of no use any more.
  package internal(set) var failure: IOError?
  /// How the disk is.
  package internal(set) var health = DiskHealth.ready
  var trouble = DiskTrouble()
  /// What becomes of a write that finds no space.
  package var space = SpacePolicy(waits: false) {
    didSet {
      trouble.waits = space.waits
      health = trouble.health
      // An older module refuses it, and fails what fails.
      do throws(IOError) {
        _ = try node.answer([.holdFailed(space.waits)])
      } catch { failure = error }
    }
  }
  /// Errors of writes that were told by device, and may be told again of a placement.
  private var toldWrites = 0
  /// The question of failed writes that wait for space; 0: none.
  var held: FaultID = 0
  /// Blocks that could not be carried for want of space, each to be tried again.
  var starving: [Turn] = []
  /// The descriptor to wait on: readable when there are faults.
  package var descriptor: Int32 { node.descriptor.raw }

  let node: Node
  let devices: KernelDevices
  let offload: Offload
  private var restored: [Extent] = []
  /// The greatest mark of the dump, and how far later ones are moved.
  private var dumped: Mark = 0
  private var shift: Mark = 0
  private var highest: Mark = 0
  /// Unanswered discards: their answers are said otherwise.
  var discards: Set<FaultID> = []
  /// What unanswered reads want.
  var reads: [FaultID: Message.Request] = [:]
  /// How long the files are known to be, by the kernel's numbers.
  private var lengths: [UInt64]
  /// Faults that are not the module's.
  var news: [Fault] = []
  /// Answers in the order of their marks, the first of which waits.
  var turns: [Turn] = []
  /// Reads through user space that have not begun, and how many have.
  var queue: [Reading] = []
  var reading = 0

  /// The blocks that have one place each, if the format has said so.
  let layer: Layer?

  /// Shakes hands with the module and takes up what a former worker left. Throws: what the
  /// node says; EPROTO when it speaks another version, or when blocks of a layer are uncommitted
  /// and `layer` is nil; EINVAL when what it has uncommitted cannot be of these devices.
  package init(
    _ node: Node, _ devices: KernelDevices, layer: Layer? = nil, offload: @escaping Offload
  ) throws(IOError) {
    self.node = node
    self.devices = devices
    self.layer = layer
    self.offload = offload
    lengths = devices.known.map(\.store.size)
    // Before the dump, which has what became present of a layer.
    let knowsLayers = layer == nil ? false : try node.answer(.knowsLayers) == 0
    let results = try node.answer([.getVersion, .dump])
    guard results == [0, 0] else {
      throw IOError(results.first { $0 != 0 } ?? EPROTO, "shake hands with", "a dmu node")
    }
    var geometry: Message.Geometry?
    var last: Mark?
    var found: [Extent] = []
    var present: [(block: UInt64, bits: UInt64, mark: Mark)] = []
    while last == nil || geometry == nil {
      guard let message = try node.next(within: 10_000) else {
        throw IOError(ETIMEDOUT, "shake hands with", "a dmu node")
      }
      switch message {
      case .version(let it): geometry = it
      case .uncommitted(let it): found.append(try Self.extent(it, devices))
      case .present(let block, let bits, let mark):
        present.append((block, bits, mark))
      case .dumpDone(let mark): last = mark
      default: break
      }
    }
    guard let geometry, geometry.version == 1 else {
      throw IOError(EPROTO, "shake hands with", "a dmu node")
    }
    blockSize = geometry.blockSectors * 512
    sectors = geometry.sectors
    // Marks of an older module's grants would be those of answers that have to wait.
    isMarking = geometry.takesPools
    takesGrants = geometry.takesGrants && isMarking
    takesLayers = knowsLayers && geometry.takesLayers && takesGrants
    // What became present comes after the placements, whatever its mark.
    for (block, bits, mark) in present {
      found += Self.extents(of: bits, from: block, layer, geometry.blockSectors, mark)
    }
    found.sort { ($0.mark, $0.blocks.first) < ($1.mark, $1.blocks.first) }
    restored = found
    dumped = found.last?.mark ?? 0
    highest = dumped
    shift = (last ?? 0) - dumped
  }

  private static func extent(
    _ it: Message.Uncommitted, _ devices: KernelDevices
  ) throws(IOError) -> Extent {
    let said: Place =
      it.device == DMU.Answer.zeroDevice ? .zero : .device(it.device, sector: it.sector)
    guard let place = devices.restore(said) else {
      throw IOError(EINVAL, "take up block \(it.block) of", "a dmu node")
    }
    return Extent(
      BlockRange(it.block, it.count), place, writable: it.writable, mark: it.mark)
  }

  /// The runs of blocks of a layer whose bits are set.
  private static func extents(
    of bits: UInt64, from block: UInt64, _ layer: Layer?, _ blockSectors: UInt32, _ mark: Mark
  ) -> [Extent] {
    guard let layer else { return [] }
    var found: [Extent] = []
    var (bits, at) = (bits, block)
    while bits != 0 {
      let skipped = bits.trailingZeroBitCount
      bits >>= UInt64(skipped)
      let count = (~bits).trailingZeroBitCount
      bits = count == 64 ? 0 : bits >> UInt64(count)
      at += UInt64(skipped)
      let blocks = BlockRange(at, UInt64(count))
      let place = layer.place.advanced(by: at * UInt64(blockSectors))
      found.append(Extent(blocks, place, writable: true, mark: mark))
      at += UInt64(count)
    }
    return found
  }

  /// What the module had uncommitted when this worker came.
  package func uncommitted() -> [Extent] { restored }

  private func toKernel(_ mark: Mark) -> Mark { mark > dumped ? mark + shift : mark }
  private func fromKernel(_ mark: Mark) -> Mark {
    mark > dumped + shift ? mark - shift : min(mark, dumped)
  }

  // MARK: Faults

  /// The next fault; nil when there is none now, or when the node has failed.
  package func nextFault() -> Fault? {
    guard failure == nil else { return nil }
    if !news.isEmpty { return news.removeFirst() }
    do throws(IOError) {
      while let message = try node.next() {
        if let fault = try fault(of: message) { return fault }
      }
    } catch {
      failure = error
    }
    return nil
  }

  private func fault(of message: Message) throws(IOError) -> Fault? {
    switch message {
    case .fault(let id, let block, let count, let write, let whole, let request):
      let blocks = BlockRange(block, count)
      if write { return .write(id, blocks: blocks, whole: whole) }
      reads[id] = request
      return .read(id, blocks: blocks)
    case .flush(let id, let mark): return .flush(id, upTo: fromKernel(mark))
    case .discard(let id, let block, let count, let zeroing):
      discards.insert(id)
      return .discard(id, blocks: BlockRange(block, count), zeroing: zeroing)
    case .writesFailed(let id, let code):
      try hold(id, code)
      return nil
    case .deviceError(let device, let write, let code):
      if write { toldWrites += 1 }
      noteFailure(code, device, isRead: !write)
      return nil
    case .mapError(let block, let mark, let code):
      // A block that could not be carried along is told of no device.
      if toldWrites > 0 { toldWrites -= 1 } else { noteFailure(code, 0, isRead: false) }
      return .mapError(block: block, mark: fromKernel(mark), code: code)
    case .invalidateDone(let block, let count): return .invalidateDone(BlockRange(block, count))
    case .placed(let it):
      var extent = try Self.extent(it, devices)
      extent.mark = fromKernel(extent.mark)
      noteMark(extent.mark)
      return .placed(extent)
    case .present(let block, let bits, let mark):
      let mark = fromKernel(mark)
      noteMark(mark)
      news += Self.extents(of: bits, from: block, layer, blockSize / 512, mark).map { .placed($0) }
      return news.isEmpty ? nil : news.removeFirst()
    case .flushFailed(let code):
      noteFlushes(code)
      return nil
    case .syncDone, .version, .statistic, .uncommitted, .dumpDone, .unknown: return nil
    }
  }

  // MARK: Answers

  /// Takes an answer. Throws what the module had against it, and then nothing has changed. One
  /// that has to wait for bytes, or for such a one before it, is taken before it is given: if it
  /// comes to nothing its requests fail, and a mark is told as `mapError`.
  package func answer(_ answer: DiskModel.Answer) throws(AnswerRefusal) {
    switch answer {
    case .map(let id, let placement, let temporary):
      try map(id, placement, temporary, answer)
    case .prime(let extent): try prime(extent, answer)
    case .done(let id, let blocks): try give(.done(id: id, count: blocks), answer)
    case .fail(let id, let code): try give(.fail(id: id, code: code), answer)
    case .flushDone(let id): try give(.flushDone(id: id), answer)
    case .invalidate(let blocks):
      try give(.invalidate(block: blocks.first, count: blocks.count), answer)
    }
  }

  private func map(
    _ id: FaultID, _ placement: Placement, _ isTemporary: Bool, _ answer: DiskModel.Answer
  ) throws(AnswerRefusal) {
    let found = placement.extent
    let (place, count) = devices.translate(found.place, blocks: found.blocks.count)
    guard let place else {
      guard case .device(let number, let sector) = found.place, let request = reads[id],
        let store = devices.store(number)
      else { throw refusal(answer, ENXIO) }
      reads[id] = nil
      read(Reading(id: id, block: found.blocks.first, store, at: sector * 512, request))
      return
    }
    guard found.mark == 0 || count == found.blocks.count else { throw refusal(answer, ENXIO) }
    let blocks = BlockRange(found.blocks.first, count)
    let extent = Extent(blocks, place, writable: found.writable, mark: found.mark)
    try cover(extent, answer)
    guard !discards.contains(id), case .copy(let from) = placement.preparation else {
      let preparation = discards.contains(id) ? .none : placement.preparation
      return try take(said(id, extent, preparation, isTemporary), answer)
    }
    if let source = devices.translate(from, blocks: 1).place {
      return try take(said(id, extent, .copy(from: source), isTemporary), answer)
    }
    guard case .device(let number, let sector) = from, let store = devices.store(number) else {
      throw refusal(answer, ENXIO)
    }
    let turn = Turn(answer, said(id, extent, .none, isTemporary))
    turns.append(turn)
    noteMark(extent.mark)
    carry(from: store, at: sector * 512, to: extent, turn)
  }

  /// A mapping that nobody asked for. What has to be read through user space is left out: the
  /// kernel asks for it.
  private func prime(_ extent: Extent, _ answer: DiskModel.Answer) throws(AnswerRefusal) {
    var rest = extent
    while rest.blocks.count > 0 {
      let (place, count) = devices.translate(rest.place, blocks: rest.blocks.count)
      if let place {
        let piece = Extent(
          BlockRange(rest.blocks.first, count), place, writable: rest.writable, mark: rest.mark)
        try cover(piece, answer)
        try take(said(0, piece, .none, false), answer)
      }
      rest.blocks = BlockRange(rest.blocks.first + count, rest.blocks.count - count)
      rest.place = rest.place.advanced(by: count * UInt64(blockSize) / 512)
    }
  }

  /// Whether the place is there, or is in a file, which can be made longer.
  func canCover(_ extent: Extent, bytes: UInt64? = nil) -> Bool {
    guard case .device(let number, let sector) = extent.place, Int(number) < lengths.count else {
      return false
    }
    let (end, isTooFar) = (sector &* 512).addingReportingOverflow(
      bytes ?? self.bytes(of: extent.blocks))
    guard sector < 1 << 54, !isTooFar else { return false }
    guard end > lengths[Int(number)] else { return true }
    let store = devices.known[Int(number)].store
    return end <= store.size || (store.isWritable && store.file?.isBlockDevice == false)
  }

  /// Sees to it that a file is as long as what may be written in it: its loop device is longer,
  /// and what a read finds past the file's end is not defined.
  func cover(
    _ extent: Extent, bytes: UInt64? = nil, _ answer: DiskModel.Answer
  ) throws(AnswerRefusal) {
    guard extent.writable, case .device(let number, let sector) = extent.place else { return }
    let end = sector * 512 + (bytes ?? self.bytes(of: extent.blocks))
    let index = Int(number)
    guard end > lengths[index] else { return }
    let store = devices.known[index].store
    lengths[index] = store.size
    guard end > lengths[index] else { return }
    do throws(IOError) {
      try store.resize(to: end)
    } catch {
      note(error.code, number, isRead: false)
      throw refusal(answer, ENXIO)
    }
    lengths[index] = end
  }

  /// How many bytes of the disk are in a run of blocks.
  func bytes(of blocks: BlockRange) -> UInt64 {
    let start = blocks.first * UInt64(blockSize)
    return min(blocks.count * UInt64(blockSize), max(sectors * 512, start) - start)
  }

  /// Gives an answer when it is its turn.
  private func take(_ said: DMU.Answer, _ answer: DiskModel.Answer) throws(AnswerRefusal) {
    let mark = Self.extent(of: answer)?.mark ?? 0
    guard !turns.isEmpty, mark > highest, !mark.isProvisional else {
      return try give(said, answer)
    }
    let turn = Turn(answer, said)
    turn.isReady = true
    turns.append(turn)
    noteMark(mark)
  }

  private func noteMark(_ mark: Mark) {
    if !mark.isProvisional { highest = max(highest, mark) }
  }

  func give(_ said: DMU.Answer, _ answer: DiskModel.Answer) throws(AnswerRefusal) {
    let mark = Self.extent(of: answer)?.mark ?? 0
    let code: Int32
    do throws(IOError) {
      code = mark.isProvisional ? try tellLater(said, mark) : try tell(said)
    } catch {
      failure = error
      throw refusal(answer, error.code)
    }
    guard code == 0 else { throw refusal(answer, code) }
    switch answer {
    case .map(let id, _, _), .done(let id, _), .fail(let id, _):
      discards.remove(id)
      reads[id] = nil
    case .prime, .flushDone, .invalidate: break
    }
    noteMark(mark)
  }

  /// As `tell`, for a placement that gets its mark now.
  private func tellLater(_ said: DMU.Answer, _ provisional: Mark) throws(IOError) -> Int32 {
    let (code, mark) = try insist { () throws(IOError) in
      try node.answer(marking: isMarking ? said : said.marked(toKernel(highest + 1)))
    }
    guard code == 0 else { return code }
    if mark == 0 {
      // Whoever waited has left; the module says so of no mark.
      news.append(.mapError(block: said.block, mark: provisional, code: ECANCELED))
    } else {
      let mark = fromKernel(mark)
      noteMark(mark)
      news.append(.marked(provisional, as: mark))
    }
    return 0
  }

  /// The errno of an answer's refusal, or 0. One that finds no memory in the kernel is given
  /// again.
  func tell(_ said: DMU.Answer) throws(IOError) -> Int32 {
    try insist { () throws(IOError) in (try node.answer(said), 0) }.code
  }

  private func insist(
    _ give: () throws(IOError) -> (code: Int32, mark: Mark)
  ) throws(IOError) -> (code: Int32, mark: Mark) {
    var result = try give()
    var tries = 0
    while result.code == ENOMEM || result.code == ENOBUFS, tries < 1000 {
      usleep(1000)
      tries += 1
      result = try give()
    }
    return result
  }

  /// The extent's place and the preparation's are the kernel's.
  private func said(
    _ id: FaultID, _ extent: Extent, _ preparation: Preparation, _ isTemporary: Bool
  ) -> DMU.Answer {
    let first: DMU.Answer.Preparation =
      switch preparation {
      case .none: .none
      case .zero: .zero
      case .copy(let from): .copy(from: Self.place(from))
      }
    // An old placement may come along with what is found: the module knows it.
    let isLater = extent.mark.isProvisional
    let mark = !isLater && extent.mark > highest ? toKernel(extent.mark) : 0
    return .map(
      id: id, block: extent.blocks.first, count: extent.blocks.count,
      at: Self.place(extent.place), writable: extent.writable, preparation: first, mark: mark,
      isUncommitted: isLater, temporary: isTemporary)
  }

  static func place(_ place: Place) -> DMU.Answer.Place {
    switch place {
    case .device(let number, let sector): .init(device: number, sector: sector)
    case .zero: .zero
    }
  }

  static func extent(of answer: DiskModel.Answer) -> Extent? {
    switch answer {
    case .map(_, let placement, _): placement.extent
    case .prime(let extent): extent
    default: nil
    }
  }

  /// What the contract calls the module's errno.
  private func refusal(_ answer: DiskModel.Answer, _ code: Int32) -> AnswerRefusal {
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
