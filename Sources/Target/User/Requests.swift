// SPDX-License-Identifier: Apache-2.0
// What is asked of a target from the guest's side, and how the answer comes back.

/// One request of a guest. Offsets and lengths are in bytes, of any alignment.
package struct TargetRequest {
  /// What is wanted.
  package enum Operation: UInt8, Sendable {
    /// Fill the buffer.
    case read
    /// Write the buffer.
    case write
    /// The range is not needed any more.
    case discard
    /// The range shall read as zeroes.
    case zero
    /// Everything that was acknowledged shall be durable.
    case flush
    /// Tell into the buffer, a StatusList, what the range is made of.
    case status
  }

  /// What is wanted.
  package var operation: Operation
  /// Durable before it is acknowledged. For write, discard and zero.
  package var isForced = false
  /// Zeroes that keep their space. For zero.
  package var keepsSpace = false
  /// Bytes from the start of the disk.
  package var offset: UInt64
  /// Bytes.
  package var count: UInt64
  /// `count` bytes for read and write, lent until the request has completed.
  package var buffer: UnsafeMutableRawPointer?
  /// What the owner is told by.
  package var tag: UInt64

  /// A request from its parts.
  package init(
    _ operation: Operation, offset: UInt64 = 0, count: UInt64 = 0,
    buffer: UnsafeMutableRawPointer? = nil, tag: UInt64 = 0
  ) {
    self.operation = operation
    self.offset = offset
    self.count = count
    self.buffer = buffer
    self.tag = tag
  }
}

/// Whoever makes requests of a target.
package protocol RequestOwner: AnyObject {
  /// A request that `submit` left pending has completed with this errno, 0 for success. May
  /// be called before that `submit` has returned.
  func completed(tag: UInt64, code: Int32)
}

/// A list that a status request fills: what runs of bytes are made of.
package struct StatusList {
  /// A run that is all alike.
  package struct Entry {
    /// Bytes.
    package var count: UInt32
    /// Whether it is known to read as zeroes and to take up no space.
    package var isHole: Bool
  }

  /// What was found, at most `limit` runs.
  package internal(set) var entries: [Entry] = []
  /// How many runs may be told.
  package let limit: Int

  /// An empty list.
  package init(limit: Int) {
    self.limit = limit
    entries.reserveCapacity(min(limit, 64))
  }

  /// Adds a run; false when it does not fit any more.
  mutating func add(_ count: UInt64, isHole: Bool) -> Bool {
    if let last = entries.last, last.isHole == isHole {
      entries[entries.count - 1].count = last.count + UInt32(count)
      return true
    }
    guard entries.count < limit else { return false }
    entries.append(Entry(count: UInt32(count), isHole: isHole))
    return true
  }
}
