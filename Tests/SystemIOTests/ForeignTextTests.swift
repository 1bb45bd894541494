// SPDX-License-Identifier: Apache-2.0
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite("Text from elsewhere") struct ForeignTextTests {
  @Test(arguments: [
    ("plain, \u{E4} \u{4E2D}", "plain, \u{E4} \u{4E2D}"), ("a\u{1B}[2Jb", "a%1B[2Jb"),
    ("a\nb\tc\u{7F}", "a%0Ab%09c%7F"), ("\u{9B}31m", "%C2%9B31m"), ("\u{202E}gpj", "%E2%80%AEgpj"),
    ("\u{2028}", "%E2%80%A8"), ("\u{061C}\u{2066}", "%D8%9C%E2%81%A6"),
  ]) func whatATerminalObeysIsCoded(_ text: String, _ shown: String) {
    #expect(ForeignText.shown(text) == shown)
  }

  @Test func linesAndJSONStayWhatTheyAre() {
    #expect(ForeignText.lines("a\tb\n\u{1B}c\n") == "a\tb\n%1Bc\n")
    #expect(
      ForeignText.json("{\n  \"a\": \"\u{9B}\u{202E}\"\n}") == "{\n  \"a\": \"\\u009b\\u202e\"\n}")
  }

  /// One character of 15 KiB of combining marks, as a guest may write it: time grows with length.
  @Test func combiningMarksCostNoMoreThanOthers() {
    func time(_ count: Int) -> Double {
      let text = "a" + String(repeating: "\u{0301}", count: count)
      let begin = ContinuousClock.now
      for _ in 0..<20 { #expect(ForeignText.shown(text, limit: .max) == text) }
      return (ContinuousClock.now - begin) / .milliseconds(1)
    }
    let pairs = (0..<5).map { _ in (time(7_500), time(60_000)) }
    let ratio = (pairs.map(\.1).min() ?? 0) / (pairs.map(\.0).min() ?? 1)
    print("15 KiB and 120 KiB of combining marks: \(ratio) times as long, for 8 times the length")
    #expect(ratio < 24)
    #expect(ForeignText.shown("a" + String(repeating: "\u{0301}", count: 7_500)).utf8.count < 500)
  }
}

@Suite("Lines of a log") struct LogLinesTests {
  @Test func aReaderThatStopsIsNotWaitedFor() throws {
    let pair = try UnixSocket.pair(.stream)
    let lines = LogLines(pair.first.raw)
    let line = String(repeating: "x", count: 1000)
    let begin = ContinuousClock.now
    for _ in 0..<2000 { lines.write(line) { "dropped \($0)" } }
    #expect(ContinuousClock.now - begin < .seconds(5))
    try UnixSocket.setNonBlocking(pair.second.raw)
    func drain() -> String {
      var text: [UInt8] = []
      var buffer = [UInt8](repeating: 0, count: 1 << 16)
      while true {
        let count = read(pair.second.raw, &buffer, buffer.count)
        guard count > 0 else { return String(decoding: text, as: UTF8.self) }
        text += buffer[..<count]
      }
    }
    let first = drain().split(separator: "\n")
    #expect(first.count > 10 && first.count < 2000)
    #expect(first.allSatisfy { $0 == line })
    lines.write("again") { "dropped \($0)" }
    #expect(drain() == "dropped \(2000 - first.count)\nagain\n")
  }

  @Test func aLineIsCut() throws {
    let pair = try UnixSocket.pair(.stream)
    LogLines(pair.first.raw).write(String(repeating: "y", count: 10_000)) { "\($0)" }
    var buffer = [UInt8](repeating: 0, count: 1 << 16)
    #expect(read(pair.second.raw, &buffer, buffer.count) == LogLines.longest)
    #expect(buffer[LogLines.longest - 1] == 0x0a)
  }

  /// A guest can cause thousands of lines in a second: one a second is written, with their number.
  @Test func oneMessageThatComesAgainIsCounted() {
    let rate = LogRate(burst: 20)
    var written = 0
    var held: UInt64 = 0
    for millisecond in 0..<10_000 {
      guard let before = rate.admit("the read failed", at: Int64(millisecond)) else { continue }
      written += 1
      held += before
    }
    #expect(written == 29)
    #expect(rate.admit("another", at: 10_000) == 0)
    let rest = rate.admit("the read failed", at: 20_000) ?? 0
    #expect(UInt64(written) + held + rest == 10_000)
  }
}
