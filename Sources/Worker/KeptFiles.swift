// SPDX-License-Identifier: Apache-2.0
// The files that a person's disk lives in: opened by their paths and locked, for a worker that
// opens nothing. What an image names is known by what its worker says, and is not believed.
//
// Invariants:
// - What is only named is written only where the person can have meant it: files in the store's
//   folder or below, and what `--allow` says. The worker of a hostile image is the image's.
// - A file is locked before it is handed over, so that the lock lasts as long as anybody has it.

import BlockIO
import DiskFormats
import Glibc
import LinuxBlock
import SystemIO
import WorkerLink

/// The opened files of one disk.
struct KeptFiles {
  /// The most files: as deep a chain as there can be.
  private static let most = 256

  let store: FileStore
  let base: FileStore?
  /// What the worker asked for, in that order.
  private(set) var named: [(need: FileNeed, file: FileStore)] = []
  private let options: ByHandOptions
  private var isLocked: Bool

  /// Opens the store, and the base if it was given. `isLocked`: the kernel holds the locks, for a
  /// device that lives.
  init(_ options: ByHandOptions, isLocked: Bool) throws(WorkerError) {
    self.options = options
    self.isLocked = isLocked
    let kind = FormatName.kind(options.format)
    (store, base) = try imaging { () throws(ImageError) in
      let store = try Self.open(options.store, as: "store", writable: !options.readOnly) {
        kind?.format.howToMake(options.store) ?? "make it first"
      }
      if !isLocked { try Self.lock(store, as: "store", writable: !options.readOnly) }
      guard let path = options.base else { return (store, nil) }
      let base = try Self.open(path, as: "base", writable: false) {
        kind == nil ? "put it back" : Self.baseRemedy
      }
      try Self.check(base, isNot: store)
      if !isLocked { try Self.lock(base, as: "base", writable: false) }
      return (store, base)
    }
  }

  private static let baseRemedy = "put it back, or say with --base where it is"

  /// Opens what the images name. Throws when it may not be used.
  mutating func open(_ need: FileNeed) throws(WorkerError) -> FileStore {
    let isBase = need.role == NamedFile.Role.base.rawValue
    guard !options.untrusted else {
      throw WorkerError(
        .baseRefused,
        "image \(options.store) names \(need.path) as its \(need.role), which --untrusted refuses: "
          + "if the image may use that file, leave out --untrusted"
          + (isBase ? ", or say --base" : ""))
    }
    guard named.count < Self.most, !need.writable || !isBase && !options.readOnly else {
      throw WorkerError(
        .offLink, "the worker of \(options.store) wishes for what no image needs: \(need.path)")
    }
    let role = isBase ? "base" : "\(need.role) of store \(options.store)"
    let file = try imaging { () throws(ImageError) in
      let file = try Self.open(need.path, as: role, writable: need.writable) {
        isBase ? Self.baseRemedy : "put it back"
      }
      try Self.check(file, isNot: store)
      return file
    }
    if need.writable { try check(file, role) }
    if !isLocked {
      try imaging { () throws(ImageError) in
        try Self.lock(file, as: role, writable: need.writable)
      }
    }
    named.append((need, file))
    return file
  }

  /// Locks everything after all: no device holds it.
  mutating func lock() throws(WorkerError) {
    guard isLocked else { return }
    isLocked = false
    let (store, base, named, options) = (store, base, named, options)
    try imaging { () throws(ImageError) in
      try Self.lock(store, as: "store", writable: !options.readOnly)
      if let base { try Self.lock(base, as: "base", writable: false) }
      for (need, file) in named { try Self.lock(file, as: need.role, writable: need.writable) }
    }
  }

  /// What a device stands on, by the worker's report. It may write what it was lent for writing.
  func backings(_ parts: [DiskPart]) throws(WorkerError) -> [ServedDevice.Backing] {
    try parts.map { part throws(WorkerError) in
      var found: FileStore?
      var mayWrite = !options.readOnly
      switch part.role {
      case .store: found = store
      case .base: (found, mayWrite) = (base, false)
      case .file(let index):
        guard named.indices.contains(index) else { break }
        found = named[index].file
        mayWrite = mayWrite && named[index].need.writable
      }
      guard let found, mayWrite || !part.isWritable else {
        throw WorkerError(.offLink, "the worker wishes for what it was not given")
      }
      return ServedDevice.Backing(
        descriptor: found.raw, name: found.name, readOnly: !part.isWritable,
        isDirect: part.isDirect, growth: part.growth)
    }
  }

  /// Throws unless a file lies where a person can have meant it to be written. Beside a device lie
  /// those of others.
  private func check(_ file: FileStore, _ role: String) throws(WorkerError) {
    var places = try options.allowed.map(Self.resolved)
    if !store.isBlockDevice, !file.isBlockDevice {
      // As the store is named, and where it is.
      for path in [options.store, try Self.place(of: store)] {
        let folder = path.lastIndex(of: "/").map { path[...$0] } ?? "."
        places.append(try Self.resolved(String(folder)))
      }
    }
    let path = try Self.place(of: file)
    for place in places where path == place || path.hasPrefix(place + "/") { return }
    throw WorkerError(
      .baseRefused,
      "\(role) is \(path), which is no file in the store's folder or below: if the image may have "
        + "it written, say --allow \(path)")
  }

  /// Where a file is, whatever links led to it.
  private static func place(of file: FileStore) throws(WorkerError) -> String {
    try system { () throws(IOError) in try Folder.target(of: "/proc/self/fd/\(file.raw)") }
  }

  private static func resolved(_ path: String) throws(WorkerError) -> String {
    guard let real = realpath(path, nil) else { throw WorkerError(IOError.last("find", path)) }
    defer { free(real) }
    return String(cString: real)
  }

  private static func open(
    _ path: String, as role: String, writable: Bool, remedy: () -> String
  ) throws(ImageError) -> FileStore {
    do throws(IOError) {
      return try FileStore(path: path, writable: writable)
    } catch {
      throw ImageFile.failure(error, toOpen: path, as: role, ifMissing: remedy())
    }
  }

  private static func check(_ file: FileStore, isNot store: FileStore) throws(ImageError) {
    guard try Dscow.same(store, file) else { return }
    throw ImageError(.corrupt, "store \(store.name) is, through others, its own base")
  }

  private static func lock(
    _ store: FileStore, as role: String, writable: Bool
  ) throws(ImageError) {
    do throws(IOError) {
      try store.lock(exclusive: writable)
    } catch {
      guard error.code == EAGAIN else { throw ImageError(error) }
      throw ImageError(
        .badRequest,
        "\(role) \(store.name) is in use by another program: end that one first, or choose another",
        cause: error)
    }
    if writable { try ImageFile.refusePending(store) }
  }
}
