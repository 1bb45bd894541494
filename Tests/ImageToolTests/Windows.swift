// SPDX-License-Identifier: Apache-2.0
// Several stores on one simulated disk, so that the power goes for all of them at once.

import BlockIO
import SystemIO
import TestSupport

/// A stretch of another store. As a device, it keeps its length.
final class Window: ByteStore {
  let name: String
  let size: UInt64
  let isWritable = true
  private let inner: any ByteStore
  private let start: UInt64

  init(_ name: String, _ inner: any ByteStore, at start: UInt64, size: UInt64) {
    self.name = name
    self.inner = inner
    self.start = start
    self.size = size
  }

  func identity() -> StoreIdentity { StoreIdentity(size: size, modified: 0) }
  func allocatedBytes() -> UInt64 { size }

  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    let here = Int(min(UInt64(buffer.count), size - min(size, offset)))
    let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[here...])
    rest.initializeMemory(as: UInt8.self, repeating: 0)
    guard here > 0 else { return }
    try inner.read(UnsafeMutableRawBufferPointer(rebasing: buffer[..<here]), at: start + offset)
  }

  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    guard offset <= size, UInt64(buffer.count) <= size - offset else {
      throw IOError(28, "write", name)
    }
    try inner.write(buffer, at: start + offset)
  }

  func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    guard offset < size else { return }
    try inner.zero(at: start + offset, count: min(count, size - offset))
  }

  func resize(to size: UInt64) throws(IOError) {
    guard size <= self.size else { throw IOError(28, "resize", name) }
  }

  func flush() throws(IOError) { try inner.flush() }
}
