// SPDX-License-Identifier: Apache-2.0
import BlockIO
import Glibc
import LinuxBlock
import SystemIO

func tryLoopDevices() throws {
  let file = try scratchFile("loop.img", bytes: 1 << 20)
  let path: String
  do {
    let loop = try LoopDevice(file: file.raw, name: file.name, readOnly: false)
    path = loop.path
    check(try loop.sectorSize() == 512, "the sectors are of \(try loop.sectorSize()) bytes")
    let backing = try loop.backing()
    var status = stat()
    check(fstat(file.raw, &status) == 0, "fstat: \(errno)")
    check(backing.inode == UInt64(status.st_ino), "another file")
    check(backing.fileSystem == UInt64(status.st_dev), "another file system")
    let sectors = try Sectors(path)
    check(sectors.device.size == 1 << 20, "size \(sectors.device.size)")
    try sectors.fill(7, 0x5a)
    check(try file.read(at: 7 * 512, count: 512).allSatisfy { $0 == 0x5a }, "not in the file")
    try file.resize(to: 2 << 20)
    try loop.followSize()
    check(try FileStore(path: path, writable: false).size == 2 << 20, "has not grown")
  }
  // Nobody has it open any more: it has let its file go.
  do {
    let node = try Descriptor(path: path, flags: O_RDONLY)
    check(try LoopDevice.backing(of: node.raw, path) == nil, "\(path) keeps its file")
  }

  let base = try LoopDevice(file: file.raw, name: file.name, readOnly: true)
  do {
    // Some kernels refuse the opening, others the writing.
    try Sectors(base.path).fill(1, 0x33)
    complain("a loop device that is only read was written")
  } catch let error as IOError {
    check([EACCES, EROFS, EPERM].contains(error.code), "\(error)")
  }
  let other = base.path
  try base.release()
  do {
    let node = try Descriptor(path: other, flags: O_RDONLY)
    check(try LoopDevice.backing(of: node.raw, other) == nil, "\(other) was not released")
  }

  // A lock on the file lasts as long as the device that was made of its descriptor.
  let locked = try scratchFile("locked.img", bytes: 1 << 20)
  let held = try lockedLoop(locked.name)
  do throws(IOError) {
    try locked.lock(exclusive: true)
    complain("the lock went with its descriptor")
  } catch { check(error.code == EAGAIN, "\(error)") }
  try held.release()
  try locked.lock(exclusive: true)
  for name in ["loop.img", "locked.img"] { check(unlink("/mnt/" + name) == 0, "unlink") }
}

/// A device of a file that is locked, whose descriptor is closed.
private func lockedLoop(_ path: String) throws -> LoopDevice {
  let file = try FileStore(path: path, writable: true)
  try file.lock(exclusive: true)
  return try LoopDevice(file: file.raw, name: path, readOnly: false)
}
