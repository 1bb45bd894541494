// SPDX-License-Identifier: Apache-2.0
// What the kernel says in its log while something is tried. Constructors of targets tell there,
// and nowhere else, what they do not like.
//
// Source: the kernel's Documentation/ABI/testing/dev-kmsg.

import Glibc
import SystemIO

/// The kernel's log from a moment on.
struct KernelLog: ~Copyable {
  private let descriptor: Descriptor

  /// From now on; nil when this process may not read it, which makes errors poorer and is
  /// none itself.
  static func open() -> KernelLog? {
    do throws(IOError) {
      let descriptor = try Descriptor(path: "/dev/kmsg", flags: O_RDONLY | O_NONBLOCK)
      guard lseek(descriptor.raw, 0, SEEK_END) >= 0 else { return nil }
      return KernelLog(descriptor)
    } catch { return nil }
  }

  private init(_ descriptor: consuming Descriptor) {
    self.descriptor = descriptor
  }

  /// What the device-mapper has said of a device since; nil when nothing.
  borrowing func explanation(of number: DeviceNumber?) -> String? {
    var buffer = [UInt8](repeating: 0, count: 8192)
    var found: [String] = []
    while true {
      let count = read(descriptor.raw, &buffer, buffer.count)
      // EPIPE: the log went round; the next read goes on with the oldest that is left.
      if count < 0 && (errno == EPIPE || errno == EINTR) { continue }
      guard count > 0 else { break }
      let record = String(decoding: buffer[..<count], as: UTF8.self)
      if let words = Self.words(of: record, number) { found.append(words) }
    }
    return found.isEmpty ? nil : found.joined(separator: "; ")
  }

  /// The device-mapper's words in a record "PRIORITY,NUMBER,TIME,FLAGS;TEXT"; nil when it is
  /// another's, or says of which device it speaks and that is another.
  static func words(of record: String, _ number: DeviceNumber?) -> String? {
    let line = record.split(separator: "\n", maxSplits: 1).first ?? ""
    guard let semicolon = line.firstIndex(of: ";") else { return nil }
    var text = line[line.index(after: semicolon)...]
    let prefix = "device-mapper: "
    guard text.hasPrefix(prefix) else { return nil }
    text = text.dropFirst(prefix.count)
    guard text.hasPrefix("table: ") else { return String(text) }
    text = text.dropFirst("table: ".count)
    guard let colon = text.range(of: ": ") else { return String(text) }
    let named = text[..<colon.lowerBound]
    let looksLikeNumber = named.allSatisfy { $0.isNumber || $0 == ":" }
    guard looksLikeNumber else { return String(text) }
    if let number, named != "\(number)" { return nil }
    return String(text[colon.upperBound...])
  }
}

extension Substring {
  /// Where a short string first stands. (Foundation's, which is not used here.)
  fileprivate func range(of needle: String) -> Range<Index>? {
    var index = startIndex
    while index < endIndex {
      if self[index...].hasPrefix(needle) {
        return index..<self.index(index, offsetBy: needle.count)
      }
      index = self.index(after: index)
    }
    return nil
  }
}
