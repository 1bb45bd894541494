// SPDX-License-Identifier: Apache-2.0
// The transmission phase: one function checks every request, then it is handed to the
// target, and its reply is built.

import Glibc
import SystemIO
import Target

extension NBDSession {
  /// The errno that a request is refused with, 0 when it makes sense. Checks everything that
  /// is known without looking at the disk.
  func refusal(_ request: NBDRequest) -> Int32 {
    let allowed: UInt16
    switch request.command {
    case NBD.Command.read: allowed = structured ? NBD.CommandFlag.dontFragment : 0
    case NBD.Command.write, NBD.Command.trim: allowed = NBD.CommandFlag.forced
    case NBD.Command.writeZeroes: allowed = NBD.CommandFlag.forced | NBD.CommandFlag.noHole
    case NBD.Command.blockStatus:
      guard allocationContext else { return EINVAL }
      allowed = NBD.CommandFlag.requestOne
    case NBD.Command.flush: allowed = 0
    default: return EINVAL
    }
    // FUA means nothing on the others, and is to be borne.
    guard request.flags & ~(allowed | NBD.CommandFlag.forced) == 0 else { return EINVAL }
    let isFlush = request.command == NBD.Command.flush
    if isFlush { return request.offset == 0 && request.count == 0 ? 0 : EINVAL }
    guard request.count > 0 else { return EINVAL }
    let writes =
      request.command != NBD.Command.read && request.command != NBD.Command.blockStatus
    if writes && options.readOnly { return EPERM }
    guard request.offset <= target.size, UInt64(request.count) <= target.size - request.offset
    else { return request.command == NBD.Command.read ? EINVAL : (writes ? ENOSPC : EINVAL) }
    if request.command == NBD.Command.read, request.count > NBD.maximumPayload { return EINVAL }
    return 0
  }

  /// Serves a request that brings no payload.
  func serve(_ request: NBDRequest) {
    if request.command == NBD.Command.disconnect {
      end(.disconnected)
      return
    }
    let code = refusal(request)
    guard code == 0 else {
      refuse(request, code)
      return
    }
    switch request.command {
    case NBD.Command.read: read(request)
    case NBD.Command.flush: submit(request, .flush, slab: -1, start: 0, buffer: nil)
    case NBD.Command.trim: submit(request, .discard, slab: -1, start: 0, buffer: nil)
    case NBD.Command.writeZeroes: submit(request, .zero, slab: -1, start: 0, buffer: nil)
    case NBD.Command.blockStatus: status(request)
    default: preconditionFailure("a command that was checked")
    }
  }

  private func refuse(_ request: NBDRequest, _ code: Int32) {
    let isChunked =
      request.command == NBD.Command.read || request.command == NBD.Command.blockStatus
    if structured && isChunked {
      replyError(request.cookie, code)
    } else {
      reply(request.cookie, code)
    }
  }

  /// Serves a write whose payload lies in a slab, which is kept for as long as it takes.
  func write(_ request: NBDRequest, _ slab: Int32, _ start: Int) {
    slabs.retain(slab)
    submit(request, .write, slab: slab, start: start, buffer: slabs.pointer(slab) + start)
  }

  private var readHeader: Int { structured ? NBD.chunkSize + 8 : NBD.simpleReplySize }

  private func read(_ request: NBDRequest) {
    let count = UInt64(request.count)
    if structured, target.isHole(offset: request.offset, count: count) {
      replyHole(request)
      return
    }
    let (slab, start) = room(readHeader + Int(count))
    submit(
      request, .read, slab: slab, start: start, buffer: slabs.pointer(slab) + start + readHeader)
  }

  private func status(_ request: NBDRequest) {
    let isOne = request.flags & NBD.CommandFlag.requestOne != 0
    // The list lies in memory of its own, since the target fills it at its leisure.
    let list = UnsafeMutablePointer<StatusList>.allocate(capacity: 1)
    list.initialize(to: StatusList(limit: isOne ? 1 : 2048))
    submit(request, .status, slab: -1, start: 0, buffer: UnsafeMutableRawPointer(list))
  }

  private func submit(
    _ request: NBDRequest, _ operation: TargetRequest.Operation, slab: Int32, start: Int,
    buffer: UnsafeMutableRawPointer?
  ) {
    let index: Int32
    if let free = pendingFree.popLast() {
      index = free
    } else {
      index = Int32(pending.count)
      pending.append(Pending())
    }
    pending[Int(index)] = Pending(
      cookie: request.cookie, command: request.command, slab: slab, start: start,
      offset: request.offset, count: request.count, arrived: arrived)
    if operation == .status { pendingLists[index] = buffer }
    pendingCount += 1
    var wanted = TargetRequest(
      operation, offset: request.offset, count: UInt64(request.count), buffer: buffer,
      tag: UInt64(index))
    wanted.isForced =
      request.flags & NBD.CommandFlag.forced != 0
      && request.command != NBD.Command.read && operation != .status
    wanted.keepsSpace = request.flags & NBD.CommandFlag.noHole != 0 && operation == .zero
    if let code = target.submit(wanted, owner: owner) {
      completed(tag: UInt64(index), code: code)
    }
  }

  /// The target has served a request: build its reply.
  package func completed(tag: UInt64, code: Int32) {
    let index = Int(tag)
    let done = pending[index]
    pendingFree.append(Int32(index))
    pendingCount -= 1
    answered.append((done.command, done.arrived))
    switch done.command {
    case NBD.Command.read: completeRead(done, code)
    case NBD.Command.blockStatus: completeStatus(Int32(index), done, code)
    default:
      if done.slab >= 0 { slabs.release(done.slab) }
      reply(done.cookie, code)
    }
    export.hasOutput(self)
  }

  // MARK: Replies

  private func completeRead(_ done: Pending, _ code: Int32) {
    guard code == 0 else {
      slabs.release(done.slab)
      if structured { replyError(done.cookie, code) } else { reply(done.cookie, code) }
      return
    }
    let header = slabs.pointer(done.slab) + done.start
    if structured {
      NBDSession.putChunk(
        header, NBD.Chunk.offsetData, isDone: true, done.cookie, 8 + done.count)
      header.putBigEndian(done.offset, NBD.chunkSize)
    } else {
      NBDSession.putSimple(header, done.cookie, 0)
    }
    queue(done.slab, done.start, readHeader + Int(done.count))
  }

  private static func putSimple(_ to: UnsafeMutableRawPointer, _ cookie: UInt64, _ code: UInt32) {
    to.putBigEndian(NBD.simpleReplyMagic, 0)
    to.putBigEndian(code, 4)
    to.putBigEndian(cookie, 8)
  }

  private static func putChunk(
    _ to: UnsafeMutableRawPointer, _ type: UInt16, isDone: Bool, _ cookie: UInt64,
    _ length: UInt32
  ) {
    to.putBigEndian(NBD.chunkMagic, 0)
    to.putBigEndian(isDone ? NBD.Chunk.done : 0, 4)
    to.putBigEndian(type, 6)
    to.putBigEndian(cookie, 8)
    to.putBigEndian(length, 16)
  }

  /// A simple reply.
  func reply(_ cookie: UInt64, _ code: Int32) {
    let (slab, start) = room(NBD.simpleReplySize)
    let error = code == 0 ? 0 : NBD.error(code)
    NBDSession.putSimple(slabs.pointer(slab) + start, cookie, error)
    queue(slab, start, NBD.simpleReplySize)
  }

  private func replyError(_ cookie: UInt64, _ code: Int32) {
    let (slab, start) = room(NBD.chunkSize + 6)
    let to = slabs.pointer(slab) + start
    NBDSession.putChunk(to, NBD.Chunk.error, isDone: true, cookie, 6)
    to.putBigEndian(NBD.error(code), NBD.chunkSize)
    to.putBigEndian(UInt16(0), NBD.chunkSize + 4)
    queue(slab, start, NBD.chunkSize + 6)
  }

  private func replyHole(_ request: NBDRequest) {
    let (slab, start) = room(NBD.chunkSize + 12)
    let to = slabs.pointer(slab) + start
    NBDSession.putChunk(to, NBD.Chunk.offsetHole, isDone: true, request.cookie, 12)
    to.putBigEndian(request.offset, NBD.chunkSize)
    to.putBigEndian(request.count, NBD.chunkSize + 8)
    queue(slab, start, NBD.chunkSize + 12)
  }

  private func completeStatus(_ index: Int32, _ done: Pending, _ code: Int32) {
    guard let raw = pendingLists.removeValue(forKey: index) else {
      preconditionFailure("a status without its list")
    }
    let list = raw.assumingMemoryBound(to: StatusList.self)
    let entries = list.pointee.entries
    list.deinitialize(count: 1)
    list.deallocate()
    guard code == 0, !entries.isEmpty else {
      replyError(done.cookie, code == 0 ? EIO : code)
      return
    }
    let length = 4 + entries.count * 8
    let (slab, start) = room(NBD.chunkSize + length)
    let to = slabs.pointer(slab) + start
    NBDSession.putChunk(to, NBD.Chunk.blockStatus, isDone: true, done.cookie, UInt32(length))
    to.putBigEndian(NBD.allocationID, NBD.chunkSize)
    var at = NBD.chunkSize + 4
    for entry in entries {
      to.putBigEndian(entry.count, at)
      to.putBigEndian(entry.isHole ? NBD.stateHoleAndZero : 0, at + 4)
      at += 8
    }
    queue(slab, start, NBD.chunkSize + length)
  }
}
