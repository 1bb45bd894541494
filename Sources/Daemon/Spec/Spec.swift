// SPDX-License-Identifier: Apache-2.0
// The string after `dmu:` that says which image a disk is made of.
//
//     dmu:FORMAT[?OPTION=VALUE&...]:STORE[:BASE]
//
// STORE and BASE are paths, or sources, of which a hook makes paths (Source.swift).
//
// Invariants:
// - The characters : , % ? & = stand in a path or a value only as percent codes, so that
//   there is one way to read a spec and the toolstack's own separators never occur.
// - A path is absolute; a path and a source are UTF-8 and hold no control character: they can be
//   shown in one line.
// - A spec that was parsed and written out again is equal to itself.

/// What a disk is made of: a format, its options, a store, and perhaps a base.
package struct Spec: Sendable, Hashable, CustomStringConvertible {
  /// One option of a format.
  package struct Option: Sendable, Hashable {
    /// Its name.
    package let name: String
    /// Its value, decoded.
    package let value: String

    /// An option from its parts.
    package init(name: String, value: String) {
      self.name = name
      self.value = value
    }
  }

  /// How a spec begins.
  package static let prefix = "dmu:"
  /// The longest path, in bytes. Source: PATH_MAX in linux/limits.h, less the final zero.
  package static let longestPath = 4095

  /// The image format's name, as written; whether anybody knows it is not decided here.
  package let format: String
  /// The options, in the order written, each name once.
  package let options: [Option]
  /// Absolute path of the store; of a source its text, until `attached(_:)`.
  package private(set) var store: String
  /// Absolute path of the base, nil when the image is to name it; of a source as with the store.
  package private(set) var base: String?
  /// The source that the store is; nil: it is a path.
  package let storeSource: Source?
  /// The source that the base is.
  package let baseSource: Source?

  /// A spec from its parts.
  package init(format: String, options: [Option] = [], store: String, base: String? = nil) {
    self.format = format
    self.options = options
    self.store = store
    self.base = base
    storeSource = Source(store)
    baseSource = base.flatMap { Source($0) }
  }

  /// The same spec with the paths that hooks have made of its sources; one that has none stays
  /// as it is.
  package func attached(_ paths: [Source: String]) -> Spec {
    var spec = self
    if let path = storeSource.flatMap({ paths[$0] }) { spec.store = path }
    if let path = baseSource.flatMap({ paths[$0] }) { spec.base = path }
    return spec
  }

  /// Whether a disk's `params` are meant for this daemon at all.
  package static func isOurs(_ params: String) -> Bool { params.hasPrefix(prefix) }

  /// Reads a spec. Throws the first thing that is wrong with it.
  package init(_ text: String) throws(SpecError) {
    guard Spec.isOurs(text) else { throw SpecError(text, .noPrefix) }
    let parts = text.dropFirst(Spec.prefix.count)
      .split(separator: ":", omittingEmptySubsequences: false)
    guard parts.count >= 2 else { throw SpecError(text, .noStore) }
    guard parts.count <= 3 else { throw SpecError(text, .tooManyParts(parts.count)) }
    let head = parts[0].split(separator: "?", maxSplits: 1, omittingEmptySubsequences: false)
    format = try Spec.format(head[0], in: text)
    options = head.count > 1 ? try Spec.options(head[1], in: text) : []
    store = try Spec.path(parts[1], .store, in: text)
    base = parts.count > 2 ? try Spec.path(parts[2], .base, in: text) : nil
    storeSource = Source(store)
    baseSource = base.flatMap { Source($0) }
    guard store != base else { throw SpecError(text, .sameTwice) }
  }

  /// The value of an option, nil when it is not given.
  package func option(_ name: String) -> String? {
    options.first { $0.name == name }?.value
  }

  /// The spec as it is written in a disk line, percent codes and all, with sources as such.
  package var description: String {
    var text = Spec.prefix + format
    for (index, option) in options.enumerated() {
      text += (index == 0 ? "?" : "&") + option.name + "=" + PercentCode.encode(option.value)
    }
    text += ":" + PercentCode.encode(storeName)
    if let baseName { text += ":" + PercentCode.encode(baseName) }
    return text
  }

  private static func isNameCharacter(_ character: Character) -> Bool {
    guard let code = character.asciiValue else { return false }
    return character.isLetter || character.isNumber || code == UInt8(ascii: "-")
      || code == UInt8(ascii: "_") || code == UInt8(ascii: "+")
  }

  private static func format(_ part: Substring, in text: String) throws(SpecError) -> String {
    guard !part.isEmpty else { throw SpecError(text, .noFormat) }
    guard part.allSatisfy(isNameCharacter) else {
      throw SpecError(text, .badFormat(String(part)))
    }
    return String(part)
  }

  private static func options(_ part: Substring, in text: String) throws(SpecError) -> [Option] {
    var options: [Option] = []
    for piece in part.split(separator: "&", omittingEmptySubsequences: false) {
      let halves = piece.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      guard !halves[0].isEmpty else { throw SpecError(text, .noOptionName) }
      let name = String(halves[0])
      guard name.allSatisfy(isNameCharacter) else { throw SpecError(text, .badOptionName(name)) }
      guard halves.count == 2, !halves[1].isEmpty else {
        throw SpecError(text, .noOptionValue(name))
      }
      guard !options.contains(where: { $0.name == name }) else {
        throw SpecError(text, .optionTwice(name))
      }
      let value = try decode(halves[1], what: "option '\(name)'", in: text)
      options.append(Option(name: name, value: value))
    }
    return options
  }

  private static func path(
    _ part: Substring, _ role: SpecError.Role, in text: String
  ) throws(SpecError) -> String {
    guard !part.isEmpty else { throw SpecError(text, role == .store ? .noStore : .emptyBase) }
    let path = try decode(part, what: role.rawValue, in: text)
    if Source.isMeant(path) {
      guard Source(path) != nil else { throw SpecError(text, .badSource(role, path)) }
      return path
    }
    guard path.hasPrefix("/") else { throw SpecError(text, .notAbsolute(role, path)) }
    guard path.utf8.count <= longestPath else { throw SpecError(text, .tooLong(role)) }
    return path
  }

  private static func decode(
    _ part: Substring, what: String, in text: String
  ) throws(SpecError) -> String {
    do {
      return try PercentCode.decode(part)
    } catch {
      throw SpecError(text, .badCode(what: what, error))
    }
  }
}
