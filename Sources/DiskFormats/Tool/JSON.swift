// SPDX-License-Identifier: Apache-2.0
// JSON as text, as much of it as the tools print.

internal import SystemIO

/// A JSON value.
package enum JSON: Sendable {
  /// A whole number.
  case number(UInt64)
  /// A string.
  case string(String)
  /// True or false.
  case bool(Bool)
  /// Nothing.
  case null
  /// Values in order.
  case array([JSON])
  /// Members in order.
  case object([(String, JSON)])

  /// A string, or null.
  package static func text(_ text: String?) -> JSON { text.map { .string($0) } ?? .null }

  /// The value on one line.
  package var text: String {
    switch self {
    case .number(let number): "\(number)"
    case .string(let string): Self.quoted(string)
    case .bool(let bool): bool ? "true" : "false"
    case .null: "null"
    case .array(let values): "[" + values.map(\.text).joined(separator: ", ") + "]"
    case .object(let members): "{" + Self.members(members, separator: ", ") + "}"
    }
  }

  /// An object with a member a line.
  package var lines: String {
    guard case .object(let members) = self else { return text }
    return "{\n  " + Self.members(members, separator: ",\n  ") + "\n}"
  }

  private static func members(_ members: [(String, JSON)], separator: String) -> String {
    members.map { quoted($0.0) + ": " + $0.1.text }.joined(separator: separator)
  }

  /// Source: RFC 8259, section 7.
  private static func quoted(_ string: String) -> String {
    var text = "\""
    for scalar in string.unicodeScalars {
      switch scalar {
      case "\"", "\\": text += "\\\(scalar)"
      case "\n": text += "\\n"
      case _ where ForeignText.isUnfit(scalar):
        let digits = String(scalar.value, radix: 16)
        text += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
      default: text.unicodeScalars.append(scalar)
      }
    }
    return text + "\""
  }
}

extension JSON {
  /// The value over lines, each level four columns further in.
  package var indented: String { indented("") }

  private func indented(_ margin: String) -> String {
    let inner = margin + "    "
    func block(_ open: String, _ parts: [String], _ close: String) -> String {
      guard !parts.isEmpty else { return open + close }
      return open + "\n" + parts.map { inner + $0 }.joined(separator: ",\n") + "\n" + margin + close
    }
    switch self {
    case .array(let values): return block("[", values.map { $0.indented(inner) }, "]")
    case .object(let members):
      return block(
        "{", members.map { Self.quoted($0.0) + ": " + $0.1.indented(inner) }, "}")
    default: return text
    }
  }
}
