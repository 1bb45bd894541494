// SPDX-License-Identifier: Apache-2.0
// Memory for I/O, used again and again. Sizes are powers of two and a page for the headers
// that go with them. What lies idle is bounded and can be given back.

internal import CLinux

/// A pool of page-aligned buffers. Used from one thread.
package final class BufferPool {
  /// The smallest buffer in bytes, without its page for headers.
  package static let minimum = 64 << 10
  /// The largest buffer in bytes, without its page for headers.
  package static let maximum = 64 << 20
  private static let headers = 4096

  private var idle: [[UnsafeMutableRawPointer]]
  private var idleBytes = 0
  private let keep: Int

  /// A pool that keeps at most so many bytes idle.
  package init(keep: Int) {
    self.keep = keep
    let classes = (BufferPool.maximum / BufferPool.minimum).trailingZeroBitCount + 1
    idle = Array(repeating: [], count: classes)
  }

  deinit {
    trim()
  }

  /// The size of the buffer that is taken for so many bytes.
  package static func size(for count: Int) -> Int {
    var size = minimum
    while size + headers < count { size <<= 1 }
    return size + headers
  }

  private static func index(_ size: Int) -> Int {
    ((size - headers) / minimum).trailingZeroBitCount
  }

  /// Lends a buffer; `size` is one that `size(for:)` has told. Its contents are undefined.
  package func take(_ size: Int) -> UnsafeMutableRawPointer {
    precondition(size <= BufferPool.maximum + BufferPool.headers, "a buffer beyond every limit")
    if let pointer = idle[BufferPool.index(size)].popLast() {
      idleBytes -= size
      return pointer
    }
    return .allocate(byteCount: size, alignment: 4096)
  }

  /// Takes a buffer back.
  package func give(_ pointer: UnsafeMutableRawPointer, _ size: Int) {
    guard idleBytes + size <= keep else {
      pointer.deallocate()
      return
    }
    idle[BufferPool.index(size)].append(pointer)
    idleBytes += size
  }

  /// Gives everything idle back to the system.
  package func trim() {
    guard idleBytes > 0 else { return }
    for index in idle.indices {
      for pointer in idle[index] { pointer.deallocate() }
      idle[index].removeAll()
    }
    idleBytes = 0
    dmu_trim_memory()
  }
}
