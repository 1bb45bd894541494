// SPDX-License-Identifier: Apache-2.0
// How far a command is: the line in every width, and what a terminal and qemu-img's readers see.

import Foundation
import Glibc
import SystemIO
import Testing
import TestSupport

@testable import ImageTool

@Suite("Progress") struct ProgressTests {
  private let gib: UInt64 = 1 << 30

  private func line(_ columns: Int, done: UInt64? = nil) -> String {
    ProgressLine(done: done ?? gib, total: 4 * gib, rate: Double(64 << 20), columns: columns).text
  }

  @Test func aWideTerminalSaysAll() {
    #expect(
      line(100) == "[##########..............................]  25.0 %  0:48 left  64 MiB/s"
        + "  1 GiB of 4 GiB")
    #expect(
      ProgressLine(done: 0, total: gib, rate: nil, columns: 100).text
        == "[" + String(repeating: ".", count: 40) + "]   0.0 %  0 B of 1 GiB")
    // All is done: nothing is left.
    #expect(!line(100, done: 4 * gib).contains("left"))
    #expect(line(100, done: 4 * gib).hasPrefix("[" + String(repeating: "#", count: 40) + "]"))
    // Nothing to do is done.
    #expect(ProgressLine(done: 0, total: 0, rate: nil, columns: 30).text.contains("100.0 %"))
  }

  @Test func aNarrowOneLosesWhatMattersLess() {
    var before = ""
    for columns in 1...120 {
      let text = line(columns)
      #expect(text.utf8.count <= columns, "\(columns): \(text)")
      if columns >= 7 { #expect(text.contains("25.0 %"), "\(columns): \(text)") }
      // Whoever has a little more room loses nothing.
      for word in ["[", "left", "MiB/s", " of "] where before.contains(word) {
        #expect(text.contains(word), "\(columns): \(text), before: \(before)")
      }
      before = text
    }
    #expect(before == line(100))
  }

  @Test(arguments: [
    (0.2, "0:01"), (59.0, "0:59"), (59.5, "1:00"), (3599.0, "59:59"), (3600.0, "1:00:00"),
    (90_061.0, "25:01:01"), (1e12, "days"),
  ]) func times(_ seconds: Double, _ words: String) {
    #expect(ProgressLine.time(seconds) == words)
  }

  @Test func theRateIsTheLastSeconds() {
    var pace = Pace()
    pace.note(0, at: 0)
    #expect(pace.rate == nil)
    pace.note(1000, at: 100_000_000)
    #expect(pace.rate == nil, "nobody can say so soon")
    for second in 1...60 as ClosedRange<Int64> {
      // Ten times as fast in the second half.
      let bytes = second <= 30 ? second * 1000 : 30_000 + (second - 30) * 10_000
      pace.note(UInt64(bytes), at: second * 1_000_000_000)
    }
    #expect(pace.rate == 10_000)
  }

  /// A sparse disk of which 24 MiB are data: what is shown is their share, and no line is longer than
  /// the terminal.
  @Test(arguments: [20, 44, 200]) func aTerminalSeesData(columns: UInt16) throws {
    let bench = try Bench()
    try bench.must("dmu-img", "create", "-q", "-f", "raw", "a", "64G")
    for place in [0, 32, 63] {
      try bench.must("qemu-io", "-f", "raw", "-c", "write -q -P 1 \(place)G 8M", "a")
    }
    // Source: pts(4), tty_ioctl(4).
    let terminal = try Descriptor(path: "/dev/ptmx", flags: O_RDWR | O_NOCTTY)
    var (lock, number) = (Int32(0), UInt32(0))
    #expect(ioctl(terminal.raw, 0x4004_5431, &lock) == 0, "TIOCSPTLCK")
    #expect(ioctl(terminal.raw, 0x8004_5430, &number) == 0, "TIOCGPTN")
    var size = winsize()
    size.ws_col = columns
    #expect(ioctl(terminal.raw, UInt(TIOCSWINSZ), &size) == 0)
    let other = try Descriptor(path: "/dev/pts/\(number)", flags: O_RDWR | O_NOCTTY)
    // A reader that is slow, so that it takes some time.
    var command = Command(
      "/usr/bin/strace",
      ["-f", "-qq", "-o", "/dev/null", "-e", "trace=pread64"]
        + ["-e", "inject=pread64:delay_enter=30000", try Bench.program("dmu-img").path]
        + ["convert", "-f", "raw", "-O", "raw", "-m", "1", bench.path("a"), bench.path("b")])
    command.descriptors = [1: other.raw, 2: other.raw]
    let process = try command.start()
    var seen: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 4096)
    while true {
      var item = pollfd(fd: terminal.raw, events: Int16(POLLIN), revents: 0)
      if poll(&item, 1, 200) > 0 {
        let count = read(terminal.raw, &buffer, buffer.count)
        if count > 0 { seen += buffer[..<count] }
      } else if process.hasEnded {
        break
      }
    }
    #expect(try process.wait(milliseconds: 10_000) == .exited(0))
    let lines = String(decoding: seen, as: UTF8.self).split(whereSeparator: \.isNewline)
    try #require(lines.count >= 3, "\(lines)")
    for line in lines { #expect(line.utf8.count < columns, "'\(line)'") }
    #expect(lines.last?.contains("100.0 %") == true)
    let shares = lines.compactMap { line -> Double? in
      guard let end = line.range(of: " %") else { return nil }
      return Double(line[..<end.lowerBound].split(separator: " ").last ?? "")
    }
    #expect(shares == shares.sorted())
    // By the disk's length the first third of the data would be nothing.
    #expect(shares.contains { $0 > 5 && $0 < 33 }, "\(shares)")
    if columns == 200 {
      #expect(lines.contains { $0.contains(" of 24 MiB") && $0.contains("MiB/s") }, "\(lines)")
    }
  }

  /// With -p and no terminal: qemu-img's words.
  @Test func aPipeSeesWords() throws {
    let bench = try Bench()
    try bench.must("qemu-io", "-f", "raw", "-c", "write -q -P 1 0 8M", try make(bench))
    let outcome = try bench.tool("convert", "-p", "-f", "raw", "-O", "qcow2", "a", "b")
    #expect(outcome.exit == 0 && outcome.error == "")
    #expect(outcome.out.hasSuffix("    (100.00/100%)\r\n"))
    let compared = try bench.tool("compare", "-p", "-f", "raw", "-F", "qcow2", "a", "b")
    #expect(compared.out.contains("(100.00/100%)"))
  }

  private func make(_ bench: Bench) throws -> String {
    try bench.must("dmu-img", "create", "-q", "-f", "raw", "a", "64M")
    return bench.path("a")
  }
}
