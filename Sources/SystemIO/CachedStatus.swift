// SPDX-License-Identifier: Apache-2.0
// What the kernel knows of a file without asking anybody: for files that somebody else has chosen,
// whose server may not answer.

internal import CLinux
import Glibc

/// Which file something is.
package struct CachedStatus: Sendable, Equatable {
  /// The device of the file's file system, as stat(2) reports it.
  package let fileSystem: UInt64
  /// The file there.
  package let inode: UInt64
  /// The device that a node stands for.
  package let device: UInt64
  /// Type and permissions.
  package let mode: UInt32
  /// The user whose it is.
  package let owner: UInt32

  /// Of an open descriptor; `name` is for errors. Throws: the errno of statx(2).
  package init(_ raw: Int32, name: String) throws(IOError) {
    try self.init(raw, "", name)
  }

  /// Of what a path leads to. Throws: the errno of statx(2).
  package init(path: String) throws(IOError) {
    try self.init(AT_FDCWD, path, path)
  }

  private init(_ raw: Int32, _ path: String, _ name: String) throws(IOError) {
    var found = dmu_status()
    guard dmu_stat_cached(raw, path, &found) == 0 else { throw IOError.last("examine", name) }
    (fileSystem, inode, device) = (found.file_system, found.inode, found.device)
    (mode, owner) = (found.mode, found.owner)
  }
}
