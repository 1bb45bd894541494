// SPDX-License-Identifier: Apache-2.0
// Marks of loop devices, for udev: nothing in sysfs says whose a loop device is, so a file named
// like the device does. The rules in etc/09-dmu-xen.rules do not probe a device that has one.
//
// Invariants:
// - A mark is there from before its device gets its file until the device is free again: udev
//   never finds a device of ours without one.
// - A process holds the lock of a mark's file from marking until the device has its file. A mark
//   whose lock is free and whose device has no file is stale; `sweep` removes it.
// - The folder is the same for every daemon, whatever its run directory, and for cowd by hand:
//   the rules name one path.

import BlockIO
import Glibc
package import SystemIO

/// The folder of the marks.
package struct LoopMarks: Sendable {
  /// The folder that udev's rules look into.
  package static let host = LoopMarks(folder: "/run/dmu-xen/loops", devices: "/sys/block")
  /// A mark's lock is held for a moment; then it is tried again after so many microseconds.
  private static let pause: UInt32 = 5000
  private static let attempts = 400

  private let folder: String
  private let devices: String

  /// Marks in a folder, of devices whose attributes are below `devices`.
  init(folder: String, devices: String) {
    self.folder = folder
    self.devices = devices
  }

  /// Marks /dev/loopN and holds the mark's lock until the result is released. Throws: EAGAIN when
  /// the lock is held for long, and the errno of mkdir(2) or open(2).
  func mark(_ number: Int32) throws(IOError) -> LoopMark {
    let path = folder + "/loop\(number)"
    try makeFolder()
    for _ in 0..<Self.attempts {
      guard let (descriptor, isNew) = try Self.open(path) else { continue }
      let file = try FileStore(Descriptor(owning: descriptor), name: path)
      do throws(IOError) { try file.lockByte(0) } catch {
        guard error.code == EAGAIN else { throw error }
        usleep(Self.pause)
        continue
      }
      // A sweep may have removed the file before it was locked.
      if try isThere(file) { return LoopMark(path: path, isNew: isNew, file: file) }
    }
    throw IOError(EAGAIN, "mark for udev", path)
  }

  /// Removes the marks of devices that have no file any more. Call it after a device has gone: the
  /// next owner of its number may want to have it probed. Throws: the errno of open(2), unlink(2).
  package func sweep() throws(IOError) {
    for name in try Folder.names(folder) where name.hasPrefix("loop") {
      let path = folder + "/" + name
      do throws(IOError) {
        let file = try FileStore(Descriptor(path: path, flags: O_RDWR | O_NOFOLLOW), name: path)
        try file.lockByte(0)
        // Another sweep may have removed the file before it was locked, and the name is that of a
        // new mark.
        guard try isThere(file) else { continue }
        guard access(devices + "/" + name + "/loop/backing_file", F_OK) != 0 else { continue }
        guard errno == ENOENT else { throw IOError.last("examine", name) }
        guard unlink(path) == 0 else { throw IOError.last("remove", path) }
      } catch {
        // Removed by another sweep, or its device is being made.
        guard error.code == ENOENT || error.code == EAGAIN else { throw error }
      }
    }
  }

  /// Whether a locked file still has its name: only who has the lock takes it away.
  private func isThere(_ file: FileStore) throws(IOError) -> Bool {
    var status = stat()
    guard fstat(file.raw, &status) == 0 else { throw IOError.last("examine", file.name) }
    return status.st_nlink > 0
  }

  private func makeFolder() throws(IOError) {
    let parent = folder[..<(folder.lastIndex(of: "/") ?? folder.startIndex)]
    // As the daemon makes its run directory, and no more: udev runs as root.
    for (path, mode) in [(String(parent), mode_t(0o711)), (folder, 0o755)] {
      guard mkdir(path, mode) == 0 || errno == EEXIST else { throw IOError.last("make", path) }
    }
  }

  /// Opens the file, and whether it is new; nil when another process has just removed it.
  private static func open(_ path: String) throws(IOError) -> (raw: Int32, isNew: Bool)? {
    let flags = O_RDWR | O_NOFOLLOW
    do throws(IOError) {
      return (
        try Descriptor(path: path, flags: flags | O_CREAT | O_EXCL, mode: 0o644).release(), true
      )
    } catch {
      guard error.code == EEXIST else { throw error }
    }
    do throws(IOError) { return (try Descriptor(path: path, flags: flags).release(), false) } catch
    {
      guard error.code == ENOENT else { throw error }
      return nil
    }
  }
}

/// The mark of one loop device; its lock is held as long as this lives.
struct LoopMark {
  let path: String
  /// Whether the device had none before: then no other process has made the device ours.
  let isNew: Bool
  fileprivate let file: FileStore

  /// Removes it: the device is none of ours.
  func remove() throws(IOError) {
    guard unlink(path) == 0 || errno == ENOENT else { throw IOError.last("remove", path) }
  }

  /// Removes it after an error, which is the one worth telling; a sweep reports what is left.
  func giveUp() { _ = unlink(path) }

  /// Keeps the lock until here.
  func keepUntilHere() { withExtendedLifetime(file) {} }
}
