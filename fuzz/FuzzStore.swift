// SPDX-License-Identifier: Apache-2.0
// What the fuzzer's images live in: bytes in memory, of a length that may be any, of which
// only so many may ever be written.

import BlockIO
import Glibc
import SystemIO

/// A byte store over an array. Used from one thread.
final class FuzzStore: ByteStore, @unchecked Sendable {
  /// Bytes that may be written; a write past them fails as on a full medium.
  static let room = 24 << 20

  let name: String
  private(set) var bytes: [UInt8]
  private(set) var size: UInt64
  let isWritable = true

  init(_ name: String, _ bytes: [UInt8], size: UInt64? = nil) {
    self.name = name
    self.bytes = bytes
    self.size = size ?? UInt64(bytes.count)
  }

  func identity() -> StoreIdentity { StoreIdentity(size: size, modified: 1) }

  func allocatedBytes() -> UInt64 { UInt64(bytes.count) }

  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) {
    let start = min(offset, UInt64(bytes.count))
    let count = min(buffer.count, bytes.count - Int(start))
    bytes.withUnsafeBytes {
      buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: $0[Int(start)..<Int(start) + count]))
    }
    UnsafeMutableRawBufferPointer(rebasing: buffer[count...])
      .initializeMemory(as: UInt8.self, repeating: 0)
  }

  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    guard offset <= Self.room, buffer.count <= Self.room - Int(offset) else {
      throw IOError(ENOSPC, "write", name)
    }
    let start = Int(offset)
    let end = start + buffer.count
    if bytes.count < end { bytes += [UInt8](repeating: 0, count: end - bytes.count) }
    bytes.withUnsafeMutableBytes {
      UnsafeMutableRawBufferPointer(rebasing: $0[start..<end]).copyMemory(from: buffer)
    }
    size = max(size, UInt64(end))
  }

  func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    let start = Int(min(offset, UInt64(bytes.count)))
    let (sum, over) = offset.addingReportingOverflow(count)
    let end = over ? bytes.count : Int(min(sum, UInt64(bytes.count)))
    for index in start..<end { bytes[index] = 0 }
  }

  func resize(to size: UInt64) throws(IOError) {
    if size < UInt64(bytes.count) { bytes.removeSubrange(Int(size)...) }
    self.size = size
  }

  func flush() {}

  /// What lies behind the bytes is a hole.
  func nextData(from offset: UInt64) -> Range<UInt64>? {
    let end = UInt64(bytes.count)
    return offset < end ? offset..<end : nil
  }
}
