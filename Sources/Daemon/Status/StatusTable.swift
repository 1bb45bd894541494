// SPDX-License-Identifier: Apache-2.0
// Status as a table for a terminal: one line a disk, columns as wide as they need to be,
// and below it a line for every disk that has something to tell.

import Glibc

/// Renders status for people.
package enum StatusTable {
  private static let headings = [
    "DOMAIN", "VDEV", "FORMAT", "STORE", "BASE", "DEVICE", "VIA", "SIZE", "ALLOCATED",
    "STATE", "WORKER", "SINCE",
  ]
  private static let right: Set<Int> = [7, 8]

  /// The whole text, a newline at the end of each line.
  package static func render(_ disks: [DiskStatus]) -> String {
    guard !disks.isEmpty else { return "no disks\n" }
    let rows = [headings] + disks.map(row)
    let widths = headings.indices.map { column in
      rows.map { $0[column].count }.max() ?? 0
    }
    var text = ""
    for row in rows {
      let cells = row.enumerated().map { column, cell in
        let gap = String(repeating: " ", count: widths[column] - cell.count)
        return right.contains(column) ? gap + cell : cell + gap
      }
      var line = cells.joined(separator: "  ")
      while line.last == " " { line.removeLast() }
      text += line + "\n"
    }
    for disk in disks {
      for line in [disk.error, disk.note].compactMap({ $0 }) {
        text += (disk.name ?? "\(disk.domainWords) \(disk.label)") + ": \(line)\n"
      }
    }
    return text
  }

  private static func row(_ disk: DiskStatus) -> [String] {
    [
      disk.domainWords, disk.label, disk.format ?? "-", disk.store ?? "-", disk.base ?? "-",
      disk.link ?? disk.device ?? "-", disk.transport?.rawValue ?? "-",
      disk.size.map(ByteCount.short) ?? "-",
      disk.allocated.map(ByteCount.short) ?? "-", disk.state.rawValue,
      disk.worker.map { String($0) } ?? "-", time(disk.since),
    ]
  }

  /// "2026-01-31 17:05:09", in the local time zone.
  static func time(_ seconds: Int64) -> String {
    var instant = time_t(seconds)
    var parts = tm()
    localtime_r(&instant, &parts)
    var buffer = [CChar](repeating: 0, count: 32)
    let count = strftime(&buffer, buffer.count, "%Y-%m-%d %H:%M:%S", &parts)
    return String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}
