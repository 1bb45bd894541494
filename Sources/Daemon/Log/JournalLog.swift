// SPDX-License-Identifier: Apache-2.0
// The log, to stderr: under systemd with the journal's priorities, on a terminal with the
// time. Facts follow the message as KEY=VALUE, in the order of their keys.

import Glibc
package import Logging
import Synchronization
internal import SystemIO

/// The least serious level that is logged, for the whole process.
package enum LogLevel {
  private static let stored = Mutex(Logger.Level.info)

  /// Read at every message, changed by a reload.
  package static var current: Logger.Level {
    get { stored.withLock { $0 } }
    set { stored.withLock { $0 = newValue } }
  }
}

/// Writes each message as one line.
package struct JournalLog: LogHandler {
  /// Facts that stand in every line.
  package var metadata: Logger.Metadata = [:]
  /// The level of the whole process: setting it here sets it everywhere.
  package var logLevel: Logger.Level {
    get { LogLevel.current }
    set { LogLevel.current = newValue }
  }

  private let isTerminal: Bool

  /// A handler that looks by itself whether a person is reading.
  package init() { isTerminal = isatty(2) == 1 }

  /// Facts by key.
  package subscript(metadataKey key: String) -> Logger.Metadata.Value? {
    get { metadata[key] }
    set { metadata[key] = newValue }
  }

  /// Writes one line, in one write(2), so that lines of several threads stay whole.
  package func log(event: LogEvent) {
    var facts = metadata.merging(event.metadata ?? [:]) { $1 }
    if event.level > .debug {
      let key = "\(event.message) \(facts["disk"] ?? "")"
      guard let held = JournalLog.rate.admit(key) else { return }
      if held > 0 { facts["held-back"] = "\(held)" }
    }
    JournalLog.lines.write(start(event.level) + JournalLog.render("\(event.message)", facts)) {
      let remark = JournalLog.render(
        "nobody read the log: lines were dropped", ["lines": "\($0)"])
      return start(.warning) + remark
    }
  }

  /// Of the whole process.
  private static let lines = LogLines(2)
  private static let rate = LogRate()

  private func start(_ level: Logger.Level) -> String {
    isTerminal ? StatusTable.time(Int64(time(nil))) + " " : "<\(level.priority)>"
  }

  /// "message key=value key=\"a value\"".
  static func render(_ message: String, _ facts: Logger.Metadata) -> String {
    var line = ForeignText.shown(message, limit: 4000)
    for (key, value) in facts.sorted(by: { $0.key < $1.key }) {
      line += " \(key)=\(quoted("\(value)"))"
    }
    return line
  }

  private static func quoted(_ text: String) -> String {
    let shown = ForeignText.shown(text, limit: 4000)
    guard shown.isEmpty || shown.contains(where: { $0 == " " || $0 == "\"" || $0 == "=" }) else {
      return shown
    }
    return "\"" + shown.map { $0 == "\"" || $0 == "\\" ? "\\\($0)" : "\($0)" }.joined() + "\""
  }
}

extension Logger.Level {
  /// The priority of syslog(3) that stands for the level.
  fileprivate var priority: Int {
    switch self {
    case .trace, .debug: 7
    case .info: 6
    case .notice: 5
    case .warning: 4
    case .error: 3
    case .critical: 2
    }
  }
}
