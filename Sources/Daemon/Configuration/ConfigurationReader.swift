// SPDX-License-Identifier: Apache-2.0
// From the text of the configuration file to a Configuration, all or nothing.

import Glibc
import SystemIO
internal import TOMLKit

extension Configuration {
  /// Reads a file. One that does not exist gives the defaults. Throws the first error.
  package static func load(_ path: String) throws(ConfigurationError) -> Configuration {
    let text: String
    do {
      text = try TextFile.read(path)
    } catch let error where error.code == ENOENT {
      return Configuration()
    } catch {
      throw ConfigurationError(file: path, line: nil, key: nil, reason: error.description)
    }
    return try parse(text, file: path)
  }

  /// Understands the text of a configuration file. Throws the first error, with its line.
  package static func parse(
    _ text: String, file: String
  ) throws(ConfigurationError) -> Configuration {
    let lines = ConfigurationLines(text)
    return try take(try document(text, lines, file: file), lines, file: file)
  }

  /// The keys and values of a text. Throws where it cannot be read.
  static func document(
    _ text: String, _ lines: ConfigurationLines, file: String
  ) throws(ConfigurationError) -> TOMLTable {
    if let line = lines.strange {
      throw ConfigurationError(
        file: file, line: line, key: nil,
        reason: unquoted(text, line: line)
          ?? "this is neither a [table] nor KEY = VALUE nor a # comment, as far as is needed here")
    }
    do {
      return try TOMLTable(string: text)
    } catch let error as TOMLParseError {
      let line = error.source.begin.line
      throw ConfigurationError(
        file: file, line: line, key: nil,
        reason: unquoted(text, line: line) ?? error.description)
    } catch {
      throw ConfigurationError(file: file, line: nil, key: nil, reason: "\(error)")
    }
  }

  /// What to say of a line whose value is a word without quotes, the mistake that is made most; nil
  /// for any other line.
  private static func unquoted(_ text: String, line: Int) -> String? {
    let rows = text.split(omittingEmptySubsequences: false, whereSeparator: \.isNewline)
    guard rows.indices.contains(line - 1), let cut = rows[line - 1].firstIndex(of: "=") else {
      return nil
    }
    func trimmed(_ part: Substring) -> String {
      part.split(whereSeparator: \.isWhitespace).joined(separator: " ")
    }
    let row = rows[line - 1]
    let key = trimmed(row[..<cut])
    let value = trimmed(row[row.index(after: cut)...].prefix { $0 != "#" })
    guard let first = value.first, first.isASCII, first.isLetter || first == "/" || first == "~",
      !value.contains("\"")
    else { return nil }
    return "the value \(value) has no quotes: write \(key) = \"\(value)\""
  }

  private static func take(
    _ document: TOMLTable, _ lines: ConfigurationLines, file: String
  ) throws(ConfigurationError) -> Configuration {
    var configuration = Configuration()
    let tables = Set(ConfigurationKey.all.map(\.table))
    for table in document.keys.sorted() {
      func fail(_ key: String?, _ reason: String) -> ConfigurationError {
        let path = key.map { "\(table).\($0)" } ?? table
        return ConfigurationError(
          file: file, line: lines.line(table: table, key: key), key: path, reason: reason)
      }
      guard tables.contains(table) else {
        let hint = NearestMatch.hint(for: table, among: tables.sorted())
        throw fail(nil, "there is no such table\(hint)")
      }
      guard let content = document[table]?.table else {
        throw fail(nil, "this must be a table: write [\(table)]")
      }
      for name in content.keys.sorted() {
        let known = ConfigurationKey.all.filter { $0.table == table }
        guard let key = known.first(where: { $0.name == name }), let value = content[name] else {
          if let instead = ConfigurationKey.gone["\(table).\(name)"] {
            throw fail(name, "there is no such key any more: \(instead)")
          }
          let hint = NearestMatch.hint(for: name, among: known.map(\.name))
          throw fail(name, "there is no such key\(hint)")
        }
        do throws(Wanted) {
          try key.take(&configuration, value)
        } catch {
          throw fail(name, "the value must be \(error.what)")
        }
      }
    }
    return configuration
  }
}

/// The lines of a configuration file, before the parser sees them: where each key stands,
/// since the parser tells lines only of text that it cannot read; and the first line of a
/// shape that no key of ours needs, since the parser ends the process on some of those.
struct ConfigurationLines {
  /// The first line, from 1, that is none of: blank, comment, [table], KEY = VALUE, or the
  /// rest of a list.
  private(set) var strange: Int?
  private var found: [String: Int] = [:]

  init(_ text: String) {
    var table = ""
    var listDepth = 0
    // Ends of lines as Windows writes them count as one character to Swift.
    let lines = text.replacing("\r\n", with: "\n")
      .split(separator: "\n", omittingEmptySubsequences: false)
    for (index, line) in lines.enumerated() {
      // The parser takes some of these for ends of lines, too.
      if line.unicodeScalars.contains(where: ConfigurationLines.isControl) {
        strange = strange ?? index + 1
      }
      let content = ConfigurationLines.withoutComment(line).trimmed
      if listDepth > 0 {
        listDepth = take(content, listDepth, line: index + 1)
      } else if content.first == "[" {
        let name = content.dropFirst().prefix { $0 != "]" }
        table = String(name.trimmed)
        let closed = content.dropFirst(1 + name.count) == "]"
        if !closed || !ConfigurationLines.isKey(name.trimmed) { strange = strange ?? index + 1 }
        note(table, index + 1)
      } else if let equals = content.firstIndex(of: "="),
        ConfigurationLines.isKey(content[..<equals].trimmed)
      {
        let key = content[..<equals].trimmed
        let value = content[content.index(after: equals)...]
        listDepth = take(value, 0, line: index + 1)
        note(table.isEmpty ? String(key) : "\(table).\(key)", index + 1)
        if table.isEmpty, let dot = key.firstIndex(of: ".") {
          note(String(key[..<dot]), index + 1)
        }
      } else if !content.isEmpty {
        strange = strange ?? index + 1
      }
    }
  }

  private static func isControl(_ scalar: Unicode.Scalar) -> Bool {
    scalar != "\t"
      && [.control, .lineSeparator, .paragraphSeparator].contains(
        scalar.properties.generalCategory)
  }

  private mutating func note(_ key: String, _ line: Int) {
    if found[key] == nil { found[key] = line }
  }

  /// The line of a key that stands in no table.
  func line(_ key: String) -> Int? { found[key] }

  func line(table: String, key: String?) -> Int? {
    guard let key else { return found[table] }
    return found["\(table).\(key)"] ?? found[table]
  }

  /// Bare words with dots between them.
  private static func isKey(_ text: Substring) -> Bool {
    text.split(separator: ".", omittingEmptySubsequences: false).allSatisfy { word in
      !word.isEmpty
        && word.unicodeScalars.allSatisfy {
          $0.isASCII && ($0.properties.isAlphabetic || ("0"..."9").contains($0))
            || $0 == "-" || $0 == "_"
        }
    }
  }

  /// The line up to a "#" that stands outside of quotes.
  private static func withoutComment(_ line: Substring) -> Substring {
    var quote: Character?
    for index in line.indices {
      switch (line[index], quote) {
      case ("#", nil): return line[..<index]
      case (let mark, nil) where mark == "\"" || mark == "'": quote = mark
      case (let mark, let open?) where mark == open: quote = nil
      default: continue
      }
    }
    return line
  }

  /// Goes over a value or a piece of a list; answers how many lists are open after it.
  private mutating func take(_ text: Substring, _ depth: Int, line: Int) -> Int {
    guard let depth = ConfigurationLines.depth(text, depth) else {
      strange = strange ?? line
      return 0
    }
    return depth
  }

  /// How many lists are open after a piece of text, of so many before; nil when it has what
  /// no value of ours needs: an open quote, a code after a backslash, a stray mark.
  private static func depth(_ text: Substring, _ before: Int) -> Int? {
    var depth = before
    var rest = text
    while let character = rest.popFirst() {
      switch character {
      case " ", "\t", "\r": continue
      case "'", "\"":
        while let inner = rest.popFirst(), inner != character {
          guard inner == "\\", character == "\"" else {
            if rest.isEmpty { return nil }
            continue
          }
          guard let escaped = rest.popFirst(), escaped == "\\" || escaped == "\"" else {
            return nil
          }
          if rest.isEmpty { return nil }
        }
      case "[": depth += 1
      case "]": depth -= 1
      case ",": if depth == 0 { return nil }
      case "_", "+", "-", ".", ":": continue
      default: guard character.isASCII, character.isLetter || character.isNumber else { return nil }
      }
      if depth < 0 || depth > 8 { return nil }
    }
    return depth
  }
}

extension Substring {
  fileprivate var trimmed: Substring {
    let start = drop { $0 == " " || $0 == "\t" || $0 == "\r" }
    guard let end = start.lastIndex(where: { $0 != " " && $0 != "\t" && $0 != "\r" }) else {
      return start
    }
    return start[...end]
  }
}
