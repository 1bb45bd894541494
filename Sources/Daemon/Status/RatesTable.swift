// SPDX-License-Identifier: Apache-2.0
// Rates as a table that fits a terminal: columns that matter least go first, then lines are cut;
// disks that have no line are counted in the last one.

import Glibc
internal import SystemIO

/// Renders rates for people.
package enum RatesTable {
  private struct Column: Sendable {
    var heading: String
    /// Columns of a greater number go first where there is no room.
    var rank: Int
    var isRight: Bool
    var cell: @Sendable (DiskRates) -> String
  }

  private static let columns = [
    Column(heading: "DOMAIN", rank: 0, isRight: false) { $0.domainWords },
    Column(heading: "VDEV", rank: 0, isRight: false) { $0.label },
    Column(heading: "VIA", rank: 7, isRight: false) { $0.transport?.rawValue ?? "-" },
    Column(heading: "STATE", rank: 1, isRight: false) { $0.state.rawValue },
    Column(heading: "R/S", rank: 2, isRight: true) { count($0.reads) },
    Column(heading: "W/S", rank: 2, isRight: true) { count($0.writes) },
    Column(heading: "F/S", rank: 6, isRight: true) { count($0.flushes) },
    Column(heading: "READ/S", rank: 3, isRight: true) { bytes($0.bytesRead) },
    Column(heading: "WRITE/S", rank: 3, isRight: true) { bytes($0.bytesWritten) },
    Column(heading: "MEAN", rank: 4, isRight: true) { time($0.latency) },
    Column(heading: "P99", rank: 5, isRight: true) { time($0.latency99) },
  ]

  /// The text, a newline at the end of each line. `width` and `height` of the terminal; nil: without
  /// bound.
  package static func render(_ rates: [DiskRates], width: Int? = nil, height: Int? = nil) -> String
  {
    guard !rates.isEmpty else { return "no disks\n" }
    let room = max(1, (height ?? .max) - 3)
    let shown = rates.count > room ? Array(rates.prefix(room)) : rates
    var columns = columns
    var lines = lines(shown, columns)
    while let width, lines.contains(where: { $0.count > width }),
      let rank = columns.map(\.rank).max(), rank > 1
    {
      columns.removeAll { $0.rank == rank }
      lines = self.lines(shown, columns)
    }
    if shown.count < rates.count { lines.append("and \(rates.count - shown.count) more") }
    return lines.map { line in (width.map { String(line.prefix($0)) } ?? line) + "\n" }.joined()
  }

  private static func lines(_ rates: [DiskRates], _ columns: [Column]) -> [String] {
    let rows = [columns.map(\.heading)] + rates.map { disk in columns.map { $0.cell(disk) } }
    let widths = columns.indices.map { column in rows.map { $0[column].count }.max() ?? 0 }
    return rows.map { row in
      var line = ""
      for (index, cell) in row.enumerated() {
        let gap = String(repeating: " ", count: widths[index] - cell.count)
        line += (index > 0 ? "  " : "") + (columns[index].isRight ? gap + cell : cell + gap)
      }
      while line.last == " " { line.removeLast() }
      return line
    }
  }

  private static func count(_ value: Double?) -> String {
    guard let value else { return "-" }
    return value > 0 && value < 9.95 ? tenths(value) : "\(UInt64(value.rounded()))"
  }

  private static func bytes(_ value: Double?) -> String {
    value.map { ByteCount.short(UInt64($0.rounded())) } ?? "-"
  }

  /// "85us", "1.2ms", "3.0s".
  private static func time(_ seconds: Double?) -> String {
    guard let seconds else { return "-" }
    if seconds < 0.000_999_5 { return "\(UInt64((seconds * 1e6).rounded()))us" }
    return seconds < 0.9995 ? tenths(seconds * 1e3) + "ms" : tenths(seconds) + "s"
  }

  private static func tenths(_ value: Double) -> String {
    let number = UInt64((value * 10).rounded())
    return "\(number / 10).\(number % 10)"
  }
}
