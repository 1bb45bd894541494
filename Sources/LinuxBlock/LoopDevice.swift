// SPDX-License-Identifier: Apache-2.0
// Files as block devices, for what takes nothing else.
//
// Invariants:
// - A device is given its file in one call, so that nobody ever sees it half made.
// - It clears itself with its last close: whoever dies leaves nothing behind. Open it (the
//   device-mapper does, when a table names it) before this owner goes.
// - A device keeps the length that its file had when it got it. A file that shall grow is
//   therefore made longer for that moment: its device then has room ahead, and the file grows
//   as it is written. Whoever lets it be written there sees to it that the file is as long.
// - A device is marked for udev before it is given its file (LoopMarks).

internal import CLinux
import Glibc
package import SystemIO

/// The owner of a loop device; the device goes when neither this owner nor anybody else has it
/// open. Needs root and Linux 5.8.
package struct LoopDevice: ~Copyable, Sendable {
  private static let readOnly: UInt32 = 1
  private static let autoClear: UInt32 = 4
  private static let directIO: UInt32 = 16

  /// What a loop device stands on.
  package struct File: Sendable, Hashable {
    /// The device of the file's file system, as stat(2) says it.
    package let fileSystem: UInt64
    /// The file there.
    package let inode: UInt64
    /// Whether requests pass the page cache by.
    package let isDirect: Bool
  }

  /// Takes the file from a loop device of somebody else, at once or with its last close. Throws the
  /// errno of open(2), and ENXIO for one without a file. Its mark goes with the next sweep.
  package static func release(_ path: String) throws(IOError) {
    let device = try Descriptor(path: path, flags: O_RDONLY)
    guard dmu_loop_clear(device.raw) == 0 else { throw IOError.last("give back", path) }
  }

  /// The number in /dev/loopN.
  package let number: Int32
  /// The device's node.
  package var path: String { "/dev/loop\(number)" }
  private let descriptor: Descriptor

  /// Makes a device of an open file or device, which stays the caller's, with sectors of `sector`
  /// bytes (512 to 4096). With `direct` requests pass the page cache by where the file system lets
  /// them, in larger sectors where it takes no smaller ones. `growth`: by so many bytes the device
  /// is longer than the file, as far as its file system has files of that length. `name` is what
  /// losetup prints. Throws: ENOENT without the driver, EBADF, and the errno of the ioctl calls of
  /// loop(4).
  package init(
    file: Int32, name: String, readOnly: Bool, direct: Bool = true, sector: UInt32 = 512,
    growth: UInt64 = 0
  ) throws(IOError) {
    let control = try Descriptor(path: "/dev/loop-control", flags: O_RDWR)
    let flags =
      Self.autoClear | (direct ? Self.directIO : 0) | (readOnly ? Self.readOnly : 0)
    let length = try Self.stretch(file, name, by: growth)
    var made: Made?
    var failure: IOError?
    do throws(IOError) {
      made = try Self.make(control, file, flags, sector, name)
    } catch { failure = error }
    if let length, ftruncate(file, off_t(length)) != 0 {
      throw failure ?? IOError.last("shorten", name)
    }
    guard let made = made.take() else { throw failure ?? IOError(EBUSY, "make", name) }
    number = made.number
    descriptor = made.device
  }

  /// A device that was made.
  private struct Made: ~Copyable {
    let number: Int32
    let device: Descriptor
    init(_ number: Int32, _ device: consuming Descriptor) {
      self.number = number
      self.device = device
    }
  }

  /// Lengthens a file as far as there are files of that length; its former length, or nil when
  /// nothing was done.
  static func stretch(
    _ file: Int32, _ name: String, by growth: UInt64
  ) throws(IOError) -> UInt64? {
    guard growth > 0 else { return nil }
    var status = stat()
    guard fstat(file, &status) == 0 else { throw IOError.last("examine", name) }
    guard status.st_mode & S_IFMT == S_IFREG else { return nil }
    let length = UInt64(status.st_size)
    var ahead = growth / 4096 * 4096
    while ahead >= 4096 {
      if ftruncate(file, off_t(truncatingIfNeeded: length &+ ahead)) == 0 { return length }
      guard errno == EFBIG || errno == ENOSPC || errno == EINVAL else {
        throw IOError.last("lengthen", name)
      }
      ahead = ahead / 8192 * 4096
    }
    return nil
  }

  private static func make(
    _ control: borrowing Descriptor, _ file: Int32, _ flags: UInt32, _ sector: UInt32,
    _ name: String
  ) throws(IOError) -> Made {
    let readOnly = flags & Self.readOnly != 0
    // Between finding a free device and taking it another may have taken it.
    for _ in 0..<100 {
      let number = dmu_loop_get_free(control.raw)
      guard number >= 0 else { throw IOError.last("find a free loop device for", name) }
      let node = "/dev/loop\(number)"
      let device = try Descriptor(path: node, flags: readOnly ? O_RDONLY : O_RDWR)
      let mark = try LoopMarks.host.mark(number)
      guard try backing(of: device.raw, name) == nil else {
        // An older mark is that of another process, which has made this device meanwhile.
        if mark.isNew { try mark.remove() }
        continue
      }
      let isMade: Bool
      do throws(IOError) {
        isMade = try Self.configure(device, file, flags, sector, name)
      } catch {
        mark.giveUp()
        throw error
      }
      if isMade {
        mark.keepUntilHere()
        return Made(number, device)
      }
      try mark.remove()
    }
    throw IOError(EBUSY, "find a free loop device for", name)
  }

  /// False when somebody else took the device. A file that cannot be read past the cache in
  /// small sectors is asked for in larger ones.
  private static func configure(
    _ device: borrowing Descriptor, _ file: Int32, _ flags: UInt32, _ sector: UInt32,
    _ name: String
  ) throws(IOError) -> Bool {
    for size in [sector, 4096] {
      guard dmu_loop_configure(device.raw, file, size, flags, name) == 0 else {
        if errno == EBUSY { return false }
        throw IOError.last("make a loop device of", name)
      }
      guard let backing = try backing(of: device.raw, name) else { return false }
      if backing.isDirect || size == 4096 || flags & directIO == 0 { return true }
      guard isDirectPossible(file, sector: 4096) else { return true }
      guard dmu_loop_clear(device.raw) == 0 else {
        throw IOError.last("give back a loop device of", name)
      }
    }
    return true
  }

  /// Whether the file takes requests past the page cache in units of so many bytes, but not in
  /// smaller ones.
  private static func isDirectPossible(_ file: Int32, sector: Int) -> Bool {
    let raw = dmu_open_direct("/proc/self/fd/\(file)")
    // A file system without it says so: EINVAL. What else goes wrong is no reason to fail.
    guard raw >= 0 else { return false }
    let direct = Descriptor(owning: raw)
    let buffer = UnsafeMutableRawPointer.allocate(byteCount: sector, alignment: sector)
    defer { buffer.deallocate() }
    return pread(direct.raw, buffer, sector, 0) >= 0 && pread(direct.raw, buffer, 512, 0) < 0
  }

  /// What the device of an open node stands on; nil when it is free. `name` is for errors.
  package static func backing(of node: Int32, _ name: String) throws(IOError) -> File? {
    var device: UInt64 = 0
    var inode: UInt64 = 0
    var flags: UInt32 = 0
    guard dmu_loop_status(node, &device, &inode, &flags) == 0 else {
      if errno == ENXIO { return nil }
      throw IOError.last("examine", name)
    }
    return File(fileSystem: device, inode: inode, isDirect: flags & directIO != 0)
  }

  /// What this device stands on.
  package func backing() throws(IOError) -> File {
    guard let backing = try Self.backing(of: descriptor.raw, path) else {
      throw IOError(ENXIO, "examine", path)
    }
    return backing
  }

  /// The device's number, as stat(2) says it.
  package func deviceNumber() throws(IOError) -> UInt64 {
    var status = stat()
    guard fstat(descriptor.raw, &status) == 0 else { throw IOError.last("examine", path) }
    return UInt64(status.st_rdev)
  }

  /// Bytes of a sector of the device.
  package func sectorSize() throws(IOError) -> UInt32 {
    var size: UInt32 = 0
    guard dmu_block_device_sector(descriptor.raw, &size) == 0 else {
      throw IOError.last("measure", path)
    }
    return size
  }

  /// Lets the device grow as its file has.
  package func followSize() throws(IOError) {
    guard dmu_loop_set_capacity(descriptor.raw) == 0 else { throw IOError.last("grow", path) }
  }

  /// Takes the file from the device now, or with its last close while others have it open.
  package consuming func release() throws(IOError) {
    guard dmu_loop_clear(descriptor.raw) == 0 else { throw IOError.last("give back", path) }
  }
}
