// SPDX-License-Identifier: Apache-2.0
// A byte store in memory: sparse, so that a disk of 64 TiB costs what is written to it.

package import BlockIO
import Glibc
import Synchronization
package import SystemIO

/// A file that exists only in memory. Safe from any thread.
package final class MemoryStore: ByteStore {
  private static let pageSize = 4096

  private struct State {
    var pages: [UInt64: [UInt8]] = [:]
    var size: UInt64
    var modified: UInt64
    var isWritable = true
  }

  private let state: Mutex<State>
  /// What errors call it.
  package let name: String

  /// A store of zeroes.
  package init(_ name: String = "memory", size: UInt64 = 0, modified: UInt64 = 1) {
    self.name = name
    state = Mutex(State(size: size, modified: modified))
  }

  /// A store with contents.
  package convenience init(_ name: String = "memory", bytes: [UInt8]) {
    self.init(name, size: UInt64(bytes.count))
    state.withLock { state in bytes.withUnsafeBytes { Self.put($0, at: 0, in: &state) } }
  }

  /// Length in bytes.
  package var size: UInt64 { state.withLock { $0.size } }

  /// Whether writes are allowed; may be changed at any time.
  package var isWritable: Bool {
    get { state.withLock { $0.isWritable } }
    set { state.withLock { $0.isWritable = newValue } }
  }

  /// Modification time in nanoseconds; may be changed at any time, and is by no write.
  package var modified: UInt64 {
    get { state.withLock { $0.modified } }
    set { state.withLock { $0.modified = newValue } }
  }

  /// Size and modification time.
  package func identity() -> StoreIdentity {
    state.withLock { StoreIdentity(size: $0.size, modified: $0.modified) }
  }

  /// Bytes of the pages that were ever written.
  package func allocatedBytes() -> UInt64 {
    state.withLock { UInt64($0.pages.count * Self.pageSize) }
  }

  /// The whole contents. For small stores.
  package func contents() -> [UInt8] {
    state.withLock { state in
      var bytes = [UInt8](repeating: 0, count: Int(state.size))
      for (index, page) in state.pages {
        let start = Int(index) * Self.pageSize
        let count = min(Self.pageSize, bytes.count - start)
        if count > 0 { bytes.replaceSubrange(start..<(start + count), with: page[..<count]) }
      }
      return bytes
    }
  }

  /// Fills the buffer; past the end, with zeroes.
  package func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) {
    state.withLock { state in
      var done = 0
      while done < buffer.count {
        let position = offset + UInt64(done)
        let start = Int(position % UInt64(Self.pageSize))
        let count = min(Self.pageSize - start, buffer.count - done)
        let target = UnsafeMutableRawBufferPointer(rebasing: buffer[done..<(done + count)])
        if let page = state.pages[position / UInt64(Self.pageSize)] {
          page.withUnsafeBytes {
            target.copyMemory(from: .init(rebasing: $0[start..<(start + count)]))
          }
        } else {
          target.initializeMemory(as: UInt8.self, repeating: 0)
        }
        done += count
      }
    }
  }

  private static func put(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, in state: inout State)
  {
    var done = 0
    while done < bytes.count {
      let position = offset + UInt64(done)
      let start = Int(position % UInt64(pageSize))
      let count = min(pageSize - start, bytes.count - done)
      let piece = UnsafeRawBufferPointer(rebasing: bytes[done..<(done + count)])
      let empty = [UInt8](repeating: 0, count: pageSize)
      state.pages[position / UInt64(pageSize), default: empty].withUnsafeMutableBytes {
        UnsafeMutableRawBufferPointer(rebasing: $0[start...]).copyMemory(from: piece)
      }
      done += count
    }
    state.size = max(state.size, offset + UInt64(bytes.count))
  }

  /// Writes the whole buffer, growing the store when need be. Throws EBADF when read-only.
  package func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    try checkWritable("write")
    state.withLock { Self.put(buffer, at: offset, in: &$0) }
  }

  /// Zeroes a range, dropping whole pages; does not change the length.
  package func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    try checkWritable("zero")
    state.withLock { state in
      Self.clear(&state, from: offset, to: min(state.size, offset + count))
    }
  }

  private static func clear(_ state: inout State, from start: UInt64, to end: UInt64) {
    guard start < end else { return }
    let page = UInt64(pageSize)
    for index in Array(state.pages.keys) where index * page < end && (index + 1) * page > start {
      let first = Int(max(start, index * page) - index * page)
      let last = Int(min(end, (index + 1) * page) - index * page)
      if last - first == pageSize {
        state.pages[index] = nil
      } else {
        for byte in first..<last { state.pages[index]?[byte] = 0 }
      }
    }
  }

  /// Sets the length.
  package func resize(to size: UInt64) throws(IOError) {
    try checkWritable("resize")
    state.withLock { state in
      Self.clear(&state, from: size, to: state.size)
      state.size = size
    }
  }

  /// Memory has nothing to flush.
  package func flush() {}

  private func checkWritable(_ operation: String) throws(IOError) {
    guard isWritable else { throw IOError(EBADF, operation, name) }
  }
}
