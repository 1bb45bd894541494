// SPDX-License-Identifier: Apache-2.0
// What a power cut leaves of a dscow disk: every sector holds what the last flush confirmed
// or something written since; what nobody wrote reads as the base.

import DiskFormats
import Fakes
import SystemIO
import Testing
import TestSupport

/// One seeded life of a disk: requests, power cuts, and what is found after each.
struct CrashRun {
  /// What went wrong, with what is needed to see it again.
  struct Violation: Error, CustomStringConvertible {
    let description: String
  }

  static let blockSize = 4096
  let seed: UInt64
  let order: CommitOrder
  var random: SplitMix64
  var model: NaiveDisk
  var disk: SimulatedDisk
  let base: MemoryStore
  var stamp: UInt64 = 1 << 32

  init(seed: UInt64, order: CommitOrder = .right) throws {
    self.seed = seed
    self.order = order
    random = SplitMix64(seed: seed)
    // A disk of up to 24 blocks, perhaps ending within a block, and a base that is as long,
    // shorter or longer, perhaps ending within a block or even a sector.
    let sectors = 8 + random.below(24 * 8 - 8)
    let baseBytes = max(
      1, random.chance(50) ? sectors * 512 : random.below(sectors * 640) / 8 * 8)
    var bytes: [UInt8] = []
    for sector in 0..<((baseBytes + 511) / 512) {
      bytes += Stamp.sectors(1, UInt64(sector + 1))
    }
    // The last sector of a base that ends within it is told by its first word alone.
    let whole = baseBytes / 512
    bytes.removeSubrange((whole * 512)...)
    base = MemoryStore("base", bytes: bytes)
    model = NaiveDisk(sectors: sectors) { $0 < whole ? UInt64($0 + 1) : 0 }
    disk = SimulatedDisk("store", size: (sectors / 8 + 1) * Self.blockSize + 65536)
    if bytes.isEmpty {
      try Dscow.create(
        store: disk, base: nil, baseName: "", blockSize: UInt32(Self.blockSize),
        size: UInt64(sectors * 512))
    } else {
      try Dscow.create(
        store: disk, base: base, baseName: "base", blockSize: UInt32(Self.blockSize),
        size: UInt64(sectors * 512), overwrite: true)
    }
  }

  /// Lives through a number of power cuts.
  mutating func live(cuts: Int) throws {
    for _ in 0..<cuts {
      let format = try Dscow.open(store: disk, base: base, writable: true)
      let engine = MiniEngine(format, store: disk, base: base, order: order)
      disk.cutPower(after: random.below(60))
      do {
        for _ in 0..<40 { try step(engine) }
      } catch let error as IOError where error.code == 5 {
      } catch let error as ImageError where error.cause?.code == 5 {}
      disk = disk.afterPowerCut(using: &random)
      try inspect()
    }
  }

  private mutating func range() -> Range<Int> {
    let first = random.below(model.count)
    let most = random.chance(70) ? 12 : model.count
    return first..<min(model.count, first + 1 + random.below(most))
  }

  private mutating func step(_ engine: MiniEngine) throws {
    switch random.below(10) {
    case 0..<5: try write(engine, range())
    case 5: try beginWrite(engine, range())
    case 6: try discard(engine, range(), zeroing: false)
    case 7: try discard(engine, range(), zeroing: true)
    case 8: try flush(engine)
    default: try check(engine, range())
    }
  }

  private mutating func write(_ engine: MiniEngine, _ range: Range<Int>) throws {
    stamp += 1
    let write = model.begin(range, stamp: stamp)
    try engine.write(range.lowerBound, Stamp.sectors(range.count, stamp))
    model.end(write)
  }

  /// A write that is placed, and whose data is written with the next request. It is never
  /// acknowledged.
  private mutating func beginWrite(_ engine: MiniEngine, _ range: Range<Int>) throws {
    stamp += 1
    _ = model.begin(range, stamp: stamp)
    _ = try engine.beginWrite(range.lowerBound, Stamp.sectors(range.count, stamp))
  }

  private mutating func discard(
    _ engine: MiniEngine, _ range: Range<Int>, zeroing: Bool
  ) throws {
    let write = zeroing ? model.begin(range, stamp: 0) : model.beginDiscard(range)
    try engine.discard(range.lowerBound, count: range.count, zeroing: zeroing)
    model.end(write)
  }

  private mutating func flush(_ engine: MiniEngine) throws {
    let start = model.beginFlush()
    let others = (0..<random.below(3)).map { _ in range() }
    let held = random.chance(30) ? range() : nil
    try engine.flush {
      for range in others { try write(engine, range) }
      if let held { try beginWrite(engine, held) }
    }
    model.flushed(start)
  }

  private func check(_ engine: MiniEngine, _ range: Range<Int>) throws {
    try engine.finish()
    let bytes = try engine.read(range.lowerBound, count: range.count)
    for (index, sector) in range.enumerated() {
      let stamp = bytes.withUnsafeBytes { Stamp.read($0, at: index * 512) }
      guard let stamp, model.mayRead(stamp, sector: sector) else {
        throw Violation(description: "seed \(seed): sector \(sector) read as \(stamp as Any)")
      }
    }
  }

  /// Opens and checks the disk after a cut and compares every sector with the model.
  private mutating func inspect() throws {
    let format = try Dscow.open(store: disk, base: base, writable: false)
    let engine = MiniEngine(format, store: disk, base: base)
    let bytes = try engine.read(0, count: model.count)
    var found: [UInt64] = []
    for sector in 0..<model.count {
      let stamp = bytes.withUnsafeBytes { Stamp.read($0, at: sector * 512) }
      guard let stamp, model.mayHold(stamp, sector: sector) else {
        throw Violation(
          description: "seed \(seed): after a power cut sector \(sector) holds "
            + "\(stamp as Any), not one of \(model.candidates(sector: sector))")
      }
      found.append(stamp)
    }
    model.settle(found)
  }
}

@Suite struct CrashTests {
  @Test(arguments: 0..<8) func powerCuts(part: Int) throws {
    for seed in Depth.seeds(250, offset: UInt64(part) * 1_000_000) {
      var run = try CrashRun(seed: seed)
      try run.live(cuts: 3)
    }
  }

  /// The suite must be able to fail: a commit in the wrong order is found out.
  @Test(arguments: [CommitOrder.bitmapBeforeData, .laterMarksToo])
  func brokenOrderIsFound(order: CommitOrder) throws {
    var violations = 0
    for seed in 0..<400 {
      var run = try CrashRun(seed: UInt64(seed), order: order)
      do { try run.live(cuts: 3) } catch is CrashRun.Violation { violations += 1 }
    }
    #expect(violations > 0)
    print("\(order): \(violations) of 400 seeds found it")
  }
}
