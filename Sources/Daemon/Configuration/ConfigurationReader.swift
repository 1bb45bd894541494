// From the text of the configuration file to a Configuration, all or nothing.

internal import Posix
internal import TOMLKit
import Glibc

extension Configuration {
  /// Reads a file. One that does not exist gives the defaults. Throws the first error.
  public static func load(_ path: String) throws(ConfigurationError) -> Configuration {
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
  public static func parse(
    _ text: String, file: String
  ) throws(ConfigurationError) -> Configuration {
    let document: TOMLTable
    do {
      document = try TOMLTable(string: text)
    } catch let error as TOMLParseError {
      throw ConfigurationError(
        file: file, line: error.source.begin.line, key: nil, reason: error.description)
    } catch {
      throw ConfigurationError(file: file, line: nil, key: nil, reason: "\(error)")
    }
    return try take(document, ConfigurationLines(text), file: file)
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

/// Finds the line on which a key stands. The parser tells lines only of text that it
/// cannot read.
struct ConfigurationLines {
  private var found: [String: Int] = [:]

  init(_ text: String) {
    var table = ""
    for (index, line) in text.split(separator: "\n", omittingEmptySubsequences: false).enumerated()
    {
      let content = line.trimmed
      if content.first == "[" {
        table = String(content.dropFirst().prefix { $0 != "]" }.trimmed)
        note(table, index + 1)
      } else if let equals = content.firstIndex(of: "="), content.first != "#" {
        let key = content[..<equals].trimmed.filter { $0 != "\"" && $0 != "'" }
        note(table.isEmpty ? key : "\(table).\(key)", index + 1)
        if table.isEmpty, let dot = key.firstIndex(of: ".") {
          note(String(key[..<dot]), index + 1)
        }
      }
    }
  }

  private mutating func note(_ key: String, _ line: Int) {
    if found[key] == nil { found[key] = line }
  }

  func line(table: String, key: String?) -> Int? {
    guard let key else { return found[table] }
    return found["\(table).\(key)"] ?? found[table]
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
