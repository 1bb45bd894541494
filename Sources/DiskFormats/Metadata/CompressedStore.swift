// SPDX-License-Identifier: Apache-2.0
// Compressed units of an image as a byte store. The unit that is known by number n is found at
// n strides: the address says all, so that reads need no table and may come from any thread.

import BlockIO
import Glibc
import Synchronization
import SystemIO

/// Reads compressed units of one image.
final class CompressedStore: ReadOnlyStore {
  /// So many units are kept, the most recent first.
  private static let kept = 4

  let name: String
  let size: UInt64 = 1 << 62
  let isMade = true
  private let unit: UInt64
  private let stride: UInt64
  private let load: @Sendable (UInt64) throws(IOError) -> [UInt8]
  private let recent = Mutex<[(number: UInt64, bytes: [UInt8])]>([])

  /// `unit` is the length of what `load` makes of a number, in bytes; it throws EIO for what
  /// cannot be decompressed. A stride of more than that keeps units whose numbers follow each
  /// other from looking like one run.
  init(
    name: String, unit: UInt64, stride: UInt64,
    load: @escaping @Sendable (UInt64) throws(IOError) -> [UInt8]
  ) {
    self.stride = stride
    self.name = name
    self.unit = unit
    self.load = load
  }

  /// Reads from within one unit.
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    let start = Int(offset % stride)
    guard start + buffer.count <= Int(unit) else {
      throw IOError(EINVAL, "read across compressed units of", name)
    }
    let bytes = try bytes(of: offset / stride)
    bytes.withUnsafeBytes {
      buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: $0[start..<(start + buffer.count)]))
    }
  }

  private func bytes(of number: UInt64) throws(IOError) -> [UInt8] {
    if let kept = recent.withLock({ $0.first { $0.number == number }?.bytes }) { return kept }
    let bytes = try load(number)
    recent.withLock { recent in
      recent.insert((number, bytes), at: 0)
      if recent.count > Self.kept { recent.removeLast() }
    }
    return bytes
  }
}
