// SPDX-License-Identifier: Apache-2.0
// Formats in shared libraries: the example and the manual's own are built and served.

import BlockIO
import Glibc
import SystemIO
import Testing
import TestSupport

private let hasCompiler = access("/usr/bin/cc", X_OK) == 0

@Suite("Plugins", .enabled(if: hasCompiler)) struct PluginTests {
  private let image: TestImage
  private var folder: TemporaryFolder { image.folder }
  private static let root = String(#filePath.dropLast("Tests/WorkerTests/PluginTests.swift".count))

  init() throws {
    image = try TestImage(sectors: 2048, blockSize: 65536, create: false)
    #expect(mkdir(image.folder.file("plugins"), 0o755) == 0)
  }

  private func build(_ source: String, as name: String) throws -> String {
    let library = folder.file("plugins/\(name).so")
    let command = Command(
      "/usr/bin/cc",
      [
        "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I",
        Self.root + "Sources/CPlugin/include", "-o", library, source,
      ])
    #expect(try command.start().wait(milliseconds: 60_000) == .exited(0))
    #expect(chmod(library, 0o644) == 0)
    return library
  }

  private func build(text: String, as name: String) throws -> String {
    let path = folder.file("\(name).c")
    let file = try FileStore(
      Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600), name: path)
    try file.write(Array(text.utf8), at: 0)
    return try build(path, as: name)
  }

  private func cowd(_ name: String, _ arguments: String...) throws -> CowdProcess {
    try CowdProcess(
      [
        "-p", name, "--plugins", folder.file("plugins"), "--nbd", "unix:" + folder.file("nbd"),
      ] + arguments, folder: folder)
  }

  private func refusal(_ name: String, _ store: String) throws -> String {
    let process = try cowd(name, store)
    #expect(try process.process.wait(milliseconds: 10_000) == .exited(1))
    return try process.messages()
  }

  @Test func theExampleIsAFormat() throws {
    var seeds = SeededRandom(announcedAs: "the example plugin")
    _ = try build(Self.root + "examples/plugin/overlay.c", as: "overlay")
    let path = folder.file("store.overlay")
    _ = try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600)
    let load = RandomLoad(image.model(), seed: seeds.next(), longest: 300, repeats: false)
    for round in 0..<3 {
      let process = try cowd("overlay", "--base", image.base, path)
      try process.expectReady()
      let client = try TestNBDClient(path: folder.file("nbd"))
      while load.replies < 400 * (round + 1), load.wrongs.isEmpty, !client.ended {
        try load.turn(client, depth: 8, milliseconds: 1)
      }
      try load.drain(client)
      if round == 1 {
        // A death: what was not flushed may be gone, what was is there.
        try process.kill9()
      } else {
        try process.stop()
      }
      let reader = try cowd("overlay", "--read-only", "--base", image.base, path)
      try reader.expectReady()
      let all = try TestNBDClient(path: folder.file("nbd"))
      load.settle(try all.run(.read, offset: 0, length: 2048 * 512), after: "round \(round)")
      #expect(load.wrongs == [])
      try reader.stop()
    }
    guard access("/usr/bin/qemu-io", X_OK) == 0 else { return }
    let process = try cowd("overlay", "--base", image.base, path)
    try process.expectReady()
    let judge = Command(
      "/usr/bin/qemu-io",
      [
        "-f", "raw", "-c", "write -P 7 64k 96k", "-c", "flush", "-c", "read -P 7 64k 96k",
        "nbd+unix:///?socket=" + folder.file("nbd"),
      ])
    #expect(try judge.start().wait(milliseconds: 30_000) == .exited(0))
    try process.stop()
  }

  @Test func theManualOpensWithACompletePlugin() throws {
    let manual = Self.root + "man/man7/dmu-plugin.7"
    let file = try FileStore(path: manual, writable: false)
    let text = String(decoding: try file.read(at: 0, count: Int(file.size)), as: UTF8.self)
    let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
    let start = try #require(lines.firstIndex(of: ".EX"))
    let end = try #require(lines.firstIndex(of: ".EE"))
    let source = lines[(start + 1)..<end].joined(separator: "\n").replacing("\\-", with: "-")
    _ = try build(text: source, as: "same")
    let process = try cowd("same", image.base)
    try process.expectReady()
    let client = try TestNBDClient(path: folder.file("nbd"))
    let found = try client.run(.read, offset: 512, length: 512)
    #expect(found == Stamp.sectors(1, TestImage.stamp(1)))
    try client.run(.write, offset: 512, length: 512, data: Stamp.sectors(1, 5))
    try process.stop()
    let written = try FileStore(path: image.base, writable: false).read(at: 512, count: 512)
    #expect(written == Stamp.sectors(1, 5))
  }

  @Test func whatIsNotSafeOrNotAPluginIsRefused() throws {
    let old = """
      #include <dmu_plugin.h>
      static const struct dmu_plugin plugin = {.version = 99};
      const struct dmu_plugin *dmu_plugin(void) { return &plugin; }
      """
    let library = try build(text: old, as: "old")
    #expect(try refusal("old", image.base).contains("is of version 99 of the interface"))
    #expect(chmod(library, 0o666) == 0)
    #expect(try refusal("old", image.base).contains("old.so is not safe to load from"))
    #expect(chmod(library, 0o644) == 0 && chmod(folder.file("plugins"), 0o777) == 0)
    #expect(try refusal("old", image.base).contains("plugins is not safe to load from"))
    #expect(chmod(folder.file("plugins"), 0o755) == 0)
    _ = try build(text: "int nothing;", as: "nothing")
    #expect(try refusal("nothing", image.base).contains("nothing.so cannot be loaded: "))
    #expect(try refusal("../old", image.base).contains("format '../old' is unknown"))
    #expect(
      try refusal("none", image.base).contains("and no plugin \(folder.path)/plugins/none.so"))
    let lying = """
      #include <dmu_plugin.h>
      static int open_it(const struct dmu_host *host, struct dmu_disk *disk) {
        disk->size = host->size(host, DMU_STORE);
        disk->block_size = 4096;
        return 0;
      }
      static int find(void *state, uint64_t block, uint64_t limit, struct dmu_extent *extent) {
        (void)state; (void)limit;
        extent->block = block;
        extent->count = 1 << 30;
        extent->device = block == 0 ? 0 : 77;
        return 0;
      }
      static const struct dmu_plugin plugin = {
        .version = DMU_PLUGIN_VERSION, .open = open_it, .find = find};
      const struct dmu_plugin *dmu_plugin(void) { return &plugin; }
      """
    _ = try build(text: lying, as: "lying")
    let process = try cowd("lying", image.base)
    try process.expectReady()
    let client = try TestNBDClient(path: folder.file("nbd"))
    #expect(throws: IOError.self) {
      try client.run(.write, offset: 0, length: 512, data: [UInt8](repeating: 1, count: 512))
    }
    try process.stop()
  }

  @Test func writesAreHeldUntilTheyAreLetGo() throws {
    let trace = folder.file("trace")
    let pipe = folder.file("pipe")
    let process = try CowdProcess(
      [
        "-p", "raw", "--trace", trace, "--hold", pipe, "--nbd", "unix:" + folder.file("nbd"),
        image.base,
      ], folder: folder)
    try process.expectReady()
    let client = try TestNBDClient(path: folder.file("nbd"))
    client.submit(.write, handle: 1, offset: 0, length: 512, data: Stamp.sectors(1, 5), fua: false)
    client.submit(
      .write, handle: 2, offset: 131_072, length: 512, data: Stamp.sectors(1, 6), fua: false)
    var replies: [UInt64] = []
    func taken(within milliseconds: Int32) throws -> [UInt64] {
      var found: [UInt64] = []
      for _ in 0..<10 { found += try client.turn(milliseconds: milliseconds / 10).map(\.handle) }
      return found
    }
    func lines() throws -> String {
      let file = try FileStore(path: trace, writable: false)
      return String(decoding: try file.read(at: 0, count: Int(file.size)), as: UTF8.self)
    }
    for _ in 0..<100 where try !lines().contains("held 2 ") { replies += try taken(within: 100) }
    #expect(replies == [])
    let said = try lines()
    #expect(said.contains("fault ") && said.contains(" read ") || said.contains(" write "))
    #expect(said.contains("held 1 write device 0 sector 0 bytes 512"))
    #expect(said.contains("held 2 write device 0 sector 256 bytes 512"))
    let orders = try Descriptor(path: pipe, flags: O_WRONLY)
    #expect(write(orders.raw, "release 2\n", 10) == 10)
    for _ in 0..<100 where replies.isEmpty { replies += try taken(within: 100) }
    #expect(replies == [2])
    // The end lets go what is held.
    try process.stop()
    let bytes = try FileStore(path: image.base, writable: false).read(at: 0, count: 512)
    #expect(bytes == Stamp.sectors(1, 5))
  }
}
