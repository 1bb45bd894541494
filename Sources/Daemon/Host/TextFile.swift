// SPDX-License-Identifier: Apache-2.0
// Small text files: the configuration, state files, files of /proc and /sys.

import Glibc
internal import SystemIO

/// Reads and replaces small text files.
enum TextFile {
  /// The largest file that is read, in bytes.
  static let limit = 1 << 20

  /// Reads a whole file. Throws the errno of open(2) or read(2), EFBIG past the limit and
  /// EILSEQ for what is not UTF-8.
  static func read(_ path: String) throws(IOError) -> String {
    try read(Descriptor(path: path, flags: O_RDONLY), name: path)
  }

  /// The same of an open file, from where it stands.
  static func read(
    _ file: borrowing Descriptor, name: String, upTo limit: Int = limit
  ) throws(IOError) -> String {
    guard let text = String(validating: try bytes(file, name, limit), as: UTF8.self) else {
      throw IOError(EILSEQ, "read", name)
    }
    return text
  }

  /// The same of a file that holds others' bytes, too: what is not UTF-8 is replaced.
  static func readRepairing(_ path: String) throws(IOError) -> String {
    String(decoding: try bytes(Descriptor(path: path, flags: O_RDONLY), path, limit), as: UTF8.self)
  }

  private static func bytes(
    _ descriptor: borrowing Descriptor, _ path: String, _ limit: Int
  ) throws(IOError) -> [UInt8] {
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 4096)
    while true {
      let count = Glibc.read(descriptor.raw, &buffer, buffer.count)
      if count < 0 {
        if errno == EINTR { continue }
        throw IOError.last("read", path)
      }
      if count == 0 { return bytes }
      bytes += buffer[..<count]
      guard bytes.count <= limit else { throw IOError(EFBIG, "read", path) }
    }
  }

  /// Replaces a file whole: a reader sees the old text or the new one. In the run directory the
  /// reserve is used when there is no space. `durably`: after a power cut, too.
  static func replace(
    _ path: String, with text: String, mode: mode_t = 0o600, durably: Bool = false
  ) throws(IOError) {
    try RunReserve.writing(path) { () throws(IOError) in try write(path, text, mode, durably) }
    if durably { try syncFolder(of: path) }
  }

  /// Has a file's name, or that it is gone, survive a power cut.
  static func syncFolder(of path: String) throws(IOError) {
    let folder = path.lastIndex(of: "/").map { String(path[...$0]) } ?? "."
    let descriptor = try Descriptor(path: folder, flags: O_RDONLY | O_DIRECTORY)
    guard fsync(descriptor.raw) == 0 else { throw IOError.last("write out", folder) }
  }

  private static func write(
    _ path: String, _ text: String, _ mode: mode_t, _ durably: Bool
  ) throws(IOError) {
    let new = path + ".new"
    let descriptor = try Descriptor(path: new, flags: O_WRONLY | O_CREAT | O_TRUNC, mode: mode)
    var rest = Array(text.utf8)[...]
    while !rest.isEmpty {
      let count = rest.withUnsafeBytes { Glibc.write(descriptor.raw, $0.baseAddress, $0.count) }
      if count < 0 {
        if errno == EINTR { continue }
        throw IOError.last("write", new)
      }
      rest = rest.dropFirst(count)
    }
    if durably, fsync(descriptor.raw) != 0 { throw IOError.last("write out", new) }
    try descriptor.close()
    guard rename(new, path) == 0 else { throw IOError.last("replace", path) }
  }
}
