// SPDX-License-Identifier: Apache-2.0
// Which file something is, whatever path or descriptor leads to it.

import Glibc
internal import SystemIO

/// Tells files apart, whatever path they were opened by.
struct FileIdentity: Hashable, Sendable {
  let device: UInt64
  let inode: UInt64

  /// Of an open descriptor; a device node is known by the device's own number.
  init(_ raw: Int32, name: String) throws(IOError) {
    var status = stat()
    guard fstat(raw, &status) == 0 else { throw IOError.last("examine", name) }
    self.init(status)
  }

  init(_ status: stat) {
    let isDevice = status.st_mode & S_IFMT == S_IFBLK
    device = isDevice ? UInt64.max : UInt64(status.st_dev)
    inode = isDevice ? UInt64(status.st_rdev) : UInt64(status.st_ino)
  }

  /// Of a descriptor that a worker gave, without asking a file system. Throws EPERM for what is
  /// neither a file nor a block device.
  init(cached raw: Int32, name: String) throws(IOError) {
    guard let found = FileIdentity(try CachedStatus(raw, name: name)) else {
      throw IOError(EPERM, "use (neither file nor block device)", name)
    }
    self = found
  }

  /// nil for what is neither a file nor a block device.
  init?(_ status: CachedStatus) {
    switch status.mode & S_IFMT {
    case S_IFREG: (device, inode) = (status.fileSystem, status.inode)
    case S_IFBLK: (device, inode) = (UInt64.max, status.device)
    default: return nil
    }
  }

  /// "f-801-4c2" or "b-fd00", as a pending log is named after its store.
  var text: String {
    let number = String(inode, radix: 16)
    return device == .max ? "b-" + number : "f-" + String(device, radix: 16) + "-" + number
  }

  /// From such a text; nil for any other.
  init?(_ text: String) {
    let parts = text.split(separator: "-", omittingEmptySubsequences: false)
    let numbers = parts.dropFirst().compactMap { UInt64($0, radix: 16) }
    switch (parts.first, parts.count, numbers.count) {
    case ("b", 2, 1): (device, inode) = (.max, numbers[0])
    case ("f", 3, 2): (device, inode) = (numbers[0], numbers[1])
    default: return nil
    }
  }
}
