// SPDX-License-Identifier: Apache-2.0
// Opening a disk's store and base: existence, creation, locks, and whether an image may
// name a base. Nothing here reads a byte of an image.
//
// Invariants:
// - The lock that decides is held on an open file description of the daemon's own, which no
//   worker gets: no worker can give it up, or keep it. The same locks are on the description that
//   the worker gets a duplicate of, and a loop device of the file: they last as long as anybody
//   serves the disk when no daemon is there.
// - Locks are taken on what was opened, never on a path.
// - A lock of somebody who can only read a file is no reason to refuse reading it.
// - A new store has no name before its worker has formatted it: a store that was made and came
//   to nothing is never found later and taken for a disk.

internal import BlockIO
import Glibc
internal import SystemIO

/// An image that was opened and locked.
struct OpenImage: Sendable {
  let file: FileStore
  let identity: FileIdentity
  /// The same file by a second open file description, for one that the disk writes to. Nobody
  /// flushes it until a worker has to learn whether the flush in which its predecessor died has
  /// failed: the kernel reports a failed write once for each open file description.
  var witness: FileStore?
  /// The same file once more, with the lock that decides who may use it. Nobody else gets it.
  private(set) var guardian: FileStore?

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

extension OpenImage {
  /// Locks the file; false when another has it. With `isHeld` a lock of somebody else is the
  /// file's own loop device's, and goes with ours. `file` may have locks already.
  ///
  /// 1. The daemon's own description gets the locks: from now on nobody else begins to use it.
  /// 2. The shared description, which a worker or a loop device has, gives its locks up.
  /// 3. Whatever is found now is a stranger's.
  /// 4. The shared description gets the locks again, for the time when no daemon is there.
  mutating func lock(exclusive: Bool, isHeld: Bool) throws(IOError) -> Bool {
    let own = try FileStore(
      Descriptor(
        path: "/proc/self/fd/\(file.raw)",
        flags: (file.isWritable ? O_RDWR : O_RDONLY) | O_NONBLOCK), name: file.name)
    do throws(IOError) {
      try own.placeLocks(exclusive: exclusive)
      try file.unlock()
      if try own.hasConflict(exclusive: exclusive), !isHeld,
        exclusive || LockHolders.hasWriter(identity, FileStore.conflicts(exclusive: false))
      {
        return false
      }
      try file.placeLocks(exclusive: exclusive)
    } catch {
      // Somebody has a byte of them alone, for which one has to be able to write.
      guard error.code == EAGAIN else { throw error }
      return isHeld
    }
    guardian = own
    return true
  }

  /// Gives the locks up, whoever else has the shared description.
  func unlock() throws(IOError) {
    try file.unlock()
    try guardian?.unlock()
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
      var image = try openBase(path)
      guard try lock(&image, .base, isHeld: isHeld) else { return .locked(.base, image.identity) }
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
    guard var store else { return .missing }
    guard try lock(&store, .store, shared: readOnly, isHeld: isHeld) else {
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

  /// Opens a base that was named by a spec. Blocks.
  static func openBase(_ path: String) throws(DiskFailure) -> OpenImage {
    do throws(IOError) {
      return try openStore(path, readOnly: true)
    } catch {
      throw error.code == ENOENT ? .baseMissing(path) : DiskFailure(error)
    }
  }

  /// Takes the lock; false when another has it. Of a file that is held its loop device may.
  static func lock(
    _ image: inout OpenImage, _ role: SpecError.Role, shared: Bool = false, isHeld: Bool = false
  ) throws(DiskFailure) -> Bool {
    do throws(IOError) {
      return try image.lock(exclusive: role == .store && !shared, isHeld: isHeld)
    } catch { throw DiskFailure(error) }
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
      // Only what is not there is told apart. A path that cannot be resolved, being too long for
      // example, leads nobody knows where.
      guard errno == ENOENT || errno == ENOTDIR else { return nil }
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

  static func openStore(
    _ path: String, readOnly: Bool, followsLinks: Bool = true
  ) throws(IOError) -> OpenImage {
    // O_NONBLOCK means nothing to files and devices.
    let flags = (readOnly ? O_RDONLY : O_RDWR) | O_NONBLOCK
    var image = try OpenImage(
      try Descriptor(imagePath: path, flags: flags, followsLinks: followsLinks), name: path)
    if !readOnly { try image.addWitness() }
    return image
  }

  private static func make(_ path: String) throws(DiskFailure) -> NewFile {
    do throws(IOError) { return try NewFile(path: path) } catch {
      throw error.code == ENOENT ? .storeDirectoryMissing(path) : DiskFailure(error)
    }
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
