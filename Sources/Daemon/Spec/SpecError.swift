// SPDX-License-Identifier: Apache-2.0
// Everything that can be wrong with a spec, each with its own words.

internal import DiskModel
internal import SystemIO

/// A spec that cannot be read, and why.
package struct SpecError: Error, Sendable, Hashable, CustomStringConvertible {
  /// Which of the two paths.
  package enum Role: String, Sendable, Hashable {
    /// The store.
    case store
    /// The base.
    case base
  }

  /// What is wrong.
  package enum Reason: Sendable, Hashable {
    /// It does not begin with "dmu:".
    case noPrefix
    /// Nothing stands where the format should.
    case noFormat
    /// The format's name has characters that no name has.
    case badFormat(String)
    /// No store is named.
    case noStore
    /// It ends in a colon with no base after it.
    case emptyBase
    /// More parts than format, store and base; how many.
    case tooManyParts(Int)
    /// An option without a name.
    case noOptionName
    /// An option's name has characters that no name has.
    case badOptionName(String)
    /// An option without a value.
    case noOptionValue(String)
    /// The same option twice.
    case optionTwice(String)
    /// A path that does not begin with a slash.
    case notAbsolute(Role, String)
    /// It begins like a source and is none.
    case badSource(Role, String)
    /// A path longer than the kernel takes.
    case tooLong(Role)
    /// Store and base are the same path.
    case sameTwice
    /// Something is wrong with the percent codes of a part.
    case badCode(what: String, PercentCode.Fault)
  }

  /// The spec as it was given.
  package let text: String
  /// What is wrong with it.
  package let reason: Reason

  /// An error from its parts.
  package init(_ text: String, _ reason: Reason) {
    self.text = text
    self.reason = reason
  }

  /// The shape that every spec has.
  package static let shape = "dmu:FORMAT[?OPTION=VALUE]:STORE[:BASE]"

  /// The sentence: the spec, the reason, the remedy.
  package var description: String {
    "spec '\(ForeignText.shown(text))' is malformed: \(explanation): write \(SpecError.shape)"
  }

  /// The reason in words, without the spec.
  package var explanation: String {
    switch reason {
    case .noPrefix: "it does not begin with 'dmu:'"
    case .noFormat: "it names no format"
    case .badFormat(let name): "'\(ForeignText.shown(name))' cannot be the name of a format"
    case .noStore: "it names no store"
    case .emptyBase: "it ends in ':' with no base after it"
    case .tooManyParts(let count):
      "it has \(count) parts where format, store and base are three at the most"
        + " (a ':' in a path is written %3A)"
    case .noOptionName: "an option has no name"
    case .badOptionName(let name): "'\(ForeignText.shown(name))' cannot be the name of an option"
    case .noOptionValue(let name): "option '\(name)' has no value"
    case .optionTwice(let name): "option '\(name)' is given twice"
    case .notAbsolute(let role, let path):
      "\(role.rawValue) '\(ForeignText.shown(path))' is not an absolute path"
    case .badSource(let role, let text):
      "\(role.rawValue) '\(ForeignText.shown(text))' is no source (\(Source.rule))"
    case .tooLong(let role):
      "the path of the \(role.rawValue) is longer than \(Spec.longestPath) bytes"
    case .sameTwice: "store and base are the same"
    case .badCode(let what, let fault): SpecError.words(what, fault)
    }
  }

  private static func words(_ what: String, _ fault: PercentCode.Fault) -> String {
    switch fault {
    case .bare(let character):
      "\(what) has a '\(character)', which is written"
        + " \(PercentCode.code(character.asciiValue ?? 0))"
    case .notACode(let found):
      "\(what) has '\(ForeignText.shown(found))', which is not a percent code"
    case .control(let byte): "\(what) has the control character \(PercentCode.code(byte))"
    case .notText: "\(what) is not UTF-8"
    }
  }
}
