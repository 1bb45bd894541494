// The checksum of this room. No format depends on a library for it.

/// CRC-32C (Castagnoli), reflected, with the usual inversions.
/// Source: RFC 3720, appendix B.4, whose examples the tests repeat.
struct CRC32C {
  private static let table: [UInt32] = (0..<256).map { index in
    (0..<8).reduce(UInt32(index)) { value, _ in
      value & 1 == 1 ? (value >> 1) ^ 0x82F6_3B78 : value >> 1
    }
  }

  private var state: UInt32 = 0xFFFF_FFFF

  /// The checksum of all bytes taken in so far.
  var value: UInt32 { ~state }

  /// Takes in more bytes.
  mutating func update(_ bytes: UnsafeRawBufferPointer) {
    var state = state
    Self.table.withUnsafeBufferPointer { table in
      for byte in bytes {
        state = table[Int(UInt8(truncatingIfNeeded: state) ^ byte)] ^ (state >> 8)
      }
    }
    self.state = state
  }

  /// The checksum of an array.
  static func of(_ bytes: [UInt8]) -> UInt32 {
    var sum = CRC32C()
    bytes.withUnsafeBytes { sum.update($0) }
    return sum.value
  }
}
