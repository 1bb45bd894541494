// SPDX-License-Identifier: Apache-2.0
// dmu-img convert, with qemu-img as the judge of what came out.

import Foundation
import Testing
import TestSupport

@Suite struct ConvertTests {
  static let targets: [[String]] = [
    ["-O", "raw"], ["-O", "raw", "-S", "0"], ["-O", "raw", "-C"], ["-O", "qcow2"],
    ["-O", "qcow2", "-c"],
    ["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
    ["-O", "qcow2", "-o", "cluster_size=512"], ["-O", "qcow2", "-c", "-o", "cluster_size=512"],
    ["-O", "qcow2", "-o", "cluster_size=2M,extended_l2=on"], ["-O", "qcow2", "-o", "compat=0.10"],
    ["-O", "qcow2", "-c", "-o", "refcount_bits=1"], ["-O", "qcow2", "-o", "refcount_bits=64"],
    ["-O", "qcow2", "-o", "preallocation=metadata"],
    ["-O", "qcow2", "-o", "preallocation=falloc"], ["-O", "qcow2", "-S", "0"],
    ["-O", "qcow2", "-o", "data_file=t.data"],
    ["-O", "qcow2", "-o", "data_file=t.data,data_file_raw=on"], ["-O", "vpc"],
    ["-O", "vpc", "-o", "subformat=fixed"], ["-O", "qcow"], ["-O", "vmdk"],
    ["-O", "vmdk", "-o", "subformat=streamOptimized"],
    ["-O", "vmdk", "-o", "subformat=monolithicFlat"],
    ["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"],
  ]

  /// There and back, judged on both ways.
  @Test(arguments: targets) func toAndFrom(target: [String]) throws {
    let bench = try Bench()
    // No multiple of a cluster, and one of what a VHD disk of QEMU's has.
    try bench.makeRaw("a", size: 5_000_192, seed: 7)
    let format = target[1]
    let outcome = try bench.run("dmu-img", ["convert"] + target + ["-f", "raw", "a", "t"])
    #expect(outcome.exit == 0, "\(outcome.error)")
    #expect(try bench.run("qemu-img", ["compare", "-f", "raw", "-F", format, "a", "t"]).exit == 0)
    if format == "qcow2" {
      let check = try bench.run("qemu-img", ["check", "-f", format, "t"])
      #expect(check.exit == 0, "\(check.out)")
      #expect(try bench.tool("check", "t").exit == 0)
    }
    try bench.must("dmu-img", "convert", "-f", format, "-O", "raw", "t", "b")
    #expect(try bench.bytes("a") == bench.bytes("b"))
    #expect(try bench.tool("compare", "-f", "raw", "-F", format, "a", "t").exit == 0)
  }

  /// What qemu-img makes is read here.
  @Test(arguments: [[], ["-c"], ["-o", "extended_l2=on"], ["-o", "compat=0.10"]])
  func fromQEMU(options: [String]) throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 3 << 20, seed: 8)
    let made = try bench.run(
      "qemu-img", ["convert", "-O", "qcow2"] + options + ["-f", "raw", "a", "q"])
    #expect(made.exit == 0)
    try bench.must("dmu-img", "convert", "q", "b")
    #expect(try bench.bytes("a") == bench.bytes("b"))
  }

  /// The outcome does not depend on how many threads there are.
  @Test func threads() throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 9 << 20, seed: 9)
    try bench.must("dmu-img", "convert", "-c", "-O", "qcow2", "-m", "1", "a", "one")
    try bench.must("dmu-img", "convert", "-c", "-O", "qcow2", "-m", "5", "a", "five")
    #expect(try bench.bytes("one") == bench.bytes("five"))
  }

  /// Only what differs from the base is copied.
  @Test func overABase() throws {
    let bench = try Bench()
    try bench.makeRaw("base", size: 4 << 20, seed: 10)
    try bench.must("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top")
    try bench.must(
      "qemu-io", "-c", "write -P 7 1M 64k", "-c", "write -z 2M 256k", "-c", "discard 3M 64k", "top")
    try bench.must(
      "dmu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-B", "base", "-F", "raw", "top", "t")
    try bench.must("qemu-img", "compare", "top", "t")
    try bench.must("qemu-img", "check", "t")
    let size = try bench.bytes("t").count
    #expect(size < 1 << 20, "\(size) bytes for what differs")
    // A base that is not the source's, shorter, in another format.
    try bench.makeRaw("other", size: 3 << 20, seed: 10)
    try bench.must("qemu-img", "convert", "-O", "qcow2", "-f", "raw", "other", "base2")
    try bench.must(
      "dmu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-B", "base2", "-F", "qcow2", "top", "u")
    try bench.must("qemu-img", "compare", "top", "u")
    try bench.must("qemu-img", "check", "u")
  }

  /// Into an image that is there, and holds something else.
  @Test(arguments: ["raw", "qcow2", "dscow"]) func intoExisting(format: String) throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 3 << 20, seed: 11)
    try bench.makeRaw("old", size: 3 << 20, seed: 12)
    try bench.must("dmu-img", "convert", "-O", format, "-f", "raw", "old", "t")
    try bench.must("dmu-img", "convert", "-n", "-O", format, "-f", "raw", "a", "t")
    try bench.must("dmu-img", "compare", "-f", "raw", "-F", format, "a", "t")
    if format == "qcow2" { try bench.must("qemu-img", "check", "t") }
  }

  /// A conversion that is killed, or fails, leaves nothing under the target's name, and nothing
  /// beside it.
  @Test func brokenOff() throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 64 << 20, seed: 13)
    var killed = 0
    for delay: UInt32 in [0, 2000, 10000, 30000, 60000] {
      let process = try bench.start("dmu-img", ["convert", "-c", "-O", "qcow2", "a", "t"])
      usleep(delay)
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
      guard process.terminationReason == .uncaughtSignal else { continue }
      killed += 1
      #expect(try bench.names() == ["a"])
    }
    print("\(killed) of 5 conversions were killed in time")
    // An older image stays what it was.
    try bench.must("dmu-img", "create", "-q", "-f", "qcow2", "t", "1M")
    let before = try bench.bytes("t")
    #expect(try bench.tool("convert", "-O", "qcow2", "-o", "cluster_size=3", "a", "t").exit == 1)
    #expect(try bench.bytes("t") == before)
    #expect(try bench.names() == ["a", "t"])
  }

  @Test func refusals() throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 1 << 20, seed: 14)
    func refused(_ words: String, _ arguments: String...) throws {
      let outcome = try bench.run("dmu-img", ["convert"] + arguments)
      #expect(outcome.exit == 1)
      #expect(outcome.error.contains(words), "\(outcome.error)")
      #expect(outcome.error.split(separator: "\n").count == 1)
    }
    try refused("is being read from", "-f", "raw", "a", "a")
    try refused("format 'qcow9' is unknown", "-O", "qcow9", "a", "t")
    try refused("option 'clustersize' is unknown", "-O", "qcow2", "-o", "clustersize=1", "a", "t")
    try refused("has no base", "-O", "raw", "-B", "a", "-F", "raw", "a", "t")
    try refused("only a new qcow2 image", "-c", "-O", "raw", "a", "t")
    try refused("does not exist", "nothing", "t")
    #expect(try bench.names() == ["a"])
  }
}
