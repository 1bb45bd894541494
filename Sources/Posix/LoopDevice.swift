// Files as block devices, for what takes nothing else.
//
// Invariants:
// - A device is given its file in one call, so that nobody ever sees it half made.
// - It clears itself with its last close: whoever dies leaves nothing behind. Open it (the
//   device-mapper does, when a table names it) before this owner goes.

internal import CLinux
import Glibc

/// The owner of a loop device; the device goes when neither this owner nor anybody else has it
/// open. Needs root and Linux 5.8.
public struct LoopDevice: ~Copyable, Sendable {
  private static let readOnly: UInt32 = 1
  private static let autoClear: UInt32 = 4
  private static let directIO: UInt32 = 16

  /// What a loop device stands on.
  public struct Backing: Sendable, Hashable {
    /// The device of the file's file system, as stat(2) says it.
    public let fileSystem: UInt64
    /// The file there.
    public let inode: UInt64
    /// Whether requests pass the page cache by.
    public let isDirect: Bool
  }

  /// The number in /dev/loopN.
  public let number: Int32
  /// The device's node.
  public var path: String { "/dev/loop\(number)" }
  private let descriptor: Descriptor

  /// Makes a device of an open file, which stays the caller's. Requests pass the page cache by
  /// where the file system lets them, in sectors as small as it takes, and 512 bytes otherwise.
  /// `name` is what losetup prints. Throws: ENOENT without the driver, EBADF, and the errno of
  /// the ioctl calls of loop(4).
  public init(file: Int32, name: String, readOnly: Bool) throws(IOError) {
    let control = try Descriptor(path: "/dev/loop-control", flags: O_RDWR)
    let flags = Self.autoClear | Self.directIO | (readOnly ? Self.readOnly : 0)
    // Between finding a free device and taking it another may have taken it.
    for _ in 0..<100 {
      let number = dmu_loop_get_free(control.raw)
      guard number >= 0 else { throw IOError.last("find a free loop device for", name) }
      let node = "/dev/loop\(number)"
      let device = try Descriptor(path: node, flags: readOnly ? O_RDONLY : O_RDWR)
      if try Self.configure(device, file, flags, name) {
        self.number = number
        self.descriptor = device
        return
      }
    }
    throw IOError(EBUSY, "find a free loop device for", name)
  }

  /// False when somebody else took the device. A file that cannot be read past the cache in
  /// small sectors is asked for in larger ones.
  private static func configure(
    _ device: borrowing Descriptor, _ file: Int32, _ flags: UInt32, _ name: String
  ) throws(IOError) -> Bool {
    for size in [UInt32(512), 4096] {
      guard dmu_loop_configure(device.raw, file, size, flags, name) == 0 else {
        if errno == EBUSY { return false }
        throw IOError.last("make a loop device of", name)
      }
      guard let backing = try backing(of: device.raw, name) else { return false }
      if backing.isDirect || size == 4096 { return true }
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
  public static func backing(of node: Int32, _ name: String) throws(IOError) -> Backing? {
    var device: UInt64 = 0
    var inode: UInt64 = 0
    var flags: UInt32 = 0
    guard dmu_loop_status(node, &device, &inode, &flags) == 0 else {
      if errno == ENXIO { return nil }
      throw IOError.last("examine", name)
    }
    return Backing(fileSystem: device, inode: inode, isDirect: flags & directIO != 0)
  }

  /// What this device stands on.
  public func backing() throws(IOError) -> Backing {
    guard let backing = try Self.backing(of: descriptor.raw, path) else {
      throw IOError(ENXIO, "examine", path)
    }
    return backing
  }

  /// The device's number, as stat(2) says it.
  public func deviceNumber() throws(IOError) -> UInt64 {
    var status = stat()
    guard fstat(descriptor.raw, &status) == 0 else { throw IOError.last("examine", path) }
    return UInt64(status.st_rdev)
  }

  /// Bytes of a sector of the device.
  public func sectorSize() throws(IOError) -> UInt32 {
    var size: UInt32 = 0
    guard dmu_block_device_sector(descriptor.raw, &size) == 0 else {
      throw IOError.last("measure", path)
    }
    return size
  }

  /// Lets the device grow as its file has.
  public func followSize() throws(IOError) {
    guard dmu_loop_set_capacity(descriptor.raw) == 0 else { throw IOError.last("grow", path) }
  }

  /// Takes the file from the device now, or with its last close while others have it open.
  public consuming func release() throws(IOError) {
    guard dmu_loop_clear(descriptor.raw) == 0 else { throw IOError.last("give back", path) }
  }
}
