// SPDX-License-Identifier: Apache-2.0
// Tables as text: what is taken, what is refused and how, and that text and value agree.

import Testing
import TestSupport

@testable import LinuxBlock

@Suite struct TableTests {
  /// Lines that dmsetup takes, in the spelling in which they are printed again.
  static let good = [
    "0 8 linear /dev/loop0 16",
    "0 8 linear 7:0 0",
    "0 8 error",
    "0 8 zero",
    "0 64 striped 2 8 /dev/a 0 /dev/b 32",
    "0 64 striped 1 64 /dev/a 5",
    "0 64 mirror core 1 16 2 /dev/a 0 /dev/b 0",
    "0 64 mirror core 2 16 nosync 3 /dev/a 0 /dev/b 0 /dev/c 8",
    "0 64 mirror disk 2 /dev/log 16 2 /dev/a 0 /dev/b 0 1 handle_errors",
    "0 64 mirror disk 3 /dev/log 64 sync 2 /dev/a 0 /dev/b 0 2 handle_errors keep_log",
    "0 64 snapshot /dev/a /dev/b P 8",
    "0 64 snapshot 7:1 7:2 N 0",
    "0 64 snapshot /dev/a /dev/b PO 128 2 discard_zeroes_cow discard_passdown_origin",
    "0 64 delay /dev/a 0 0",
    "0 64 delay /dev/a 0 0 /dev/b 4 500",
    "0 64 delay /dev/a 0 0 /dev/b 0 500 /dev/c 0 1000",
    "0 64 flakey /dev/a 8 0 1",
    "0 64 flakey /dev/a 8 3 1 1 error_writes",
    "0 2048 userspace disk 128 2 /dev/loop1 ro:/dev/loop0",
    "0 2048 userspace a.b-c_d 1 1 ro:7:0 2 fault_timeout 30",
    "0 8 linear /dev/with\\ space 0",
    "0 8 zero\n8 8 error\n16 100 linear /dev/a 0",
  ]

  @Test(arguments: good)
  func whatIsPrintedIsWhatWasRead(_ text: String) throws {
    let table = try Table(parsing: text)
    #expect("\(table)" == text)
    #expect(try Table(parsing: "\n  # a remark\n\n" + text + "  \n") == table)
    #expect(try Table(table.segments) == table)
  }

  /// A text, and the line, the field and a part of the reason.
  static let bad: [(String, Int, String, String)] = [
    ("", 1, "START", "empty"),
    ("# nothing\n", 1, "START", "empty"),
    ("8 8 zero", 1, "START", "8 is not 0"),
    ("0 8 zero\n\n16 8 zero", 3, "START", "16 is not 8"),
    ("0 8 zero\n4 8 zero", 2, "START", "4 is not 8"),
    ("0 0 zero", 1, "LEN", "none"),
    ("0 18446744073709551615 zero", 1, "LEN", "more than a device"),
    ("0 18446744073709551616 zero", 1, "LEN", "more than"),
    ("0 -8 zero", 1, "LEN", "not a number"),
    ("0", 1, "LEN", "missing"),
    ("0 8", 1, "TYPE", "missing"),
    ("0 8 thin", 1, "TYPE", "'thin' is none of"),
    ("0 8 zero 1", 1, "end of line", "'1' is a word too many"),
    ("0 8 linear", 1, "DEV", "missing"),
    ("0 8 linear loop0 0", 1, "DEV", "neither a path"),
    ("0 8 linear 7:x 0", 1, "DEV", "neither a path"),
    ("0 8 linear /dev/a", 1, "OFFSET", "missing"),
    ("0 8 linear /dev/a 9223372036854775807", 1, "OFFSET", "beyond"),
    ("0 8 linear /dev/a 0 0", 1, "end of line", "too many"),
    ("0 64 striped 0 8", 1, "STRIPES", "nothing"),
    ("0 64 striped 4294967295 8 /dev/a 0", 1, "DEV 2", "missing"),
    ("0 64 striped 2 0 /dev/a 0 /dev/b 0", 1, "CHUNK", "none"),
    ("0 65 striped 2 8 /dev/a 0 /dev/b 0", 1, "LEN", "evenly"),
    ("0 64 striped 2 12 /dev/a 0 /dev/b 0", 1, "CHUNK", "whole chunks"),
    ("0 64 striped 2 8 /dev/a 0 /dev/b x", 1, "OFFSET 2", "not a number"),
    ("0 64 mirror cluster 1 16 2 /dev/a 0 /dev/b 0", 1, "LOG", "neither core nor disk"),
    ("0 64 mirror core 3 16 sync x 2 /dev/a 0 /dev/b 0", 1, "LOG ARGS", "not 3"),
    ("0 64 mirror core 1 24 2 /dev/a 0 /dev/b 0", 1, "REGION", "power of two"),
    ("0 64 mirror core 1 128 2 /dev/a 0 /dev/b 0", 1, "REGION", "more than"),
    ("0 64 mirror core 2 16 both 2 /dev/a 0 /dev/b 0", 1, "SYNC", "neither"),
    ("0 64 mirror core 1 16 1 /dev/a 0", 1, "MIRRORS", "2 to 9"),
    ("0 64 mirror core 1 16 3 /dev/a 0 /dev/b 0", 1, "MIRRORS", "words for 2"),
    ("0 64 mirror core 1 16 2 /dev/a 0 /dev/b 0 1 keep_log", 1, "FEATURE", "needs"),
    ("0 64 mirror core 1 16 2 /dev/a 0 /dev/b 0 1 fast", 1, "FEATURE", "'fast'"),
    ("0 64 snapshot /dev/a /dev/b Q 8", 1, "PERSISTENT", "none of P"),
    ("0 64 snapshot /dev/a /dev/b P 9", 1, "CHUNK", "power of two"),
    ("0 64 snapshot /dev/a /dev/a P 8", 1, "STORE", "origin itself"),
    ("0 64 snapshot /dev/a /dev/b P 8 1 fast", 1, "FEATURE", "none of discard"),
    ("0 64 delay /dev/a 0", 1, "DELAY", "missing"),
    ("0 64 flakey /dev/a 0 0 0", 1, "DOWN", "no seconds"),
    ("0 64 flakey /dev/a 0 1 1 1 drop_writes", 1, "FEATURE", "not error_writes"),
    ("0 64 delay /dev/a 0 0 /dev/b 0", 1, "WRITE DELAY", "missing"),
    ("0 64 delay /dev/a 0 4294967296", 1, "DELAY", "more than"),
    ("0 64 userspace .x 8 1 /dev/a", 1, "NAME", "letters"),
    ("0 64 userspace a/b 8 1 /dev/a", 1, "NAME", "letters"),
    ("0 64 userspace x 9 1 /dev/a", 1, "BLOCK_SECTORS", "power of two"),
    ("0 64 userspace x 0 1 /dev/a", 1, "BLOCK_SECTORS", "power of two"),
    ("0 64 userspace x 8 0", 1, "NDEVS", "1 to 15"),
    ("0 64 userspace x 8 2 /dev/a", 1, "NDEVS", "words for 1"),
    ("0 64 userspace x 8 1 ro:a", 1, "DEV 1", "neither"),
    ("0 64 userspace x 8 1 /dev/a 1 fast", 1, "FEATURE", "not fault_timeout"),
    ("0 64 userspace x 8 1 /dev/a 1 fault_timeout", 1, "FEATURES", "are 2"),
    ("0 64 userspace x 8 1 /dev/a 2 fault_timeout 86401", 1, "SECONDS", "86400"),
  ]

  @Test(arguments: bad)
  func anErrorNamesLineFieldAndReason(
    _ text: String, _ line: Int, _ field: String, _ reason: String
  ) throws {
    let error = #expect(throws: TableError.self) { try Table(parsing: text) }
    #expect(error?.line == line)
    #expect(error?.field == field)
    #expect(error?.reason.contains(reason) == true, "\(String(describing: error))")
    #expect(error.map { "\($0)" }?.hasPrefix("line \(line), \(field): ") == true)
  }

  @Test func valuesAreValidatedToo() {
    #expect(throws: TableError.self) {
      try Table(length: 8, .userspace(Userspace(name: "x", blockSectors: 8, devices: [])))
    }
    #expect(throws: TableError.self) {
      try Table([
        Segment(start: 0, length: 8, .zero), Segment(start: 9, length: 8, .zero),
      ])
    }
  }

  /// No line, whatever stands in it, does anything but parse or throw; what parses is printed
  /// so that it parses to the same.
  @Test func mangledLinesThrowAndNeverTrap() throws {
    var random = SeededRandom(announcedAs: "mangled tables")
    let words = Self.good.joined(separator: " ").split(separator: " ").map(String.init)
    var taken = 0
    for _ in 0..<20_000 {
      var line = Self.good.randomElement(using: &random) ?? ""
      for _ in 0..<Int.random(in: 0..<3, using: &random) {
        var parts = line.split(separator: " ").map(String.init)
        let at = Int.random(in: 0..<max(1, parts.count), using: &random)
        switch Int.random(in: 0..<4, using: &random) {
        case 0 where at < parts.count: parts.remove(at: at)
        case 1: parts.insert(words.randomElement(using: &random) ?? "", at: at)
        case 2 where at < parts.count: parts[at] = "\(random.next())"
        default: parts.append("\\")
        }
        line = parts.joined(separator: " ")
      }
      let table: Table
      do throws(TableError) {
        table = try Table(parsing: line)
      } catch {
        #expect(error.line >= 1)
        continue
      }
      taken += 1
      #expect(try Table(parsing: "\(table)") == table)
    }
    #expect(taken > 1000)
  }
}

@Suite struct KernelLogTests {
  @Test func onlyTheDeviceMappersWordsAreTaken() {
    let number = DeviceNumber(major: 254, minor: 3)
    let words = { KernelLog.words(of: $0, number) }
    #expect(
      words("3,77,1,-;device-mapper: table: 254:3: userspace: NDEVS is not 1 to 15\n KEY=x\n")
        == "userspace: NDEVS is not 1 to 15")
    #expect(words("3,77,1,-;device-mapper: table: 254:4: zero: no") == nil)
    #expect(words("3,77,1,-;device-mapper: ioctl: unable to") == "ioctl: unable to")
    #expect(words("6,77,1,-;loop0: detected capacity change") == nil)
    #expect(words("nonsense") == nil)
    #expect(words("") == nil)
  }

  @Test func errorsSayAllThatIsKnown() {
    #expect(
      "\(DeviceMapperError(22, "load a table for", "x", explanation: "zero: no"))"
        == "cannot load a table for x: zero: no (Invalid argument)")
    #expect("\(DeviceMapperError(16, "remove", "x"))" == "cannot remove x: Device or resource busy")
  }

  @Test func deviceNumbersAreTheKernels() {
    #expect(DeviceNumber(UInt64(0x700)) == DeviceNumber(major: 7, minor: 0))
    #expect(DeviceNumber(UInt64(0x1230_fe05)) == DeviceNumber(major: 254, minor: 0x12305))
  }
}
