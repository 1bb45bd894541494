// SPDX-License-Identifier: Apache-2.0
// What the tools do not do: write guesses down, follow what only looks like an image, replace what
// is in use, or leave a name with nothing behind it.

import BlockIO
import DiskFormats
import Fakes
import Foundation
import SystemIO
import Testing
import TestSupport

@testable import ImageTool

@Suite struct SafetyTests {
  private static func refused(
    _ bench: Bench, _ words: String, _ program: String, _ arguments: String...
  ) throws {
    let outcome = try bench.run(program, arguments)
    #expect(outcome.exit != 0, "\(arguments)")
    #expect(outcome.error.contains(words), "\(arguments): \(outcome.error)")
  }

  // MARK: Guesses

  @Test func guessesAreNotWrittenDown() throws {
    let bench = try Bench()
    try bench.makeRaw("raw", size: 1 << 20, seed: 1)
    try bench.must("qemu-img", "create", "-q", "-f", "qcow2", "image", "1M")
    try bench.must(
      "qemu-img", "create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", "overlay", "1M")
    let words = "backing file given without its format"
    for base in ["raw", "image"] {
      for format in ["qcow2", "dscow", "qcow", "vpc"] {
        try Self.refused(bench, words, "dmu-img", "create", "-f", format, "-b", base, "t")
      }
      try Self.refused(
        bench, words, "dmu-img", "convert", "-f", "raw", "-O", "qcow2", "-B", base, "raw", "t")
      for unsafe in [[], ["-u"]] {
        let outcome = try bench.run(
          "dmu-img", ["rebase", "-f", "qcow2", "-b", base] + unsafe + ["overlay"])
        #expect(outcome.exit == 1 && outcome.error.contains(words), "\(outcome.error)")
      }
    }
    #expect(try bench.names() == ["image", "overlay", "raw"])
    // Stated, and by what qemu-img says in options too.
    try bench.must("dmu-img", "create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", "t")
    try bench.must(
      "dmu-img", "create", "-q", "-f", "qcow2", "-o", "backing_file=raw,backing_fmt=raw", "u")
    #expect(try bench.must("qemu-img", "info", "u").contains("backing file format: raw"))
    // A VHD image has no word for a base of another format.
    try Self.refused(
      bench, "can remember no other", "dmu-img", "create", "-f", "vpc", "-b", "image", "-F",
      "qcow2", "v")
  }

  /// A raw disk whose guest wrote an image's header: no command follows what that names.
  @Test func guessesAreNotFollowed() throws {
    let bench = try Bench()
    try bench.makeRaw("secret", size: 1 << 20, seed: 2)
    let secret = try bench.bytes("secret")
    try bench.must(
      "qemu-img", "create", "-q", "-f", "qcow2", "-b", "secret", "-F", "raw", "disk", "1M")
    let before = try bench.bytes("disk")
    for arguments in [
      ["convert", "-O", "raw", "disk", "t"], ["map", "disk"], ["compare", "disk", "disk"],
      ["commit", "disk"], ["resize", "disk", "2M"], ["info", "--backing-chain", "disk"],
      ["rebase", "-b", "", "disk"], ["bench", "-c", "1", "disk"],
      ["bench", "-w", "-c", "1", "disk"],
    ] {
      let outcome = try bench.run("dmu-img", arguments)
      #expect(outcome.exit != 0, "\(arguments)")
      #expect(outcome.error.contains("nobody says that it is one"), "\(arguments) \(outcome.error)")
    }
    try Self.refused(bench, "nobody says", "dscow_tool", "-c", "store", "disk")
    // As a base of what cannot say its format.
    try bench.must("dmu-img", "create", "-q", "-f", "qcow", "-b", "disk", "-F", "raw", "top")
    try Self.refused(bench, "nobody says", "dmu-img", "convert", "-f", "qcow", "top", "t")
    try Self.refused(bench, "nobody says", "dmu-img", "commit", "-d", "-f", "qcow", "top")
    try bench.must(
      "dmu-img", "convert", "-f", "qcow", "--base-format", "raw", "-O", "raw", "top", "t")
    #expect(try bench.bytes("disk") == before && bench.bytes("secret") == secret)
    #expect(try bench.bytes("t")[..<before.count] == before[...])
    // Its header is nobody's to doubt: this is told, and not followed.
    #expect(try bench.must("dmu-img", "info", "disk").contains("backing file: secret"))
  }

  @Test func unknownFormats() throws {
    let bench = try Bench()
    for (name, bytes) in [("vhdx", Array("vhdxfile".utf8)), ("gz", [0x1F, 0x8B, 8])] {
      let all = bytes + [UInt8](repeating: 0, count: (1 << 20) - bytes.count)
      try Data(all).write(to: URL(fileURLWithPath: bench.path("f")))
      for arguments in [
        ["info", "f"], ["check", "f"], ["convert", "-O", "raw", "f", "t"], ["map", "f"],
        ["compare", "f", "f"], ["resize", "f", "2M"], ["snapshot", "-l", "f"], ["dump", "f"],
      ] {
        let outcome = try bench.run("dmu-img", arguments)
        #expect(outcome.exit != 0 && outcome.error.contains("of format \(name)"), "\(outcome)")
      }
      try Self.refused(bench, "of format \(name)", "dscow_tool", "-c", "store", "f")
      try bench.must("dmu-img", "info", "-f", "raw", "f")
      try bench.must("dscow_tool", "create", "-F", "raw", "store", "f")
      try FileManager.default.removeItem(atPath: bench.path("store"))
    }
  }

  /// A store over an image is as long as the disk in it.
  @Test func dscowOverAnImage() throws {
    let bench = try Bench()
    try bench.makeRaw("raw", size: 20 << 20, seed: 3)
    try bench.must("dmu-img", "convert", "-f", "raw", "-c", "-O", "qcow2", "raw", "image")
    try bench.must(
      "qemu-img", "create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", "top", "24M")
    #expect(try bench.must("dscow_tool", "-c", "a", "image").contains("Size:         \(20 << 20)"))
    #expect(
      try bench.must("dscow_tool", "create", "-F", "qcow2", "b", "top").contains("\(24 << 20)"))
    try bench.must("dmu-img", "compare", "-f", "dscow", "a", "-F", "raw", "raw")
    try bench.must("dscow_tool", "check", "--base", "image", "a")
    try bench.must("dscow_tool", "accept", "a", "image")
    try bench.must("dmu-img", "compare", "-f", "dscow", "a", "-F", "raw", "raw")
  }

  // MARK: Replacing

  /// What is replaced keeps owner, mode and its other names.
  @Test func ownerModeAndNames() throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 3 << 20, seed: 4)
    try bench.must("dmu-img", "create", "-q", "-f", "raw", "t", "1M")
    try bench.must("chmod", "0640", "t")
    let isRoot = getuid() == 0
    if isRoot { try bench.must("chown", "1234:4321", "t") }
    try bench.must("ln", "t", "other")
    func status(_ name: String) throws -> stat {
      var found = stat()
      guard stat(bench.path(name), &found) == 0 else { throw IOError.last("examine", name) }
      return found
    }
    let before = try status("t")
    for round in 0..<2 {
      try bench.must("dmu-img", "convert", "-f", "raw", "-O", "qcow2", "a", "t")
      try bench.must("qemu-img", "compare", "-f", "raw", "a", "-F", "qcow2", "t")
      let after = try status("t")
      #expect(after.st_uid == before.st_uid && after.st_gid == before.st_gid)
      #expect(after.st_mode == before.st_mode)
      if round == 0 {
        #expect(after.st_ino == before.st_ino && after.st_nlink == 2)
        #expect(try bench.bytes("other") == bench.bytes("t"))
        try FileManager.default.removeItem(atPath: bench.path("other"))
      }
    }
    #expect(try bench.names() == ["a", "t"])
    if !isRoot { print("SKIPPED: another owner: this needs root") }
  }

  /// The new bytes are on the medium before the name points to them, whatever the cache mode.
  @Test func flushedBeforeItIsNamed() throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 1 << 20, seed: 5)
    try bench.makeRaw("t", size: 1 << 20, seed: 6)
    let log = bench.path("log")
    for options in [["-O", "qcow2"], ["-O", "raw"], ["-O", "vpc"], ["-O", "vmdk"]] {
      let tool = try Bench.program("dmu-img").path
      let outcome = try bench.run(
        "strace",
        ["-f", "-o", log, "-e", "trace=fsync,fdatasync,rename,renameat,renameat2,pwrite64", tool]
          + ["convert", "-f", "raw"] + options + ["a", "t"])
      #expect(outcome.exit == 0, "\(outcome.error)")
      let calls = try String(contentsOfFile: log, encoding: .utf8).split(separator: "\n")
      let named = calls.firstIndex { $0.contains("rename") } ?? -1
      #expect(named > 0, "\(calls.suffix(5))")
      let written = calls[..<max(0, named)].lastIndex { $0.contains("pwrite64") } ?? 0
      #expect(calls[written..<named].contains { $0.contains("fsync(") }, "\(calls.suffix(9))")
      // And the name after it.
      #expect(calls[named...].contains { $0.contains("fsync(") })
    }
  }

  /// Killed at any step, a conversion over a file leaves the old one or the new one.
  @Test func killedWhileReplacing() throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 256 << 10, seed: 7)
    try bench.makeRaw("old", size: 256 << 10, seed: 8)
    let tool = try Bench.program("dmu-img").path
    var killed = 0
    for call in ["pwrite64", "fsync", "fdatasync", "linkat", "rename", "ftruncate"] {
      for step in [1, 2, 3, 5, 8] {
        try bench.must("cp", "old", "t")
        let outcome = try bench.run(
          "strace",
          [
            "-f", "-o", "/dev/null", "-e", "trace=\(call)", "-e",
            "inject=\(call):signal=KILL:when=\(step)", tool, "convert", "-f", "raw", "-O", "qcow2",
            "a", "t",
          ])
        let same = { name, format in
          try bench.run(
            "qemu-img", ["compare", "-f", "raw", name, "-F", format, "t"]
          ).exit == 0
        }
        if outcome.exit == 0 {
          #expect(try same("a", "qcow2"), "\(call) \(step)")
        } else {
          killed += 1
          let isOld = try bench.bytes("t") == bench.bytes("old")
          #expect(try isOld || same("a", "qcow2"), "\(call) \(step)")
        }
        // What has a temporary name at that moment stays; nobody takes it for an image.
        for name in try bench.names() where name.hasSuffix(".part") {
          try FileManager.default.removeItem(atPath: bench.path(name))
        }
      }
    }
    #expect(killed > 5)
    print("\(killed) conversions over a file were killed")
  }

  /// A file that somebody uses is not replaced, whatever it is to the image.
  @Test func lockedFilesStay() throws {
    let bench = try Bench()
    try bench.makeRaw("a", size: 1 << 20, seed: 9)
    for (file, arguments) in [
      ("data", ["-O", "qcow2", "-o", "data_file=data"]),
      ("t-flat.vmdk", ["-O", "vmdk", "-o", "subformat=monolithicFlat"]),
      ("t-s001.vmdk", ["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"]),
    ] {
      try bench.makeRaw(file, size: 1 << 20, seed: 10)
      let before = try bench.bytes(file)
      do {
        let holder = try ImageFile.base(bench.path(file))
        let target = file == "data" ? "t" : "t.vmdk"
        let outcome = try bench.run(
          "dmu-img", ["convert", "-f", "raw"] + arguments + ["a", target])
        #expect(outcome.exit == 1 && outcome.error.contains("in use"), "\(outcome)")
        let options = Array(arguments.suffix(2))
        let made = try bench.run(
          "dmu-img", ["create", "-f", arguments[1]] + options + [target, "1M"])
        #expect(made.exit == 1 && made.error.contains("in use"), "\(made)")
        #expect(holder.size == 1 << 20)
      }
      #expect(try bench.bytes(file) == before)
      let target = file == "data" ? "t" : "t.vmdk"
      try bench.must(
        "dmu-img", "convert", "-f", "raw", arguments[0], arguments[1], arguments[2], arguments[3],
        "a", target)
      try bench.must("qemu-img", "compare", "-f", "raw", "a", "-F", arguments[1], target)
    }
  }

  // MARK: Chains and snapshots

  /// An image that is shorter than its base hides what that has behind its end.
  @Test func shortMiddle() throws {
    let bench = try Bench()
    try bench.must("sh", "-c", "head -c 2M /dev/zero | tr '\\0' b >base")
    try bench.must(
      "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "mid", "1M")
    try bench.must(
      "qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top", "2M")
    try bench.must(
      "dmu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-B", "base", "-F", "raw", "top", "t")
    try bench.must("qemu-img", "compare", "top", "t")
    try bench.must("dmu-img", "compare", "-f", "qcow2", "top", "-F", "qcow2", "t")
  }

  @Test func internalSnapshots() throws {
    let bench = try Bench()
    for name in ["base", "other"] { try bench.makeRaw(name, size: 1 << 20, seed: 11) }
    try bench.must(
      "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "1M")
    try bench.must("qemu-img", "snapshot", "-c", "then", "top")
    let before = try bench.bytes("base")
    try Self.refused(bench, "internal snapshots", "dmu-img", "commit", "-f", "qcow2", "top")
    try Self.refused(bench, "internal snapshots", "dmu-img", "commit", "-d", "-f", "qcow2", "top")
    try Self.refused(
      bench, "internal snapshots", "dmu-img", "rebase", "-f", "qcow2", "-b", "other", "-F", "raw",
      "top")
    #expect(try bench.bytes("base") == before)
  }

  /// A flat image of several files of 2 GiB, written over their border.
  @Test func flatExtents() throws {
    let bench = try Bench()
    let size = (2 << 30) + (3 << 20)
    try bench.must("truncate", "-s", "\(size)", "a")
    try bench.makeRaw("part", size: 4 << 20, seed: 12)
    try bench.must(
      "dd", "if=part", "of=a", "bs=1M", "seek=2046", "conv=notrunc", "status=none")
    try bench.must(
      "dmu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", "a",
      "t.vmdk")
    try bench.must("qemu-img", "compare", "-f", "raw", "a", "-F", "vmdk", "t.vmdk")
    try bench.must("dmu-img", "compare", "-f", "raw", "a", "-F", "vmdk", "t.vmdk")
  }

  // MARK: dscow

  /// A commit that fails before it has written leaves a store that notices a changed base.
  @Test func failedCommit() throws {
    let base = MemoryStore("base", bytes: [UInt8](repeating: 3, count: 1 << 20))
    let store = MemoryStore("store")
    try Dscow.create(store: store, base: base, baseName: "base", size: 2 << 20)
    func resolve(_ request: NamedFile) throws(ImageError) -> any ByteStore { base }
    func commit(into target: any ByteStore) throws(ImageError) {
      try ImageTool.commit(
        store, .dscow, into: target, .raw, keep: false, progress: Progress(on: false)
      ) { _ throws(ImageError) in target }
    }
    // A base that cannot grow.
    let device = SimulatedDisk("base", contents: base.contents())
    let error = #expect(throws: ImageError.self) { try commit(into: device) }
    #expect(error?.code == .badRequest)
    #expect(try !Dscow.header(of: store).header.isCommitting)
    // Whatever step it fails at: marked, a base that differs elsewhere is noticed.
    for step in 0..<40 {
      let copy = MemoryStore("store", bytes: store.contents())
      let below = MemoryStore("base", bytes: base.contents())
      let failing = FailingStore(below, failAt: step, forGood: true)
      do {
        try ImageTool.commit(
          copy, .dscow, into: failing, .raw, keep: false, progress: Progress(on: false)
        ) { _ throws(ImageError) in failing }
      } catch { #expect(error.cause?.code == 5) }
      _ = try Dscow.open(store: copy, base: below, writable: false)
      try below.write([UInt8](repeating: 9, count: 1 << 19), at: 1 << 18)
      #expect(throws: ImageError.self, "step \(step)") {
        try Dscow.open(store: copy, base: below, writable: false)
      }
    }
  }

  /// A store whose making was broken off at any step is made again without being forced.
  @Test func halfMadeStores() throws {
    let base = MemoryStore("base", bytes: [UInt8](repeating: 3, count: 1 << 20))
    for seed in Depth.seeds(400) {
      var random = SplitMix64(seed: seed)
      let machine = Machine(["store"])
      let store = machine.file("store")
      machine.limit(random.below(16))
      do {
        try Dscow.create(store: store, base: base, baseName: "base", blockSize: 65536, size: 65536)
      } catch { #expect(error.cause?.code == 5) }
      let left = machine.after(seed % 2 == 0 ? .kill : .powerCut, using: &random).file("store")
      // No header is what was broken off before it was a store: that it cannot be read is the answer.
      if (try? Dscow.header(of: left)) == nil {
        try Dscow.create(store: left, base: base, baseName: "base", blockSize: 65536, size: 65536)
      }
      _ = try Dscow.open(store: left, base: base, writable: true)
    }
    // What is not ours is still nobody's to overwrite.
    let foreign = MemoryStore("store", bytes: [UInt8](repeating: 0, count: 600) + [1])
    #expect(throws: ImageError.self) {
      try Dscow.create(store: foreign, base: base, baseName: "base")
    }
  }
}
