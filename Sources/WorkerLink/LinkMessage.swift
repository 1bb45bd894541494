// SPDX-License-Identifier: Apache-2.0
// One message between the daemon and a worker: a packet of at most 16 KiB of text.
//
//   VERB\n
//   KEY=VALUE\n ...
//
// A verb and a key are 1 to 32 of a-z, 0-9 and '-'; a key stands once. In a value '%' and
// every byte below space are written as % and two hexadecimal digits. The field `roles`
// names the descriptors that travel with the packet, in their order, parted by commas.
//
// Either side may be hostile: a message is decoded whole or not at all.

/// A message that is not one.
package enum LinkFault: Error, Sendable, Equatable, CustomStringConvertible {
  /// Longer than `LinkMessage.limit`, or with too many descriptors.
  case tooLarge
  /// Not of the form above; what is wrong with it.
  case malformed(String)
  /// A field that the verb needs is missing, or has a value that makes no sense.
  case badField(verb: String, field: String)
  /// A verb that this side does not know.
  case unknownVerb(String)

  /// One sentence without a final stop.
  package var description: String {
    switch self {
    case .tooLarge: "the message is too large"
    case .malformed(let reason): "the message is malformed: \(reason)"
    case .badField(let verb, let field): "'\(verb)' has no good value for '\(field)'"
    case .unknownVerb(let verb): "the verb '\(verb)' is unknown"
    }
  }
}

/// A verb and its fields.
package struct LinkMessage: Sendable, Equatable {
  /// The longest message in bytes.
  package static let limit = 16384
  /// The most fields.
  package static let maxFields = 64
  /// The field that names descriptors; set by the connection, never by hand.
  package static let rolesField = "roles"

  /// What it is about.
  package var verb: String
  /// The rest.
  package var fields: [String: String]

  /// A message from its parts.
  package init(_ verb: String, _ fields: [String: String] = [:]) {
    self.verb = verb
    self.fields = fields
  }

  /// The bytes, fields in the order of their keys. Throws `tooLarge`, and `malformed` for
  /// verbs and keys outside the alphabet.
  package func encoded() throws(LinkFault) -> [UInt8] {
    guard fields.count <= Self.maxFields else { throw .tooLarge }
    try Self.checkWord(Array(verb.utf8)[...])
    var bytes = Array(verb.utf8) + [newline]
    for (key, value) in fields.sorted(by: { $0.key < $1.key }) {
      try Self.checkWord(Array(key.utf8)[...])
      bytes += Array(key.utf8) + [equals]
      for byte in value.utf8 {
        if byte < 0x20 || byte == percent {
          bytes += [percent, Self.digit(byte >> 4), Self.digit(byte & 15)]
        } else {
          bytes.append(byte)
        }
      }
      bytes.append(newline)
    }
    guard bytes.count <= Self.limit else { throw .tooLarge }
    return bytes
  }

  /// The message of a packet.
  package init(decoding bytes: [UInt8]) throws(LinkFault) {
    guard bytes.count <= Self.limit else { throw .tooLarge }
    guard bytes.last == newline else { throw .malformed("it does not end in a newline") }
    var lines = bytes.dropLast().split(separator: newline, omittingEmptySubsequences: false)
    verb = try Self.word(lines.removeFirst())
    fields = [:]
    guard lines.count <= Self.maxFields else { throw .tooLarge }
    for line in lines {
      guard let cut = line.firstIndex(of: equals) else {
        throw .malformed("a field has no '='")
      }
      let key = try Self.word(line[..<cut])
      let value = try Self.value(line[(cut + 1)...])
      guard fields.updateValue(value, forKey: key) == nil else {
        throw .malformed("the field '\(key)' stands twice")
      }
    }
  }

  private static func checkWord(_ bytes: ArraySlice<UInt8>) throws(LinkFault) {
    let good = bytes.allSatisfy {
      (0x61...0x7a).contains($0) || (0x30...0x39).contains($0) || $0 == 0x2d
    }
    guard good, (1...32).contains(bytes.count) else {
      throw .malformed("a verb or key has a bad character or length")
    }
  }

  private static func word(_ bytes: ArraySlice<UInt8>) throws(LinkFault) -> String {
    try checkWord(bytes)
    return String(decoding: bytes, as: UTF8.self)
  }

  private static func value(_ bytes: ArraySlice<UInt8>) throws(LinkFault) -> String {
    var decoded: [UInt8] = []
    var rest = bytes
    while let byte = rest.popFirst() {
      guard byte == percent else {
        guard byte >= 0x20 else { throw .malformed("a value has a bare control character") }
        decoded.append(byte)
        continue
      }
      guard let high = rest.popFirst().flatMap(number), let low = rest.popFirst().flatMap(number)
      else { throw .malformed("a '%' without two hexadecimal digits") }
      decoded.append(high << 4 | low)
    }
    guard let text = String(validating: decoded, as: UTF8.self) else {
      throw .malformed("a value is not UTF-8")
    }
    return text
  }

  private static func digit(_ value: UInt8) -> UInt8 { value < 10 ? 0x30 + value : 0x57 + value }

  private static func number(_ digit: UInt8) -> UInt8? {
    switch digit {
    case 0x30...0x39: digit - 0x30
    case 0x61...0x66: digit - 0x57
    case 0x41...0x46: digit - 0x37
    default: nil
    }
  }
}

private let newline: UInt8 = 0x0a
private let equals: UInt8 = 0x3d
private let percent: UInt8 = 0x25
