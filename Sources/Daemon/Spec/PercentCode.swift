// SPDX-License-Identifier: Apache-2.0
// Percent codes: how the characters that divide a spec stand inside a path.

/// Writing and reading of percent-encoded text.
package enum PercentCode {
  /// What is wrong with a piece of encoded text.
  package enum Fault: Error, Sendable, Hashable {
    /// A character that must be written as a percent code stands as itself.
    case bare(Character)
    /// "%" without two hexadecimal digits after it; holds what was found.
    case notACode(String)
    /// A control character, by its code; zero included.
    case control(UInt8)
    /// The decoded bytes are not UTF-8.
    case notText
  }

  /// The characters that divide a spec or a disk line and therefore need a code.
  package static let reserved: Set<Character> = [":", ",", "%", "?", "&", "="]

  /// The code of one byte: "%3A".
  static func code(_ byte: UInt8) -> String {
    let digits = String(byte, radix: 16, uppercase: true)
    return "%" + (digits.count < 2 ? "0" : "") + digits
  }

  /// Encodes what is reserved, and blanks and control characters, which would not survive
  /// a disk line.
  package static func encode(_ text: String) -> String {
    var result = ""
    for scalar in text.unicodeScalars {
      if scalar.value <= 0x20 || scalar.value == 0x7F || reserved.contains(Character(scalar)) {
        result += code(UInt8(scalar.value))
      } else {
        result.unicodeScalars.append(scalar)
      }
    }
    return result
  }

  /// Decodes. Throws the first thing that is wrong.
  package static func decode(_ text: some StringProtocol) throws(Fault) -> String {
    var bytes: [UInt8] = []
    var rest = Array(text.utf8)[...]
    while let byte = rest.popFirst() {
      guard byte == UInt8(ascii: "%") else {
        let character = Character(UnicodeScalar(byte))
        if reserved.contains(character) { throw .bare(character) }
        bytes.append(byte)
        continue
      }
      let digits = rest.prefix(2)
      let shown = "%" + String(decoding: digits, as: UTF8.self)
      guard digits.count == 2, digits.allSatisfy({ isHexDigit($0) }),
        let value = UInt8(String(decoding: digits, as: UTF8.self), radix: 16)
      else { throw .notACode(shown) }
      bytes.append(value)
      rest = rest.dropFirst(2)
    }
    if let control = bytes.first(where: { $0 < 0x20 || $0 == 0x7F }) { throw .control(control) }
    guard let result = String(validating: bytes, as: UTF8.self) else { throw .notText }
    return result
  }

  private static func isHexDigit(_ byte: UInt8) -> Bool {
    Character(UnicodeScalar(byte)).isHexDigit
  }
}
