// SPDX-License-Identifier: Apache-2.0
// What dmu-img prints: golden maps, JSON that qemu-img prints as well, and the way it ends.

import BlockIO
import Foundation
import Testing
import TestSupport

@Suite struct WordsTests {
  /// A chain of two, with data, zeroes and holes.
  static func chain(_ bench: Bench) throws {
    // qemu-img would write a block of zeroes at its start.
    try bench.must("dmu-img", "create", "-q", "-f", "raw", "base", "1M")
    try bench.must(
      "qemu-io", "-f", "raw", "-c", "write -P 1 64k 64k", "-c", "write -P 2 512k 128k", "base")
    try bench.must(
      "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "2M")
    try bench.must(
      "qemu-io", "-c", "write -P 3 128k 128k", "-c", "write -z 512k 64k", "-c",
      "write -P 4 1536k 64k", "top")
  }

  @Test func mapText() throws {
    let bench = try Bench()
    try Self.chain(bench)
    let golden = """
      Offset          Length          Mapped to       File
      0x10000         0x10000         0x10000         base
      0x20000         0x20000         0x50000         top
      0x90000         0x10000         0x90000         base
      0x180000        0x10000         0x70000         top

      """
    #expect(try bench.must("dmu-img", "map", "-f", "qcow2", "top") == golden)
    #expect(try bench.must("qemu-img", "map", "top") == golden)
  }

  @Test func mapJSON() throws {
    let bench = try Bench()
    try Self.chain(bench)
    let golden = """
      [{ "start": 0, "length": 65536, "depth": 1, "present": true, "zero": true, "data": false, \
      "offset": 0},
      { "start": 65536, "length": 65536, "depth": 1, "present": true, "zero": false, \
      "data": true, "offset": 65536},
      { "start": 131072, "length": 131072, "depth": 0, "present": true, "zero": false, \
      "data": true, "offset": 327680},
      { "start": 262144, "length": 262144, "depth": 1, "present": true, "zero": true, \
      "data": false, "offset": 262144},
      { "start": 524288, "length": 65536, "depth": 0, "present": true, "zero": true, \
      "data": false},
      { "start": 589824, "length": 65536, "depth": 1, "present": true, "zero": false, \
      "data": true, "offset": 589824},
      { "start": 655360, "length": 393216, "depth": 1, "present": true, "zero": true, \
      "data": false, "offset": 655360},
      { "start": 1048576, "length": 524288, "depth": 0, "present": false, "zero": true, \
      "data": false},
      { "start": 1572864, "length": 65536, "depth": 0, "present": true, "zero": false, \
      "data": true, "offset": 458752},
      { "start": 1638400, "length": 458752, "depth": 0, "present": false, "zero": true, \
      "data": false}]

      """
    #expect(try bench.must("dmu-img", "map", "-f", "qcow2", "--output=json", "top") == golden)
    #expect(try bench.must("qemu-img", "map", "--output=json", "top") == golden)
    let part = try bench.must(
      "dmu-img", "map", "-f", "qcow2", "--json", "-s", "128K", "-l", "64K", "top")
    #expect(part.hasPrefix("[{ \"start\": 131072, \"length\": 65536, "))
  }

  @Test func picture() throws {
    let bench = try Bench()
    try Self.chain(bench)
    try bench.must("dmu-img", "map", "-f", "qcow2", "--svg", "map.svg", "top")
    let text = String(decoding: try bench.bytes("map.svg"), as: UTF8.self)
    #expect(text.hasPrefix("<svg ") && text.hasSuffix("</svg>\n"))
    #expect(!text.contains("nan") && !text.contains("'-"))
    #expect(text.contains("<title>Map of top</title>"))
    #expect(text.contains(">top: 192 KiB</text>"))
    #expect(text.contains(">base: 128 KiB</text>"))
  }

  /// The numbers that both print agree.
  @Test(arguments: [["info"], ["check"]]) func likeQEMU(command: [String]) throws {
    let bench = try Bench()
    try Self.chain(bench)
    try bench.must("qemu-img", "snapshot", "-c", "then", "top")
    try bench.must("qemu-img", "convert", "-c", "-O", "qcow2", "top", "packed")
    func object(_ program: String, _ file: String) throws -> [String: NSObject] {
      let text = try bench.run(program, command + ["--output=json", file]).out
      let value = try JSONSerialization.jsonObject(with: Data(text.utf8))
      var object = try #require(value as? [String: NSObject])
      // The time to the nanosecond, and others that have no place here.
      object["snapshots"] = nil
      return object
    }
    for file in ["top", "packed"] {
      #expect(try object("dmu-img", file) == object("qemu-img", file), "\(file)")
    }
    #expect(try bench.must("dmu-img", "snapshot", "-l", "top").contains("1         then"))
  }

  @Test func chains() throws {
    let bench = try Bench()
    try Self.chain(bench)
    let text = try bench.must("dmu-img", "info", "-f", "qcow2", "--backing-chain", "--json", "top")
    let value = try JSONSerialization.jsonObject(with: Data(text.utf8)) as? [[String: NSObject]]
    #expect(value?.map { $0["filename"] as? String } == ["top", "base"])
    // A base that is its own is told, not followed for ever.
    try bench.must("dmu-img", "rebase", "-f", "qcow2", "-u", "-b", "other", "-F", "qcow2", "top")
    try bench.must(
      "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "top", "-F", "qcow2", "other", "1M")
    let loop = try bench.tool("map", "-f", "qcow2", "top")
    #expect(loop.exit == 1)
    #expect(loop.error.contains("its own base"), "\(loop.error)")
  }

  /// The exit codes of a check: sound, leaking, damaged, and nothing to check.
  @Test func checks() throws {
    let bench = try Bench()
    try bench.must("dmu-img", "create", "-q", "-f", "qcow2", "t", "4M")
    try bench.must("qemu-io", "-c", "write 0 1M", "t")
    #expect(try bench.tool("check", "t").exit == 0)
    // One cluster counted that nothing uses: entry 30 of the only refcount block.
    let store = try FileStore(path: bench.path("t"), writable: true)
    try store.write([0, 1], at: 2 * 65536 + 60)
    try store.resize(to: 40 * 65536)
    let leaks = try bench.tool("check", "--json", "t")
    #expect(leaks.exit == 3)
    #expect(leaks.out.contains("\"leaks\": 1"))
    #expect(try bench.run("qemu-img", ["check", "t"]).exit == 3)
    #expect(try bench.tool("check", "-r", "leaks", "t").exit == 0)
    #expect(try bench.run("qemu-img", ["check", "t"]).exit == 0)
    // And one used that is not counted.
    try store.write([0, 0], at: 2 * 65536 + 12)
    #expect(try bench.tool("check", "t").exit == 2)
    #expect(try bench.tool("check", "-r", "all", "t").exit == 0)
    #expect(try bench.run("qemu-img", ["check", "t"]).exit == 0)
    try bench.must("dmu-img", "create", "-q", "raw", "1M")
    #expect(try bench.tool("check", "raw").exit == 63)
    #expect(try bench.tool("check", "nothing").exit == 1)
  }

  @Test func comparing() throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 3 << 20, seed: 1)
    try bench.makeRaw("b", size: 4 << 20, seed: 1)
    let a = try FileStore(path: bench.path("b"), writable: true)
    try a.zero(at: 3 << 20, count: 1 << 20)
    try a.write(try bench.bytes("a"), at: 0)
    #expect(try bench.tool("compare", "a", "b").exit == 0)
    #expect(try bench.tool("compare", "-s", "a", "b").exit == 1)
    try a.write([9], at: 2_000_003)
    let result = try bench.tool("compare", "a", "b")
    #expect(result.exit == 1)
    #expect(result.out == "Content mismatch at offset 2000003!\n")
    #expect(try bench.tool("compare", "a", "nothing").exit == 2)
  }

  /// A mapping that is dumped and restored makes the same disk, and the same mapping but for
  /// the places.
  @Test(arguments: ["qcow2", "dscow", "vpc"]) func dumpAndRestore(format: String) throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 8 << 20, seed: 2)
    try bench.must("dmu-img", "convert", "-f", "raw", "-O", format, "a", "t")
    try bench.must("dmu-img", "dump", "-f", format, "-o", "t.xml", "t")
    try bench.must("dmu-img", "restore", "-i", "t.xml", "-D", "t", "-O", format, "u")
    try bench.must("dmu-img", "compare", "-f", format, "-F", format, "t", "u")
    func origins(_ text: String) -> [String] {
      text.split(separator: "\n").map { line in
        line.split(separator: " ").filter { !$0.hasPrefix("data_b") && !$0.hasPrefix("nr_data") }
          .joined(separator: " ")
      }
    }
    let first = String(decoding: try bench.bytes("t.xml"), as: UTF8.self)
    let second = try bench.must("dmu-img", "dump", "-f", format, "u")
    #expect(origins(first) == origins(second))
    #expect(first.contains("<superblock "))
  }

  @Test(arguments: [
    ("<superblock", "not well-formed"), ("<device/>", "before a superblock"),
    ("<superblock data_block_size='x'/>", "no number"),
    ("<superblock data_block_size='128'/>", "length is not said"),
    (
      "<!-- dmu-img: size=1048576 --><superblock data_block_size='128'><device>"
        + "<single_mapping origin_block='3' data_block='99999999' time='0'/></device></superblock>",
      "past the end"
    ),
    (
      "<!-- dmu-img: size=1048576 --><superblock data_block_size='128'><device>"
        + "<range_mapping origin_begin='3' data_begin='0' length='0' time='0'/></device></superblock>",
      "a mapping of 0 blocks"
    ),
    (
      "<!DOCTYPE a [<!ENTITY b 'c'>]><!-- dmu-img: size=1048576 --><superblock "
        + "data_block_size='128'/>", "no document type"
    ),
  ]) func badMappings(text: String, words: String) throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 1 << 20, seed: 2)
    try Data(text.utf8).write(to: URL(fileURLWithPath: bench.path("x.xml")))
    let outcome = try bench.tool("restore", "-i", "x.xml", "-D", "a", "t")
    #expect(outcome.exit == 1)
    #expect(outcome.error.contains(words), "\(outcome.error)")
    #expect(try bench.names() == ["a", "x.xml"])
  }

  @Test func resizing() throws {
    let bench = try Bench()
    for format in ["raw", "qcow2", "dscow"] {
      try bench.must("dmu-img", "create", "-q", "-f", format, "t", "10M")
      #expect(try bench.tool("resize", "-f", format, "t", "5M").exit == 1)
      try bench.must("dmu-img", "resize", "-f", format, "--shrink", "t", "5M")
      try bench.must("dmu-img", "resize", "-f", format, "t", "+3M")
      #expect(
        try bench.must("dmu-img", "info", "-f", format, "--json", "t").contains(
          "\"virtual-size\": 8388608"))
    }
  }

  @Test func benching() throws {
    let bench = try Bench()
    try bench.must("dmu-img", "create", "-q", "-f", "qcow2", "t", "10M")
    try bench.must("dmu-img", "bench", "-c", "300", "-d", "4", "-w", "--pattern", "7", "t")
    try bench.must("qemu-io", "-c", "read -P 7 0 1200k", "t")
    try bench.must("qemu-img", "check", "t")
    #expect(try bench.must("dmu-img", "bench", "-c", "100", "--json", "t").contains("requests"))
  }
}
