// SPDX-License-Identifier: Apache-2.0
// What every command has in common: where text goes and how it ends.

import Glibc
internal import SystemIO

/// How a command ended, as its exit status.
package enum CommandStatus: Int32, Sendable {
  /// It did what it was asked.
  case done = 0
  /// It failed; the reason was printed.
  case failed = 1
  /// dmu-xend is not running.
  case noDaemon = 2
  /// There is no such disk.
  case noDisk = 3
}

/// Where commands print.
package enum CommandOutput {
  /// Prints to stdout.
  package static func say(_ text: String) { put(ForeignText.lines(text), 1) }

  /// Clears the terminal, if stdout is one.
  static func clear() {
    // Source: ECMA-48: cursor home, erase to the end of the screen.
    if isatty(1) == 1 { put("\u{1B}[H\u{1B}[J", 1) }
  }

  /// Prints a line to stderr.
  package static func complain(_ line: String) { put(ForeignText.lines(line) + "\n", 2) }

  /// Whatever text is in it that came from elsewhere, a terminal is shown text and nothing else: the
  /// caller has seen to that.
  private static func put(_ text: String, _ descriptor: Int32) {
    var rest = Array(text.utf8)[...]
    while !rest.isEmpty {
      let count = rest.withUnsafeBytes { write(descriptor, $0.baseAddress, $0.count) }
      if count < 0 {
        // A reader that has gone wants no more; there is nobody to tell.
        guard errno == EINTR else { return }
      } else {
        rest = rest.dropFirst(count)
      }
    }
  }
}

/// Questions to whoever sits at the terminal.
enum Terminal {
  /// Asks; only "y" or "yes" is one. Without a terminal nobody agrees.
  static func confirms(_ question: String) -> Bool {
    guard isatty(0) == 1 else {
      CommandOutput.complain(question)
      return false
    }
    CommandOutput.say(question + " Do it? [y/N] ")
    return ["y", "yes"].contains(readLine()?.lowercased() ?? "")
  }
}
