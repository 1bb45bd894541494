// SPDX-License-Identifier: Apache-2.0
// A store or base that is no path: what a hook of the host makes a block device of.
//
//     SCHEME//REST        lvm//vg/lv, nbd//10.0.0.5/export
//
// Invariant: a source's text never begins with a slash, so that none is a path, and its rest never
// begins with '-', so that a hook's commands take none for an option.

/// Storage that a hook attaches.
package struct Source: Sendable, Hashable, CustomStringConvertible {
  /// The longest scheme, in bytes: it is the name of a file.
  static let longestScheme = 32
  /// The longest rest, in bytes: it is an argument of a program.
  static let longestRest = 1024
  /// What a source has to be, in words.
  package static let rule =
    "a source is SCHEME//REST; SCHEME begins with a lower-case letter and has at most"
    + " \(longestScheme) of them, digits and '-'; REST has at most \(longestRest) bytes and does not"
    + " begin with '-'"

  /// Names the hook.
  package let scheme: String
  /// What the hook is given, decoded.
  package let rest: String

  /// Reads a source; nil when it breaks the rule.
  package init?(_ text: some StringProtocol) {
    guard let scheme = Source.scheme(text) else { return nil }
    let rest = text.dropFirst(scheme.count + 2)
    guard !rest.isEmpty, rest.first != "-", rest.utf8.count <= Source.longestRest else {
      return nil
    }
    (self.scheme, self.rest) = (scheme, String(rest))
  }

  /// Whether a text is meant to be a source: it begins with a scheme and two slashes.
  static func isMeant(_ text: some StringProtocol) -> Bool { scheme(text) != nil }

  /// What stands before the first two slashes, if that can be a scheme.
  private static func scheme(_ text: some StringProtocol) -> String? {
    let head = text.prefix { $0 != "/" }
    guard (1...longestScheme).contains(head.utf8.count), text.dropFirst(head.count).hasPrefix("//"),
      let first = head.utf8.first, isLetter(first),
      head.utf8.allSatisfy({ isLetter($0) || isDigit($0) || $0 == UInt8(ascii: "-") })
    else { return nil }
    return String(head)
  }

  private static func isLetter(_ byte: UInt8) -> Bool {
    (UInt8(ascii: "a")...UInt8(ascii: "z")).contains(byte)
  }

  private static func isDigit(_ byte: UInt8) -> Bool {
    (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte)
  }

  /// "lvm//vg/lv".
  package var description: String { scheme + "//" + rest }
}

extension Spec {
  /// What hooks have to attach, the base's first: a store may be made over it.
  var sources: [(role: SpecError.Role, source: Source)] {
    [(.base, baseSource), (.store, storeSource)].compactMap { role, source in
      source.map { (role, $0) }
    }
  }

  /// Whether a part is still a source, and no path.
  var isUnresolved: Bool {
    storeSource.map { store == $0.description } ?? false
      || baseSource.map { base == $0.description } ?? false
  }

  /// The store as the spec has it, for people: the source, if it is one.
  var storeName: String { storeSource?.description ?? store }

  /// The base likewise.
  var baseName: String? { baseSource?.description ?? base }
}
