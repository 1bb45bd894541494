// SPDX-License-Identifier: Apache-2.0
// What the kernel cannot move by itself, because it lies where the kernel knows no device:
// reads get their bytes in the answer, and a block that is to move is written to its new place
// before the kernel is told of that. Both happen off the target's thread.
//
// A block that moves is written through the page cache. Where the kernel passes that by, the
// cache is written out and forgotten before the kernel writes there.

import BlockIO
import DiskModel
import DMU
import Glibc
import SystemIO

extension KernelTarget {
  /// An answer whose mark has to be given in its turn.
  final class Turn {
    let answer: DiskModel.Answer
    let said: DMU.Answer
    var isReady = false
    var failure: IOError?
    /// Has the block carried again, if that found no space.
    var again: (() -> Void)?

    init(_ answer: DiskModel.Answer, _ said: DMU.Answer) {
      self.answer = answer
      self.said = said
    }
  }

  /// A read through user space.
  struct Reading {
    let id: FaultID
    let block: UInt64
    let store: any ByteStore
    /// The byte of the store where the block begins.
    let place: UInt64
    /// What is wanted, in sectors of the disk.
    let request: Message.Request

    init(
      id: FaultID, block: UInt64, _ store: any ByteStore, at place: UInt64,
      _ request: Message.Request
    ) {
      self.id = id
      self.block = block
      self.store = store
      self.place = place
      self.request = request
    }
  }

  /// So many reads are under way at once, each with at most 1 MiB.
  private static let most = 8
  /// Of larger blocks only what is wanted is read, in units of so many bytes.
  private static let unit: UInt64 = 64 << 10

  // MARK: Reads

  /// Reads now, or when others have ended.
  func read(_ reading: Reading) {
    guard self.reading < Self.most else { return queue.append(reading) }
    self.reading += 1
    let part = part(of: reading)
    let bytes = Bytes(Int(part.count))
    offload(
      {
        do throws(IOError) {
          try reading.store.read(bytes.buffer, at: reading.place + part.offset)
          return nil
        } catch { return error }
      },
      { [self] failure in
        finish(reading, bytes, part.offset, failure)
        self.reading -= 1
        if !queue.isEmpty { read(queue.removeFirst()) }
      })
  }

  /// The bytes of the block that are read for a request.
  private func part(of reading: Reading) -> (offset: UInt64, count: UInt64) {
    Self.part(
      of: reading.request, start: reading.block * UInt64(blockSize),
      length: bytes(of: BlockRange(reading.block)))
  }

  /// The bytes, counted from the start of a block, that are read for a request: all of a small
  /// block, and of a larger one what is wanted, in whole units. At most what one answer holds.
  static func part(
    of request: Message.Request, start: UInt64, length: UInt64
  ) -> (offset: UInt64, count: UInt64) {
    let first = max(request.sector * 512, start) - start
    let end = min(length, first + UInt64(max(1, request.count)) * 512)
    guard length > unit, first < end else { return (0, min(length, UInt64(DMU.Answer.mostData))) }
    let from = first / unit * unit
    let to = min(length, (end + unit - 1) / unit * unit)
    guard to - from > UInt64(DMU.Answer.mostData) else { return (from, to - from) }
    return (first, min(end - first, UInt64(DMU.Answer.mostData)))
  }

  private func finish(
    _ reading: Reading, _ bytes: Bytes, _ offset: UInt64, _ failure: IOError?
  ) {
    guard self.failure == nil else { return }
    do throws(IOError) {
      guard failure == nil else {
        note(failure?.code ?? EIO, reading.store.name, isRead: true)
        return try lose(reading.id, reading.block, 0, failure?.code ?? EIO)
      }
      let data = DMU.Answer.data(
        id: reading.id, UnsafeRawBufferPointer(bytes.buffer), offset: UInt32(offset))
      switch try tell(data) {
      case 0, ENOENT: break
      case ERANGE:
        // Another request has come first meanwhile: the kernel asks again.
        _ = try node.answer([.wait(id: reading.id), .retry(id: reading.id)])
      case let code: try lose(reading.id, reading.block, 0, code)
      }
    } catch { self.failure = error }
  }

  // MARK: Blocks that move

  /// Writes a block to its new place, and gives the answer after that.
  func carry(from store: any ByteStore, at offset: UInt64, to extent: Extent, _ turn: Turn) {
    guard case .device(let number, let sector) = extent.place else {
      preconditionFailure("a block is carried to no device")
    }
    let known = devices.known[Int(number)]
    let count = bytes(of: extent.blocks)
    turn.again = { [unowned self, unowned turn] in
      carry(from: store, at: offset, to: extent, turn)
    }
    offload(
      {
        do throws(IOError) {
          try Self.copy(store, offset, known, sector * 512, count)
          return nil
        } catch { return error }
      },
      { [self] failure in
        if let failure, isShortage(failure.code), mayWait(failure.code) {
          starving.append(turn)
          return
        }
        if let failure { note(failure.code, failure.subject, isRead: failure.operation == "read") }
        turn.failure = failure
        turn.isReady = true
        proceed()
      })
  }

  private static func copy(
    _ from: any ByteStore, _ offset: UInt64, _ to: KernelDevices.Known, _ place: UInt64,
    _ count: UInt64
  ) throws(IOError) {
    let bytes = Bytes(Int(min(count, 1 << 20)))
    var done: UInt64 = 0
    while done < count {
      let piece = UnsafeMutableRawBufferPointer(
        rebasing: bytes.buffer[..<Int(min(count - done, UInt64(bytes.buffer.count)))])
      try from.read(piece, at: offset + done)
      try to.store.write(UnsafeRawBufferPointer(piece), at: place + done)
      done += UInt64(piece.count)
    }
    if to.isDirect, let file = to.store.file { try file.settle(at: place, count: count) }
  }

  /// Gives the answers whose turn it is.
  private func proceed() {
    while failure == nil, let turn = turns.first, turn.isReady {
      turns.removeFirst()
      var code = turn.failure?.code
      if code == nil {
        do throws(AnswerRefusal) { try give(turn.said, turn.answer) } catch { code = EIO }
      }
      guard let code, failure == nil, case .map(let id, let placement, _) = turn.answer else {
        continue
      }
      let extent = placement.extent
      do throws(IOError) {
        try lose(id, extent.blocks.first, extent.mark, code)
      } catch { failure = error }
    }
  }

  // MARK: Failures

  /// Fails what waits for an answer that came to nothing.
  private func lose(
    _ id: FaultID, _ block: UInt64, _ mark: Mark, _ code: Int32
  ) throws(IOError) {
    discards.remove(id)
    news.append(.mapError(block: block, mark: mark, code: code))
    // Whoever waited may have left: then nobody is to be told.
    _ = try tell(.fail(id: id, code: code))
  }

  /// Notes a failure that the module has told of.
  func noteFailure(_ code: Int32, _ device: UInt16, isRead: Bool) {
    if !isRead, isShortage(code) {
      trouble.noteShortage(code == EIO ? ENOSPC : code)
      health = trouble.health
    } else {
      note(code, device, isRead: isRead)
    }
  }

  /// Counts a failure of a backing device.
  func note(_ code: Int32, _ device: UInt16, isRead: Bool) {
    let isKnown = Int(device) < devices.known.count
    note(code, isKnown ? devices.known[Int(device)].store.name : "device \(device)", isRead: isRead)
  }

  private func note(_ code: Int32, _ name: String, isRead: Bool) {
    guard code != ECANCELED else { return }
    let number = devices.known.firstIndex { $0.store.name == name } ?? devices.known.count
    trouble.count(UInt16(clamping: number), name, isRead: isRead, code)
    health = trouble.health
  }

  /// Every flush fails with this errno from now on; 0: they may be tried again.
  func noteFlushes(_ code: Int32) {
    trouble.flushReason =
      DiskTrouble.flushReason + " (by hand: `dmsetup message DEVICE 0 clear_error`)"
    trouble.flushFailed = code
    health = trouble.health
  }

  /// An admin has acted: errors are forgotten. Flushes are the module's to clear.
  package func clearFailure() {
    let failed = trouble.flushFailed
    trouble.clear()
    trouble.flushFailed = failed
    health = trouble.health
  }

  // MARK: Want of space

  /// A full file system under a loop device that uses the page cache is an I/O error.
  func isShortage(_ code: Int32) -> Bool {
    SpacePolicy.isShortage(code) || (code == EIO && isFull)
  }

  /// Notes that a write found no space. Whether it waits.
  private func mayWait(_ code: Int32) -> Bool {
    trouble.noteShortage(code == EIO ? ENOSPC : code)
    health = trouble.health
    return space.waits && !trouble.spaceExpired
  }

  /// Writes have failed at their places: they wait if that was for want of space.
  func hold(_ id: FaultID, _ code: Int32) throws(IOError) {
    let isFull = isShortage(code)
    if isFull, mayWait(code) {
      held = id
    } else {
      // Whoever waited may have left.
      _ = try tell(.fail(id: id, code: isFull ? ENOSPC : code))
    }
  }

  /// Whether time alone may change something: to be told of by `tick` every second.
  package var wantsTicks: Bool { trouble.isPassing }

  /// A second has passed: what waits for space is tried again, or fails when it has waited too
  /// long. After `quiet` seconds without one, errors are forgotten.
  package func tick(quiet: UInt32) {
    trouble.settle(after: quiet)
    if trouble.space != 0 {
      let isOver = held == 0 && starving.isEmpty
      if space.timeout > 0, !trouble.spaceExpired,
        DiskTrouble.now() - trouble.spaceSince >= Int64(space.timeout) * 1000
      {
        trouble.spaceExpired = true
        endWaiting(ENOSPC)
      } else if !isFull {
        // Since the last second nothing has found the medium full.
        if isOver { trouble.endShortage() }
        retry()
      }
    }
    health = trouble.health
  }

  private func retry() {
    let again = starving
    starving = []
    for turn in again { turn.again?() }
    guard held != 0 else { return }
    let id = held
    held = 0
    do throws(IOError) { _ = try tell(.retry(id: id)) } catch { failure = error }
  }

  /// Fails whatever waits for space with an errno.
  package func endWaiting(_ code: Int32) {
    let (id, turns) = (held, starving)
    held = 0
    starving = []
    for turn in turns {
      turn.failure = IOError(code, "carry a block to", "the store")
      turn.isReady = true
    }
    if id != 0 {
      do throws(IOError) { _ = try tell(.fail(id: id, code: code)) } catch { failure = error }
    }
    proceed()
  }

  /// Whether a file system has no room for a block.
  private var isFull: Bool {
    devices.known.contains { known in
      guard known.store.isWritable, let file = known.store.file else { return false }
      do throws(IOError) {
        guard let free = try file.freeBytes() else { return false }
        return free < UInt64(blockSize) + 1 << 20
      } catch {
        // Then it is not for want of space, as far as anybody can tell.
        return false
      }
    }
  }
}

/// Memory that one thread fills and then another reads. Freed with its owner.
private final class Bytes: @unchecked Sendable {
  // Handed from thread to thread by the pool's queue, never used by two at once.
  let buffer: UnsafeMutableRawBufferPointer

  init(_ count: Int) {
    buffer = .allocate(byteCount: max(count, 1), alignment: 4096)
  }

  deinit { buffer.deallocate() }
}
