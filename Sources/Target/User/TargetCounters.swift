// SPDX-License-Identifier: Apache-2.0

/// What has happened since the start.
package struct TargetCounters: Sendable, Equatable {
  /// Requests of each kind.
  package var reads: UInt64 = 0
  /// Write requests.
  package var writes: UInt64 = 0
  /// Flush requests, forced writes not included.
  package var flushes: UInt64 = 0
  /// Discards and write-zeroes.
  package var discards: UInt64 = 0
  /// Bytes that reads asked for.
  package var bytesRead: UInt64 = 0
  /// Bytes that writes brought.
  package var bytesWritten: UInt64 = 0
  /// Questions to the worker, flushes included.
  package var faults: UInt64 = 0
  /// Blocks that were put together from a copy and a write.
  package var copies: UInt64 = 0
  /// Requests that failed.
  package var errors: UInt64 = 0
}
