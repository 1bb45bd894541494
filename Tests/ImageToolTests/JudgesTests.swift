// SPDX-License-Identifier: Apache-2.0
// Second judges beside QEMU: libyal's libraries and dissect read what is written here, and
// python3-vmdkstream writes what is read here. `lab/prerequisites test` installs them.

import Foundation
import Testing
import TestSupport

/// Programs that are not QEMU.
enum Judges {
  /// The script that asks them.
  static let script = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
    .deletingLastPathComponent().appendingPathComponent("judges/disk.py").path

  /// Their interpreter, in the cache.
  static let python: String = {
    let home = getenv("HOME").map { String(cString: $0) } ?? "/root"
    let cache = getenv("XDG_CACHE_HOME").map { String(cString: $0) } ?? home + "/.cache"
    return cache + "/dmu-xen/judges/bin/python"
  }()

  static let areThere: Bool = {
    let areThere = FileManager.default.isExecutableFile(atPath: python)
    if !areThere { print("SKIPPED: libyal and dissect: there is no \(python)") }
    return areThere
  }()

  static let writesStreams: Bool = {
    let isThere = FileManager.default.fileExists(
      atPath: "/usr/lib/python3/dist-packages/VMDKstream.py")
    if !isThere { print("SKIPPED: python3-vmdkstream is not installed") }
    return isThere
  }()
}

@Suite struct JudgesTests {
  /// An image, and who reads it.
  struct Case: CustomTestStringConvertible, Sendable {
    var format: String
    var option = ""
    var readers: [String]
    var testDescription: String { format + " " + option }

    static let all = [
      Case(format: "vpc", option: "subformat=dynamic", readers: ["vhdi", "vhd"]),
      Case(format: "vpc", option: "subformat=fixed", readers: ["vhdi", "vhd"]),
      Case(format: "vmdk", option: "subformat=monolithicSparse", readers: ["vmdk", "vmdk-d"]),
      Case(format: "vmdk", option: "subformat=monolithicFlat", readers: ["vmdk", "vmdk-d"]),
      Case(format: "vmdk", option: "subformat=twoGbMaxExtentSparse", readers: ["vmdk", "vmdk-d"]),
      Case(format: "vmdk", option: "subformat=streamOptimized", readers: ["vmdk", "vmdk-d"]),
      Case(format: "qcow", readers: ["qcow"]),
      Case(format: "qcow2", option: "compat=0.10", readers: ["qcow", "qcow2"]),
      Case(format: "qcow2", option: "compat=1.1", readers: ["qcow", "qcow2"]),
    ]
  }

  private static func expected(_ bench: Bench, _ raw: String) throws -> String {
    let sum = try bench.must("sha256sum", raw).prefix(64)
    return "\(try bench.bytes(raw).count) \(sum)"
  }

  private static func read(_ bench: Bench, _ arguments: String...) throws -> String {
    let outcome = try bench.run(Judges.python, [Judges.script] + arguments)
    guard outcome.exit == 0 else { throw Bench.Failure(description: outcome.error) }
    return outcome.out.trimmingCharacters(in: .newlines)
  }

  @Test(.enabled(if: Judges.areThere, "run lab/prerequisites test"), arguments: Case.all)
  func othersReadIt(_ test: Case) throws {
    let bench = try Bench()
    try bench.makeRaw("raw", size: (5 << 20) + 512 * 77, seed: 21)
    let options = test.option.isEmpty ? [] : ["-o", test.option]
    let name = test.format == "vmdk" ? "t.vmdk" : "t"
    let made = try bench.run(
      "dmu-img", ["convert", "-f", "raw", "-O", test.format] + options + ["raw", name])
    #expect(made.exit == 0, "\(made.error)")
    let wanted = try Self.expected(bench, "raw")
    for reader in test.readers {
      #expect(try Self.read(bench, reader, name) == wanted, "\(reader)")
    }
    guard test.option != "subformat=streamOptimized" else { return }
    // Longer and shorter, they read on.
    for size in ["9M", "3M"] {
      try bench.must("dmu-img", "resize", "-q", "--shrink", "-f", test.format, name, size)
      try bench.must("truncate", "-s", size, "raw")
      let wanted = try Self.expected(bench, "raw")
      // libvhdi goes by the length that a VHD disk was made with, which no resizing changes.
      for reader in test.readers where reader != "vhdi" {
        #expect(try Self.read(bench, reader, name) == wanted, "\(reader), \(size)")
      }
    }
    print("judges: \(test.testDescription): \(test.readers.joined(separator: ", ")): equal")
  }

  /// A differencing VHD over another, as libvhdi puts them together.
  @Test(.enabled(if: Judges.areThere, "run lab/prerequisites test"))
  func differencing() throws {
    let bench = try Bench()
    for (name, seed) in [("a", UInt64(22)), ("b", 23)] {
      try bench.makeRaw(name, size: 6 << 20, seed: seed)
    }
    try bench.must("dmu-img", "convert", "-f", "raw", "-O", "vpc", "a", "base.vhd")
    try bench.must(
      "dmu-img", "convert", "-f", "raw", "-O", "vpc", "-B", "base.vhd", "-F", "vpc", "b", "t.vhd")
    let wanted = try Self.expected(bench, "b")
    #expect(try Self.read(bench, "vhdi", "t.vhd", "base.vhd") == wanted)
  }

  @Test(.enabled(if: Judges.writesStreams, "run lab/prerequisites test"))
  func streamsOfOthers() throws {
    let bench = try Bench()
    for size in [1000 * 512, 3 << 20, (3 << 20) + 512] {
      try bench.makeRaw("raw", size: size, seed: UInt64(size))
      let outcome = try bench.run(
        "/usr/bin/python3", [Judges.script, "write-stream", "raw", "t.vmdk"])
      #expect(outcome.exit == 0, "\(outcome.error)")
      #expect(try bench.must("dmu-img", "info", "t.vmdk").contains("file format: vmdk"))
      try bench.must("dmu-img", "compare", "-f", "raw", "raw", "-F", "vmdk", "t.vmdk")
      try FileManager.default.removeItem(atPath: bench.path("t.vmdk"))
    }
  }
}
