// SPDX-License-Identifier: Apache-2.0
// What the daemon may know of a pending log: whether it holds something that is not in the
// store. The log's layout stands at the head of Target/PendingLog.swift.
//
// A worker may write anything into its log. What is read here decides only whether the file is
// kept, and what is said of it.

/// The state of a pending log, read from its header.
package import SystemIO
package struct PendingSummary: Sendable, Equatable {
  /// Most placements that are not committed; 0: none.
  package var uncommitted: UInt64
  /// The errno of the failed flush that stands; 0: none.
  package var flushFailed: Int32
  /// Whether a flush had no known result when the log was last written.
  package var isFlushing: Bool

  /// Bytes of a log when it is made, and at most.
  package static let firstSize: UInt64 = 4096 + 1024 * 40
  /// A log that is longer was not written by a worker in its senses.
  package static let largestSize: UInt64 = 4096 + 65536 * 40

  /// Whether something would be lost with the log.
  package var isNeeded: Bool { uncommitted > 0 || flushFailed != 0 || isFlushing }

  /// Nothing to recover.
  package static let nothing = PendingSummary(uncommitted: 0, flushFailed: 0, isFlushing: false)

  private init(uncommitted: UInt64, flushFailed: Int32, isFlushing: Bool) {
    self.uncommitted = uncommitted
    self.flushFailed = flushFailed
    self.isFlushing = isFlushing
  }

  /// Reads the header of a log and its newest record. A file that is no log, since its worker
  /// died before it made one, holds nothing. Blocks for a moment. Throws the errno of a read.
  package init(_ log: FileStore) throws(IOError) {
    self = .nothing
    let size = log.size
    guard size >= 4096 else { return }
    let header = try log.read(at: 0, count: 64)
    func word(_ offset: Int) -> UInt64 {
      (0..<8).reduce(0) { $0 | UInt64(header[offset + $1]) << (UInt64($1) * 8) }
    }
    guard word(0) == 0x3164_6e65_7075_6d64 else { return }
    flushFailed = Int32(truncatingIfNeeded: word(48) & 0xffff)
    isFlushing = word(48) >> 32 != 0
    let capacity = word(24)
    let (tail, head) = (word(32) & 0xffff_ffff, word(32) >> 32)
    guard tail != head, capacity <= 1 << 20, tail < capacity, head < capacity else {
      // Positions that make no sense are for the worker to judge: such a log is kept.
      if tail != head { uncommitted = 1 }
      return
    }
    let newest = head == 0 ? capacity - 1 : head - 1
    let record = try log.read(at: 4096 + newest * 40, count: 40)
    let mark = (0..<8).reduce(UInt64(0)) { $0 | UInt64(record[16 + $1]) << (UInt64($1) * 8) }
    if mark > word(40) { uncommitted = head > tail ? head - tail : head + capacity - tail }
  }
}
