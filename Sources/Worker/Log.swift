// SPDX-License-Identifier: Apache-2.0
// Lines to standard error: a message and key=value pairs. Under systemd each line begins
// with its priority, which the journal takes out. Source: sd-daemon(3).

import Glibc
internal import SystemIO

/// A log of one program and, where there is one, one disk.
package struct Log: Sendable {
  /// How grave a line is, as syslog(3) counts.
  package enum Level: Int, Sendable, Comparable, CaseIterable {
    /// Somebody must act.
    case error = 3
    /// Something is odd, and work goes on.
    case warning = 4
    /// What an admin wants to see of a normal day.
    case info = 6
    /// What a developer wants to see.
    case debug = 7

    /// Graver is smaller.
    package static func < (left: Level, right: Level) -> Bool { left.rawValue < right.rawValue }
  }

  /// Lines less grave than this are dropped.
  package var level: Level
  /// Whether lines begin with a priority for the journal, instead of the program's name.
  package var journal: Bool
  /// The disk, said in every line.
  package var disk: String?

  private let output: LogLines
  private let rate = LogRate()

  /// A log to a descriptor, which stays the caller's.
  package init(level: Level = .info, journal: Bool, output: Int32 = 2) {
    self.level = level
    self.journal = journal
    self.output = LogLines(output)
  }

  /// Whether standard error goes to the journal, by what systemd says.
  package static var underJournal: Bool { getenv("JOURNAL_STREAM") != nil }

  /// Writes a line. One that comes again and again is written once a second, with the number of
  /// those between. A reader that has stopped is not waited for.
  package func callAsFunction(
    _ level: Level, _ message: String, _ fields: KeyValuePairs<String, String> = [:]
  ) {
    guard level <= self.level else { return }
    var line = line(level, message, fields)
    if level < .debug {
      guard let held = rate.admit(message) else { return }
      if held > 0 { line += " held-back=\(held)" }
    }
    output.write(line) { count in
      self.line(.warning, "nobody read the log: lines were dropped", ["lines": "\(count)"])
    }
  }

  func line(
    _ level: Level, _ message: String, _ fields: KeyValuePairs<String, String>
  ) -> String {
    var line = journal ? "<\(level.rawValue)>" : "cowd: "
    line += Self.escaped(message)
    if let disk { line += " disk=" + Self.quoted(disk) }
    for (key, value) in fields { line += " \(key)=" + Self.quoted(value) }
    return line
  }

  private static func quoted(_ value: String) -> String {
    let shown = escaped(value)
    let plain = shown.utf8.allSatisfy { $0 != 0x20 && $0 != 0x22 && $0 != 0x3d }
    guard !plain || value.isEmpty else { return shown }
    let inner = shown.split(separator: "\"", omittingEmptySubsequences: false)
    return "\"" + inner.joined(separator: "\\\"") + "\""
  }

  /// Without what could end a line or speak to a terminal.
  private static func escaped(_ text: String) -> String { ForeignText.shown(text, limit: 1000) }
}
