// SPDX-License-Identifier: Apache-2.0
// What is wrong with a table, said so that it can be found.

/// A table that is not valid.
public struct TableError: Error, Sendable, Equatable, CustomStringConvertible {
  /// The line, from 1.
  public let line: Int
  /// The field, in the words of the target's documentation: "CHUNK", "DEV 2".
  public let field: String
  /// What is wrong with it.
  public let reason: String

  init(line: Int, field: String, _ reason: String) {
    self.line = line
    self.field = field
    self.reason = reason
  }

  /// "line LINE, FIELD: REASON".
  public var description: String { "line \(line), \(field): \(reason)" }
}
