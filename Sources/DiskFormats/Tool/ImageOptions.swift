// SPDX-License-Identifier: Apache-2.0
// What stands after -o: names and values, by the words that qemu-img has for them.

/// Options of a new image.
package struct ImageOptions: Sendable {
  /// An option by its name, and its values where they are few.
  package typealias Known = (name: String, values: [String])

  private var values: [(name: String, value: String)] = []
  private var used: Set<String> = []
  /// What they are for, in errors.
  private let kind: ImageKind

  /// Reads "name=value,name=value" from several arguments. A comma in a value is doubled.
  ///
  /// - Throws: `badRequest` for what is no such list.
  package init(_ arguments: [String], for kind: ImageKind) throws(ImageError) {
    self.kind = kind
    for argument in arguments {
      for part in Self.parts(argument) {
        guard let equals = part.firstIndex(of: "="), equals != part.startIndex else {
          throw ImageError(
            .badRequest, "option '\(part)' has no value: write -o NAME=VALUE,NAME=VALUE")
        }
        values.append((String(part[..<equals]), String(part[part.index(after: equals)...])))
      }
    }
  }

  private static func parts(_ text: String) -> [String] {
    var parts = [""]
    var characters = Array(text)[...]
    while let character = characters.popFirst() {
      if character != "," {
        parts[parts.count - 1].append(character)
      } else if characters.first == "," {
        characters.removeFirst()
        parts[parts.count - 1].append(",")
      } else {
        parts.append("")
      }
    }
    return parts.filter { !$0.isEmpty }
  }

  /// The value of an option, the last one given.
  package mutating func take(_ name: String) -> String? {
    used.insert(name)
    return values.last { $0.name == name }?.value
  }

  private func refuse(_ name: String, _ value: String, _ wanted: String) -> ImageError {
    ImageError(.badRequest, "option \(name)=\(value): it is to be \(wanted)")
  }

  /// A size, with K, M, G or T.
  package mutating func bytes(_ name: String) throws(ImageError) -> UInt64? {
    guard let value = take(name) else { return nil }
    guard let bytes = ImageFile.bytes(value) else { throw refuse(name, value, "a size") }
    return bytes
  }

  /// On or off.
  package mutating func flag(_ name: String) throws(ImageError) -> Bool? {
    guard let value = take(name) else { return nil }
    switch value {
    case "on", "true", "yes": return true
    case "off", "false", "no": return false
    default: throw refuse(name, value, "on or off")
    }
  }

  /// One of some words.
  package mutating func word<Word>(
    _ name: String, _ words: [(String, Word)]
  ) throws(ImageError) -> Word? {
    guard let value = take(name) else { return nil }
    guard let found = words.first(where: { $0.0 == value }) else {
      throw refuse(name, value, "one of " + words.map(\.0).joined(separator: ", "))
    }
    return found.1
  }

  /// Throws `badRequest` for an option that nobody has taken.
  package func checkAllUsed() throws(ImageError) {
    guard let unknown = values.first(where: { !used.contains($0.name) }) else { return }
    let known = used.sorted().joined(separator: ", ")
    throw ImageError(
      .badRequest,
      "option '\(unknown.name)' is unknown for \(kind.name)"
        + (known.isEmpty ? ", which has none" : ": it has \(known)"))
  }

  /// How much is laid out at once.
  package mutating func preallocation() throws(ImageError) -> Preallocation? {
    let all: [Preallocation] = [.off, .metadata, .falloc, .full]
    return try word("preallocation", all.map { ($0.rawValue, $0) })
  }
}
