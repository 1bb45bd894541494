// Files that an image names: whether the configuration lets them be opened, and opening and
// locking them. A worker asks for them; nothing here believes what it says of them.

internal import Posix
internal import WorkerLink

/// A file that an image named, as it was allowed.
struct NamedFile: Sendable, Hashable {
  /// What the worker asked for.
  let need: FileNeed
  /// Where that led.
  let path: String
}

/// What an image may name.
struct NamingPolicy: Sendable {
  /// The most files that one disk may have.
  static let mostFiles = 1024

  let baseDirectories: [String]
  let storeDirectories: [String]
  let depth: Int
  /// The configuration's file, for what is said.
  let file: String

  init(_ configuration: Configuration, file: String) {
    baseDirectories = configuration.baseDirectories
    storeDirectories = configuration.storeDirectories
    depth = configuration.chainDepth
    self.file = file
  }

  /// Whether a disk with these files may have one more.
  func check(_ need: FileNeed, after files: [NamedFile], of spec: Spec) throws(DiskFailure) {
    guard files.count < Self.mostFiles else { throw .tooMany(spec.store, Self.mostFiles) }
    guard need.role == "base" else { return }
    let bases = files.filter { $0.need.role == "base" }.count + (spec.base == nil ? 0 : 1)
    guard bases + 1 < depth else { throw .tooDeep(spec.store, depth) }
  }

  /// Where a need leads, if that is allowed, or was so before.
  func resolve(
    _ need: FileNeed, of spec: Spec, unless before: NamedFile?
  ) throws(DiskFailure) -> NamedFile {
    if let before { return before }
    // A relative path starts at the store's folder.
    let store = spec.store
    let folder = store.prefix(through: store.lastIndex(of: "/") ?? store.startIndex)
    let path = need.path.hasPrefix("/") ? need.path : folder + need.path
    guard Self.isPlain(path), Self.isRole(need.role) else { throw .strangeName(store) }
    let directories = need.writable ? storeDirectories : baseDirectories + storeDirectories
    guard let real = Images.allowed(path, in: directories) else {
      if need.writable {
        throw DiskFailure.fileRefused(need.role, path, store: store, configuration: file)
      }
      throw DiskFailure.baseRefused(path, store: store, configuration: file)
    }
    guard Self.isPlain(real) else { throw .strangeName(store) }
    return NamedFile(need: need, path: real)
  }

  /// Whether a path can be shown in a line, and kept in one.
  private static func isPlain(_ path: String) -> Bool {
    path.utf8.count <= Spec.longestPath && path.utf8.allSatisfy { $0 >= 0x20 && $0 != 0x7F }
  }

  private static func isRole(_ role: String) -> Bool {
    (1...32).contains(role.utf8.count)
      && role.utf8.allSatisfy { (0x61...0x7A).contains($0) || $0 == 0x2D }
  }
}

extension Images {
  /// Opens and locks a file that was allowed. Blocks.
  static func open(
    _ file: NamedFile, of store: OpenImage, isHeld: Bool = false
  ) throws(DiskFailure) -> OpenImage {
    let image = try openNamed(file)
    guard image.identity != store.identity else { throw .namesItself(store.file.name) }
    guard try lock(image, file.need.writable ? .store : .base, isHeld: isHeld) else {
      if file.need.role == "base" { throw .sameStoreTwice(file.path, []) }
      throw .fileInUse(file.need.role, file.path)
    }
    return image
  }

  private static func openNamed(_ file: NamedFile) throws(DiskFailure) -> OpenImage {
    guard file.need.writable else { return try openBase(file.path) }
    do throws(IOError) {
      return try openStore(file.path, readOnly: false)
    } catch { throw DiskFailure(error) }
  }
}
