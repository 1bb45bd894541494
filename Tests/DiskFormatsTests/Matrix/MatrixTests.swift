// SPDX-License-Identifier: Apache-2.0
// The matrix against QEMU: every kind of image that qemu-img makes, read here as there, then
// written here at random, found clean (where QEMU has a check) and equal there. One table.

import DiskFormats
import Foundation
import Synchronization
import Testing
import TestSupport

/// One line of the matrix.
protocol MatrixRow: Sendable {
  /// QEMU's name of the format.
  var format: String { get }
  var name: String { get }
  /// Lives the life of one image; returns what came of changing its length.
  func live(seed: UInt64) throws -> String
}

/// A line as an argument of a test.
struct MatrixCase: CustomTestStringConvertible, Sendable {
  let row: any MatrixRow
  var testDescription: String { "\(row.format) \(row.name)" }

  static let all: [MatrixCase] =
    Depth.some(4, of: Qcow2Case.all).map { MatrixCase(row: $0) }
    + Depth.some(12, of: FormatCase.all).map { MatrixCase(row: $0) }
}

@Suite(.serialized) struct MatrixTests {
  /// Lines that have been printed.
  private static let lines = Mutex(0)

  private static func cell(_ text: String, _ width: Int) -> String {
    " " + text + String(repeating: " ", count: max(0, width - text.count)) + " |"
  }

  private static func line(_ cells: [String]) -> String {
    zip(cells, [6, 34, 6, 8, 6, 8]).reduce("matrix |") { $0 + cell($1.0, $1.1) }
  }

  @Test(arguments: MatrixCase.all) func asQEMU(_ test: MatrixCase) throws {
    var resized = ""
    for number in 0..<UInt64(max(1, Depth.factor / 10)) {
      let seed = Depth.firstSeed &+ number
      do { resized = try test.row.live(seed: seed) } catch {
        Issue.record("\(test.testDescription), seed \(seed): \(error)")
        throw error
      }
    }
    let isFirst = Self.lines.withLock { lines in
      lines += 1
      return lines == 1
    }
    if isFirst { print(Self.line(["format", "kind", "read", "written", "check", "resized"])) }
    // QEMU has no check of these; raw has none at all.
    let checks = ["qcow": "ours", "vpc": "ours", "raw": "-"]
    let check = checks[test.row.format] ?? "clean"
    print(Self.line([test.row.format, test.row.name, "equal", "equal", check, resized]))
  }
}
