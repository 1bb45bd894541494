// A file that is seen under its name only when it is whole: it has none while it is written,
// and goes with the process that writes it. Where the file system has no files without a name
// it has a temporary one beside.

internal import CLinux
import Glibc

/// A file in the making.
public final class PendingFile {
  /// The file, writable. Its `name` is the path that it will have.
  public let store: FileStore
  private let path: String
  /// Its name of the meantime, where it has to have one.
  private var temporary: String?
  private var isNamed = false

  /// Begins a file that shall have a path, a link there being followed.
  ///
  /// - Throws: the errno of open(2).
  public init(path: String, mode: UInt32 = 0o644) throws(IOError) {
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
    // What is replaced keeps its permissions.
    var old = stat()
    if stat(real, &old) == 0, fchmod(raw, old.st_mode & 0o7777) != 0 {
      let error = IOError.last("set the permissions of", path)
      _ = Glibc.close(raw)
      if let temporary { unlink(temporary) }
      throw error
    }
    store = try FileStore(Descriptor(owning: raw), name: path)
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
  /// medium on return; the bytes are the caller's to flush before.
  ///
  /// - Throws: the errno of linkat(2), rename(2) or fsync(2).
  public func publish(durable: Bool) throws(IOError) {
    if temporary == nil {
      if dmu_name_file(store.raw, path) == 0 {
        isNamed = true
      } else {
        guard errno == EEXIST else { throw IOError.last("name", path) }
        let name = Self.beside(path)
        guard dmu_name_file(store.raw, name) == 0 else { throw IOError.last("name", path) }
        temporary = name
      }
    }
    if let temporary, !isNamed {
      guard rename(temporary, path) == 0 else { throw IOError.last("name", path) }
      isNamed = true
    }
    guard durable else { return }
    let directory = try Descriptor(
      path: Self.directory(of: path), flags: O_RDONLY | O_DIRECTORY)
    guard fsync(directory.raw) == 0 else { throw IOError.last("flush", path) }
  }
}
