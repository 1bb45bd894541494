// SPDX-License-Identifier: Apache-2.0
// What a worker has measured of the requests that it serves itself: fields of its report that a
// worker of an earlier version does not send.

package import SystemIO

/// Bytes, times and latencies of requests since the worker started.
package struct ReportedTimes: Sendable, Equatable {
  /// Bytes that reads asked for.
  package var bytesRead: UInt64 = 0
  /// Bytes that writes brought.
  package var bytesWritten: UInt64 = 0
  /// Discards and writes of zeroes.
  package var discards: UInt64 = 0
  /// Nanoseconds of all reads together.
  package var reading: UInt64 = 0
  /// The same of writes.
  package var writing: UInt64 = 0
  /// The same of flushes.
  package var flushing: UInt64 = 0
  /// The same of discards and writes of zeroes.
  package var discarding: UInt64 = 0
  /// Of everything but flushes.
  package var latencies = LatencyHistogram()
  /// Of flushes.
  package var flushLatencies = LatencyHistogram()

  /// Nothing yet.
  package init() {}

  func write(to fields: inout [String: String]) {
    fields["bytes-read"] = String(bytesRead)
    fields["bytes-written"] = String(bytesWritten)
    fields["discards"] = String(discards)
    fields["reading"] = String(reading)
    fields["writing"] = String(writing)
    fields["flushing"] = String(flushing)
    fields["discarding"] = String(discarding)
    fields["latencies"] = Self.word(latencies)
    fields["flush-latencies"] = Self.word(flushLatencies)
  }

  /// nil when the report has none.
  init?(_ message: LinkMessage) throws(LinkFault) {
    guard message.fields["latencies"] != nil else { return nil }
    bytesRead = try message.number("bytes-read")
    bytesWritten = try message.number("bytes-written")
    discards = try message.number("discards")
    reading = try message.number("reading")
    writing = try message.number("writing")
    flushing = try message.number("flushing")
    discarding = try message.number("discarding")
    latencies = try Self.histogram(message, "latencies")
    flushLatencies = try Self.histogram(message, "flush-latencies")
  }

  /// "NANOSECONDS,COUNT,COUNT...": a count for each bucket.
  private static func word(_ histogram: LatencyHistogram) -> String {
    ([histogram.nanoseconds] + histogram.counts).map { String($0) }.joined(separator: ",")
  }

  private static func histogram(
    _ message: LinkMessage, _ field: String
  ) throws(LinkFault) -> LatencyHistogram {
    let words = try message.text(field).split(separator: ",", omittingEmptySubsequences: false)
    let numbers = words.compactMap { UInt64($0) }
    guard numbers.count == words.count, let sum = numbers.first,
      let histogram = LatencyHistogram(counts: Array(numbers.dropFirst()), nanoseconds: sum)
    else { throw .badField(verb: message.verb, field: field) }
    return histogram
  }
}
