// SPDX-License-Identifier: Apache-2.0
// A byte store of which the Nth input or output fails.

package import BlockIO
import Glibc
import Synchronization
package import SystemIO

/// Passes everything on to another store, save one call, or all from one on.
package final class FailingStore: ByteStore {
  /// What errors call it.
  package var name: String { inner.name }
  private let inner: any ByteStore
  private let failAt: Int?
  private let forGood: Bool
  private let code: Int32
  private let count = Mutex(0)

  /// A store over another. The call number `failAt` (from 0; reads, writes, zeroes, resizes
  /// and flushes count) fails with errno `code`; with `forGood`, every later one too.
  package init(
    _ inner: any ByteStore, failAt: Int?, forGood: Bool = false, code: Int32 = EIO
  ) {
    self.inner = inner
    self.failAt = failAt
    self.forGood = forGood
    self.code = code
  }

  /// How many calls there have been.
  package var calls: Int { count.withLock { $0 } }
  /// Length in bytes.
  package var size: UInt64 { inner.size }
  /// Whether writes are allowed.
  package var isWritable: Bool { inner.isWritable }
  /// As the store under it.
  package var isFixedSize: Bool { inner.isFixedSize }

  private func call(_ operation: String) throws(IOError) {
    let number = count.withLock { count in
      defer { count += 1 }
      return count
    }
    guard let failAt, number == failAt || (forGood && number > failAt) else { return }
    throw IOError(code, operation, name)
  }

  /// Identity of the store under it.
  package func identity() throws(IOError) -> StoreIdentity { try inner.identity() }
  /// Allocation of the store under it.
  package func allocatedBytes() throws(IOError) -> UInt64 { try inner.allocatedBytes() }

  /// Counts, then reads.
  package func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    try call("read")
    try inner.read(buffer, at: offset)
  }

  /// Counts, then writes.
  package func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    try call("write")
    try inner.write(buffer, at: offset)
  }

  /// Counts, then zeroes.
  package func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    try call("zero")
    try inner.zero(at: offset, count: count)
  }

  /// Counts, then resizes.
  package func resize(to size: UInt64) throws(IOError) {
    try call("resize")
    try inner.resize(to: size)
  }

  /// Counts, then reserves space.
  package func reserve(at offset: UInt64, count: UInt64) throws(IOError) {
    try call("reserve space in")
    try inner.reserve(at: offset, count: count)
  }

  /// Counts, then flushes.
  package func flush() throws(IOError) {
    try call("flush")
    try inner.flush()
  }
}
