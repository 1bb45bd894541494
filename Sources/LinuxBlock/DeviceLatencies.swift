// SPDX-License-Identifier: Apache-2.0
// Latencies of a mapped device's requests, as the device-mapper's own statistics count them:
// one region over the whole device, with a histogram, under this project's program name.
//
// Reads, writes and discards are in one histogram; the kernel counts no flushes there.
// Source: Documentation/admin-guide/device-mapper/statistics.rst.

import Glibc
package import SystemIO

extension MappedDevice {
  /// The name that regions of this project bear.
  private static let program = "dmu-xen"

  /// What was counted since counting began. If nothing is counted yet, counting begins now. From
  /// then on each request costs the kernel two readings of its clock and a few additions to
  /// counters of the processor, until `stopLatencies` or the device's removal.
  package func latencies() throws(DeviceMapperError) -> LatencyHistogram {
    guard let region = try latencyRegions().first else {
      let bounds = LatencyHistogram.bounds.map { String($0) }.joined(separator: ",")
      _ = try message(
        "@stats_create - /1 2 precise_timestamps histogram:\(bounds) \(Self.program)")
      return LatencyHistogram()
    }
    let text = try message("@stats_print \(region)") ?? ""
    guard let histogram = Self.latencies(in: text) else {
      throw DeviceMapperError(
        EPROTO, "read the statistics of", name, explanation: "the kernel prints '\(text)'")
    }
    return histogram
  }

  /// Ends the counting, if there is any.
  package func stopLatencies() throws(DeviceMapperError) {
    for region in try latencyRegions() { _ = try message("@stats_delete \(region)") }
  }

  /// Numbers of the regions of ours that have these bounds; those of an earlier version with other
  /// bounds are deleted.
  private func latencyRegions() throws(DeviceMapperError) -> [Int] {
    var regions: [Int] = []
    for line in (try message("@stats_list \(Self.program)") ?? "").split(separator: "\n") {
      guard let region = Int(line.prefix { $0 != ":" }) else { continue }
      if Self.bounds(in: line).map({ $0 == LatencyHistogram.bounds }) ?? true {
        regions.append(region)
      } else {
        _ = try message("@stats_delete \(region)")
      }
    }
    return regions
  }

  /// The bounds that a line of the list names; nil if it names none, as old kernels do.
  static func bounds(in line: Substring) -> [UInt64]? {
    let mark = "histogram:"
    guard let word = line.split(separator: " ").last(where: { $0.hasPrefix(mark) }) else {
      return nil
    }
    return word.dropFirst(mark.count).split(separator: ",").compactMap { UInt64($0) }
  }

  /// The histogram of a printed region: START+LENGTH, then for reads and for writes how many,
  /// merged, sectors and nanoseconds, five more counters, and the counts with colons between them.
  /// nil when it is none.
  package static func latencies(in text: String) -> LatencyHistogram? {
    let words = text.split(whereSeparator: \.isWhitespace)
    guard words.count == 15, let reading = UInt64(words[4]), let writing = UInt64(words[8]) else {
      return nil
    }
    let counts = words[14].split(separator: ":").compactMap { UInt64($0) }
    return LatencyHistogram(counts: counts, nanoseconds: reading &+ writing)
  }
}
