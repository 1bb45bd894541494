// SPDX-License-Identifier: Apache-2.0
// What is wrong with a table, said so that it can be found.

/// A table that is not valid.
package struct TableError: Error, Sendable, Equatable, CustomStringConvertible {
  /// The line, from 1.
  package let line: Int
  /// The field, in the words of the target's documentation: "CHUNK", "DEV 2".
  package let field: String
  /// What is wrong with it.
  package let reason: String

  init(line: Int, field: String, _ reason: String) {
    self.line = line
    self.field = field
    self.reason = reason
  }

  /// "line LINE, FIELD: REASON".
  package var description: String { "line \(line), \(field): \(reason)" }
}
