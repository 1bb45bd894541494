// SPDX-License-Identifier: Apache-2.0
// The checksum of this room. No format depends on a library for it.

/// CRC-32C (Castagnoli), reflected, with the usual inversions, eight bytes at a time.
/// Source: RFC 3720, appendix B.4, whose examples the tests repeat.
struct CRC32C {
  /// Eight tables of 256 in a row: table t takes a byte that t more bytes follow.
  private static let tables: [UInt32] = {
    var tables = [UInt32](repeating: 0, count: 8 * 256)
    for index in 0..<256 {
      tables[index] = (0..<8).reduce(UInt32(index)) { value, _ in
        value & 1 == 1 ? (value >> 1) ^ 0x82F6_3B78 : value >> 1
      }
    }
    for index in 256..<(8 * 256) {
      let before = tables[index - 256]
      tables[index] = (before >> 8) ^ tables[Int(before & 0xFF)]
    }
    return tables
  }()

  private var state: UInt32 = 0xFFFF_FFFF

  /// The checksum of all bytes taken in so far.
  var value: UInt32 { ~state }

  /// Takes in more bytes.
  mutating func update(_ bytes: UnsafeRawBufferPointer) {
    var crc = state
    Self.tables.withUnsafeBufferPointer { table in
      var offset = 0
      let words = bytes.count & ~7
      while offset < words {
        let next = bytes.loadUnaligned(fromByteOffset: offset, as: UInt64.self)
        let word = UInt64(littleEndian: next) ^ UInt64(crc)
        crc =
          table[0x700 | Int(word & 0xFF)] ^ table[0x600 | Int(word >> 8 & 0xFF)]
          ^ table[0x500 | Int(word >> 16 & 0xFF)] ^ table[0x400 | Int(word >> 24 & 0xFF)]
        crc ^=
          table[0x300 | Int(word >> 32 & 0xFF)] ^ table[0x200 | Int(word >> 40 & 0xFF)]
          ^ table[0x100 | Int(word >> 48 & 0xFF)] ^ table[Int(word >> 56)]
        offset += 8
      }
      while offset < bytes.count {
        crc = table[Int((crc ^ UInt32(bytes[offset])) & 0xFF)] ^ (crc >> 8)
        offset += 1
      }
    }
    state = crc
  }

  /// The checksum of an array.
  static func of(_ bytes: [UInt8]) -> UInt32 {
    var sum = CRC32C()
    bytes.withUnsafeBytes { sum.update($0) }
    return sum.value
  }
}
