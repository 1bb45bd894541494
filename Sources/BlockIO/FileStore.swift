// SPDX-License-Identifier: Apache-2.0
// A byte store that is a file or a block device, over an owned descriptor.

internal import CLinux
import Glibc
import Synchronization
package import SystemIO

/// A file or a block device as a byte store. The descriptor is closed with it.
package final class FileStore: ByteStore {
  /// The path, or the role that errors shall call it by.
  package let name: String
  /// Whether the descriptor was opened for writing.
  package let isWritable: Bool
  /// Whether it is a block device: fixed in size, no modification time of meaning.
  package let isBlockDevice: Bool
  /// A block device.
  package var isFixedSize: Bool { isBlockDevice }
  /// Itself.
  package var file: FileStore? { self }
  /// The descriptor, lent.
  package var raw: Int32 { descriptor.raw }

  private let descriptor: Descriptor
  /// Reads and writes pass the page cache by, in units of so many bytes; 0: they do not.
  private let unit = Atomic<Int>(0)
  /// Held while a unit is read in order to change a part of it.
  private let parts = Mutex(())
  /// The length that a device had when it was opened, for when it cannot be asked any more.
  private let firstSize: UInt64

  /// Takes over a descriptor. Throws: the errno of fstat(2), EINVAL for what is neither a
  /// file nor a block device.
  package init(_ descriptor: consuming Descriptor, name: String) throws(IOError) {
    var status = stat()
    guard fstat(descriptor.raw, &status) == 0 else { throw IOError.last("examine", name) }
    let flags = fcntl(descriptor.raw, F_GETFL)
    guard flags >= 0 else { throw IOError.last("examine", name) }
    var size: UInt64 = 0
    switch status.st_mode & S_IFMT {
    case S_IFREG: isBlockDevice = false
    case S_IFBLK:
      isBlockDevice = true
      guard dmu_block_device_size(descriptor.raw, &size) == 0 else {
        throw IOError.last("measure", name)
      }
    default: throw Self.unusable(name)
    }
    self.firstSize = size
    self.isWritable = flags & O_ACCMODE != O_RDONLY
    self.name = name
    self.descriptor = descriptor
    // Another owner of the same open file may have asked for it.
    if dmu_is_direct(raw) == 1 { unit.store(directUnit, ordering: .relaxed) }
  }

  /// Opens a path, without ever waiting. A path of another kind than a regular file or a block
  /// device is not opened at all: opening a FIFO waits for its other end, and opening a character
  /// device may have effects. Throws: EINVAL for these, the errno of open(2), and what the other
  /// initialiser throws.
  package convenience init(path: String, writable: Bool) throws(IOError) {
    guard Self.unusableKind(of: path) == nil else { throw Self.unusable(path) }
    // The path may lead to a FIFO by now.
    let flags = (writable ? O_RDWR : O_RDONLY) | O_NONBLOCK
    let descriptor = try Descriptor(path: path, flags: flags)
    try self.init(descriptor, name: path)
    let status = fcntl(raw, F_GETFL)
    guard status >= 0, fcntl(raw, F_SETFL, status & ~O_NONBLOCK) == 0 else {
      throw IOError.last("set up", path)
    }
  }

  /// What a path leads to, in words, if that can be no store: "a FIFO". nil for a regular file, a
  /// block device, and a path that cannot be examined. Source: inode(7).
  package static func unusableKind(of path: String) -> String? {
    var status = stat()
    guard stat(path, &status) == 0 else { return nil }
    return switch status.st_mode & S_IFMT {
    case S_IFREG, S_IFBLK: nil
    case S_IFIFO: "a FIFO"
    case S_IFSOCK: "a socket"
    case S_IFCHR: "a character device"
    case S_IFDIR: "a directory"
    default: "neither a file nor a block device"
    }
  }

  private static func unusable(_ name: String) -> IOError {
    IOError(EINVAL, "use as a store (neither file nor block device)", name)
  }

  /// Locks one byte for this open file description, against everybody, without waiting. For files
  /// that are no images. Throws EAGAIN when another has it.
  package func lockByte(_ byte: Int64) throws(IOError) {
    try lock(F_WRLCK, at: byte, length: 1)
  }

  /// Locks one byte for this open file description as many may have it at once. Throws EAGAIN when
  /// somebody has it alone.
  package func lockShared(_ byte: Int64) throws(IOError) {
    try lock(F_RDLCK, at: byte, length: 1)
  }

  /// Gives up the lock of a byte.
  package func unlockByte(_ byte: Int64) throws(IOError) {
    try lock(F_UNLCK, at: byte, length: 1)
  }

  /// Locks an image for this open file description, without waiting: exclusively for a store,
  /// shared for a base. Throws EAGAIN when another has it in a way that does not go with that.
  ///
  /// The locks are those of QEMU, so that its tools may read a base that is in use and nothing
  /// else: all are shared ones; a lock on byte 100 + n says that somebody does n, one on byte
  /// 200 + n that somebody does not bear n done by others; n is 0 for reading what is
  /// consistent, 1 for writing, 3 for resizing. Source: QEMU, docs/devel, image locking.
  package func lock(exclusive: Bool) throws(IOError) {
    do throws(IOError) {
      try placeLocks(exclusive: exclusive)
      if try hasConflict(exclusive: exclusive) { throw IOError(EAGAIN, "lock", name) }
    } catch {
      // The error that led here is the one worth telling.
      _ = dmu_ofd_lock(raw, Int16(F_UNLCK), 100, 200)
      throw error
    }
  }

  /// Takes the locks of `lock(exclusive:)` without looking for those of others. Throws EAGAIN when
  /// another has one of the bytes alone.
  package func placeLocks(exclusive: Bool) throws(IOError) {
    for act in Self.done(exclusive) { try lock(F_RDLCK, at: 100 + act, length: 1) }
    for act in Self.unbearable { try lock(F_RDLCK, at: 200 + act, length: 1) }
  }

  /// Whether another open file description has a lock that does not go with those of
  /// `lock(exclusive:)`.
  package func hasConflict(exclusive: Bool) throws(IOError) -> Bool {
    for byte in Self.conflicts(exclusive: exclusive) {
      let found = dmu_ofd_locked(raw, byte, 1)
      guard found >= 0 else { throw IOError.last("look for a lock on", name) }
      if found != 0 { return true }
    }
    return false
  }

  /// The bytes on which somebody else's lock is in the way.
  package static func conflicts(exclusive: Bool) -> [Int64] {
    done(exclusive).map { 200 + $0 } + unbearable.map { 100 + $0 }
  }

  private static func done(_ exclusive: Bool) -> [Int64] { exclusive ? [0, 1, 3] : [0] }
  private static var unbearable: [Int64] { [1, 3] }

  /// Gives up the locks of `lock(exclusive:)`.
  package func unlock() throws(IOError) {
    try lock(F_UNLCK, at: 100, length: 200)
  }

  private func lock(_ type: Int32, at start: Int64, length: Int64) throws(IOError) {
    guard dmu_ofd_lock(raw, Int16(type), start, length) == 0 else {
      throw IOError(errno == EACCES ? EAGAIN : errno, "lock", name)
    }
  }

  private func status() throws(IOError) -> stat {
    var status = stat()
    guard fstat(raw, &status) == 0 else { throw IOError.last("examine", name) }
    return status
  }

  /// Whether another store is the same file, or the same device by whatever node.
  package func isSameFile(as other: FileStore) throws(IOError) -> Bool {
    let mine = try status()
    let theirs = try other.status()
    if isBlockDevice && other.isBlockDevice { return mine.st_rdev == theirs.st_rdev }
    return mine.st_dev == theirs.st_dev && mine.st_ino == theirs.st_ino
  }

  /// The next range of bytes at or after an offset that is not a hole, nil when there is
  /// none. On a device, or where the file system knows no holes, everything is data.
  /// Source: lseek(2).
  package func nextData(from offset: UInt64) throws(IOError) -> Range<UInt64>? {
    guard !isBlockDevice else { return offset < deviceSize ? offset..<deviceSize : nil }
    let (seekData, seekHole): (Int32, Int32) = (3, 4)
    let start = lseek(raw, off_t(truncatingIfNeeded: offset), seekData)
    if start < 0 && errno == ENXIO { return nil }
    guard start >= 0 else { throw IOError.last("find data in", name) }
    let end = lseek(raw, start, seekHole)
    guard end > start else { throw IOError.last("find a hole in", name) }
    return UInt64(start)..<UInt64(end)
  }

  private var deviceSize: UInt64 {
    var size: UInt64 = 0
    return dmu_block_device_size(raw, &size) == 0 ? size : firstSize
  }

  /// Length in bytes. It is asked for each time: a file grows, and so may a device.
  package var size: UInt64 {
    guard !isBlockDevice else { return deviceSize }
    var status = stat()
    // fstat on an open descriptor of a regular file has no way to fail but a bad descriptor.
    precondition(fstat(raw, &status) == 0, "fstat of an owned descriptor")
    return UInt64(status.st_size)
  }

  /// Size, and the modification time of a file.
  package func identity() throws(IOError) -> StoreIdentity {
    let status = try status()
    let time = status.st_mtim
    let modified = UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    return StoreIdentity(size: size, modified: isBlockDevice ? 0 : modified)
  }

  /// Bytes of the file's blocks; all of a device.
  package func allocatedBytes() throws(IOError) -> UInt64 {
    isBlockDevice ? deviceSize : UInt64(try status().st_blocks) * 512
  }

  // MARK: Past the page cache

  /// What reads and writes past the page cache are multiples of, in offset, length and memory:
  /// a page for a file, a sector for a device.
  private var directUnit: Int {
    var size: Int32 = 0
    let getSectorSize: UInt = 0x1268
    guard isBlockDevice, dmu_ioctl_pointer(raw, getSectorSize, &size) == 0, size >= 512 else {
      return 4096
    }
    return Int(size)
  }

  /// Has `read` and `write`, and every other user of the same open file, pass the page cache by, or
  /// use it again. What the cache holds is written out and forgotten first. False where the file
  /// system cannot; then nothing has changed. For a file that somebody else writes past the cache:
  /// a page here, or a larger piece around it, might be written back over that.
  /// Throws: the errno of writing out. Source: open(2), O_DIRECT.
  @discardableResult
  package func bypassCache(_ bypass: Bool) throws(IOError) -> Bool {
    if bypass {
      guard fdatasync(raw) == 0 else { throw IOError.last("flush", name) }
      guard dmu_settle_range(raw, 0, 0) == 0 else { throw IOError.last("write out", name) }
    }
    guard dmu_set_direct(raw, bypass ? 1 : 0) == 0 else {
      if bypass, errno == EINVAL { return false }
      throw IOError.last("set up", name)
    }
    unit.store(bypass ? directUnit : 0, ordering: .relaxed)
    return true
  }

  /// Whether reads and writes pass the page cache by.
  package var bypassesCache: Bool { unit.load(ordering: .relaxed) != 0 }

  /// The range of whole units around a range of bytes.
  private static func units(_ offset: UInt64, _ count: Int, _ unit: Int) -> Range<UInt64> {
    let size = UInt64(unit)
    return offset / size * size..<(offset + UInt64(count) + size - 1) / size * size
  }

  private func readDirect(
    _ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, _ unit: Int
  ) throws(IOError) {
    let range = Self.units(offset, buffer.count, unit)
    let whole = UnsafeMutableRawBufferPointer.allocate(
      byteCount: Int(range.upperBound - range.lowerBound), alignment: max(unit, 4096))
    defer { whole.deallocate() }
    try readAll(whole, at: range.lowerBound)
    let start = Int(offset - range.lowerBound)
    buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: whole[start..<start + buffer.count]))
  }

  private func writeDirect(
    _ buffer: UnsafeRawBufferPointer, at offset: UInt64, _ unit: Int
  ) throws(IOError) {
    let range = Self.units(offset, buffer.count, unit)
    let length = Int(range.upperBound - range.lowerBound)
    let whole = UnsafeMutableRawBufferPointer.allocate(
      byteCount: length, alignment: max(unit, 4096))
    defer { whole.deallocate() }
    let start = Int(offset - range.lowerBound)
    let piece = UnsafeMutableRawBufferPointer(rebasing: whole[start..<start + buffer.count])
    guard start != 0 || buffer.count != length else {
      piece.copyMemory(from: buffer)
      return try writeAll(UnsafeRawBufferPointer(whole), at: range.lowerBound)
    }
    let end = size
    let failure = parts.withLock { _ -> IOError? in
      do throws(IOError) {
        try readAll(whole, at: range.lowerBound)
        piece.copyMemory(from: buffer)
        try writeAll(UnsafeRawBufferPointer(whole), at: range.lowerBound)
        // A file that ended within the last unit ends where it was written.
        let wanted = max(end, offset + UInt64(buffer.count))
        if !isBlockDevice, wanted < range.upperBound { try resize(to: wanted) }
        return nil
      } catch { return error }
    }
    if let failure { throw failure }
  }

  // MARK: Reading and writing

  // An offset that no file has, which an image may name, is the system call's to refuse (EINVAL).

  /// Fills the buffer; past the end, with zeroes.
  package func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    let unit = unit.load(ordering: .relaxed)
    guard unit == 0 else { return try readDirect(buffer, at: offset, unit) }
    try readAll(buffer, at: offset)
  }

  /// Fills the buffer if that takes no wait for the medium; false, with the buffer in any state, if it
  /// might, or fails. Past the end, with zeroes. Source: preadv2(2), RWF_NOWAIT.
  package func readAtOnce(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) -> Bool {
    guard !bypassesCache else { return false }
    var done = 0
    while done < buffer.count {
      let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
      let place = off_t(truncatingIfNeeded: offset) &+ off_t(done)
      let count = dmu_pread_nowait(raw, rest.baseAddress, rest.count, place)
      guard count >= 0 else { return false }
      if count == 0 {
        rest.initializeMemory(as: UInt8.self, repeating: 0)
        return true
      }
      done += count
    }
    return true
  }

  private func readAll(
    _ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
  ) throws(IOError) {
    var done = 0
    while done < buffer.count {
      let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
      let count = pread(
        raw, rest.baseAddress, rest.count, off_t(truncatingIfNeeded: offset) &+ off_t(done))
      if count < 0 {
        if errno == EINTR { continue }
        throw IOError.last("read", name)
      }
      if count == 0 {
        rest.initializeMemory(as: UInt8.self, repeating: 0)
        return
      }
      done += count
      // Past the cache a file ends within a unit only at its end.
      if bypassesCache, done % 512 != 0 {
        UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
          .initializeMemory(as: UInt8.self, repeating: 0)
        return
      }
    }
  }

  /// Writes the whole buffer.
  package func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    let unit = unit.load(ordering: .relaxed)
    guard unit == 0 else { return try writeDirect(buffer, at: offset, unit) }
    try writeAll(buffer, at: offset)
  }

  private func writeAll(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    var done = 0
    while done < buffer.count {
      let rest = UnsafeRawBufferPointer(rebasing: buffer[done...])
      let count = pwrite(
        raw, rest.baseAddress, rest.count, off_t(truncatingIfNeeded: offset) &+ off_t(done))
      if count < 0 {
        if errno == EINTR { continue }
        throw IOError.last("write", name)
      }
      done += count
    }
  }

  /// Punches a hole; where the medium cannot, writes zeroes. A device gives space back in whole
  /// pages only: the rest of the range is written.
  package func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    let page: UInt64 = 4096
    guard isBlockDevice, offset % page != 0 || (offset + count) % page != 0 else {
      return try punch(at: offset, count: count)
    }
    let end = offset + count
    let first = min(end, (offset + page - 1) / page * page)
    let last = max(first, end / page * page)
    try writeZeroes(at: offset, count: first - offset)
    try punch(at: first, count: last - first)
    try writeZeroes(at: last, count: end - last)
  }

  private func punch(at offset: UInt64, count: UInt64) throws(IOError) {
    guard count > 0 else { return }
    if dmu_punch_hole(raw, Int64(offset), Int64(count)) == 0 { return }
    guard [EOPNOTSUPP, ENODEV, ENOSYS].contains(errno) || (isBlockDevice && errno == EINVAL) else {
      throw IOError.last("zero", name)
    }
    try writeZeroes(at: offset, count: count)
  }

  private func writeZeroes(at offset: UInt64, count: UInt64) throws(IOError) {
    guard count > 0 else { return }
    let zeroes = [UInt8](repeating: 0, count: Int(min(count, 1 << 20)))
    var done: UInt64 = 0
    while done < count {
      let piece = Int(min(count - done, UInt64(zeroes.count)))
      try write(Array(zeroes[..<piece]), at: offset + done)
      done += UInt64(piece)
    }
  }

  /// Gives a range its space, lengthening a file when need be; its bytes stay as they are.
  /// Throws EOPNOTSUPP where the file system cannot.
  package func allocate(at offset: UInt64, count: UInt64) throws(IOError) {
    guard !isBlockDevice, count > 0 else { return }
    guard dmu_allocate(raw, Int64(offset), Int64(count)) == 0 else {
      throw IOError.last("allocate", name)
    }
  }

  /// Copies bytes from another file within the kernel, sharing them where the file systems
  /// can. Source: copy_file_range(2).
  package func copy(
    from other: FileStore, at source: UInt64, to offset: UInt64, count: UInt64
  ) throws(IOError) {
    var (from, to) = (off_t(truncatingIfNeeded: source), off_t(truncatingIfNeeded: offset))
    var left = Int(count)
    while left > 0 {
      let done = dmu_copy_range(other.raw, &from, raw, &to, left)
      if done < 0 {
        if errno == EINTR { continue }
        throw IOError.last("copy \(other.name) to", name)
      }
      guard done > 0 else { throw IOError(EIO, "copy past the end of \(other.name) to", name) }
      left -= done
    }
  }

  /// Writes out what of a range is only in the page cache, and forgets it there: for whoever
  /// reads or writes the medium past the cache. Not durable before `flush`.
  package func settle(at offset: UInt64, count: UInt64) throws(IOError) {
    guard count > 0 else { return }
    guard dmu_settle_range(raw, Int64(offset), Int64(count)) == 0 else {
      throw IOError.last("write out", name)
    }
  }

  /// Bytes that the file system has left; nothing is known of a device.
  package func freeBytes() throws(IOError) -> UInt64? {
    guard !isBlockDevice else { return nil }
    var bytes: UInt64 = 0
    guard dmu_free_space(raw, &bytes) == 0 else { throw IOError.last("examine", name) }
    return bytes
  }

  /// Sets a file's length. Throws ENOTSUP for a device whose length differs.
  package func resize(to size: UInt64) throws(IOError) {
    if isBlockDevice {
      guard size <= deviceSize else { throw IOError(ENOSPC, "resize", name) }
      return
    }
    guard ftruncate(raw, off_t(truncatingIfNeeded: size)) == 0 else {
      throw IOError.last("resize", name)
    }
  }

  /// `allocate`, on a file system that knows it. Throws ENOSPC where there is not four times as much
  /// free: a call that finds too little takes, for a while or for good, what others are writing to.
  package func reserve(at offset: UInt64, count: UInt64) throws(IOError) {
    guard !isBlockDevice else { return }
    if let free = try freeBytes(), free / 4 < count {
      throw IOError(ENOSPC, "reserve space in", name)
    }
    do throws(IOError) { try allocate(at: offset, count: count) } catch {
      guard error.code == EOPNOTSUPP || error.code == ENOSYS else { throw error }
    }
  }

  /// fdatasync(2): data, and the metadata that is needed to find it.
  package func flush() throws(IOError) {
    guard fdatasync(raw) == 0 else { throw IOError.last("flush", name) }
  }

  /// fsync(2): times, too.
  package func flushAll() throws(IOError) {
    guard fsync(raw) == 0 else { throw IOError.last("flush", name) }
  }
}
