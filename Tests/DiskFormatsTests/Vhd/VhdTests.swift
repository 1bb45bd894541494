// SPDX-License-Identifier: Apache-2.0
// VHD images: differencing ones, which QEMU does not know, against a model; power cuts; hostile
// bytes. What QEMU makes is in the matrix.

import BlockIO
import DiskModel
import Fakes
import Foundation
import SystemIO
import Testing
import TestSupport

@testable import DiskFormats

@Suite struct VhdTests {
  /// Reads, writes, discards and flushes at random; returns what the disk then holds.
  static func live(
    _ engine: DeviceEngine, _ model: [UInt8], seed: UInt64, steps: Int = 120
  ) throws -> [UInt8] {
    var random = SplitMix64(seed: seed)
    var model = model
    for step in 0..<steps {
      let first = random.below(engine.sectors)
      let count = min(engine.sectors - first, 1 + random.below(300))
      let bytes = (first * 512)..<((first + count) * 512)
      switch random.below(8) {
      case 0..<4:
        let data = [UInt8](repeating: UInt8(1 + random.below(255)), count: count * 512)
        try engine.write(first, data)
        model.replaceSubrange(bytes, with: data)
      case 4:
        try engine.discard(first, count: count, zeroing: true)
        model.replaceSubrange(bytes, with: repeatElement(0, count: count * 512))
      case 5:
        try engine.flush { try engine.write(first, [UInt8](repeating: 3, count: count * 512)) }
        model.replaceSubrange(bytes, with: repeatElement(3, count: count * 512))
      default: try engine.flush()
      }
      let at = random.below(engine.sectors)
      let some = min(engine.sectors - at, 300)
      #expect(
        try engine.read(at, count: some)[...] == model[(at * 512)..<((at + some) * 512)],
        "seed \(seed), step \(step)")
    }
    try engine.flush()
    return model
  }

  /// In blocks of the table, and in pieces of them.
  @Test(arguments: [UInt64(65536), 16384, 4096]) func differencing(piece: UInt64) throws {
    let base = MemoryStore("base")
    let size: UInt64 = 3 << 20
    let uuid = [UInt8](repeating: 7, count: 16)
    try Vhd.create(store: base, size: size, blockSize: 65536, uuid: uuid)
    let lower = DeviceEngine(try Vhd.open(store: base, writable: true), store: base)
    let contents = try Self.live(lower, [UInt8](repeating: 0, count: Int(size)), seed: 1)
    let store = MemoryStore("store")
    try Vhd.create(
      store: store, size: size, kind: .differencing, blockSize: 65536,
      uuid: [UInt8](repeating: 8, count: 16), base: ("base", uuid))
    func open(_ writable: Bool) throws -> DeviceEngine {
      guard piece == Vhd.largestPiece else {
        let below = ImageStore(try Vhd.open(store: base, writable: false), store: base)
        let format = try Vhd.open(store: store, base: below, writable: writable, piece: piece)
        return DeviceEngine(format, store: store)
      }
      let format = try Chain(store, kind: .vhd) { request in
        #expect(request.path == "base")
        return base
      }.disk(writable: writable)
      return DeviceEngine(format, store: store)
    }
    let engine = try open(true)
    #expect(engine.format.blockSize == piece)
    #expect(try engine.read(0, count: engine.sectors) == contents)
    var model = try Self.live(engine, contents, seed: 2)
    #expect(try open(false).read(0, count: engine.sectors) == model)
    // As blktap leaves blocks: only some sectors are the image's own.
    let header = try VhdHeader.read(from: store)
    var mixed = 0
    for block in 0..<Int(size / 65536) {
      let entry = try store.read(at: header.tableOffset + UInt64(block) * 4, count: 4)
      guard entry != [255, 255, 255, 255], mixed < 8 else { continue }
      let place = entry.reduce(UInt64(0)) { $0 << 8 | UInt64($1) } * 512
      let bits = try store.read(at: place, count: 16)
      try store.write(bits.map { $0 & 0xF0 }, at: place)
      for sector in 0..<128 where sector % 8 >= 4 {
        let at = block * 65536 + sector * 512
        model.replaceSubrange(at..<(at + 512), with: contents[at..<(at + 512)])
      }
      mixed += 1
    }
    #expect(mixed == 8)
    let again = try open(true)
    #expect(try again.read(0, count: engine.sectors) == model)
    model = try Self.live(again, model, seed: 3)
    #expect(try open(false).read(0, count: engine.sectors) == model)
    #expect(try Vhd.check(store: store).isClean)
  }

  @Test func anotherBaseIsRefused() throws {
    let base = MemoryStore("base")
    try Vhd.create(store: base, size: 1 << 20, uuid: [UInt8](repeating: 1, count: 16))
    let store = MemoryStore("store")
    try Vhd.create(
      store: store, size: 1 << 20, kind: .differencing, uuid: [UInt8](repeating: 2, count: 16),
      base: ("base", [UInt8](repeating: 3, count: 16)))
    let error = #expect(throws: ImageError.self) {
      try Chain(store, kind: .vhd) { _ in base }.disk()
    }
    #expect(error?.code == .baseChanged)
  }

  /// What a first write of 4 KiB puts into an image with blocks of 2 MiB: 64 KiB of data, their
  /// bits and no others; the next one, into the same block, adds its own.
  @Test func aFirstWriteTakesAPiece() throws {
    let base = MemoryStore("base", bytes: [UInt8](repeating: 9, count: 4 << 20))
    let store = MemoryStore("store")
    try Vhd.create(
      store: store, size: 4 << 20, kind: .differencing, uuid: [UInt8](repeating: 2, count: 16),
      base: ("base", [UInt8](repeating: 0, count: 16)))
    let disk = try Vhd.open(store: store, base: base, writable: true)
    #expect(disk.blockSize == 65536)
    let engine = DeviceEngine(disk, store: store)
    var bits = [UInt8](repeating: 0, count: 512)
    for piece in [3, 31, 4] {
      // In the second block of the table.
      try engine.write(4096 + piece * 128 + 8, [UInt8](repeating: 5, count: 4096))
      try engine.flush()
      bits.replaceSubrange((piece * 16)..<(piece * 16 + 16), with: repeatElement(0xFF, count: 16))
      let place = try #require(try disk.place(of: 1))
      #expect(try store.read(at: place, count: 512) == bits)
      let data = try store.read(at: place + 512, count: 2 << 20)
      for at in 0..<32 {
        var wanted = [UInt8](repeating: bits[at * 16] == 0 ? 0 : 9, count: 65536)
        if bits[at * 16] != 0 {
          wanted.replaceSubrange(4096..<8192, with: repeatElement(5, count: 4096))
        }
        #expect(data[(at * 65536)..<((at + 1) * 65536)] == wanted[...], "piece \(at)")
      }
    }
    #expect(try disk.place(of: 0) == nil)
    #expect(engine.format.allocatedBlocks >= 3)
    #expect(try Vhd.check(store: store).isClean)
    #expect(XenServerRules(store.contents()).problems.isEmpty)
  }

  /// Pieces of two blocks, uncommitted, one block of which the table knows: a successor takes them
  /// over, and puts what comes next into the same blocks. What cannot have been is refused.
  @Test func piecesOutliveTheirWorker() throws {
    let base = MemoryStore("base", bytes: [UInt8](repeating: 9, count: 1 << 20))
    let store = MemoryStore("store")
    try Vhd.create(
      store: store, size: 1 << 20, kind: .differencing, blockSize: 65536,
      uuid: [UInt8](repeating: 2, count: 16), base: ("base", [UInt8](repeating: 0, count: 16)))
    func open() throws -> DeviceEngine {
      let disk = try Vhd.open(store: store, base: base, writable: true, piece: 4096)
      return DeviceEngine(disk, store: store)
    }
    func page(_ value: UInt8) -> [UInt8] { [UInt8](repeating: value, count: 4096) }
    let first = try open()
    try first.write(0, page(1))
    try first.flush()
    // Blocks of the disk: 16 in each of the table.
    for (block, value) in [(3, UInt8(2)), (20, 3), (18, 4)] {
      try first.write(block * 8, page(value))
    }
    let left = first.uncommitted
    #expect(left.count == 3)
    let heir = try open()
    try heir.format.restore(left)
    heir.takeOver(left)
    try heir.write(19 * 8, page(5))
    guard case .device(0, let sector) = try heir.format.find(19, limit: 1).place,
      case .device(0, let before) = try heir.format.find(18, limit: 1).place
    else { return #expect(Bool(false), "not in the store") }
    #expect(sector == before + 8)
    try heir.flush()
    var wanted = [UInt8](repeating: 9, count: 1 << 20)
    for (block, value) in [(0, UInt8(1)), (3, 2), (20, 3), (18, 4), (19, 5)] {
      wanted.replaceSubrange((block * 4096)..<(block * 4096 + 4096), with: page(value))
    }
    #expect(try open().read(0, count: 2048) == wanted)
    #expect(try Vhd.check(store: store).isClean)

    let far = (store.size + 1 << 20) / 4096 * 4096
    func placed(_ blocks: BlockRange, _ offset: UInt64, _ mark: Mark) -> Extent {
      Extent(blocks, .device(0, sector: offset / 512), writable: true, mark: mark)
    }
    let place = try #require(try (heir.format as? Vhd)?.place(of: 0)) + 512
    let wrong: [[Extent]] = [
      // Over two blocks of the table; not where the block's place is; two places for one block.
      [placed(BlockRange(47, 2), far, 1)],
      [placed(BlockRange(5), place + 6 * 4096, 1)],
      [placed(BlockRange(64), far, 1), placed(BlockRange(66), far + 3 * 4096, 2)],
      // Before the store; over what there is; one block over another.
      [placed(BlockRange(79), 4096, 1)], [placed(BlockRange(64), place, 1)],
      [placed(BlockRange(64), far, 1), placed(BlockRange(80), far + 8 * 4096, 2)],
      // Twice; under no new mark.
      [placed(BlockRange(64), far, 1), placed(BlockRange(64), far, 2)],
      [placed(BlockRange(64), far, 2), placed(BlockRange(65), far + 4096, 2)],
    ]
    for extents in wrong {
      #expect(throws: ImageError.self, "\(extents)") { try open().format.restore(extents) }
    }
    try open().format.restore([
      placed(BlockRange(64), far, 1), placed(BlockRange(66), far + 8192, 2),
    ])
  }

  /// A block of a dynamic image that has a place, and no bit set, may get another one by a pool.
  @Test func aPoolTakesABlockWithoutBits() throws {
    let store = MemoryStore()
    try Vhd.create(
      store: store, size: 1 << 20, blockSize: 65536, uuid: [UInt8](repeating: 1, count: 16))
    let first = DeviceEngine(try Vhd.open(store: store, base: nil, writable: true), store: store)
    try first.write(0, [UInt8](repeating: 7, count: 65536))
    try first.flush()
    guard case .device(0, let old) = try first.format.find(0, limit: 1).place else {
      throw ImageError(.corrupt, "block 0 has no place")
    }
    try store.write([UInt8](repeating: 0, count: 512), at: old * 512 - 512)
    let disk = try Vhd.open(store: store, base: nil, writable: true)
    #expect(try !disk.find(0, limit: 1).writable && disk.takeMarks())
    let pool = try #require(try disk.pool())
    let extent = Extent(BlockRange(0), pool.place, writable: true, mark: 1)
    try disk.granted(extent)
    guard case .device(0, let new) = pool.place else { return }
    try store.write([UInt8](repeating: 9, count: 65536), at: new * 512)
    try (try disk.commitPlan(upTo: 1)).carry(to: store)
    disk.committed(upTo: 1)
    let again = try Vhd.open(store: store, base: nil, writable: false)
    #expect(try again.find(0, limit: 1).place == pool.place)
    #expect(try Vhd.check(store: store).corruptions == 0)
  }

  private static func cuts(
    overBase: Bool, blockSize: UInt64 = 8192, piece: UInt64 = 8192
  ) throws -> PowerCuts {
    let fresh = MemoryStore()
    let zeroes = [UInt8](repeating: 0, count: 16)
    try Vhd.create(
      store: fresh, size: UInt64(PowerCuts.sectors * 512),
      kind: overBase ? .differencing : .dynamic, blockSize: blockSize,
      uuid: [UInt8](repeating: 1, count: 16), base: overBase ? ("base", zeroes) : nil)
    let base = MemoryStore("base", bytes: PowerCuts.base)
    return PowerCuts(
      name: "vhd", image: fresh.contents(), isFull: overBase,
      open: {
        try Vhd.open(store: $0, base: overBase ? base : nil, writable: $1, piece: piece)
      },
      check: { try Vhd.check(store: $0) }, hasPools: !overBase,
      repair: { try Vhd.repair(store: $0, .all) })
  }

  @Test(arguments: [false, true]) func powerCuts(overBase: Bool) throws {
    try Self.cuts(overBase: overBase).run(seeds: Depth.seeds(20))
  }

  @Test(arguments: [UInt64(32768), 131072]) func powerCutsOfPieces(blockSize: UInt64) throws {
    try Self.cuts(overBase: true, blockSize: blockSize, piece: 4096).run(seeds: Depth.seeds(40))
  }

  @Test(arguments: [false, true]) func powerCutsWhileResizing(overBase: Bool) throws {
    let cuts = try Self.cuts(overBase: overBase, blockSize: overBase ? 32768 : 8192, piece: 4096)
    // The last two: zeroes past the old end were not durable when the footer said the new length.
    let seeds = Depth.seeds(40) + [1_356_936_866_036, 1_356_936_866_073]
    try cuts.runResizes(seeds: seeds) { format, size in
      try #require(format as? Vhd).resize(to: size)
    }
  }

  @Test func brokenOrderIsFound() throws {
    try Self.cuts(overBase: true).findBrokenOrder()
    try Self.cuts(overBase: true, blockSize: 32768, piece: 4096).findBrokenOrder()
  }

  @Test func hostile() throws {
    let store = MemoryStore()
    try Vhd.create(
      store: store, size: 1 << 20, blockSize: 65536, uuid: [UInt8](repeating: 1, count: 16))
    _ = try Self.live(
      DeviceEngine(try Vhd.open(store: store, writable: true), store: store),
      [UInt8](repeating: 0, count: 1 << 20), seed: 4)
    let image = store.contents()
    func use(_ bytes: [UInt8]) throws {
      let store = MemoryStore(bytes: bytes)
      func attempt(_ body: () throws -> Void) throws {
        do { try body() } catch is ImageError {} catch is IOError {}
      }
      try attempt { _ = try Vhd.check(store: store) }
      try attempt {
        let engine = DeviceEngine(try Vhd.open(store: store, writable: true), store: store)
        for sector in stride(from: 0, to: min(engine.sectors, 2048) - 64, by: 64) {
          try attempt { _ = try engine.read(sector, count: 64) }
        }
        try attempt { try engine.write(9, [UInt8](repeating: 5, count: 512 * 20)) }
        try attempt { try engine.flush() }
      }
    }
    for length in Depth.some(54, of: Array(0..<1600)) + [image.count - 1, image.count - 512] {
      try use([UInt8](image[..<length]))
    }
    for offset in Depth.some(52, of: Array(0..<1536)) {
      var bytes = image
      bytes[offset] ^= 0xFF
      try use(bytes)
    }
    for seed in Depth.seeds(17) {
      var random = SplitMix64(seed: seed)
      var bytes = image
      for _ in 0...random.below(6) {
        // The table and the bitmaps; and the header with its sum put right.
        let offset = random.chance(50) ? 4096 + random.below(64) : 512 + random.below(64)
        bytes[offset] = UInt8(truncatingIfNeeded: random.next())
      }
      var sum: UInt32 = 0
      for index in 0..<1024 where !(36..<40).contains(index) { sum &+= UInt32(bytes[512 + index]) }
      for index in 0..<4 {
        bytes[548 + index] = UInt8(truncatingIfNeeded: ~sum >> UInt32(24 - 8 * index))
      }
      try use(bytes)
    }
  }
}
