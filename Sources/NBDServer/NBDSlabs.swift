// SPDX-License-Identifier: Apache-2.0
// The buffers of one NBD connection. A slab is a buffer that several things may lie in at
// once, what was received or what is to be sent; it counts what is still needed of it.

import SystemIO
import Target

/// Counted buffers, named by index. Used from one thread.
struct NBDSlabs {
  struct Slab {
    var pointer: UnsafeMutableRawPointer
    var size: Int
    /// Bytes given out, from the start on.
    var used: Int
    var references: Int
  }

  /// Bytes of an ordinary slab.
  static let ordinary = 256 << 10

  private let pool: BufferPool
  private var slabs: [Slab] = []
  private var free: [Int32] = []
  /// Bytes of all slabs held.
  private(set) var bytes = 0

  init(_ pool: BufferPool) {
    self.pool = pool
  }

  /// A slab of at least so many bytes, with one reference.
  mutating func take(_ count: Int) -> Int32 {
    let size = BufferPool.size(for: count)
    let slab = Slab(pointer: pool.take(size), size: size, used: 0, references: 1)
    bytes += size
    if let index = free.popLast() {
      slabs[Int(index)] = slab
      return index
    }
    slabs.append(slab)
    return Int32(slabs.count - 1)
  }

  func pointer(_ index: Int32) -> UnsafeMutableRawPointer { slabs[Int(index)].pointer }
  func size(_ index: Int32) -> Int { slabs[Int(index)].size }
  func references(_ index: Int32) -> Int { slabs[Int(index)].references }

  /// Gives out bytes of a slab, with a reference; nil when it has no room.
  mutating func allot(_ index: Int32, _ count: Int) -> Int? {
    let start = slabs[Int(index)].used
    guard slabs[Int(index)].size - start >= count else { return nil }
    slabs[Int(index)].used = start + count
    slabs[Int(index)].references += 1
    return start
  }

  /// Takes back the end of what was given out last.
  mutating func shrink(_ index: Int32, to used: Int) {
    slabs[Int(index)].used = used
  }

  mutating func retain(_ index: Int32) {
    slabs[Int(index)].references += 1
  }

  mutating func release(_ index: Int32) {
    slabs[Int(index)].references -= 1
    switch slabs[Int(index)].references {
    case 0:
      bytes -= slabs[Int(index)].size
      pool.give(slabs[Int(index)].pointer, slabs[Int(index)].size)
      free.append(index)
    case 1:
      // Only its owner has it: it may be filled from the start again.
      slabs[Int(index)].used = 0
    default: break
    }
  }
}
