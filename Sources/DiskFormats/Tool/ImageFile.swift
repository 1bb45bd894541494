// SPDX-License-Identifier: Apache-2.0
// Opening stores and bases by path, for the tools: with the locks that keep a tool and a
// running disk from each other's feet.

package import BlockIO
import Glibc
package import SystemIO

/// Opens what a tool works on.
package enum ImageFile {
  /// Opens a store and locks it: exclusively for writing, shared for reading, not at all with
  /// `evenInUse`. Throws `io`, `badRequest` when it is in use.
  package static func store(
    _ path: String, writable: Bool, evenInUse: Bool = false
  ) throws(ImageError) -> FileStore {
    let file = try open(path, as: "store", writable: writable)
    if !evenInUse { try lock(store: file, exclusive: writable) }
    return file
  }

  /// Locks a store that is open. Throws `badRequest` when it is in use, or shall be written to
  /// and a disk's pending log for it is kept.
  package static func lock(store: FileStore, exclusive: Bool) throws(ImageError) {
    let remedy = exclusive ? "" : ", or look at it while it changes (-U)"
    try lock(
      store, exclusive: exclusive,
      inUse: "store \(store.name) is in use by another program: stop that first\(remedy)")
    if exclusive { try refusePending(store) }
  }

  /// Refuses to write to a store, locked by the caller, for which a pending log is kept. Throws
  /// `badRequest`.
  package static func refusePending(_ store: FileStore) throws(ImageError) {
    let hindrance = try io { () throws(IOError) in
      try PendingRegistry.ofTools.hindrance(store)
    }
    if let hindrance { throw ImageError(.badRequest, hindrance) }
  }

  /// Opens a base for reading, with a shared lock. Throws `io`, `badRequest` when somebody
  /// writes to it.
  package static func base(_ path: String) throws(ImageError) -> FileStore {
    let file = try open(path, as: "base", writable: false)
    try lock(base: file)
    return file
  }

  static func lock(base: FileStore) throws(ImageError) {
    try lock(
      base, exclusive: false,
      inUse: "base \(base.name) is in use as a store by another program: stop that first")
  }

  private static func lock(
    _ file: FileStore, exclusive: Bool, inUse message: String
  ) throws(ImageError) {
    do throws(IOError) {
      try file.lock(exclusive: exclusive)
    } catch {
      guard error.code == EAGAIN else { throw ImageError(error) }
      throw ImageError(.badRequest, message, cause: error)
    }
  }

  /// Opens without a lock.
  package static func open(
    _ path: String, as role: String, writable: Bool
  ) throws(ImageError) -> FileStore {
    do throws(IOError) {
      return try FileStore(path: path, writable: writable)
    } catch {
      throw failure(error, toOpen: path, as: role, ifMissing: "check the path")
    }
  }

  /// Why a path could not be opened, with a remedy. `ifMissing` is the remedy when nothing is there.
  package static func failure(
    _ error: IOError, toOpen path: String, as role: String, ifMissing remedy: String
  ) -> ImageError {
    if error.code == ENOENT {
      return ImageError(.io, "\(role) \(path) does not exist: \(remedy)", cause: error)
    }
    guard error.code == EINVAL, let kind = FileStore.unusableKind(of: path) else {
      return ImageError(error)
    }
    return ImageError(
      .badRequest, "\(role) \(path) is \(kind): give a regular file or a block device",
      cause: error)
  }

  /// Makes a new file for a store, readable by its owner only; opens the file or device that
  /// is there already. Takes no lock. Returns whether it is new.
  package static func create(_ path: String) throws(ImageError) -> (store: FileStore, isNew: Bool) {
    let flags = O_RDWR | O_CREAT | O_EXCL
    do throws(IOError) {
      let file = try Descriptor(path: path, flags: flags, mode: 0o600)
      return (try FileStore(file, name: path), true)
    } catch {
      guard error.code == EEXIST else { throw ImageError(error) }
    }
    return (try open(path, as: "store", writable: true), false)
  }

  /// Takes back `create`. The error that led here is the one worth telling, so an error of
  /// unlink(2) is not.
  package static func remove(_ path: String) { _ = unlink(path) }

  /// Makes the entry of a new file durable. Source: fsync(2).
  package static func flushDirectory(of path: String) throws(ImageError) {
    let parent = path.lastIndex(of: "/").map { String(path[...$0]) } ?? "."
    try io { () throws(IOError) in
      let directory = try Descriptor(path: parent, flags: O_RDONLY | O_DIRECTORY)
      guard fsync(directory.raw) == 0 else { throw IOError.last("flush", parent) }
    }
  }

  /// A path from the root on, its links as they are. Throws `io`.
  package static func absolute(_ path: String) throws(ImageError) -> String {
    guard !path.hasPrefix("/") else { return path }
    guard let here = getcwd(nil, 0) else {
      throw ImageError(IOError.last("find the working directory"))
    }
    defer { free(here) }
    let directory = String(cString: here)
    return directory == "/" ? "/" + path : directory + "/" + path
  }
}

extension ImageFile {
  /// Reads a size: a number of bytes, decimal or hexadecimal ("0x"), or a decimal number, which may
  /// have a fraction, followed by K, M, G, T, P or E (powers of 1024; "KiB" and the like too). A
  /// fraction of a byte is dropped. nil for anything else.
  package static func bytes(_ text: String) -> UInt64? {
    if text.lowercased().hasPrefix("0x") {
      let digits = text.dropFirst(2)
      return digits.allSatisfy(\.isHexDigit) ? UInt64(digits, radix: 16) : nil
    }
    let digits = text.prefix { $0.isASCII && $0.isNumber }
    guard let number = UInt64(digits) else { return nil }
    var rest = text.dropFirst(digits.count)
    var fraction = Substring()
    if rest.first == "." {
      fraction = rest.dropFirst().prefix { $0.isASCII && $0.isNumber }
      guard (1...18).contains(fraction.count) else { return nil }
      rest = rest.dropFirst(fraction.count + 1)
    }
    let units = ["": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60]
    var unit = rest.uppercased()
    if unit.hasSuffix("IB"), unit.count == 3 { unit = String(unit.prefix(1)) }
    guard let shift = units[unit], fraction.isEmpty || shift > 0 else { return nil }
    let scale = UInt64(1) << UInt64(shift)
    let (bytes, overflow) = number.multipliedReportingOverflow(by: scale)
    guard !overflow, !fraction.isEmpty, let parts = UInt64(fraction) else {
      return overflow ? nil : bytes
    }
    var whole: UInt64 = 1
    for _ in fraction { whole *= 10 }
    let more = whole.dividingFullWidth(parts.multipliedFullWidth(by: scale)).quotient
    let (sum, isTooLarge) = bytes.addingReportingOverflow(more)
    return isTooLarge ? nil : sum
  }

  /// How sizes are written, for what is said to people about one that is none.
  package static let sizeHelp =
    "a number of bytes, or one like 512K, 1.5G or 2TiB (powers of 1024)"
}
