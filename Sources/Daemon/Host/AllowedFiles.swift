// SPDX-License-Identifier: Apache-2.0
// Files that an image names: whether the configuration lets them be opened, and opening and
// locking them. A worker asks for them; nothing here believes what it says of them.

import BlockIO
import Glibc
internal import SystemIO
internal import WorkerLink

/// A file that an image named, as it was allowed.
struct AllowedFile: Sendable, Hashable {
  /// What the worker asked for.
  let need: FileNeed
  /// Where that led.
  let path: String
  /// Which file that was; nil in the record of an earlier daemon.
  var identity: FileIdentity?
}

/// What an image may name.
struct NamingPolicy: Sendable {
  /// The most files that one disk may have: as deep a chain as can be configured.
  static let mostFiles = 256

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

  /// Whether a disk with these files may have one more. `isComplete`: a worker has served the disk
  /// with these, so that its images name no others.
  func check(
    _ need: FileNeed, after files: [AllowedFile], isComplete: Bool = false, of spec: Spec
  ) throws(DiskFailure) {
    guard !isComplete else { throw .notNamedBefore(need.role, need.path, store: spec.store) }
    guard files.count < Self.mostFiles else { throw .tooMany(spec.store, Self.mostFiles) }
    guard need.role == "base" else { return }
    let bases = files.filter { $0.need.role == "base" }.count + (spec.base == nil ? 0 : 1)
    guard bases + 1 < depth else { throw .tooDeep(spec.store, depth) }
  }

  /// Where a need leads, if that is allowed, or was so before.
  func resolve(
    _ need: FileNeed, of spec: Spec, unless before: AllowedFile?
  ) throws(DiskFailure) -> AllowedFile {
    if let before { return before }
    // A relative path starts at the store's folder.
    let store = spec.store
    let folder = store.prefix(through: store.lastIndex(of: "/") ?? store.startIndex)
    let path = need.path.hasPrefix("/") ? need.path : folder + need.path
    guard Self.isPlain(path), Self.isRole(need.role) else { throw .strangeName(store) }
    let directories = try directories(need, spec)
    guard let real = Images.allowed(path, in: directories) else {
      if need.writable {
        throw DiskFailure.fileRefused(need.role, path, store: store, configuration: file)
      }
      throw DiskFailure.baseRefused(path, store: store, configuration: file)
    }
    guard Self.isPlain(real) else { throw .strangeName(store) }
    return AllowedFile(need: need, path: real)
  }

  private func directories(_ need: FileNeed, _ spec: Spec) throws(DiskFailure) -> [String] {
    guard !need.writable else { return storeDirectories }
    guard let own = try FormatOptions(spec).baseDirectory else {
      return baseDirectories + storeDirectories
    }
    // In place of the host's; what is no base may still be a part of the store.
    return need.role == "base" ? [own] : [own] + storeDirectories
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
    _ file: AllowedFile, of store: OpenImage, isHeld: Bool = false
  ) throws(DiskFailure) -> OpenImage {
    var image: OpenImage
    do throws(IOError) { image = try openNamed(file) } catch {
      switch error.code {
      case ENOENT where !file.need.writable: throw .baseMissing(file.path)
      // The path was resolved when the file was allowed: a link in it has come since.
      case ELOOP, EXDEV: throw .exchanged(file.need.role, file.path)
      default: throw DiskFailure(error)
      }
    }
    guard image.identity != store.identity else { throw .namesItself(store.file.name) }
    guard file.identity == nil || file.identity == image.identity else {
      throw .exchanged(file.need.role, file.path)
    }
    guard try lock(&image, file.need.writable ? .store : .base, isHeld: isHeld) else {
      if file.need.role == "base" { throw .sameStoreTwice(file.path, []) }
      throw .fileInUse(file.need.role, file.path)
    }
    return image
  }

  private static func openNamed(_ file: AllowedFile) throws(IOError) -> OpenImage {
    try openStore(file.path, readOnly: !file.need.writable, followsLinks: false)
  }
}
