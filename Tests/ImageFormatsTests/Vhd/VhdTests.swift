// VHD images: those that QEMU makes, read and written here and judged there; differencing
// ones, which QEMU does not know, against a model; power cuts; hostile bytes.

import Foundation
import ImageFormats
import Posix
import TestSupport
import Testing

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

  @Test(arguments: ["dynamic", "fixed", "dynamic,force_size=on", "fixed,force_size=on"])
  func asQEMU(options: String) throws {
    for seed in 0..<max(1, Depth.factor / 7) {
      let judge = try Judge()
      let options = "subformat=" + options
      try judge.must(
        "qemu-img", "create", "-q", "-f", "vpc", "-o", options, "disk.img", "\(11 << 20)")
      try judge.io(
        "disk.img", "vpc", ["write -P 7 1000k 2000k", "write -P 8 9M 100k", "write -P 9 512 512"])
      let before = try judge.contents("disk.img", "vpc")
      let store = try judge.open("disk.img", writable: true)
      var format = try judge.chain(store, kind: .vhd, writable: true)
      var engine = DeviceEngine(format, store: store)
      #expect(try engine.read(0, count: engine.sectors) == before)
      let model = try Self.live(engine, before, seed: UInt64(seed))
      #expect(try judge.contents("disk.img", "vpc") == model)
      #expect(try Vhd.check(store: store).isClean)
      // A worker dies with placements that are not committed.
      let data = [UInt8](repeating: 0x5A, count: 512 * 9)
      for sector in [4000, 12000, 21000] where sector + 9 < engine.sectors {
        try engine.write(sector, data)
      }
      let left = engine.uncommitted
      format = try judge.chain(store, kind: .vhd, writable: true)
      try format.restore(left)
      engine = DeviceEngine(format, store: store)
      engine.takeOver(left)
      #expect(try engine.read(12000, count: 9) == data)
      try engine.flush()
      let after = try judge.contents("disk.img", "vpc")
      #expect(after == (try engine.read(0, count: engine.sectors)))
      #expect([UInt8](after[(12000 * 512)..<(12009 * 512)]) == data)
    }
    print("vpc \(options): read equal, written, equal")
  }

  @Test func differencing() throws {
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
      let format = try ImageChain.open(store, writable: writable) { request in
        #expect(request.path == "base")
        return base
      }
      return DeviceEngine(format, store: store)
    }
    let engine = try open(true)
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
      try store.write([UInt8](repeating: 0xF0, count: 16), at: place)
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
      try ImageChain.open(store, writable: false) { _ in base }
    }
    #expect(error?.code == .baseChanged)
  }

  @Test func powerCuts() throws {
    let sectors = 256
    let fresh = MemoryStore()
    try Vhd.create(
      store: fresh, size: UInt64(sectors * 512), blockSize: 8192,
      uuid: [UInt8](repeating: 1, count: 16))
    var image = fresh.contents()
    image += [UInt8](repeating: 0, count: (1 << 20) - image.count)
    let seeds = Depth.times(40)
    for seed in 0..<seeds {
      var random = SplitMix64(seed: UInt64(seed))
      var model = DiskModel(sectors: sectors) { _ in 0 }
      var disk = SimulatedDisk("store", contents: image)
      var stamp: UInt64 = 1 << 32
      for _ in 0..<3 {
        disk.cutPower(after: random.below(90))
        do {
          let engine = DeviceEngine(try Vhd.open(store: disk, writable: true), store: disk)
          for _ in 0..<40 {
            let first = random.below(sectors)
            let range = first..<min(sectors, first + 1 + random.below(20))
            func write() throws {
              stamp += 1
              let write = model.begin(range, stamp: stamp)
              try engine.write(range.lowerBound, Stamp.sectors(range.count, stamp))
              model.end(write)
            }
            if random.chance(80) {
              try write()
            } else {
              let start = model.beginFlush()
              try engine.flush { try write() }
              model.flushed(start)
            }
          }
        } catch let error as IOError where error.code == 5 || error.code == 28 {
        } catch let error as ImageError where [5, 28].contains(error.cause?.code ?? 0) {}
        disk = disk.afterPowerCut(using: &random)
        #expect(try Vhd.check(store: disk).isClean, "seed \(seed)")
        let engine = DeviceEngine(try Vhd.open(store: disk, writable: false), store: disk)
        let bytes = try engine.read(0, count: sectors)
        var found: [UInt64] = []
        for sector in 0..<sectors {
          let stamp = bytes.withUnsafeBytes { Stamp.read($0, at: sector * 512) }
          #expect(
            stamp.map { model.mayHold($0, sector: sector) } ?? false,
            "seed \(seed), sector \(sector): \(stamp as Any)")
          found.append(stamp ?? 0)
        }
        model.settle(found)
      }
    }
    print("vhd: \(seeds * 3) power cuts")
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
    for seed in 0..<Depth.times(17) {
      var random = SplitMix64(seed: UInt64(seed))
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
