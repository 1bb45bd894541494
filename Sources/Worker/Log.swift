// Lines to standard error: a message and key=value pairs. Under systemd each line begins
// with its priority, which the journal takes out. Source: sd-daemon(3).

import Glibc

/// A log of one program and, where there is one, one disk.
public struct Log: Sendable {
  /// How grave a line is, as syslog(3) counts.
  public enum Level: Int, Sendable, Comparable, CaseIterable {
    /// Somebody must act.
    case error = 3
    /// Something is odd, and work goes on.
    case warning = 4
    /// What an admin wants to see of a normal day.
    case info = 6
    /// What a developer wants to see.
    case debug = 7

    /// Graver is smaller.
    public static func < (left: Level, right: Level) -> Bool { left.rawValue < right.rawValue }
  }

  /// Lines less grave than this are dropped.
  public var level: Level
  /// Whether lines begin with a priority for the journal, instead of the program's name.
  public var journal: Bool
  /// The disk, said in every line.
  public var disk: String?

  private let output: Int32

  /// A log to a descriptor, which stays the caller's.
  public init(level: Level = .info, journal: Bool, output: Int32 = 2) {
    self.level = level
    self.journal = journal
    self.output = output
  }

  /// Whether standard error goes to the journal, by what systemd says.
  public static var underJournal: Bool { getenv("JOURNAL_STREAM") != nil }

  /// Writes a line.
  public func callAsFunction(
    _ level: Level, _ message: String, _ fields: KeyValuePairs<String, String> = [:]
  ) {
    guard level <= self.level else { return }
    var line = Array(line(level, message, fields).utf8)
    line.append(0x0a)
    // A log that cannot be written has nowhere to say so.
    _ = Glibc.write(output, line, line.count)
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
    let plain = value.utf8.allSatisfy { $0 > 0x20 && $0 != 0x22 && $0 != 0x3d && $0 != 0x7f }
    guard !plain || value.isEmpty else { return value }
    let inner = escaped(value).split(separator: "\"", omittingEmptySubsequences: false)
    return "\"" + inner.joined(separator: "\\\"") + "\""
  }

  /// Without what could end a line or speak to a terminal.
  private static func escaped(_ text: String) -> String {
    guard text.utf8.contains(where: { $0 < 0x20 || $0 == 0x7f }) else { return text }
    return String(text.map { $0.asciiValue.map { $0 < 0x20 || $0 == 0x7f } ?? false ? "?" : $0 })
  }
}
