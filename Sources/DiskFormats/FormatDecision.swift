// SPDX-License-Identifier: Apache-2.0
// Which format an image has, and whether it may name other files: the one place that decides
// whom to believe. The table is in docs/spec.md, and a test goes through its cells.
//
// A guest writes its disk as it likes, and could write the header of an image into it. So an
// image that nobody stated to be one may name no file, and what begins like a format that is
// not supported is never taken for a raw disk.

package import BlockIO

/// What is said of an image before its bytes are looked at.
package struct FormatStatement: Sendable, Equatable {
  /// Who said which format it is.
  package enum Source: Sendable, Equatable {
    /// Whoever runs the command or wrote the spec.
    case stated(ImageKind)
    /// The image above, which may name it, by this word.
    case named(String)
    /// Nobody.
    case nobody
  }

  /// Who said it.
  package var source: Source

  /// A statement by whoever runs the command, if there is one.
  package init(_ stated: ImageKind?) { source = stated.map { .stated($0) } ?? .nobody }

  /// A statement of a base: by whoever runs the command, else by the image above.
  package init(_ stated: ImageKind?, named: String?) {
    self.init(stated)
    if stated == nil, let named { source = .named(named) }
  }
}

/// What was decided of an image.
package struct FormatDecision: Sendable, Equatable {
  /// The format.
  package var kind: ImageKind
  /// Whether only the first bytes say so: the image may name no file, and the guess is
  /// written down nowhere.
  package var isGuessed: Bool

  /// A decision from its parts.
  package init(kind: ImageKind, isGuessed: Bool = false) {
    self.kind = kind
    self.isGuessed = isGuessed
  }

  /// Decides on an image.
  ///
  /// - Parameter formats: those that there are.
  /// - Throws: `unsupported` for a format that is known by name or by its first bytes and not
  ///   read; `corrupt` for a damaged header; `io`.
  package static func decide(
    _ statement: FormatStatement, of store: any ByteStore, among formats: FormatList = .all
  ) throws(ImageError) -> FormatDecision {
    switch statement.source {
    case .stated(let kind): return FormatDecision(kind: kind)
    case .named(let name):
      guard let kind = formats.ofBase(named: name) else {
        throw ImageError(
          .unsupported,
          "base \(store.name) is of format '\(name)', which is not read here: convert it")
      }
      return FormatDecision(kind: kind)
    case .nobody:
      let kind = try formats.probe(store)
      // Nothing can be named by what is raw.
      return FormatDecision(kind: kind, isGuessed: kind != .raw)
    }
  }

  /// Throws `unsupported` when the image may not name a file.
  package func checkMayName(_ path: String, _ store: any ByteStore) throws(ImageError) {
    guard isGuessed else { return }
    throw ImageError(
      .unsupported,
      "\(store.name) begins like an image that names \(path), but nobody says that it is "
        + "one: give its format (\(kind.name), or raw if it is a disk of its own) with -f, "
        + "or with base-format where it is a base")
  }
}
