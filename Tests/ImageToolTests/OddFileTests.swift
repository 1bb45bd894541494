// SPDX-License-Identifier: Apache-2.0
// Files that are no images: FIFOs, sockets, devices, files of 8 EiB; and files that an image of
// unknown origin names. A tool refuses or ends; it never waits.

import BlockIO
import DiskFormats
import Foundation
import SystemIO
import Testing
import TestSupport

@Suite struct OddFileTests {
  /// A program that is not done by then waits for ever, even on a busy machine.
  private static let patience = "60"

  /// Runs a program of this package, which has to end by itself.
  private static func run(
    _ bench: Bench, _ program: String, _ arguments: [String]
  ) throws -> Bench.Outcome {
    let path = try Bench.program(program).path
    let outcome = try bench.run("timeout", ["-k", "1", patience, path] + arguments)
    #expect(outcome.exit != 124 && outcome.exit != 137, "\(program) \(arguments) does not end")
    return outcome
  }

  private static func refused(
    _ bench: Bench, _ words: String, _ program: String, _ arguments: [String]
  ) throws {
    let outcome = try run(bench, program, arguments)
    #expect(outcome.exit != 0, "\(program) \(arguments)")
    #expect(outcome.error.contains(words), "\(program) \(arguments): \(outcome.error)")
  }

  /// What stands for a store or a base in this suite, and the words for it.
  private static func makeOdd(_ bench: Bench) throws -> [(path: String, words: String)] {
    try bench.must("mkfifo", "fifo")
    let socket = try UnixSocket.listen(at: bench.path("socket"), kind: .stream)
    _ = consume socket
    try bench.must("ln", "-s", "fifo", "link")
    try FileManager.default.createDirectory(
      atPath: bench.path("folder"), withIntermediateDirectories: false)
    return [
      ("fifo", "is a FIFO"), ("link", "is a FIFO"), ("socket", "is a socket"),
      ("/dev/zero", "is a character device"), ("folder", "is a directory"),
    ]
  }

  private static let remedy = ": give a regular file or a block device"

  // MARK: What is no file

  @Test func oddFilesAreRefusedByCommands() throws {
    let bench = try Bench()
    try bench.makeRaw("raw", size: 1 << 20, seed: 1)
    for (path, words) in try Self.makeOdd(bench) {
      for arguments in [
        ["info", path], ["info", "-f", "qcow2", path], ["check", path], ["map", path],
        ["convert", "-O", "raw", path, "t"], ["convert", "-f", "raw", "-O", "raw", path, "t"],
        ["convert", "-f", "raw", "-O", "qcow2", "raw", path],
        ["convert", "-f", "raw", "-n", "-O", "raw", "raw", path],
        ["convert", "-f", "raw", "-O", "qcow2", "-B", path, "-F", "raw", "raw", "t"],
        ["convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=\(path)", "raw", "t"],
        ["compare", path, "raw"], ["compare", "raw", path], ["commit", "-f", "qcow2", path],
        ["rebase", "-f", "qcow2", "-b", "", path], ["resize", path, "2M"],
        ["snapshot", "-l", path], ["dump", path], ["bench", "-c", "1", path],
        ["create", "-f", "qcow2", "-b", path, "-F", "raw", "t"], ["create", path, "1M"],
        ["create", "-f", "qcow2", "-o", "data_file=\(path)", "t", "1M"],
      ] {
        try Self.refused(bench, words + Self.remedy, "dmu-img", arguments)
      }
      for arguments in [
        ["create", path, "raw"], ["create", "t", path], ["info", path], ["check", path],
        ["map", path], ["accept", path],
      ] {
        try Self.refused(bench, words + Self.remedy, "dscow_tool", arguments)
      }
    }
    #expect(try bench.names() == ["fifo", "folder", "link", "raw", "socket"])
  }

  /// What an image names may have been replaced since, or was so from the beginning.
  @Test func oddFilesAreRefusedInImages() throws {
    let bench = try Bench()
    try Self.makeNaming(bench)
    for (odd, words) in try Self.makeOdd(bench) {
      for (image, format, named) in Self.naming {
        try bench.must("mv", named, "aside")
        try bench.must("ln", "-s", odd, named)
        for arguments in [["map"], ["convert", "-O", "raw"], ["compare"]] {
          let rest = arguments[0] == "map" ? [image] : [image, "t"]
          try Self.refused(
            bench, words + Self.remedy, "dmu-img", arguments + ["-f", format] + rest)
        }
        if format == "dscow" {
          try Self.refused(bench, words + Self.remedy, "dscow_tool", ["accept", image])
        }
        try bench.must("rm", named)
        try bench.must("mv", "aside", named)
      }
    }
  }

  /// Images, their formats, and the file that each names.
  private static let naming = [
    ("over.qcow2", "qcow2", "base"), ("over.dscow", "dscow", "base"), ("over.qcow", "qcow", "base"),
    ("over.vhd", "vpc", "base"), ("over.vmdk", "vmdk", "base.vmdk"),
    ("data.qcow2", "qcow2", "data"),
    ("flat.vmdk", "vmdk", "flat-flat.vmdk"),
  ]

  private static func makeNaming(_ bench: Bench) throws {
    try bench.makeRaw("base", size: 1 << 20, seed: 2)
    try bench.must("dmu-img", "convert", "-f", "raw", "-O", "vmdk", "base", "base.vmdk")
    for (image, format, base) in naming where image.hasPrefix("over") {
      try bench.must(
        "dmu-img", "create", "-q", "-f", format, "-b", base, "-F",
        base == "base" ? "raw" : "vmdk", image)
    }
    try bench.must(
      "dmu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=data", "base",
      "data.qcow2")
    try bench.must(
      "dmu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", "base",
      "flat.vmdk")
  }

  // MARK: --untrusted

  @Test func untrustedImagesNameNoFile() throws {
    let bench = try Bench()
    try Self.makeNaming(bench)
    for (image, format, named) in Self.naming {
      let isBase = image.hasPrefix("over")
      var commands = [
        ["map", image], ["convert", "-O", "raw", image, "t"], ["compare", image, image],
        ["bench", "-c", "1", image],
      ]
      if isBase {
        commands += [["info", "--backing-chain", image]]
        if ["dscow", "qcow2"].contains(format) { commands += [["rebase", "-b", "", image]] }
        commands += [["commit", "-d", image]]
      } else {
        commands += [
          ["dump", image], ["resize", image, "2M"], ["bench", "-w", "-c", "1", image],
        ]
        if format == "vmdk" { commands += [["check", image]] }
      }
      for command in commands {
        let stated = [command[0], "-f", format] + command.dropFirst()
        // Compare has no -F in these words: the second is guessed, and refused for that.
        let arguments = command[0] == "compare" ? stated + ["-F", format] : stated
        let before = try bench.names()
        let outcome = try Self.run(bench, "dmu-img", arguments + ["--untrusted"])
        #expect(outcome.exit != 0, "\(arguments)")
        #expect(
          outcome.error.contains("image \(image) names ") && outcome.error.contains(named)
            && outcome.error.contains(", which --untrusted refuses: if the image may use that"),
          "\(arguments): \(outcome.error)")
        #expect(try bench.names() == before)
      }
      // Without it what an image names is followed, and with it an image is still described.
      try bench.must("dmu-img", "map", "-f", format, image)
      try bench.must("dmu-img", "info", "--untrusted", "-f", format, image)
    }
    // One that names nothing is as before.
    for command in [["info"], ["map"], ["check"]] {
      let outcome = try Self.run(
        bench, "dmu-img", command + ["--untrusted", "-f", "vmdk", "base.vmdk"])
      #expect(outcome.exit == 0, "\(outcome)")
    }
    try bench.must(
      "dmu-img", "convert", "--untrusted", "-f", "vmdk", "-O", "raw", "base.vmdk", "t")
    try bench.must("cmp", "base", "t")
  }

  /// A base that the command names is opened; what that names is not.
  @Test func untrustedBases() throws {
    let bench = try Bench()
    try Self.makeNaming(bench)
    let words = "over.qcow2 names base as its base, which --untrusted refuses"
    for arguments in [
      ["create", "-f", "qcow2", "-b", "over.qcow2", "-F", "qcow2", "t"],
      ["convert", "-f", "raw", "-O", "qcow2", "-B", "over.qcow2", "-F", "qcow2", "base", "t"],
      ["rebase", "-u", "-f", "dscow", "-b", "over.qcow2", "-F", "qcow2", "over.dscow"],
    ] {
      try Self.refused(bench, words, "dmu-img", arguments + ["--untrusted"])
    }
    for arguments in [
      ["create", "-F", "qcow2", "t", "over.qcow2"],
      ["check", "-F", "qcow2", "--base", "over.qcow2", "over.dscow"],
      ["accept", "-F", "qcow2", "over.dscow", "over.qcow2"],
    ] {
      try Self.refused(bench, words, "dscow_tool", arguments + ["--untrusted"])
    }
    try Self.refused(
      bench, "as its base, which --untrusted refuses", "dscow_tool",
      ["accept", "--untrusted", "over.dscow"])
    try bench.must(
      "dmu-img", "create", "--untrusted", "-f", "qcow2", "-b", "base", "-F", "raw", "u")
  }

  // MARK: Files of 8 EiB

  /// A folder of a file system that has files of 8 EiB, which ext4 has not.
  @Test(.enabled(if: access("/dev/shm", W_OK) == 0)) func hugeFiles() throws {
    let bench = try Bench()
    let folder = "/dev/shm/dmu-odd-\(getpid())"
    try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: false)
    defer {
      do { try FileManager.default.removeItem(atPath: folder) } catch { print("left: \(error)") }
    }
    try bench.makeRaw("disk", size: 1 << 20, seed: 3)
    let most = Int64.max
    for (format, options) in [
      ("raw", []), ("qcow2", []), ("qcow2", ["-o", "refcount_bits=1"]),
      ("qcow2", ["-o", "cluster_size=512"]), ("dscow", []), ("qcow", []), ("vpc", []),
      ("vpc", ["-o", "subformat=fixed"]), ("vmdk", []),
    ] {
      let image = folder + "/image"
      try bench.must("rm", "-f", image)
      let convert = ["convert", "-f", "raw", "-O", format] + options + ["disk", image]
      #expect(try bench.run("dmu-img", convert).exit == 0)
      try bench.must("truncate", "-s", "\(most)", image)
      for command in [
        ["info"], ["check"], ["map"], ["dump"], ["convert", "-O", "raw"],
        ["convert", "-O", "qcow2"], ["compare"],
      ] {
        let other = command[0] == "convert" ? ["t"] : command[0] == "compare" ? ["disk"] : []
        let outcome = try Self.run(
          bench, "dmu-img", command + ["-f", format, image] + other)
        // A signal is a trap: whatever else is said is an answer.
        #expect(outcome.exit < 128, "\(command) of \(format) \(options): \(outcome)")
        guard format == "qcow2" || format == "dscow" else { continue }
        #expect(outcome.exit == 0, "\(command) of \(format) \(options): \(outcome)")
      }
      if format == "dscow" {
        for command in ["info", "check", "map"] {
          #expect(try Self.run(bench, "dscow_tool", [command, image]).exit == 0)
        }
      }
    }
  }

  /// A qcow2 image in a huge file whose clusters are far apart, and which counts some that it does
  /// not use: both are found, wherever they lie.
  @Test(.enabled(if: access("/dev/shm", W_OK) == 0)) func scatteredClusters() throws {
    let bench = try Bench()
    let image = "/dev/shm/dmu-scattered-\(getpid())"
    defer { _ = unlink(image) }
    try bench.must("dmu-img", "create", "-q", "-f", "qcow2", image, "64M")
    try bench.must("truncate", "-s", "\(Int64.max)", image)
    do {
      let store = try FileStore(path: image, writable: true)
      func put(_ value: UInt64, at offset: UInt64) throws {
        try store.write(withUnsafeBytes(of: value.bigEndian) { [UInt8]($0) }, at: offset)
      }
      func number(at offset: UInt64) throws -> UInt64 {
        try store.read(at: offset, count: 8).reduce(0) { $0 << 8 | UInt64($1) }
      }
      let (l1, table) = (try number(at: 40), try number(at: 48))
      let cluster: UInt64 = 65536
      // An L2 table at 1 TiB, data at 2 TiB and 3 TiB, none of them counted; a block of refcounts
      // for what lies at 4 TiB, which counts itself and one cluster more.
      let l2: UInt64 = 1 << 40
      try put(l2 | 1 << 63, at: l1)
      try put(2 << 40 | 1 << 63, at: l2)
      try put(3 << 40 | 1 << 63, at: l2 + 8)
      let counts: UInt64 = 4 << 40
      let perBlock = cluster / 2
      try put(counts, at: table + counts / cluster / perBlock * 8)
      try put(0x0001_0001_0000_0000, at: counts)
    }
    let outcome = try Self.run(bench, "dmu-img", ["check", "-f", "qcow2", "--json", image])
    #expect(outcome.exit == 2, "\(outcome)")
    let clusters = [1 << 40, 2 << 40, 3 << 40].map { $0 / 65536 }
    for cluster in clusters {
      #expect(
        outcome.out.contains("cluster \(cluster) is used 1 times and counted 0 times"),
        "\(outcome.out)")
    }
    let leak = (4 << 40) / 65536 + 1
    #expect(
      outcome.out.contains("cluster \(leak) is used 0 times and counted 1 times"),
      "\(outcome.out)")
    #expect(outcome.out.contains("\"leaks\": 1"), "\(outcome.out)")
  }
}
