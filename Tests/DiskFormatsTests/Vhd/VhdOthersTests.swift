// SPDX-License-Identifier: Apache-2.0
// VHD images as others make them: XenServer's batmap and locators, Windows' locators with room,
// devices, sizes by creator, raw bases, dead paths, hostile tables.

import BlockIO
import Fakes
import Foundation
import SystemIO
import Testing
import TestSupport

@testable import DiskFormats

@Suite struct VhdOthersTests {
  /// A header of another maker, written out with its sums.
  struct Made {
    var header: VhdHeader
    var locators: [(code: String, offset: UInt64, space: UInt32, path: [UInt8])] = []

    init(_ kind: VhdKind, size: UInt64, creator: String = "win ", blockSize: UInt64 = 65536) {
      header = VhdHeader(
        kind: kind, size: size, uuid: [UInt8](repeating: 7, count: 16),
        creator: Array(creator.utf8), timestamp: 0)
      header.headerOffset = kind == .fixed ? 0 : 512
      header.tableOffset = 4096
      header.tableBlock = blockSize
      header.tableEntries = UInt32((size + blockSize - 1) / blockSize)
    }

    /// The image, without a block, in a store.
    func store(_ name: String = "store") throws -> MemoryStore {
      let store = MemoryStore(name)
      guard header.kind != .fixed else {
        try store.resize(to: header.size)
        try store.write(header.encodedFooter(), at: header.size)
        return store
      }
      var dynamic = header.encodedDynamic()
      for (index, locator) in locators.enumerated() {
        let at = 576 + index * 24
        dynamic.replaceSubrange(at..<(at + 4), with: Array(locator.code.utf8))
        dynamic.putBig(locator.space, at: at + 4)
        dynamic.putBig(UInt32(locator.path.count), at: at + 8)
        dynamic.putBig(locator.offset, at: at + 16)
      }
      dynamic.putBig(VhdHeader.checksum(dynamic, at: 36), at: 36)
      try store.write(header.encodedFooter(), at: 0)
      try store.write(dynamic, at: 512)
      let table = [UInt8](repeating: 0xFF, count: Int(header.tableSize))
      try store.write(table, at: header.tableOffset)
      for locator in locators { try store.write(locator.path, at: locator.offset) }
      try store.write(header.encodedFooter(), at: (store.size + 511) / 512 * 512)
      return store
    }
  }

  private static func utf16(_ text: String) -> [UInt8] {
    text.utf16.flatMap { [UInt8($0 & 255), UInt8($0 >> 8)] }
  }

  private static func engine(_ store: any ByteStore, base: (any ByteStore)? = nil) throws
    -> DeviceEngine
  {
    DeviceEngine(try Vhd.open(store: store, base: base, writable: true), store: store)
  }

  private static func pattern(_ sectors: Int, _ value: UInt8) -> [UInt8] {
    [UInt8](repeating: value, count: sectors * 512)
  }

  // MARK: What belongs to others

  /// A first block goes behind the locators and the room that is kept for them.
  @Test func locatorsKeepTheirRoom() throws {
    var made = Made(.differencing, size: 1 << 20)
    made.locators = [
      ("W2ku", 8192, 4096, Self.utf16("C:\\images\\base.vhd")),
      ("W2ru", 16384, 65536, Self.utf16(".\\base.vhd")),
      ("XXXX", 90112, 8, [1, 2, 3, 4]),
    ]
    let store = try made.store()
    let base = MemoryStore("base", bytes: Self.pattern(2048, 9))
    let before = store.contents()
    let engine = try Self.engine(store, base: base)
    try engine.write(0, Self.pattern(128, 0x41))
    try engine.flush()
    let place = try #require(try (engine.format as? Vhd)?.place(of: 0))
    #expect(place >= 90112 + 8 * 512)
    #expect(store.contents()[8192..<90116] == before[8192..<90116])
    #expect(try VhdHeader.read(from: store).basePaths == ["./base.vhd", "C:/images/base.vhd"])
    #expect(try Vhd.check(store: store).isClean)
    // Longer: the table moves, and the locators with it.
    try #require(engine.format as? Vhd).resize(to: 64 << 20)
    let header = try VhdHeader.read(from: store)
    #expect(header.basePaths == ["./base.vhd", "C:/images/base.vhd"])
    #expect(header.size == 64 << 20 && text(header.creator) == "win ")
    #expect(try Vhd.check(store: store).isClean)
    let again = try Self.engine(store, base: base)
    #expect(try again.read(0, count: 256) == Self.pattern(128, 0x41) + Self.pattern(128, 9))
  }

  @Test(.enabled(if: Faults.isThere, "../shared/faults is missing"))
  func windowsLayout() throws {
    let store = try Faults.image("windows-differencing-empty.vhd")
    let base = try Faults.image("windows-parent-made.vhd")
    let before = store.contents()
    func open(_ writable: Bool) throws -> DeviceEngine {
      var asked: [String] = []
      let format = try Chain(store, kind: .vhd) {
        request throws(ImageError) in
        asked.append(request.path)
        return base
      }.disk(writable: writable)
      #expect(asked == ["./fat-parent.vhd"])
      return DeviceEngine(format, store: store)
    }
    let shown = try open(false).read(0, count: 8192)
    let engine = try open(true)
    try engine.write(0, Self.pattern(128, 0x41))
    try engine.flush()
    #expect(try engine.read(0, count: 8192) == Self.pattern(128, 0x41) + shown[65536...])
    // Everything in front of the first block is as it was, save the table.
    #expect(store.contents()[512..<8192] == before[512..<8192])
    #expect(store.contents()[8704..<81408] == before[8704..<81408])
    #expect(try open(false).read(0, count: 128) == Self.pattern(128, 0x41))
    #expect(try Vhd.check(store: store).isClean)
  }

  /// A block goes behind XenServer's batmap, and no repair touches that.
  @Test(
    .enabled(if: Faults.isThere, "../shared/faults is missing"),
    arguments: [
      "xenserver-empty.vhd", "xenserver-one-block.vhd", "xenserver-1tib-empty.vhd",
      "xenserver-child.vhd",
    ])
  func batmapsStay(name: String) throws {
    let store = try Faults.image(name)
    let base = try Faults.image("xenserver-one-block.vhd")
    let batmap = try #require(try VhdHeader.read(from: store).batmap)
    let place = Int(batmap.headerOffset)..<Int(batmap.offset + batmap.size)
    let before = store.contents()
    #expect(try Vhd.check(store: store).isClean)
    try Vhd.repair(store: store, .leaks)
    #expect(store.contents() == before)
    let below = ImageStore(try Vhd.open(store: base, writable: false), store: base)
    let engine = try Self.engine(store, base: below)
    // Two blocks that are not there yet.
    for block in [1, 3] { try engine.write(block * 4096, Self.pattern(4096, 0x42)) }
    try engine.flush()
    #expect(store.contents()[place] == before[place])
    for which in [Repair.leaks, .all] { try Vhd.repair(store: store, which) }
    #expect(store.contents()[place] == before[place])
    #expect(try Vhd.check(store: store).isClean)
    let header = try VhdHeader.read(from: store)
    #expect(header.creatorVersion == 0x0001_0003 && header.batmap == batmap)
  }

  /// Longer and shorter: creator, version, locators and a batmap that is right stay.
  @Test(
    .enabled(if: Faults.isThere, "../shared/faults is missing"),
    arguments: ["xenserver-one-block.vhd", "xenserver-child.vhd"])
  func resizingKeepsStructures(name: String) throws {
    let store = try Faults.image(name)
    let base = try Faults.image("xenserver-one-block.vhd")
    func open() throws -> Vhd {
      let below = ImageStore(try Vhd.open(store: base, writable: false), store: base)
      return try Vhd.open(store: store, base: below, writable: true)
    }
    let paths = try VhdHeader.read(from: store).basePaths
    let engine = DeviceEngine(try open(), store: store)
    try engine.write(5 * 4096, Self.pattern(4096, 0x43))
    try engine.flush()
    // All blocks that are whole are entered, as tapdisk would.
    let header = try VhdHeader.read(from: store)
    try open().renewBatmap(header.footer)
    var wasShort = false
    for size: UInt64 in [1 << 30, 9 << 30, 16 << 20, 64 << 20, 4 << 20, 20 << 30] {
      wasShort = wasShort || size < 10 << 20
      try open().resize(to: size)
      let header = try VhdHeader.read(from: store)
      #expect(header.size == size && header.basePaths == paths)
      #expect(header.creatorVersion == 0x0001_0003 && text(header.creator) == "tap\0")
      let batmap = try #require(header.batmap)
      let bits = try store.read(at: batmap.offset, count: Int(batmap.size))
      #expect(VhdBatmap.sum(bits) == batmap.checksum)
      #expect(VhdBatmap.isSet(5, in: bits) == (size > 10 << 20 && !wasShort))
      // Blocks come behind everything that the headers name, as vhd-util asks.
      var first = UInt64.max
      try header.forEachBlock(of: store) { _, offset throws(ImageError) in
        first = min(first, offset)
      }
      #expect(first >= header.structuresEnd)
      let report = try Vhd.check(store: store)
      // What a shorter disk no longer has is left at the end.
      #expect(
        report.corruptions == 0
          && report.problems.allSatisfy { $0.contains("at the end of the file are not in use") },
        "\(size): \(report.problems)")
      if size > 20 << 20, !wasShort {
        let again = DeviceEngine(try open(), store: store)
        #expect(try again.read(5 * 4096, count: 4096) == Self.pattern(4096, 0x43))
      }
    }
  }

  /// What is made here promises no batmap; what promised one without having it is mended.
  @Test func noBatmapIsPromised() throws {
    let store = MemoryStore("store")
    try Vhd.create(store: store, size: 8 << 20, uuid: [UInt8](repeating: 1, count: 16))
    #expect(try VhdHeader.read(from: store).creatorVersion == 0x0001_0000)
    #expect(try store.read(at: 28, count: 8) == Array("tap\0".utf8) + [0, 1, 0, 0])
    var made = Made(.dynamic, size: 1 << 20, creator: "tap\0")
    made.header.creatorVersion = 0x0001_0003
    let old = try made.store()
    #expect(try Vhd.check(store: old).leaks == 1)
    try Vhd.repair(store: old, .leaks)
    #expect(try Vhd.check(store: old).isClean)
    #expect(try VhdHeader.read(from: old).creatorVersion == 0x0001_0000)
  }

  /// A gap between blocks is not given back: nobody knows whose it is.
  @Test func gapsAreLeftAlone() throws {
    let store = try Made(.dynamic, size: 1 << 20).store()
    let engine = try Self.engine(store)
    for block in 0..<3 { try engine.write(block * 128, Self.pattern(128, 0x61)) }
    try engine.flush()
    let place = try #require(try (engine.format as? Vhd)?.place(of: 1))
    try store.write([255, 255, 255, 255], at: 4096 + 4)
    try store.write([1, 2, 3], at: store.size + 70000)
    try Vhd.repair(store: store, .all)
    #expect(try store.read(at: place + 512, count: 512) == Self.pattern(1, 0x61))
    #expect(try Vhd.check(store: store).isClean)
  }

  // MARK: Devices

  /// An image on a device: blocks until the device is full, the footer in its last sector, and
  /// nothing that leaks.
  @Test func onADevice() throws {
    let device = SimulatedDisk("device", size: 4 << 20)
    try Vhd.create(
      store: device, size: 8 << 20, blockSize: 65536, uuid: [UInt8](repeating: 1, count: 16))
    let engine = try Self.engine(device)
    var written = 0
    do {
      for block in 0..<128 {
        try engine.write(block * 128, Self.pattern(128, UInt8(block)))
        try engine.flush()
        written += 1
      }
    } catch let error as ImageError { #expect(error.cause?.code == 28, "\(error)") } catch let
      error as IOError
    { #expect(error.code == 28) }
    // 4 MiB have room for 59 blocks of 68 KiB.
    #expect(written >= 58, "\(written) blocks")
    let report = try Vhd.check(store: device)
    #expect(report.isClean, "\(report.problems)")
    try Vhd.repair(store: device, .all)
    #expect(try Vhd.check(store: device).isClean)
    #expect(VhdHeader.isFooter(try device.read(at: (4 << 20) - 512, count: 512)))
    let again = try Self.engine(device)
    for block in 0..<written {
      #expect(try again.read(block * 128, count: 128) == Self.pattern(128, UInt8(block)))
    }
    // A device with room takes a longer table, too.
    try #require(again.format as? Vhd).resize(to: 6 << 20)
    #expect(try Vhd.check(store: device).isClean)
  }

  // MARK: Sizes and bases

  @Test(arguments: [
    ("vpc ", true), ("qemu", true), ("vbox", false), ("win ", false), ("qem2", false),
    ("d2v ", false), ("CTXS", false), ("tap\0", false), ("aws ", false), ("xo\0\0", false),
    ("\0\0\0\0", false), ("wa\0\0", false), ("hv  ", false),
  ])
  func sizes(creator: String, isGeometric: Bool) throws {
    // The geometry of 20 GiB says 5 MiB less.
    for kind in [VhdKind.dynamic, .fixed] where kind == .dynamic || creator == "vbox" {
      var made = Made(kind, size: 20 << 30, creator: creator, blockSize: 2 << 20)
      made.header.tableEntries = 10240
      let size = try VhdHeader.read(from: try made.store()).size
      #expect(isGeometric ? size < 20 << 30 : size == 20 << 30, "\(creator): \(size)")
    }
  }

  @Test func resizingKeepsTheCreator() throws {
    for (creator, after) in [("vbox", "vbox"), ("win ", "win "), ("qemu", "qem2")] {
      let store = try Made(.dynamic, size: 17 * 4 * 600 * 512, creator: creator).store()
      let image = try Vhd.open(store: store, writable: true)
      try image.resize(to: 12_345_344)
      let header = try VhdHeader.read(from: store)
      #expect(header.size == 12_345_344 && text(header.creator) == after)
    }
  }

  /// A base without an identity is raw, whatever its first bytes look like.
  @Test func rawBase() throws {
    let fake = MemoryStore("other")
    try Vhd.create(store: fake, size: 1 << 20, uuid: [UInt8](repeating: 5, count: 16))
    let bytes = try fake.read(at: 0, count: 1 << 20)
    let base = MemoryStore("base", bytes: bytes)
    let store = MemoryStore("store")
    try Vhd.create(
      store: store, size: 1 << 20, kind: .differencing, uuid: [UInt8](repeating: 2, count: 16),
      base: ("base", [UInt8](repeating: 0, count: 16)))
    let format = try Chain(store, kind: .vhd) { _ in base }.disk()
    #expect(try DeviceEngine(format, store: store).read(0, count: 2048) == bytes)
    let chain = try Chain(store, kind: .vhd) { _ throws(ImageError) in base }.layers()
    #expect(try chain.flat().read(at: 0, count: 1 << 20) == bytes)
  }

  /// A base with an identity is a VHD image and nothing else.
  @Test func baseWithIdentity() throws {
    let base = MemoryStore("base", size: 1 << 20)
    let store = MemoryStore("store")
    try Vhd.create(
      store: store, size: 1 << 20, kind: .differencing, uuid: [UInt8](repeating: 2, count: 16),
      base: ("base", [UInt8](repeating: 3, count: 16)))
    #expect(throws: ImageError.self) {
      try Chain(store, kind: .vhd) { _ in base }.disk()
    }
  }

  @Test func nextPath() throws {
    var made = Made(.differencing, size: 1 << 20)
    made.locators = [
      ("MacX", 8192, 512, Array("file:///gone/base.vhd".utf8)),
      ("W2ru", 9216, 512, Self.utf16(".\\base.vhd")),
    ]
    let store = try made.store()
    let base = MemoryStore("base", bytes: Self.pattern(2048, 9))
    var asked: [String] = []
    func resolve(_ request: NamedFile) throws(ImageError) -> any ByteStore {
      asked.append(request.path)
      guard request.path == "./base.vhd" else {
        throw ImageError(.io, "gone", cause: IOError(2, "open", request.path))
      }
      return base
    }
    _ = try Chain(store, kind: .vhd, resolve: resolve).disk()
    #expect(asked == ["/gone/base.vhd", "./base.vhd"])
  }

  // MARK: Damage

  private static func hostile(_ change: (MemoryStore, VhdHeader, UInt64) throws -> Void) throws
    -> MemoryStore
  {
    var made = Made(.differencing, size: 1 << 20)
    made.locators = [("MacX", 8192, 512, Array("file://base".utf8))]
    let store = try made.store()
    let engine = try engine(store, base: MemoryStore("base", size: 1 << 20))
    for block in 0..<3 { try engine.write(block * 128, pattern(128, 0x61)) }
    try engine.flush()
    let image = try #require(engine.format as? Vhd)
    try change(store, image.header, try #require(try image.place(of: 1)))
    return store
  }

  private static func entry(_ place: UInt64) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBig(UInt32(place / 512))
    return bytes
  }

  /// A block over a header, the table, a path of the base, or another block: refused when it is
  /// opened, whether for writing or not, and found by a check.
  @Test(arguments: [0, 512, 1024, 4096, 8192, 8192 - 512, 65536 * 4, -512, 512 + 65536])
  func blocksOverOthers(place: Int) throws {
    let store = try Self.hostile { store, header, own in
      let at =
        place < 0 || place == 512 + 65536
        ? UInt64(Int(own) + (place < 0 ? place : 512)) : UInt64(place)
      // The last one is moved half over the second.
      try store.write(Self.entry(place > 100_000 ? own : at), at: header.tableOffset + 8)
    }
    for writable in [false, true] {
      let error = #expect(throws: ImageError.self) {
        try Vhd.open(store: store, base: MemoryStore("base", size: 1 << 20), writable: writable)
      }
      #expect(error?.code == .corrupt && error?.message.contains("lies over") == true)
    }
    let report = try Vhd.check(store: store)
    #expect(report.corruptions > 0)
    let before = store.contents()
    try Vhd.repair(store: store, .all)
    #expect(store.contents() == before)
  }

  @Test func cutShort() throws {
    let store = try Self.hostile { _, _, _ in }
    let whole = store.contents()
    for length in [whole.count - 513, whole.count / 2, 70000, 4097, 1000] {
      let short = MemoryStore("short", bytes: [UInt8](whole[..<length]))
      let error = #expect(throws: ImageError.self) {
        try Vhd.open(store: short, base: MemoryStore("base", size: 1 << 20), writable: false)
      }
      #expect(error?.code == .corrupt, "\(length): \(error as Any)")
    }
  }

  /// The first sector of a fixed image is the guest's: what it writes there is not believed.
  @Test func aGuestsOwnHeader() throws {
    let store = try Made(.fixed, size: 1 << 20).store()
    let evil = try Self.hostile { _, _, _ in }.contents()
    try store.write([UInt8](evil[..<8704]), at: 0)
    let error = #expect(throws: ImageError.self) { try VhdHeader.read(from: store) }
    #expect(error?.code == .corrupt)
  }

  @Test func wrongSum() throws {
    for kind in [VhdKind.dynamic, .fixed] {
      let store = try Made(kind, size: 1 << 20).store()
      for at in kind == .fixed ? [1 << 20] : [0, store.size - 512] {
        try store.write([9], at: at + 100)
      }
      let error = #expect(throws: ImageError.self) { try FormatList.all.probe(store) }
      #expect(error?.code == .corrupt)
    }
  }

  // MARK: Mixed blocks

  /// Bytes from any place on, over borders between the image's sectors and the base's.
  @Test func mixedBlocksByByte() throws {
    let base = MemoryStore("base", bytes: (0..<2048).flatMap { Stamp.sectors(1, UInt64($0 + 1)) })
    var made = Made(.differencing, size: 1 << 20)
    made.locators = [("MacX", 8192, 512, Array("file://base".utf8))]
    let image = try made.store()
    let engine = try Self.engine(image, base: base)
    try engine.write(0, (0..<128).flatMap { Stamp.sectors(1, UInt64($0 + 5000)) })
    try engine.flush()
    let place = try #require(try (engine.format as? Vhd)?.place(of: 0))
    try image.write([UInt8](repeating: 0xA5, count: 16), at: place)
    let mixed = VhdMixedBlocks(image, base, try VhdHeader.read(from: image))
    let all = try mixed.read(at: 0, count: 65536)
    for sector in 0..<128 {
      let isOwn = 0xA5 >> (7 - sector % 8) & 1 == 1
      let stamp = all.withUnsafeBytes { Stamp.read($0, at: sector * 512) }
      #expect(stamp == UInt64(isOwn ? sector + 5000 : sector + 1))
    }
    var random = SplitMix64(seed: 1)
    for _ in 0..<300 {
      let from = random.below(65000)
      let count = 1 + random.below(min(5000, 65536 - from))
      #expect(try mixed.read(at: UInt64(from), count: count)[...] == all[from..<(from + count)])
    }
  }
}
