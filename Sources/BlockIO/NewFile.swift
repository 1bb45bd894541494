// SPDX-License-Identifier: Apache-2.0
// A file that gets its name when it is whole: until then it has none, and goes with the last
// process that has it open. Unlike PendingFile it never takes the place of another.

internal import CLinux
import Glibc
package import SystemIO

/// A new file without a name, or, where the file system has no such files, with its name from
/// the beginning.
package struct NewFile: Sendable {
  /// The file, writable, empty.
  package let store: FileStore
  /// The path that it has or will have.
  package let path: String
  /// Whether it has had its name from the beginning: then whoever gives it up removes it.
  package let isNamed: Bool

  /// Makes a file. Throws the errno of open(2): ENOENT when the folder is missing, EEXIST.
  package init(path: String, mode: UInt32 = 0o600) throws(IOError) {
    self.path = path
    let folder = path.lastIndex(of: "/").map { String(path[...$0]) } ?? "."
    let raw = dmu_unnamed_file(folder, mode)
    if raw >= 0 {
      isNamed = false
      store = try FileStore(Descriptor(owning: raw), name: path)
      return
    }
    guard errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL else {
      throw IOError.last("make", path)
    }
    isNamed = true
    let descriptor = try Descriptor(path: path, flags: O_RDWR | O_CREAT | O_EXCL, mode: mode)
    store = try FileStore(descriptor, name: path)
  }

  /// Gives it its name, durably. Throws EEXIST when another file has got it meanwhile, and the
  /// errno of linkat(2) or fsync(2).
  package func publish() throws(IOError) {
    if !isNamed, dmu_name_file(store.raw, path) != 0 { throw IOError.last("name", path) }
    let folder = path.lastIndex(of: "/").map { String(path[...$0]) } ?? "."
    let directory = try Descriptor(path: folder, flags: O_RDONLY | O_DIRECTORY)
    guard fsync(directory.raw) == 0 else { throw IOError.last("flush", folder) }
  }
}
