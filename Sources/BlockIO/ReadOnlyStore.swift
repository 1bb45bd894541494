// SPDX-License-Identifier: Apache-2.0
// Stores that are only read, and have nothing of their own on a medium: what they show is made from
// other stores. Such a store has to say no more than its name, its length and how it is read.

import Glibc
package import SystemIO

/// A byte store that is never written.
package protocol ReadOnlyStore: ByteStore {}

extension ReadOnlyStore {
  /// Never.
  package var isWritable: Bool { false }
  /// Nothing that anybody could know again.
  package func identity() throws(IOError) -> StoreIdentity {
    StoreIdentity(size: size, modified: 0)
  }
  /// None of its own.
  package func allocatedBytes() throws(IOError) -> UInt64 { 0 }
  /// Throws EBADF.
  package func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    throw IOError(EBADF, "write", name)
  }
  /// Throws EBADF.
  package func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    throw IOError(EBADF, "zero", name)
  }
  /// Throws EBADF.
  package func resize(to size: UInt64) throws(IOError) { throw IOError(EBADF, "resize", name) }
  /// There is nothing to flush.
  package func flush() throws(IOError) {}
}
