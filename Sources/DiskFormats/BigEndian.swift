// SPDX-License-Identifier: Apache-2.0
// Big-endian numbers in an array of bytes, as qcow, qcow2 and vhd have them. The caller has
// checked the array's length; an index outside it is our own mistake and traps.

extension [UInt8] {
  /// The big-endian number of a type at a byte offset.
  func big<Number: FixedWidthInteger>(_ type: Number.Type, at offset: Int) -> Number {
    precondition(offset >= 0 && offset + MemoryLayout<Number>.size <= count)
    return withUnsafeBytes {
      Number(bigEndian: $0.loadUnaligned(fromByteOffset: offset, as: Number.self))
    }
  }

  /// Puts a number at a byte offset, big-endian.
  mutating func putBig<Number: FixedWidthInteger>(_ value: Number, at offset: Int) {
    precondition(offset >= 0 && offset + MemoryLayout<Number>.size <= count)
    withUnsafeMutableBytes {
      $0.storeBytes(of: value.bigEndian, toByteOffset: offset, as: Number.self)
    }
  }

  /// Adds a number at the end, big-endian.
  mutating func appendBig<Number: FixedWidthInteger>(_ value: Number) {
    Swift.withUnsafeBytes(of: value.bigEndian) { append(contentsOf: $0) }
  }

  /// Adds zeroes until the length is a multiple.
  mutating func pad(to multiple: Int) {
    append(contentsOf: repeatElement(0, count: (multiple - count % multiple) % multiple))
  }
}

/// Text from bytes of an image; what is no UTF-8 is replaced.
func text(_ bytes: some Collection<UInt8>) -> String {
  String(decoding: bytes, as: UTF8.self)
}
