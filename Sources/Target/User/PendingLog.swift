// SPDX-License-Identifier: Apache-2.0
// The memory file: every uncommitted placement whose data is written, so that a worker may
// be killed at any instant and the next one goes on from here. It is a mapped file on tmpfs
// that the daemon holds, or anonymous memory.
//
// Layout, little endian, offsets in bytes:
//
//       0    8  magic "dmupend1"
//       8    4  bytes of a record: 40
//      12    4  bytes of a block of the disk
//      16    8  bytes of the disk
//      24    8  records that the file has room for (grows)
//      32    8  position of the oldest record (low half) and after the newest (high half)
//      40    8  mark up to which everything is committed
//      48    4  errno of the first failed flush of the store, 0: none
//      52    4  1: a flush of the store is under way, its result not yet seen
//      56    8  zero
//      64       records from 4096 on:
//                 0 block u64, 8 sector u64, 16 mark u64, 24 count u32, 28 device u16
//                 (65535: zeroes), 30 flags u16 (bit 0: writable), 32 check u32, 36 zero u32
//
// Invariants:
// - A record is written whole before the word at 32 makes it part of the log, and a word of
//   8 bytes is stored at once; so the log is right after any store of any instruction.
// - A record counts only while its mark is greater than the word at 40. Storing that word is
//   the act of dropping; moving the positions afterwards only makes room.
// - The word at 48 says that a flush is under way before the system call begins, and says so
//   until its result is there. The kernel tells an open file description once that pages could
//   not be written: if the process that is told is killed in the call, nobody else hears of it.
// - The file grows only while the records lie in one piece, before it would wrap.
// - Machines are little endian here; a power cut loses the file, and that is as it should
//   be: what was not flushed was not promised.

package import DiskModel
import Glibc
import Synchronization
package import SystemIO

/// Something is wrong with a pending log.
package struct PendingLogError: Error, Sendable, Equatable, CustomStringConvertible {
  /// One sentence: the thing, the reason, the remedy.
  package let description: String
  /// The failed system call behind it.
  package let cause: IOError?
  /// Whether the log is sound, but of another disk than this one.
  package let isForeign: Bool

  init(_ description: String, cause: IOError? = nil, isForeign: Bool = false) {
    self.description = description
    self.cause = cause
    self.isForeign = isForeign
  }
}

/// The uncommitted placements of one disk. Used from one thread.
package final class PendingLog {
  static let magic: UInt64 = 0x3164_6e65_7075_6d64
  static let recordSize = 40
  static let start = 4096
  static let zeroDevice: UInt16 = 0xffff
  /// Records in a new file, and at most.
  static let initialCapacity = 1024
  static let maximumCapacity = 1 << 16

  let base: UnsafeMutableRawPointer
  private let raw: Int32
  private let blockSize: UInt32
  private let size: UInt64
  /// Records that the file has room for.
  private(set) var capacity: Int
  private var tail: Int
  private var head: Int
  /// Called after each store to the file; the tests look at the file then.
  var onStore: (() -> Void)?
  /// Flushes of the store whose results are not there yet.
  private var flushesUnderWay = 0
  /// Whether the worker before this one died in a flush whose result nobody has seen.
  package private(set) var isSuspect = false

  private static var mapped: Int { start + maximumCapacity * recordSize }

  /// Maps a file whose descriptor is lent for the log's life. An empty file is made a log
  /// of a disk of `size` bytes; any other is checked and taken over. Throws when it is not
  /// a log, not of this disk, or damaged.
  package init(mapping raw: Int32, size: UInt64, blockSize: UInt32) throws(PendingLogError) {
    var status = stat()
    guard fstat(raw, &status) == 0 else { throw PendingLog.error(.last("examine", "pending log")) }
    let isNew = status.st_size == 0
    let initial = PendingLog.start + PendingLog.initialCapacity * PendingLog.recordSize
    if isNew {
      let code = posix_fallocate(raw, 0, off_t(initial))
      guard code == 0 else {
        throw PendingLog.error(IOError(code, "make room for", "pending log"))
      }
    } else if status.st_size < initial {
      throw PendingLogError("the pending log is cut short: remove it and lose what it held")
    }
    base = try PendingLog.map(raw, MAP_SHARED)
    self.raw = raw
    self.size = size
    self.blockSize = blockSize
    capacity = PendingLog.initialCapacity
    tail = 0
    head = 0
    // Everything is set by now, so that an error here ends in the deinit, which unmaps.
    if isNew { format() } else { try takeOver(fileSize: Int(status.st_size)) }
  }

  /// A log in anonymous memory, for a worker that nobody stands behind.
  package init(anonymousFor size: UInt64, blockSize: UInt32) throws(PendingLogError) {
    base = try PendingLog.map(-1, MAP_PRIVATE | MAP_ANONYMOUS)
    raw = -1
    self.size = size
    self.blockSize = blockSize
    capacity = PendingLog.initialCapacity
    tail = 0
    head = 0
    format()
  }

  deinit {
    munmap(base, PendingLog.mapped)
  }

  private static func map(_ raw: Int32, _ flags: Int32) throws(PendingLogError)
    -> UnsafeMutableRawPointer
  {
    let address = mmap(nil, mapped, PROT_READ | PROT_WRITE, flags, raw, 0)
    guard let address, address != MAP_FAILED else { throw error(.last("map", "pending log")) }
    return address
  }

  private static func error(_ cause: IOError) -> PendingLogError {
    PendingLogError(cause.description, cause: cause)
  }

  // MARK: The header's words

  private func word(_ offset: Int) -> UnsafeMutablePointer<Atomic<UInt64>> {
    (base + offset).assumingMemoryBound(to: Atomic<UInt64>.self)
  }

  private func publish(_ value: UInt64, at offset: Int) {
    word(offset).pointee.store(value, ordering: .sequentiallyConsistent)
    onStore?()
  }

  private func loaded(_ offset: Int) -> UInt64 {
    word(offset).pointee.load(ordering: .sequentiallyConsistent)
  }

  /// The mark up to which everything is committed.
  package private(set) var committed: Mark {
    get { loaded(40) }
    set { publish(newValue, at: 40) }
  }

  /// The errno of the first failed flush, which stands until an admin acts; 0: none.
  package var flushFailed: Int32 { Int32(truncatingIfNeeded: loaded(48) & 0xffff) }

  private static let underWay: UInt64 = 1 << 32

  private func publishFlush(failed code: Int32) {
    let isUnderWay = flushesUnderWay > 0 || isSuspect
    publish(
      UInt64(UInt16(truncatingIfNeeded: code)) | (isUnderWay ? PendingLog.underWay : 0), at: 48)
  }

  /// Makes a failed flush stand. The first one counts.
  package func failFlush(_ code: Int32) {
    if flushFailed == 0 { publishFlush(failed: code) }
  }

  /// An admin has seen to the store: flushes may succeed again.
  package func clearFlushFailure() {
    publishFlush(failed: 0)
  }

  /// A flush of the store begins.
  package func beginFlush() {
    flushesUnderWay += 1
    if flushesUnderWay == 1 { publishFlush(failed: flushFailed) }
  }

  /// The result of a flush is there, 0 for success. A failed one stands.
  package func endFlush(_ code: Int32) {
    flushesUnderWay -= 1
    let failed = flushFailed
    publishFlush(failed: failed == 0 ? code : failed)
  }

  /// What became of the flush in which the worker before this one died: 0 when it is proved that
  /// nothing was lost, else an errno, which stands.
  package func judge(_ code: Int32) {
    isSuspect = false
    let failed = flushFailed
    publishFlush(failed: failed == 0 ? code : failed)
  }

  /// Says in a log that exists already that a flush is under way, for the time in which its
  /// image is opened, which may flush. Answers whether there is such a log. Throws the errno
  /// of reading or writing it.
  package static func suspect(_ raw: Int32) throws(IOError) -> Bool {
    var word: UInt64 = 0
    for offset in [0, 48] as [off_t] {
      let count = pread(raw, &word, 8, offset)
      guard count >= 0 else { throw IOError.last("read", "pending log") }
      guard count == 8, offset == 48 || word == magic else { return false }
    }
    guard word & underWay == 0 else { return false }
    word |= underWay
    guard pwrite(raw, &word, 8, 48) == 8 else { throw IOError.last("write", "pending log") }
    return true
  }

  private func publishPositions() {
    publish(UInt64(head) << 32 | UInt64(tail), at: 32)
  }

  private func format() {
    base.storeBytes(of: UInt32(PendingLog.recordSize), toByteOffset: 8, as: UInt32.self)
    base.storeBytes(of: blockSize, toByteOffset: 12, as: UInt32.self)
    base.storeBytes(of: size, toByteOffset: 16, as: UInt64.self)
    publish(UInt64(capacity), at: 24)
    // Last, since a file without it is not a log.
    publish(PendingLog.magic, at: 0)
  }

  // MARK: Records

  /// Records in the log, dropped ones that others stand behind included.
  package var count: Int { head >= tail ? head - tail : head + capacity - tail }

  /// Makes sure that so many more records fit, growing if need be; false when they do not.
  func makeRoom(for wanted: Int) -> Bool {
    while count + wanted + 1 > capacity {
      guard head >= tail, grow() else { return false }
    }
    return true
  }

  /// Appends a placement whose data has been written. There must be room for it.
  func append(_ extent: Extent) {
    // Growing keeps the records in one piece; if it fails they wrap.
    if head + 1 == capacity, head >= tail { _ = grow() }
    precondition(count + 1 < capacity, "no room was made in the pending log")
    store(extent, at: head)
    onStore?()
    head = head + 1 == capacity ? 0 : head + 1
    publishPositions()
  }

  /// Drops everything up to a mark: it is committed.
  func drop(upTo mark: Mark) {
    guard mark > committed else { return }
    committed = mark
    var moved = tail
    while moved != head, recordMark(moved) <= mark { moved = moved + 1 == capacity ? 0 : moved + 1 }
    guard moved != tail else { return }
    tail = moved
    if tail == head {
      tail = 0
      head = 0
    }
    publishPositions()
  }

  /// Every placement in the log, in the order of the marks.
  func extents() -> [Extent] {
    var found: [Extent] = []
    var position = tail
    let committed = committed
    while position != head {
      let extent = record(at: position)
      if extent.mark > committed { found.append(extent) }
      position = position + 1 == capacity ? 0 : position + 1
    }
    return found.sorted { $0.mark < $1.mark }
  }

  private func grow() -> Bool {
    let wanted = min(capacity * 2, PendingLog.maximumCapacity)
    guard wanted > capacity else { return false }
    if raw >= 0 {
      // Without the space a store through the mapping would kill the worker; a log that
      // cannot grow is only flushed more often.
      let bytes = PendingLog.start + wanted * PendingLog.recordSize
      guard posix_fallocate(raw, 0, off_t(bytes)) == 0 else { return false }
    }
    capacity = wanted
    publish(UInt64(capacity), at: 24)
    return true
  }

  private func address(_ position: Int) -> UnsafeMutableRawPointer {
    base + PendingLog.start + position * PendingLog.recordSize
  }

  private func recordMark(_ position: Int) -> Mark {
    address(position).load(fromByteOffset: 16, as: UInt64.self)
  }

  private func store(_ extent: Extent, at position: Int) {
    let to = address(position)
    to.storeBytes(of: extent.blocks.first, toByteOffset: 0, as: UInt64.self)
    switch extent.place {
    case .device(let device, let sector):
      to.storeBytes(of: sector, toByteOffset: 8, as: UInt64.self)
      to.storeBytes(of: device, toByteOffset: 28, as: UInt16.self)
    case .zero:
      to.storeBytes(of: 0, toByteOffset: 8, as: UInt64.self)
      to.storeBytes(of: PendingLog.zeroDevice, toByteOffset: 28, as: UInt16.self)
    }
    to.storeBytes(of: extent.mark, toByteOffset: 16, as: UInt64.self)
    to.storeBytes(of: UInt32(extent.blocks.count), toByteOffset: 24, as: UInt32.self)
    to.storeBytes(of: extent.writable ? 1 : 0, toByteOffset: 30, as: UInt16.self)
    to.storeBytes(of: PendingLog.check(UnsafeRawPointer(to)), toByteOffset: 32, as: UInt32.self)
    to.storeBytes(of: 0, toByteOffset: 36, as: UInt32.self)
  }

  private func record(at position: Int) -> Extent {
    let from = UnsafeRawPointer(address(position))
    let device = from.load(fromByteOffset: 28, as: UInt16.self)
    let sector = from.load(fromByteOffset: 8, as: UInt64.self)
    return Extent(
      BlockRange(
        from.load(as: UInt64.self), UInt64(from.load(fromByteOffset: 24, as: UInt32.self))),
      device == PendingLog.zeroDevice ? .zero : .device(device, sector: sector),
      writable: from.load(fromByteOffset: 30, as: UInt16.self) & 1 != 0,
      mark: from.load(fromByteOffset: 16, as: UInt64.self))
  }

  /// FNV-1a over the first 32 bytes of a record, word by word.
  private static func check(_ from: UnsafeRawPointer) -> UInt32 {
    var hash: UInt64 = 0xcbf2_9ce4_8422_2325
    for offset in stride(from: 0, to: 32, by: 8) {
      hash = (hash ^ from.load(fromByteOffset: offset, as: UInt64.self)) &* 0x100_0000_01b3
      hash ^= hash >> 29
    }
    return UInt32(truncatingIfNeeded: hash ^ hash >> 32)
  }

  // MARK: Taking over

  private func takeOver(fileSize: Int) throws(PendingLogError) {
    func damaged(_ what: String) -> PendingLogError {
      PendingLogError("the pending log is damaged (\(what)): remove it and lose what it held")
    }
    let magic = loaded(0)
    if magic == 0 {
      // A worker died while it made the log, and so before it served anything.
      guard loaded(32) == 0, loaded(40) == 0 else { throw damaged("no magic") }
      format()
      return
    }
    guard magic == PendingLog.magic else { throw damaged("magic") }
    guard base.load(fromByteOffset: 8, as: UInt32.self) == UInt32(PendingLog.recordSize) else {
      throw damaged("record size")
    }
    guard base.load(fromByteOffset: 12, as: UInt32.self) == blockSize,
      base.load(fromByteOffset: 16, as: UInt64.self) == size
    else {
      throw PendingLogError(
        "the pending log belongs to a disk of another size: bring the store back as it was, or"
          + " discard the log", isForeign: true)
    }
    let words = (capacity: loaded(24), positions: loaded(32))
    guard words.capacity >= 2, words.capacity <= UInt64(PendingLog.maximumCapacity),
      PendingLog.start + Int(words.capacity) * PendingLog.recordSize <= fileSize
    else { throw damaged("capacity") }
    isSuspect = loaded(48) & PendingLog.underWay != 0
    capacity = Int(words.capacity)
    tail = Int(words.positions & 0xffff_ffff)
    head = Int(words.positions >> 32)
    guard tail < capacity, head < capacity else { throw damaged("positions") }
    try checkRecords(damaged)
    // Nothing left: the next worker may count its marks from the start.
    if extents().isEmpty {
      tail = 0
      head = 0
      publishPositions()
      committed = 0
    }
  }

  private func checkRecords(_ damaged: (String) -> PendingLogError) throws(PendingLogError) {
    let blocks = (size + UInt64(blockSize) - 1) / UInt64(blockSize)
    var position = tail
    while position != head {
      let from = UnsafeRawPointer(address(position))
      guard from.load(fromByteOffset: 32, as: UInt32.self) == PendingLog.check(from) else {
        throw damaged("record \(position)")
      }
      let extent = record(at: position)
      guard extent.mark > 0, extent.blocks.count > 0, extent.blocks.first < blocks,
        extent.blocks.count <= blocks - extent.blocks.first
      else { throw damaged("record \(position)") }
      if case .device(let device, let sector) = extent.place {
        guard device == 0, sector < UInt64.max >> 12 else { throw damaged("record \(position)") }
      }
      position = position + 1 == capacity ? 0 : position + 1
    }
  }
}
