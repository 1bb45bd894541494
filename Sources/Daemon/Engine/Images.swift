// Opening a disk's store and base: existence, creation, locks, and whether an image may
// name a base. Nothing here reads a byte of an image.
//
// Invariants:
// - The lock belongs to the open file, which the worker gets a duplicate of: it lasts as
//   long as anybody serves the disk, whoever of daemon and worker dies first.
// - Locks are taken on what was opened, never on a path.

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
    let isDevice = status.st_mode & S_IFMT == S_IFBLK
    device = isDevice ? UInt64.max : UInt64(status.st_dev)
    inode = isDevice ? UInt64(status.st_rdev) : UInt64(status.st_ino)
  }
}

/// An image that was opened and locked.
struct OpenImage: Sendable {
  let file: FileStore
  let identity: FileIdentity
}

/// What opening came to.
enum OpenOutcome: Sendable {
  /// Opened and locked.
  case opened(store: OpenImage, base: OpenImage?, StoreState)
  /// Somebody has a lock on this one.
  case locked(SpecError.Role, FileIdentity)
}

/// What is known of a store from outside.
enum StoreState: Sendable {
  /// It holds something.
  case used
  /// It was there and holds no byte: made once, and never formatted.
  case empty
  /// It was made just now.
  case made
}

enum Images {
  /// Opens and locks the store and the base of a spec. Blocks. `mayCreate`: a store that
  /// is not there is made. `isHeld`: the kernel has a loop device of each file for this very
  /// disk, which the caller sees to, and with it the lock.
  static func open(
    _ spec: Spec, readOnly: Bool, mayCreate: Bool = true, isHeld: Bool = false
  ) throws(DiskFailure) -> OpenOutcome {
    var base: OpenImage?
    if let path = spec.base {
      let image = try openBase(path)
      guard try lock(image, .base, isHeld: isHeld) else { return .locked(.base, image.identity) }
      base = image
    }
    var state = StoreState.used
    var store: OpenImage?
    do throws(IOError) {
      store = try openStore(spec.store, readOnly: readOnly)
    } catch {
      guard error.code == ENOENT else { throw DiskFailure(error) }
    }
    if store == nil {
      guard base != nil, mayCreate else { throw .storeMissing(spec.store) }
      guard KnownFormat.named(spec.format)?.blockSizes != nil else {
        throw .storeUnmade(spec.store, spec.format)
      }
      store = try create(spec.store)
      state = .made
    }
    guard let store else { throw .storeMissing(spec.store) }
    let shared = readOnly && state == .used
    guard try lock(store, .store, shared: shared, isHeld: isHeld) else {
      return .locked(.store, store.identity)
    }
    if state == .used, mayCreate, base != nil, !store.file.isBlockDevice, store.file.size == 0 {
      state = .empty
    }
    return .opened(store: store, base: base, state)
  }

  /// Removes a store that was made and came to nothing. Blocks.
  static func remove(_ path: String) throws(IOError) {
    guard unlink(path) == 0 || errno == ENOENT else { throw IOError.last("remove", path) }
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
      if error.code == EAGAIN { return isHeld && !image.file.isBlockDevice }
      throw DiskFailure(error)
    }
  }

  /// The real path of a base that an image names, if the configuration allows it; nil if
  /// not. A path that does not exist is answered as it stands, for the sentence. Blocks.
  static func allowed(_ path: String, in directories: [String]) -> String? {
    guard path.hasPrefix("/") else { return nil }
    func real(_ path: String) -> String? {
      guard let resolved = realpath(path, nil) else { return nil }
      defer { free(resolved) }
      return String(cString: resolved)
    }
    let known = directories.compactMap { real($0) }
    let parts = path.split(separator: "/")
    guard let resolved = real(path) else {
      let inside = directories.contains { path.hasPrefix($0 + ($0.hasSuffix("/") ? "" : "/")) }
      return inside && !parts.contains("..") ? path : nil
    }
    return known.contains { resolved.hasPrefix($0 == "/" ? $0 : $0 + "/") } ? resolved : nil
  }

  static func openStore(_ path: String, readOnly: Bool) throws(IOError) -> OpenImage {
    let flags = (readOnly ? O_RDONLY : O_RDWR) | O_NONBLOCK
    return try image(try Descriptor(path: path, flags: flags), path)
  }

  private static func create(_ path: String) throws(DiskFailure) -> OpenImage {
    do throws(IOError) {
      let flags = O_RDWR | O_CREAT | O_EXCL
      return try image(try Descriptor(path: path, flags: flags, mode: 0o600), path)
    } catch {
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
