// SPDX-License-Identifier: Apache-2.0
// Little-endian numbers in an array of bytes. The caller has checked the array's length;
// an index outside it is our own mistake and traps.

import SystemIO
extension [UInt8] {
  /// The 32-bit number at a byte offset.
  func u32(at offset: Int) -> UInt32 {
    (0..<4).reduce(0) { $0 | UInt32(self[offset + $1]) << UInt32(8 * $1) }
  }

  /// The 64-bit number at a byte offset.
  func u64(at offset: Int) -> UInt64 {
    (0..<8).reduce(0) { $0 | UInt64(self[offset + $1]) << UInt64(8 * $1) }
  }

  /// Puts a 32-bit number at a byte offset.
  mutating func put(_ value: UInt32, at offset: Int) {
    for index in 0..<4 { self[offset + index] = UInt8(truncatingIfNeeded: value >> (8 * index)) }
  }

  /// Puts a 64-bit number at a byte offset.
  mutating func put(_ value: UInt64, at offset: Int) {
    for index in 0..<8 { self[offset + index] = UInt8(truncatingIfNeeded: value >> (8 * index)) }
  }
}

/// Rounds up to a multiple; nil when the result does not fit.
func roundedUp(_ value: UInt64, to multiple: UInt64) -> UInt64? {
  let (sum, overflow) = value.addingReportingOverflow(multiple - 1)
  return overflow ? nil : sum / multiple * multiple
}

/// Runs system calls, turning their error into one of this room.
func io<Result>(_ body: () throws(IOError) -> Result) throws(ImageError) -> Result {
  do throws(IOError) { return try body() } catch { throw ImageError(error) }
}
