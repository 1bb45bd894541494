// SPDX-License-Identifier: Apache-2.0
// Text that came from elsewhere (a guest, an image, a file name), made fit to be shown: what could
// end a line, speak to a terminal or turn the order of what follows it is written as percent codes.

/// Foreign text for people.
package enum ForeignText {
  /// Text for one line, with control characters, separators of lines and changes of direction as
  /// percent codes of their UTF-8 bytes; cut off after so many scalars, with "..." in their place.
  package static func shown(_ text: String, limit: Int = 200) -> String {
    var result = ""
    var count = 0
    for scalar in text.unicodeScalars {
      guard count < limit else { return result + "..." }
      count += 1
      append(scalar, to: &result)
    }
    return result
  }

  /// The same for text of several lines, of any length: ends of lines and tabs stay.
  package static func lines(_ text: String) -> String {
    guard text.unicodeScalars.contains(where: { isUnfit($0) && $0 != "\n" && $0 != "\t" }) else {
      return text
    }
    var result = ""
    for scalar in text.unicodeScalars {
      if scalar == "\n" || scalar == "\t" {
        result.unicodeScalars.append(scalar)
      } else {
        append(scalar, to: &result)
      }
    }
    return result
  }

  /// JSON that means the same and that a terminal can be shown: what is unfit can only stand in a
  /// string, but for ends of lines and tabs between tokens. Source: RFC 8259, section 7.
  package static func json(_ text: String) -> String {
    guard text.unicodeScalars.contains(where: { isUnfit($0) && $0 != "\n" && $0 != "\t" }) else {
      return text
    }
    var result = ""
    for scalar in text.unicodeScalars {
      if isUnfit(scalar), scalar != "\n", scalar != "\t" {
        let digits = String(scalar.value, radix: 16)
        result += "\\u" + String(repeating: "0", count: 4 - digits.utf8.count) + digits
      } else {
        result.unicodeScalars.append(scalar)
      }
    }
    return result
  }

  /// Whether a scalar is not to be shown as it stands: C0 and C1 controls, DEL, separators of lines
  /// and paragraphs, and what changes the direction of text. Source: Unicode Annex 9, Bidi_Control.
  package static func isUnfit(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.value {
    case 0..<0x20, 0x7F..<0xA0, 0x061C, 0x200E, 0x200F, 0x2028...0x202E, 0x2066...0x2069: true
    default: false
    }
  }

  private static func append(_ scalar: Unicode.Scalar, to result: inout String) {
    guard isUnfit(scalar) else { return result.unicodeScalars.append(scalar) }
    for byte in Array(String(scalar).utf8) { result += code(byte) }
  }

  private static func code(_ byte: UInt8) -> String {
    let digits = String(byte, radix: 16, uppercase: true)
    return "%" + (digits.utf8.count < 2 ? "0" : "") + digits
  }
}
