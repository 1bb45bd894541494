// SPDX-License-Identifier: Apache-2.0
// Moves the bytes of requests: at once where the executor can, else by an operation that it
// starts and of which it tells the end.
//
// A transfer:
//
//     attempt ──all is done, in however many pieces──► done
//        ├─────the device has failed─────────────────► failed
//        └─────it would have to wait──► started (the slot is `io`) ──► the executor's completion

import BlockIO
import Glibc

/// The backing I/O of requests. Used from one thread.
final class DeviceIO {
  /// What came of starting a piece of I/O.
  enum Progress {
    case done
    case pending
    case failed(Int32)
  }

  private let executor: any IOExecutor
  private let geometry: DiskGeometry
  private let requests: RequestTable
  private let rounds: FlushRounds
  /// By slot: the device of the operation that was begun last.
  private let devices: UnsafeMutablePointer<UInt16>

  /// Moves bytes for the slots of a table of `capacity`.
  init(
    _ executor: any IOExecutor, _ geometry: DiskGeometry, _ requests: RequestTable,
    _ rounds: FlushRounds, capacity: Int
  ) {
    self.executor = executor
    self.geometry = geometry
    self.requests = requests
    self.rounds = rounds
    devices = .allocate(capacity: capacity)
  }

  deinit {
    devices.deallocate()
  }

  // MARK: Requests that need no slot

  /// Does what can be done without waiting and without asking, on the path of every request: how
  /// far it came.
  @inline(__always)
  func serve(_ request: TargetRequest, by map: ExtentMap) -> UInt64 {
    guard let buffer = request.buffer else { return request.offset }
    let end = request.offset + request.count
    var cursor = request.offset
    while cursor < end {
      guard let run = map.find(cursor >> geometry.shift) else { return cursor }
      let pieceEnd = min(end, run.end << geometry.shift)
      let pointer = buffer + Int(cursor - request.offset)
      let length = Int(pieceEnd - cursor)
      let isRead = request.operation == .read
      let address = geometry.address(run, cursor)
      if run.isZero || (isRead && address >= executor.end(run.device)) {
        guard isRead else { return cursor }
        memset(pointer, 0, length)
        cursor = pieceEnd
        continue
      }
      guard isRead || run.writable else { return cursor }
      if !isRead { rounds.noteWrite() }
      let done = executor.attempt(
        BackingIO(
          isRead ? .read : .write, device: run.device, offset: address, count: length,
          buffer: pointer))
      guard done > 0 else { return cursor }
      cursor += UInt64(done)
    }
    return cursor
  }

  /// Whether a range of the disk lies in one run that reads as zeroes.
  func isHole(_ offset: UInt64, _ count: UInt64, by map: ExtentMap) -> Bool {
    guard count > 0, let run = map.find(offset >> geometry.shift),
      (offset + count - 1) >> geometry.shift < run.end
    else { return false }
    return run.isZero || geometry.address(run, offset) >= executor.end(run.device)
  }

  // MARK: Requests that have a slot

  /// The device of a slot's last operation.
  func device(of index: Int) -> UInt16 { devices[index] }

  /// The byte from which on a device reads as zeroes.
  func end(_ device: UInt16) -> UInt64 { executor.end(device) }

  /// Moves bytes at once if that is possible and wanted, else starts it.
  func transfer(
    _ index: Int, _ operation: BackingIO.Operation, _ device: UInt16, _ offset: UInt64,
    _ count: Int, _ buffer: UnsafeMutableRawPointer?, atOnce: Bool = true
  ) -> Progress {
    var io = BackingIO(
      operation, device: device, offset: offset, count: count, buffer: buffer,
      token: UInt32(index))
    devices[index] = device
    if operation != .read { rounds.noteWrite() }
    while io.count > 0 {
      let done = atOnce ? executor.attempt(io) : -Int(EAGAIN)
      if done <= 0 {
        guard done == -Int(EAGAIN) else { return .failed(Int32(-done)) }
        requests.startIO(index)
        executor.start(io)
        return .pending
      }
      io.offset += UInt64(done)
      io.count -= done
      io.buffer = io.buffer.map { $0 + done }
    }
    return .done
  }

  /// Reads a request's bytes from the cursor up to the end of its piece, from where they live.
  func read(_ index: Int, _ run: Run) -> Progress {
    let slot = requests[index]
    guard let buffer = slot.pointee.buffer else { preconditionFailure("a read without a buffer") }
    let pointer = buffer + Int(slot.pointee.cursor - slot.pointee.offset)
    let length = Int(slot.pointee.pieceEnd - slot.pointee.cursor)
    if run.isZero {
      memset(pointer, 0, length)
      return .done
    }
    return transfer(
      index, .read, run.device, geometry.address(run, slot.pointee.cursor), length, pointer)
  }

  /// Writes a request's bytes from the cursor up to the end of its piece to a run; zeroes for a
  /// request that zeroes.
  func put(_ index: Int, _ run: Run) -> Progress {
    let slot = requests[index]
    let length = Int(slot.pointee.pieceEnd - slot.pointee.cursor)
    let to = geometry.address(run, slot.pointee.cursor)
    guard slot.pointee.operation == .write, let buffer = slot.pointee.buffer else {
      return zero(index, run.device, to, length)
    }
    let pointer = buffer + Int(slot.pointee.cursor - slot.pointee.offset)
    return transfer(index, .write, run.device, to, length, pointer)
  }

  /// Makes a range of a device read as zeroes, for a request that zeroes or discards.
  func zero(_ index: Int, _ device: UInt16, _ offset: UInt64, _ length: Int) -> Progress {
    let operation: BackingIO.Operation = requests[index].pointee.keepsSpace ? .zero : .punch
    return transfer(index, operation, device, offset, length, nil)
  }

  /// Adds the piece of a status request to its list, and ends the request when that is full.
  func tellStatus(_ index: Int, _ run: Run) {
    let slot = requests[index]
    guard let buffer = slot.pointee.buffer else { preconditionFailure("a status without a list") }
    let list = buffer.assumingMemoryBound(to: StatusList.self)
    let end = slot.pointee.pieceEnd
    while slot.pointee.cursor < end {
      let limit = end - slot.pointee.cursor
      let found: (isHole: Bool, count: UInt64)
      if run.isZero {
        found = (true, limit)
      } else {
        let at = geometry.address(run, slot.pointee.cursor)
        found = executor.hole(run.device, at: at, limit: limit)
      }
      guard list.pointee.add(found.count, isHole: found.isHole) else {
        slot.pointee.cursor = slot.pointee.end
        return
      }
      slot.pointee.cursor += found.count
    }
  }
}
