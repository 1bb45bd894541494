// SPDX-License-Identifier: Apache-2.0
// What of a file is in use, for checks of formats that keep no counts of use: nothing may be
// used twice, or lie past the end of the file; what lies behind all of it is a leak.
//
// Memory: uses are collected and merged by the million; an image that fills its file is then
// a few runs, whatever the order of its tables.

/// The parts of a file that an image uses, in bytes.
struct UsedSpace {
  private static let batch = 1 << 20
  private var runs: [Range<UInt64>] = []
  private var fresh: [Range<UInt64>] = []
  private let fileSize: UInt64
  /// Where what is in use ends.
  private(set) var end: UInt64 = 0

  init(fileSize: UInt64) { self.fileSize = fileSize }

  /// Takes in a part; reports what is past the end of the file. `what` is asked only then.
  /// A `mayEndEarly` part may reach over the end, as a disk's last cluster does.
  mutating func use(
    _ offset: UInt64, _ count: UInt64, mayEndEarly: Bool = false, _ report: inout CheckReport,
    _ what: @autoclosure () -> String
  ) {
    guard count > 0 else { return }
    guard offset < fileSize, mayEndEarly || count <= fileSize - offset else {
      return report.corruption("\(what()) lies past the end of the file, at byte \(offset)")
    }
    end = max(end, offset + count)
    if let last = fresh.last, last.upperBound == offset {
      fresh[fresh.count - 1] = last.lowerBound..<(offset + count)
    } else {
      fresh.append(offset..<(offset + count))
    }
    if fresh.count >= Self.batch { merge(&report) }
  }

  /// The file stays at least so long, as far as it is now.
  mutating func keep(upTo offset: UInt64) {
    end = max(end, min(offset, fileSize))
  }

  private mutating func merge(_ report: inout CheckReport) {
    fresh.sort { $0.lowerBound < $1.lowerBound }
    var merged: [Range<UInt64>] = []
    var (one, other) = (runs[...], fresh[...])
    while let next = Self.popFirst(&one, &other) {
      guard let last = merged.last, next.lowerBound <= last.upperBound else {
        merged.append(next)
        continue
      }
      if next.lowerBound < last.upperBound {
        report.corruption("byte \(next.lowerBound) of the file is in use twice")
      }
      merged[merged.count - 1] = last.lowerBound..<max(last.upperBound, next.upperBound)
    }
    runs = merged
    fresh = []
  }

  private static func popFirst(
    _ one: inout ArraySlice<Range<UInt64>>, _ other: inout ArraySlice<Range<UInt64>>
  ) -> Range<UInt64>? {
    guard let first = one.first else { return other.popFirst() }
    guard let second = other.first, second.lowerBound < first.lowerBound else {
      return one.popFirst()
    }
    return other.popFirst()
  }

  /// Ends the check: reports overlaps, and as leaks what lies behind the end, in units of
  /// `report.clusterSize`. `tail` bytes behind the end belong to the image (a footer).
  mutating func finish(_ report: inout CheckReport, tail: UInt64 = 0) {
    merge(&report)
    report.imageEnd = end + tail
    guard fileSize > end + tail, report.clusterSize > 0 else { return }
    let count = (fileSize - end - tail) / report.clusterSize
    guard count > 0 else { return }
    report.leak("\(fileSize - end - tail) bytes at the end of the file are not in use")
    report.leaks += count - 1
  }
}
