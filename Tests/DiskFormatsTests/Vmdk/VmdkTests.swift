// SPDX-License-Identifier: Apache-2.0
// VMDK images: made here and judged by QEMU; streams; content IDs; ESX's kind; power cuts;
// hostile bytes. What QEMU makes is in the matrix.

import BlockIO
import DiskFormats
import Fakes
import Foundation
import SystemIO
import Testing
import TestSupport

@Suite struct VmdkTests {
  /// Opens a file of the judge's folder, made anew when it is not there.
  private static func file(_ judge: Judge, _ name: String) throws -> FileStore {
    if !FileManager.default.fileExists(atPath: judge.path(name)) {
      try Data().write(to: URL(fileURLWithPath: judge.path(name)))
    }
    return try judge.open(name, writable: true)
  }

  @Test(arguments: VmdkSubformat.allCases.filter { $0 != .streamOptimized })
  func madeHere(subformat: VmdkSubformat) throws {
    let judge = try Judge()
    var options = VmdkOptions()
    options.subformat = subformat
    options.name = "disk.vmdk"
    // More than one extent where there may be several.
    let size: UInt64 = (2 << 30) + (5 << 20) + 512 * 3
    let names = options.extentNames(size: size)
    let store = try Self.file(judge, "disk.vmdk")
    let extents = try names.map { try Self.file(judge, $0) }
    try Vmdk.create(store: store, size: size, options: options, extents: extents)
    let info = try judge.must("qemu-img", "info", "disk.vmdk")
    #expect(info.contains("(\(size) bytes)") && info.contains(subformat.rawValue), "\(info)")
    try judge.must("qemu-img", "check", "-q", "-f", "vmdk", "disk.vmdk")
    #expect(try Vmdk.info(of: store).size == size)
    // Written here over the border of two extents, read there; and the other way round.
    let engine = DeviceEngine(try judge.chain(store, kind: .vmdk, writable: true), store: store)
    let border = Int((2 << 30) / 512)
    let data = (0..<300).flatMap { Stamp.sectors(1, UInt64($0 + 1)) }
    try engine.write(border - 150, data)
    try engine.write(engine.sectors - 300, data)
    try engine.flush()
    try judge.must("qemu-img", "check", "-q", "-f", "vmdk", "disk.vmdk")
    try judge.io("disk.vmdk", "vmdk", ["write -P 9 \((border - 20) * 512) 20480"])
    for sector in [border - 150, engine.sectors - 300] {
      try judge.must(
        "qemu-img", "dd", "-f", "vmdk", "-O", "raw", "bs=512", "skip=\(sector)",
        "count=\(sector + 300)", "if=disk.vmdk", "of=part.raw")
      var expected = data
      if sector < border {
        expected.replaceSubrange(
          (130 * 512)..<(170 * 512), with: repeatElement(9, count: 40 * 512))
      }
      let part = try Data(contentsOf: URL(fileURLWithPath: judge.path("part.raw")))
      #expect([UInt8](part.prefix(300 * 512)) == expected)
      let again = DeviceEngine(
        try judge.chain(store, kind: .vmdk, writable: false), store: store)
      #expect(try again.read(sector, count: 300) == expected)
    }
    let opened = try names.map { try judge.open($0, writable: false) }
    #expect(try Vmdk.check(store: store, extents: opened).isClean)
    print("vmdk \(subformat.rawValue): made here, clean and equal in QEMU")
  }

  @Test func stream() throws {
    let judge = try Judge()
    let size = (70 << 20) + 512 * 5
    let store = try Self.file(judge, "disk.vmdk")
    let writer = try VmdkStreamWriter(store: store, size: UInt64(size), options: VmdkOptions())
    var random = SplitMix64(seed: 3)
    var model = [UInt8](repeating: 0, count: (size + 65535) / 65536 * 65536)
    for grain in 0..<(model.count / 65536) where random.chance(30) {
      // Some grains are squeezed into a sector each, and some not at all.
      let isNoise = random.chance(20)
      let value = UInt8(random.below(255))
      let bytes = (0..<65536).map { _ in isNoise ? UInt8(random.below(256)) : value }
      var data = bytes
      let left = size - grain * 65536
      if left < 65536 { data.replaceSubrange(left..., with: repeatElement(0, count: 65536 - left)) }
      model.replaceSubrange((grain * 65536)..<((grain + 1) * 65536), with: data)
      guard let packed = VmdkStreamWriter.compressed(data) else { continue }
      try writer.append(UInt64(grain), compressed: packed)
    }
    try writer.finish()
    model.removeSubrange(size...)
    try judge.must("qemu-img", "check", "-q", "-f", "vmdk", "disk.vmdk")
    try judge.compare("disk.vmdk", "vmdk", with: model)
    let engine = DeviceEngine(try judge.chain(store, kind: nil, writable: false), store: store)
    #expect(try engine.read(0, count: engine.sectors) == model)
    #expect(try Vmdk.check(store: store).isClean)
    let error = #expect(throws: ImageError.self) { try Vmdk.open(store: store, writable: true) }
    #expect(error?.code == .unsupported)
  }

  @Test func contentIDs() throws {
    let judge = try Judge()
    let base = try Self.file(judge, "base.vmdk")
    try Vmdk.create(store: base, size: 1 << 20)
    let store = try Self.file(judge, "disk.vmdk")
    var options = VmdkOptions()
    options.base = ("base.vmdk", try Vmdk.contentID(of: base))
    try Vmdk.create(store: store, size: 1 << 20, options: options)
    let before = try Vmdk.contentID(of: store)
    let engine = DeviceEngine(try judge.chain(store, kind: .vmdk, writable: true), store: store)
    #expect(try Vmdk.contentID(of: store) != before)
    let model = try VhdTests.live(
      engine, [UInt8](repeating: 0, count: 1 << 20), seed: 5, steps: 30)
    try judge.compare("disk.vmdk", "vmdk", with: model)
    // Whoever opens the base for writing has it known.
    _ = try judge.chain(base, kind: .vmdk, writable: true)
    let error = #expect(throws: ImageError.self) {
      try judge.chain(store, kind: .vmdk, writable: false)
    }
    #expect(error?.code == .baseChanged)
  }

  /// ESX's kind, of which qemu-img makes none: put together by hand.
  @Test func esx() throws {
    let grains = 9000
    var bytes = [UInt8](repeating: 0, count: 512 * 71)
    func put(_ value: Int, _ offset: Int) {
      for index in 0..<4 { bytes[offset + index] = UInt8(value >> (8 * index) & 255) }
    }
    bytes.replaceSubrange(0..<4, with: Array("COWD".utf8))
    for (offset, value) in [(4, 1), (8, 3), (12, grains), (16, 1), (20, 4), (24, 3), (28, 71)] {
      put(value, offset)
    }
    // The directory at sector 4; the second table at sector 8, its entry 5 at sector 70.
    put(8, 4 * 512 + 4)
    put(70, 8 * 512 + 5 * 4)
    bytes.replaceSubrange((70 * 512)..<(71 * 512), with: Stamp.sectors(1, 77))
    let store = MemoryStore("esx", bytes: bytes)
    let format = try Chain(store) { _ in store }.disk()
    let engine = DeviceEngine(format, store: store)
    #expect(engine.sectors == grains)
    let found = try engine.read(0, count: grains)
    let place = (4096 + 5) * 512
    #expect([UInt8](found[place..<(place + 512)]) == Stamp.sectors(1, 77))
    #expect(found.filter { $0 != 0 }.count == Stamp.sectors(1, 77).filter { $0 != 0 }.count)
    #expect(try Vmdk.check(store: store).isClean)
    let error = #expect(throws: ImageError.self) { try Vmdk.open(store: store, writable: true) }
    #expect(error?.code == .unsupported)
  }

  /// A base of stamps.
  private static func stamped() throws -> MemoryStore {
    let base = MemoryStore("base")
    try Vmdk.create(store: base, size: UInt64(PowerCuts.sectors * 512))
    let lower = DeviceEngine(try Vmdk.open(store: base, writable: true), store: base)
    try lower.write(0, PowerCuts.base)
    try lower.flush()
    return base
  }

  /// Small grains, so that there is something to be torn; tables that are not there yet.
  private static func worn(_ extent: [UInt8]) -> [UInt8] {
    var image = extent
    image[20] = 8
    for copy in [56, 48] {
      let directory = Int(image[copy]) + Int(image[copy + 1]) << 8
      image.replaceSubrange(
        (directory * 512)..<(directory * 512 + 4), with: repeatElement(0, count: 4))
    }
    return image
  }

  /// A disk in three sparse extents, whose text is a file of its own.
  private static func splitCuts(overBase: Bool) throws -> PowerCuts {
    let base = try stamped()
    let borders = [0, 64, 192, PowerCuts.sectors]
    var text = ""
    var extents: [[UInt8]] = []
    for (index, (start, end)) in zip(borders, borders.dropFirst()).enumerated() {
      let (store, extent) = (MemoryStore("text"), MemoryStore("extent"))
      var options = VmdkOptions()
      options.subformat = .twoGbMaxExtentSparse
      options.name = "part\(index)"
      if overBase { options.base = ("base", try Vmdk.contentID(of: base)) }
      try Vmdk.create(
        store: store, size: UInt64((end - start) * 512), options: options, extents: [extent])
      extents.append(worn(extent.contents()))
      let own = String(decoding: store.contents(), as: UTF8.self)
      let line = try #require(own.split(separator: "\n").first { $0.hasPrefix("RW ") })
      if let last = text.range(of: "\nRW ", options: .backwards) {
        let next = text[last.upperBound...].firstIndex(of: "\n") ?? text.endIndex
        text.insert(contentsOf: "\n\(line)", at: next)
      } else {
        text = own
      }
    }
    let padding = [UInt8](repeating: 0, count: 511 - (text.utf8.count + 511) % 512)
    return PowerCuts(
      name: "vmdk in three extents", image: Array(text.utf8) + padding, others: extents,
      isFull: overBase,
      open: { store, writable in
        let below = ImageStore(try Vmdk.open(store: base, writable: false), store: base)
        return try Vmdk.open(
          store: store, extents: try others(store), base: below, writable: writable)
      },
      check: { try Vmdk.check(store: $0, extents: try others($0)) },
      repair: { try Vmdk.repair(store: $0, extents: try others($0), .all) })
  }

  private static func others(_ store: any ByteStore) throws -> [any ByteStore] {
    try #require(store as? GrowingDisk).others
  }

  @Test(arguments: [false, true]) func powerCutsOfExtents(overBase: Bool) throws {
    try Self.splitCuts(overBase: overBase).run(seeds: Depth.seeds(20))
  }

  @Test func brokenOrderOfExtentsIsFound() throws {
    try Self.splitCuts(overBase: true).findBrokenOrder()
  }

  private static func cuts(overBase: Bool) throws -> PowerCuts {
    let size = UInt64(PowerCuts.sectors * 512)
    let base = try stamped()
    let fresh = MemoryStore()
    var options = VmdkOptions()
    if overBase { options.base = ("base", try Vmdk.contentID(of: base)) }
    try Vmdk.create(store: fresh, size: size, options: options)
    let image = worn(fresh.contents())
    return PowerCuts(
      name: "vmdk", image: image, isFull: overBase,
      open: { store, writable in
        let below = ImageStore(try Vmdk.open(store: base, writable: false), store: base)
        return try Vmdk.open(store: store, base: below, writable: writable)
      },
      check: { try Vmdk.check(store: $0) }, hasPools: true,
      repair: { try Vmdk.repair(store: $0, .all) })
  }

  @Test(arguments: [false, true]) func powerCuts(overBase: Bool) throws {
    try Self.cuts(overBase: overBase).run(seeds: Depth.seeds(20))
  }

  /// What QEMU's own check thinks of images after power cuts: 0 is clean, 3 is leaks.
  @Test func powerCutsJudgedByQEMU() throws {
    let judge = try Judge()
    let cuts = try Self.cuts(overBase: false)
    let judged = PowerCuts(
      name: "vmdk, judged by QEMU", image: cuts.image, isFull: cuts.isFull, open: cuts.open,
      check: { store in
        let bytes = try store.read(at: 0, count: Int(store.size))
        try Data(bytes).write(to: URL(fileURLWithPath: judge.path("disk.img")))
        let (output, status) = try judge.run("qemu-img", ["check", "-f", "vmdk", "disk.img"])
        guard status == 0 || status == 3 else {
          throw PowerCuts.Violation(description: "qemu-img check: \(status) \(output)")
        }
        return try cuts.check(store)
      }, repair: cuts.repair)
    try judged.run(seeds: Depth.seeds(3))
  }

  @Test func powerCutsWhileResizing() throws {
    try Self.cuts(overBase: false).runResizes(seeds: Depth.seeds(40)) { format, size in
      try #require(format as? Vmdk).resize(to: size)
    }
  }

  @Test func brokenOrderIsFound() throws { try Self.cuts(overBase: true).findBrokenOrder() }

  // MARK: Hostile images

  private static func use(_ bytes: [UInt8]) throws {
    let store = MemoryStore("hostile", bytes: bytes)
    func attempt(_ body: () throws -> Void) throws {
      do {
        try body()
      } catch let error as ImageError {
        #expect(error.message.contains("hostile") || error.code == .badRequest, "\(error)")
      } catch is IOError {}
    }
    let other = MemoryStore("other hostile", bytes: bytes)
    try attempt { _ = try Vmdk.check(store: store) }
    try attempt {
      let format = try Chain(store, kind: .vmdk) { _ in other }.disk(writable: true)
      let engine = DeviceEngine(format, store: store)
      let sectors = min(engine.sectors, 2048)
      for sector in stride(from: 0, to: sectors - 64, by: 64) {
        try attempt { _ = try engine.read(sector, count: 64) }
      }
      guard sectors > 64 else { return }
      try attempt { try engine.write(9, [UInt8](repeating: 5, count: 512 * 20)) }
      try attempt { try engine.flush() }
    }
    try attempt { _ = try Vmdk.repair(store: store, .all) }
  }

  @Test func hostile() throws {
    let sparse = MemoryStore("hostile")
    try Vmdk.create(store: sparse, size: 1 << 20)
    _ = try VhdTests.live(
      DeviceEngine(try Vmdk.open(store: sparse, writable: true), store: sparse),
      [UInt8](repeating: 0, count: 1 << 20), seed: 4, steps: 40)
    let stream = MemoryStore("hostile")
    let writer = try VmdkStreamWriter(store: stream, size: 1 << 20, options: VmdkOptions())
    for grain in 0..<9 {
      let data = [UInt8](repeating: UInt8(1 + grain), count: 65536)
      try writer.append(UInt64(grain), compressed: VmdkStreamWriter.compressed(data) ?? [])
    }
    try writer.finish()
    for image in [sparse.contents(), stream.contents()] {
      for length in Depth.some(40, of: Array(0..<1600)) { try Self.use([UInt8](image[..<length])) }
      for offset in Depth.some(60, of: Array(0..<80) + Array(512..<1000)) {
        for flip in [UInt8(1), 0x80, 0xFF] {
          var bytes = image
          bytes[offset] ^= flip
          try Self.use(bytes)
        }
      }
      for seed in Depth.seeds(30) {
        var random = SplitMix64(seed: seed)
        var bytes = image
        for _ in 0...random.below(6) {
          let reach = [80, 1000, 80 * 512, bytes.count][random.below(4)]
          // The last sectors hold a stream's header.
          let offset =
            random.chance(20) ? bytes.count - 1 - random.below(1600) : random.below(reach)
          bytes[offset] = random.chance(30) ? 0xFF : UInt8(truncatingIfNeeded: random.next())
        }
        try Self.use(bytes)
      }
    }
  }

  @Test(arguments: [
    ("RW 0 FLAT \"a\" 0", "0 sectors"), ("RW 18446744073709551615 ZERO", "18446744073709551615"),
    ("RW 99999999999999999999 ZERO", "line"), ("RW 128 FLAT a b", "line"),
    ("RW 128 FLAT \"\" 0", "line"), ("NOACCESS 128 FLAT \"a\" 0", "line"),
    ("RW 128 SESPARSE \"a\"", "seSparse"), ("RW 128 FLAT \"a\" -1", "line"), ("", "extents"),
    ("RW 128 ZERO\nCID=xyz", "CID"), ("RW 128 ZERO\nparentCID=5", "base"),
    ("RW 128 ZERO\nversion=9", "version"), ("RW 128 ZERO\nparentCID=123456789", "parentCID"),
    ("RW 128 SPARSE \"self\"", "itself"), ("RW 128 FLAT \"self\" 0", "itself"),
  ])
  func hostileDescriptor(lines: String, names: String) throws {
    let text = "# Disk DescriptorFile\nversion=1\nCID=12345678\ncreateType=\"x\"\n" + lines + "\n"
    let store = MemoryStore("hostile", bytes: Array(text.utf8))
    let error = #expect(throws: ImageError.self) {
      try Chain(store, kind: .vmdk) { _ in store }.disk()
    }
    let message = error?.message ?? ""
    #expect(message.contains("hostile") && message.contains(names), "\(message)")
  }

  @Test func tooMuch() throws {
    let start = "# Disk DescriptorFile\nversion=1\nCID=12345678\ncreateType=\"x\"\n"
    let lines = start + String(repeating: "RW 128 ZERO\n", count: 1025)
    for bytes in [Array(lines.utf8), Array(start.utf8) + [UInt8](repeating: 10, count: 1 << 20)] {
      let store = MemoryStore("hostile", bytes: bytes)
      let error = #expect(throws: ImageError.self) { try VmdkLayout.read(from: store) }
      #expect(error?.code == .corrupt)
    }
  }
}
