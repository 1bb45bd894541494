// Opening a disk's store and base: existence, creation, locks, and whether an image may
// name a base. Nothing here reads a byte of an image.
//
// Invariants:
// - The lock belongs to the open file, which the worker gets a duplicate of: it lasts as
//   long as anybody serves the disk, whoever of daemon and worker dies first.
// - Locks are taken on what was opened, never on a path.
// - A new store has no name before its worker has formatted it: a store that was made and came
//   to nothing is never found later and taken for a disk.

internal import Posix
import Glibc

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
}

/// An image that was opened and locked.
struct OpenImage: Sendable {
  let file: FileStore
  let identity: FileIdentity
  /// The same file by a second open file description, for one that the disk writes to. Nobody
  /// flushes it until a worker has to learn whether the flush in which its predecessor died has
  /// failed: the kernel reports a failed write once for each open file description.
  var witness: FileStore?

  init(file: FileStore, identity: FileIdentity) {
    self.file = file
    self.identity = identity
  }

  /// Opens the witness if there is none.
  mutating func addWitness() throws(IOError) {
    guard witness == nil else { return }
    let path = "/proc/self/fd/\(file.raw)"
    witness = try FileStore(
      try Descriptor(path: path, flags: O_RDONLY | O_NONBLOCK), name: file.name)
  }
}

/// What opening came to.
enum OpenOutcome: Sendable {
  /// Opened and locked. `new` is the store if it was made just now.
  case opened(store: OpenImage, base: OpenImage?, new: NewFile?)
  /// Somebody has a lock on this one.
  case locked(SpecError.Role, FileIdentity)
  /// There is no store, and none was to be made.
  case missing
}

enum Images {
  /// Opens and locks the store and the base of a spec. Blocks. `create`: a store that
  /// is not there is made. `isHeld`: the kernel has a loop device of each file for this very
  /// disk, which the caller sees to, and with it the lock.
  static func open(
    _ spec: Spec, readOnly: Bool, create: Bool = false, isHeld: Bool = false
  ) throws(DiskFailure) -> OpenOutcome {
    var base: OpenImage?
    if let path = spec.base {
      let image = try openBase(path)
      guard try lock(image, .base, isHeld: isHeld) else { return .locked(.base, image.identity) }
      base = image
    }
    var store: OpenImage?
    do throws(IOError) {
      store = try openStore(spec.store, readOnly: readOnly)
    } catch {
      guard error.code == ENOENT else { throw DiskFailure(error) }
    }
    var new: NewFile?
    if store == nil, create {
      let made = try make(spec.store)
      do throws(IOError) {
        let identity = try FileIdentity(made.store.raw, name: spec.store)
        store = OpenImage(file: made.store, identity: identity)
        try store?.addWitness()
      } catch { throw DiskFailure(error) }
      new = made
    }
    guard let store else { return .missing }
    guard try lock(store, .store, shared: readOnly, isHeld: isHeld) else {
      return .locked(.store, store.identity)
    }
    if new == nil, !store.file.isBlockDevice, store.file.size == 0 {
      throw .storeEmpty(spec)
    }
    return .opened(store: store, base: base, new: new)
  }

  /// Removes a store that was made and came to nothing, if it has a name and that is still its
  /// own. Blocks.
  static func remove(_ new: NewFile) throws(IOError) {
    var status = stat()
    guard lstat(new.path, &status) == 0 else {
      if errno == ENOENT { return }
      throw IOError.last("examine", new.path)
    }
    guard try FileIdentity(status) == FileIdentity(new.store.raw, name: new.path) else { return }
    guard unlink(new.path) == 0 || errno == ENOENT else { throw IOError.last("remove", new.path) }
  }

  /// Opens a base that was named by a spec, or by an image that may. Blocks.
  static func openBase(_ path: String) throws(DiskFailure) -> OpenImage {
    do throws(IOError) {
      let descriptor = try Descriptor(path: path, flags: O_RDONLY | O_NONBLOCK)
      return try image(descriptor, path)
    } catch {
      throw error.code == ENOENT ? .baseMissing(path) : DiskFailure(error)
    }
  }

  /// Takes the lock; false when another has it. Of a file that is held its loop device may.
  static func lock(
    _ image: OpenImage, _ role: SpecError.Role, shared: Bool = false, isHeld: Bool = false
  ) throws(DiskFailure) -> Bool {
    do throws(IOError) {
      try image.file.lock(exclusive: role == .store && !shared)
      return true
    } catch {
      if error.code == EAGAIN { return isHeld }
      throw DiskFailure(error)
    }
  }

  /// What a path leads to, links resolved; nil when there is nothing. Blocks.
  static func real(_ path: String) -> String? {
    guard let resolved = realpath(path, nil) else { return nil }
    defer { free(resolved) }
    return String(cString: resolved)
  }

  /// The real path of a base that an image names, if the configuration allows it; nil if
  /// not. A path that does not exist is answered as it stands, for the sentence. Blocks.
  static func allowed(_ path: String, in directories: [String]) -> String? {
    guard path.hasPrefix("/") else { return nil }
    let known = directories.compactMap { real($0) }
    let parts = path.split(separator: "/")
    guard let resolved = real(path) else {
      let inside = directories.contains { path.hasPrefix($0 + ($0.hasSuffix("/") ? "" : "/")) }
      return inside && !parts.contains("..") ? path : nil
    }
    return known.contains { resolved.hasPrefix($0 == "/" ? $0 : $0 + "/") } ? resolved : nil
  }

  /// Whether the folder of a path is there. Blocks.
  static func hasFolder(_ path: String) -> Bool {
    path.lastIndex(of: "/").map { real(String(path[...$0])) != nil } ?? true
  }

  /// Whether a file that is to be made would lie in one of these directories, or below. Blocks.
  static func isBelow(_ path: String, _ directories: [String]) -> Bool {
    guard let slash = path.lastIndex(of: "/"), let folder = real(String(path[...slash])) else {
      return false
    }
    return directories.compactMap { real($0) }.contains {
      folder == $0 || folder.hasPrefix($0 == "/" ? $0 : $0 + "/")
    }
  }

  static func openStore(_ path: String, readOnly: Bool) throws(IOError) -> OpenImage {
    let flags = (readOnly ? O_RDONLY : O_RDWR) | O_NONBLOCK
    var image = try image(try Descriptor(path: path, flags: flags), path)
    if !readOnly { try image.addWitness() }
    return image
  }

  private static func make(_ path: String) throws(DiskFailure) -> NewFile {
    do throws(IOError) { return try NewFile(path: path) } catch {
      throw error.code == ENOENT ? .storeDirectoryMissing(path) : DiskFailure(error)
    }
  }

  private static func image(
    _ descriptor: consuming Descriptor, _ path: String
  ) throws(IOError) -> OpenImage {
    // O_NONBLOCK was for pipes that have no writer; it means nothing to files and devices.
    try OpenImage(descriptor, name: path)
  }
}

extension DiskFailure {
  /// A failed system call as a sentence.
  init(_ error: IOError) {
    let remedy =
      switch error.code {
      case EACCES, EPERM, EROFS: "check its permissions and how its file system is mounted"
      case ENOSPC, EDQUOT: "make room and attach the disk again"
      case EMFILE, ENFILE: "raise the limit of open files"
      default: "see to it and attach the disk again"
      }
    self.init(.io, "\(error.description): \(remedy)")
  }
}
