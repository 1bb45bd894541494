// SPDX-License-Identifier: Apache-2.0
// A file that is seen under its name only when it is whole: it has none while it is written,
// and goes with the process that writes it. Where the file system has no files without a name
// it has a temporary one beside.

internal import CLinux
import Glibc
package import SystemIO

/// A file in the making.
package final class PendingFile {
  /// The file, writable. Its `name` is the path that it will have.
  package let store: FileStore
  private let path: String
  /// Its name of the meantime, where it has to have one.
  private var temporary: String?
  private var isNamed = false
  /// Whether there was a file of that name.
  private var replaces = false
  /// Whether that file has to stay the same one: it has other names, or another owner.
  private var keepsInode = false

  /// Begins a file that shall have a path, a link there being followed.
  ///
  /// - Throws: the errno of open(2).
  package init(path: String, mode: UInt32 = 0o644) throws(IOError) {
    var real = path
    if let resolved = realpath(path, nil) {
      real = String(cString: resolved)
      free(resolved)
    }
    self.path = real
    var raw = dmu_unnamed_file(Self.directory(of: real), mode)
    if raw < 0 {
      guard errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL else {
        throw IOError.last("make", path)
      }
      let name = Self.beside(real)
      raw = dmu_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, mode)
      guard raw >= 0 else { throw IOError.last("make", path) }
      temporary = name
    }
    store = try FileStore(Descriptor(owning: raw), name: path)
    try takeAfter(real)
  }

  /// What is replaced keeps its owner, permissions and other names.
  private func takeAfter(_ real: String) throws(IOError) {
    var old = stat()
    guard stat(real, &old) == 0 else {
      guard errno == ENOENT else { throw IOError.last("examine", real) }
      return
    }
    replaces = true
    var own = stat()
    guard fstat(store.raw, &own) == 0 else { throw IOError.last("examine", real) }
    keepsInode = old.st_nlink > 1
    if own.st_uid != old.st_uid || own.st_gid != old.st_gid,
      fchown(store.raw, old.st_uid, old.st_gid) != 0
    {
      guard errno == EPERM else { throw IOError.last("set the owner of", real) }
      // Only its own bytes can be changed by whoever does not own it.
      keepsInode = true
    }
    guard keepsInode || fchmod(store.raw, old.st_mode & 0o7777) == 0 else {
      throw IOError.last("set the permissions of", real)
    }
  }

  deinit {
    // Nobody is left to tell that a temporary name could not be removed.
    if let temporary, !isNamed { unlink(temporary) }
  }

  private static func directory(of path: String) -> String {
    path.lastIndex(of: "/").map { String(path[...$0]) } ?? "."
  }

  private static func beside(_ path: String) -> String {
    let file = path.lastIndex(of: "/").map { path[path.index(after: $0)...] } ?? path[...]
    let folder = path.lastIndex(of: "/").map { String(path[...$0]) } ?? ""
    return "\(folder).\(file).\(getpid()).part"
  }

  /// Gives the file its name, in the place of whatever has it. `durable`: the name is on the
  /// medium on return; the bytes are the caller's to flush before. Where a file is replaced both
  /// are, whatever the caller wants: after a power cut there is the old file or the new one.
  ///
  /// A file with other names, or of another owner, is overwritten with the new bytes, which have
  /// a temporary name beside it until that is done.
  ///
  /// - Throws: the errno of linkat(2), rename(2), fsync(2) or of the copy.
  package func publish(durable: Bool) throws(IOError) {
    let durable = durable || replaces
    if replaces {
      guard fsync(store.raw) == 0 else { throw IOError.last("flush", path) }
    }
    if keepsInode { return try overwrite() }
    if temporary == nil {
      if dmu_name_file(store.raw, path) == 0 {
        isNamed = true
      } else {
        guard errno == EEXIST else { throw IOError.last("name", path) }
        // Nobody may take what it replaces for the whole: it came between.
        guard fsync(store.raw) == 0 else { throw IOError.last("flush", path) }
        try nameBeside()
      }
    }
    if let temporary, !isNamed {
      guard rename(temporary, path) == 0 else { throw IOError.last("name", path) }
      isNamed = true
    }
    if durable { try flushDirectory() }
  }

  private func flushDirectory() throws(IOError) {
    let directory = try Descriptor(
      path: Self.directory(of: path), flags: O_RDONLY | O_DIRECTORY)
    guard fsync(directory.raw) == 0 else { throw IOError.last("flush", path) }
  }

  private func nameBeside() throws(IOError) {
    guard temporary == nil else { return }
    let name = Self.beside(path)
    guard dmu_name_file(store.raw, name) == 0 else { throw IOError.last("name", path) }
    temporary = name
  }

  /// Puts the bytes into the file that has the name. A power cut meanwhile leaves them under
  /// the temporary name.
  private func overwrite() throws(IOError) {
    try nameBeside()
    try flushDirectory()
    let target = try FileStore(path: path, writable: true)
    try target.resize(to: 0)
    try target.resize(to: store.size)
    var offset: UInt64 = 0
    while let data = try store.nextData(from: offset) {
      offset = data.lowerBound
      while offset < data.upperBound {
        let count = Int(min(1 << 20, data.upperBound - offset))
        try target.write(try store.read(at: offset, count: count), at: offset)
        offset += UInt64(count)
      }
    }
    guard fsync(target.raw) == 0 else { throw IOError.last("flush", path) }
  }
}
