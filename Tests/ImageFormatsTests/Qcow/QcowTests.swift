// qcow images of version 1: those that QEMU makes, read and written here and judged there;
// power cuts; hostile bytes.

import Foundation
import ImageFormats
import Posix
import TestSupport
import Testing

@Suite struct QcowTests {
  @Test(arguments: [nil, "raw", "qcow", "qcow2"]) func asQEMU(base: String?) throws {
    for seed in 0..<max(1, Depth.factor / 7) {
      let judge = try Judge()
      var arguments = ["create", "-q", "-f", "qcow"]
      if let base {
        try judge.must("qemu-img", "create", "-q", "-f", base, "base.img", "3M")
        try judge.io("base.img", base, ["write -P 3 100k 900k", "write -P 4 2M 1M"])
        arguments += ["-b", "base.img", "-F", base]
      }
      let (output, status) = try judge.run("qemu-img", arguments + ["disk.img", "5M"])
      #expect(status == 0, "\(output)")
      try judge.io(
        "disk.img", "qcow", ["write -P 7 1000k 700k", "write -P 9 512 512", "write -P 1 4M 1M"])
      let before = try judge.contents("disk.img", "qcow")
      let store = try judge.open("disk.img", writable: true)
      var format = try judge.chain(store, kind: .qcow, writable: true)
      var engine = DeviceEngine(format, store: store)
      #expect(try engine.read(0, count: engine.sectors) == before)
      let model = try VhdTests.live(engine, before, seed: UInt64(seed))
      #expect(try judge.contents("disk.img", "qcow") == model)
      try engine.write(3000, [UInt8](repeating: 0x5A, count: 512 * 9))
      let left = engine.uncommitted
      format = try judge.chain(store, kind: .qcow, writable: true)
      try format.restore(left)
      engine = DeviceEngine(format, store: store)
      engine.takeOver(left)
      try engine.flush()
      #expect(try judge.contents("disk.img", "qcow") == engine.read(0, count: engine.sectors))
    }
    print("qcow over \(base ?? "nothing"): read equal, written, equal")
  }

  @Test func compressed() throws {
    let judge = try Judge()
    var random = SplitMix64(seed: 1)
    var bytes: [UInt8] = []
    while bytes.count < 2 << 20 {
      bytes += [UInt8](repeating: UInt8(truncatingIfNeeded: random.next()), count: 3000)
    }
    bytes.removeSubrange((2 << 20)...)
    try Data(bytes).write(to: URL(fileURLWithPath: judge.path("in.raw")))
    // qemu-img 7.2 writes all of it and then fails on an empty write that ends the image.
    _ = try judge.run(
      "qemu-img", ["convert", "-c", "-f", "raw", "-O", "qcow", "in.raw", "disk.img"])
    try #require(try judge.contents("disk.img", "qcow") == bytes)
    let store = try judge.open("disk.img", writable: true)
    let engine = DeviceEngine(
      try judge.chain(store, kind: nil, writable: true), store: store)
    #expect(try engine.read(0, count: engine.sectors) == bytes)
    let model = try VhdTests.live(engine, bytes, seed: 5)
    #expect(try judge.contents("disk.img", "qcow") == model)
  }

  @Test func powerCuts() throws {
    let sectors = 256
    let fresh = MemoryStore()
    try Qcow.create(store: fresh, size: UInt64(sectors * 512))
    var image = fresh.contents()
    image += [UInt8](repeating: 0, count: 4096 - image.count % 4096)
    let seeds = Depth.times(40)
    for seed in 0..<seeds {
      var random = SplitMix64(seed: UInt64(seed))
      var model = DiskModel(sectors: sectors) { _ in 0 }
      // A file grows where a disk cannot: each life begins at the end of the last one.
      var stamp: UInt64 = 1 << 32
      var disk = SimulatedDisk(
        "store", contents: image + [UInt8](repeating: 0, count: 2 << 20))
      var used = UInt64(image.count)
      for _ in 0..<3 {
        disk.cutPower(after: random.below(90))
        let store = GrowingDisk(disk, used: used)
        do {
          let engine = DeviceEngine(try Qcow.open(store: store, writable: true), store: store)
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
        used = store.size
        disk = disk.afterPowerCut(using: &random)
        let engine = DeviceEngine(try Qcow.open(store: disk, writable: false), store: disk)
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
    print("qcow: \(seeds * 3) power cuts")
  }

  @Test func hostile() throws {
    let store = MemoryStore()
    try Qcow.create(store: store, size: 1 << 20)
    _ = try VhdTests.live(
      DeviceEngine(try Qcow.open(store: store, writable: true), store: store),
      [UInt8](repeating: 0, count: 1 << 20), seed: 4, steps: 40)
    let image = store.contents()
    func use(_ bytes: [UInt8]) throws {
      let store = MemoryStore(bytes: bytes)
      func attempt(_ body: () throws -> Void) throws {
        do { try body() } catch is ImageError {} catch is IOError {}
      }
      try attempt {
        let base = MemoryStore("base", size: 4096)
        let format = try Qcow.open(store: store, base: base, writable: true)
        let engine = DeviceEngine(format, store: store)
        for sector in stride(from: 0, to: min(engine.sectors, 2048) - 64, by: 64) {
          try attempt { _ = try engine.read(sector, count: 64) }
        }
        try attempt { try engine.write(9, [UInt8](repeating: 5, count: 512 * 20)) }
        try attempt { try engine.flush() }
      }
    }
    for length in Depth.some(20, of: Array(0..<200)) { try use([UInt8](image[..<length])) }
    for offset in Depth.some(32, of: Array(0..<64)) {
      for flip in [UInt8(1), 2, 8, 0x80, 0xFF] {
        var bytes = image
        bytes[offset] ^= flip
        try use(bytes)
      }
    }
    for seed in 0..<Depth.times(30) {
      var random = SplitMix64(seed: UInt64(seed))
      var bytes = image
      for _ in 0...random.below(6) {
        bytes[random.below(random.chance(50) ? 64 : bytes.count)] =
          UInt8(truncatingIfNeeded: random.next())
      }
      try use(bytes)
    }
  }
}

/// A part of a simulated disk, as a file that grows up to the disk's end.
final class GrowingDisk: ByteStore, @unchecked Sendable {
  // Guarded by the tests, which are single-threaded.
  private var used: UInt64
  private let disk: SimulatedDisk
  var name: String { disk.name }
  var size: UInt64 { used }
  let isWritable = true

  init(_ disk: SimulatedDisk, used: UInt64) {
    self.disk = disk
    self.used = used
  }

  func identity() -> StoreIdentity { disk.identity() }
  func allocatedBytes() -> UInt64 { used }
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    try disk.read(buffer, at: offset)
  }
  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    try disk.write(buffer, at: offset)
    used = max(used, offset + UInt64(buffer.count))
  }
  func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    try disk.zero(at: offset, count: count)
  }
  func resize(to size: UInt64) throws(IOError) {
    try disk.resize(to: size)
    used = size
  }
  func flush() throws(IOError) { try disk.flush() }
}
