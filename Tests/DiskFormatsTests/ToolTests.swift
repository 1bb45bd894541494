// SPDX-License-Identifier: Apache-2.0
// dscow_tool as it is run: the words it prints, the way it ends.

import BlockIO
import DiskFormats
import DiskModel
import Foundation
import Testing
import TestSupport

/// A folder that goes when the test does, and the tool run in it.
final class ToolRun {
  let folder: URL

  init() throws {
    folder = FileManager.default.temporaryDirectory
      .appendingPathComponent("dscow-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
  }

  deinit {
    // A folder that stays behind in the temporary directory fails no test.
    do { try FileManager.default.removeItem(at: folder) } catch {}
  }

  func path(_ name: String) -> String { folder.appendingPathComponent(name).path }

  func makeFile(_ name: String, size: UInt64, contents: [UInt8] = []) throws {
    try Data(contents).write(to: URL(fileURLWithPath: path(name)))
    try FileStore(path: path(name), writable: true).resize(to: size)
  }

  struct Result {
    var exit: Int32
    var out: String
    var error: String
  }

  func run(_ arguments: String...) throws -> Result {
    let process = Process()
    process.executableURL = try Fixture.program("dscow_tool")
    process.arguments = arguments
    process.currentDirectoryURL = folder
    let (out, error) = (Pipe(), Pipe())
    process.standardOutput = out
    process.standardError = error
    try process.run()
    // Neither stream comes near what a pipe holds.
    let text = out.fileHandleForReading.readDataToEndOfFile()
    let errors = error.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return Result(
      exit: process.terminationStatus, out: String(decoding: text, as: UTF8.self),
      error: String(decoding: errors, as: UTF8.self))
  }
}

@Suite struct ToolTests {
  @Test func theFiveLinesOfTheHowTo() throws {
    let tool = try ToolRun()
    try tool.makeFile("base", size: 537_919_488)
    let result = try tool.run("-c", "store", "base")
    #expect(
      result.out == """
        Size:         537919488
        First block:  65536
        Block size:   4096
        Blocks:       131328
        Bitmap count: 4104

        """)
    #expect(result.error == "")
    #expect(result.exit == 0)
    let store = try FileStore(path: tool.path("store"), writable: false)
    #expect(try store.allocatedBytes() <= 65536)
  }

  @Test func optionsOfCreate() throws {
    let tool = try ToolRun()
    try tool.makeFile("base", size: 1_000_000)
    let result = try tool.run("-c", "store", "base", "-b", "8K", "--size", "1G")
    #expect(result.exit == 0)
    #expect(result.out.contains("Size:         1073741824\n"))
    #expect(result.out.contains("First block:  65536\nBlock size:   8192\nBlocks:       131072\n"))
    let again = try tool.run("create", "store", "base")
    #expect(again.exit == 1)
    #expect(
      again.error
        == "dscow_tool: store is not empty: choose another store or force it to be made anew (-f)\n"
    )
    let forced = try tool.run("-c", "store", "base", "-f")
    #expect(forced.exit == 0)
    // 1000000 bytes are 1953 sectors and an eighth: rounded up.
    #expect(forced.out.contains("Size:         1000448\n"))
    #expect(try tool.run("-c", "other", "--size", "1M").exit == 0)
  }

  @Test func refusalsOfCreate() throws {
    let tool = try ToolRun()
    try tool.makeFile("base", size: 65536)
    try tool.makeFile("empty", size: 0)
    for (arguments, message) in [
      (["s", "missing"], "base missing does not exist: check the path"),
      (["s", "base", "-b", "5000"], "block size 5000 is not a power of two from 4 KiB to 4 MiB"),
      (["s", "base", "-b", "8M"], "block size 8388608 is not a power of two from 4 KiB to 4 MiB"),
      (["s", "base", "-b", "8T"], "block size 8796093022208 is larger than 4 MiB"),
      (["s", "base", "--size", "65T"], "is not a multiple of 512 from 512 bytes to 64 TiB"),
      (["base", "base"], "base cannot be its own base"),
      (["base", "./base", "-f"], "base cannot be its own base"),
      (["s", "empty"], "/empty is empty: give the disk a size of its own"),
      (["s"], "a disk without a base needs a size"),
    ] {
      let result =
        switch arguments.count {
        case 1: try tool.run("-c", arguments[0])
        case 2: try tool.run("-c", arguments[0], arguments[1])
        case 3: try tool.run("-c", arguments[0], arguments[1], arguments[2])
        default: try tool.run("-c", arguments[0], arguments[1], arguments[2], arguments[3])
        }
      #expect(result.exit == 1)
      #expect(result.error.hasPrefix("dscow_tool: "))
      #expect(result.error.contains(message), "\(arguments): \(result.error)")
      #expect(!FileManager.default.fileExists(atPath: tool.path("s")))
    }
    #expect(try FileStore(path: tool.path("base"), writable: false).size == 65536)
  }

  @Test func aLiveStoreIsLeftAlone() throws {
    let tool = try ToolRun()
    try tool.makeFile("base", size: 65536)
    #expect(try tool.run("-c", "store", "base").exit == 0)
    let held = try FileStore(path: tool.path("store"), writable: true)
    try held.lock(exclusive: true)
    for command in ["info", "check", "map"] {
      let result = try tool.run(command, "store")
      #expect(result.exit == 1)
      #expect(
        result.error == "dscow_tool: store store is in use by another program: stop that first, "
          + "or look at it while it changes (-U)\n")
      #expect(try tool.run(command, "store", "-U").exit == 0)
    }
    #expect(try tool.run("-c", "store", "base", "-f").exit == 1)
    #expect(try tool.run("accept", "store").exit == 1)
    #expect(try tool.run("check", "--repair", "-U", "store").exit == 1)
    #expect(held.size == 131072)
  }

  @Test func infoCheckAndMap() throws {
    let tool = try ToolRun()
    try tool.makeFile("base", size: 3 * 4096)
    #expect(try tool.run("-c", "store", "base", "-b", "4k", "--size", "20K").exit == 0)
    do {
      let store = try FileStore(path: tool.path("store"), writable: true)
      let base = try FileStore(path: tool.path("base"), writable: false)
      let disk = try Dscow.open(store: store, base: base, writable: true)
      let engine = MiniEngine(disk, store: store, base: base)
      try engine.write(8, Stamp.sectors(8, 7))
      try engine.flush()
    }
    let info = try tool.run("info", "store")
    #expect(info.out.contains("Allocated:    1 blocks\n"))
    #expect(info.out.contains("Base:         \(tool.path("base"))\n"))
    let json = try tool.run("info", "--json", "store")
    let object = try #require(
      try JSONSerialization.jsonObject(with: Data(json.out.utf8)) as? [String: Any])
    #expect(object["allocated-blocks"] as? Int == 1)
    #expect((object["base"] as? [String: Any])?["size"] as? Int == 12288)
    #expect(
      try tool.run("map", "store").out == """
        Start           Length          Place  Offset there
        0               4096            base   0
        4096            4096            store  69632
        8192            4096            base   8192
        12288           8192            zero

        """)
    #expect(
      try tool.run("map", "--json", "store").out == """
        [
          {"start": 0, "length": 4096, "place": "base", "offset": 0},
          {"start": 4096, "length": 4096, "place": "store", "offset": 69632},
          {"start": 8192, "length": 4096, "place": "base", "offset": 8192},
          {"start": 12288, "length": 8192, "place": "zero", "offset": null}
        ]

        """)
    let check = try tool.run("check", "store")
    #expect(check.out == "1 of 5 blocks are in the store\nstore is clean\n")
    #expect(check.exit == 0)
  }

  @Test func checkTellsLeftoversFromDamage() throws {
    let tool = try ToolRun()
    try tool.makeFile("base", size: 5 * 4096)
    #expect(try tool.run("-c", "store", "base", "-b", "4k").exit == 0)
    let store = try FileStore(path: tool.path("store"), writable: true)
    // Data of block 2, which has no bit.
    try store.write(Stamp.sectors(8, 9), at: 65536 + 2 * 4096)
    var check = try tool.run("check", "store")
    #expect(check.exit == 3)
    #expect(check.out.hasPrefix("leftover: 1 blocks take up space without being in use\n"))
    #expect(try tool.run("check", "--repair", "store").exit == 0)
    #expect(try store.read(at: 65536 + 2 * 4096, count: 4096).allSatisfy { $0 == 0 })
    // A header copy, and a bit of a block that is none.
    try store.write([1], at: 4096 + 600)
    try store.write([0xE1], at: 8192)
    check = try tool.run("check", "store")
    #expect(check.exit == 2)
    #expect(check.out.contains("damage: the second copy of the header is damaged\n"))
    #expect(check.out.contains("damage: the bitmap speaks of blocks past the disk's end\n"))
    #expect(try tool.run("check", "--repair", "store").exit == 0)
    #expect(try tool.run("check", "store").out.hasPrefix("1 of 5 blocks"))
    // Both header copies; a store cut short; no store at all.
    try store.resize(to: 80000)
    check = try tool.run("check", "store", "--json")
    #expect(check.exit == 2)
    #expect(check.out.contains("cut short: it has 80000 bytes where 86016 belong"))
    try store.write([1], at: 600)
    try store.write([1], at: 4096 + 600)
    #expect(try tool.run("check", "store").exit == 2)
    #expect(try tool.run("check", "base").exit == 1)
  }

  @Test func aChangedBaseIsNoticedAndAccepted() throws {
    let tool = try ToolRun()
    try tool.makeFile("base", size: 65536)
    #expect(try tool.run("-c", "store", "base").exit == 0)
    try FileStore(path: tool.path("base"), writable: true).resize(to: 70000)
    let check = try tool.run("check", "store", "--base", "base")
    #expect(check.exit == 2)
    #expect(check.out.contains("base base has changed: its size was 65536 and is 70000 bytes"))
    let accept = try tool.run("accept", "store")
    #expect(accept.out == "store now belongs to \(tool.path("base")) as it is\n")
    #expect(try tool.run("check", "store", "--base", "base").exit == 0)
    #expect(try tool.run("info", "store").out.contains("Header:       change 2, both copies good"))
  }

  /// Needs a file system for files of 64 TiB, which the memory file system is.
  @Test(.enabled(if: FileManager.default.isWritableFile(atPath: "/dev/shm")))
  func aDiskOf64TiB() throws {
    let tool = try ToolRun()
    let path = "/dev/shm/dscow-\(UUID().uuidString)"
    defer { unlink(path) }
    try tool.makeFile("base", size: 65536)
    let start = ContinuousClock.now
    let result = try tool.run("-c", path, "base", "--size", "64T", "-b", "4K")
    #expect(result.out.contains("Blocks:       17179869184\nBitmap count: 536870912\n"))
    #expect(try tool.run("info", path).exit == 0)
    #expect(try tool.run("check", path).exit == 0)
    #expect(ContinuousClock.now - start < .seconds(5))
    #expect(try FileStore(path: path, writable: false).allocatedBytes() < 1 << 20)
  }
}
