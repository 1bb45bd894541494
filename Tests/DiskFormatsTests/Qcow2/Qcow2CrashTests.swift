// SPDX-License-Identifier: Apache-2.0
// What a power cut leaves of a qcow2 disk: it opens, a check finds nothing worse than leaks,
// every sector holds what the last flush confirmed or something written since, and what
// nobody wrote reads as before.

import DiskFormats
import Fakes
import Foundation
import SystemIO
import Testing
import TestSupport

/// An image to start from, made once.
enum CrashSeedImage: String, CaseIterable {
  case fresh512, fresh4k, narrow, extended, compressed, snapshot, extendedSnapshot, lazy

  static let sectors = 320
  static let base: [UInt8] = (0..<sectors).flatMap { Stamp.sectors(1, UInt64($0 + 1)) }

  /// The image's bytes, and whether its disk begins as `base` (or else as zeroes).
  func make() throws -> (bytes: [UInt8], isFull: Bool) {
    let judge = try Judge()
    let size = UInt64(Self.sectors * 512)
    func fresh(_ change: (inout Qcow2Options) -> Void) throws -> ([UInt8], Bool) {
      var options = Qcow2Options()
      change(&options)
      let store = MemoryStore()
      try Qcow2.create(store: store, size: size, options: options)
      return (store.contents(), false)
    }
    func converted(_ arguments: [String], snapshot: Bool) throws -> ([UInt8], Bool) {
      try Data(Self.base).write(to: URL(fileURLWithPath: judge.path("base.raw")))
      let all = ["convert", "-f", "raw", "-O", "qcow2"] + arguments + ["base.raw", "disk.img"]
      let (output, status) = try judge.run("qemu-img", all)
      guard status == 0 else { throw Judge.Failure(description: output) }
      if snapshot { try judge.must("qemu-img", "snapshot", "-c", "one", "disk.img") }
      let data = try Data(contentsOf: URL(fileURLWithPath: judge.path("disk.img")))
      return ([UInt8](data), true)
    }
    switch self {
    case .fresh512: return try fresh { $0.clusterSize = 512 }
    case .fresh4k: return try fresh { $0.clusterSize = 4096 }
    case .narrow:
      return try fresh {
        $0.clusterSize = 512
        $0.refcountBits = 1
      }
    case .extended:
      return try fresh {
        $0.clusterSize = 16384
        $0.extendedL2 = true
      }
    case .compressed:
      return try converted(["-c", "-o", "cluster_size=4k"], snapshot: false)
    case .snapshot: return try converted(["-o", "cluster_size=512"], snapshot: true)
    case .extendedSnapshot:
      return try converted(["-c", "-o", "cluster_size=16k,extended_l2=on"], snapshot: true)
    case .lazy:
      return try converted(["-o", "cluster_size=4k,lazy_refcounts=on"], snapshot: false)
    }
  }
}

/// One seeded life of a qcow2 disk.
struct Qcow2CrashRun {
  /// What went wrong, with what is needed to see it again.
  struct Violation: Error, CustomStringConvertible {
    let description: String
  }

  let seed: UInt64
  var keepsOrder = true
  var random: SplitMix64
  var model: NaiveDisk
  var disk: SimulatedDisk
  var stamp: UInt64 = 1 << 32
  private(set) var leaks = 0
  /// First writes whose place a pool had.
  private(set) var pooled = 0

  init(seed: UInt64, image: (bytes: [UInt8], isFull: Bool)) {
    self.seed = seed
    random = SplitMix64(seed: seed)
    model = NaiveDisk(sectors: CrashSeedImage.sectors) { image.isFull ? UInt64($0 + 1) : 0 }
    var contents = image.bytes
    contents += [UInt8](repeating: 0, count: (2 << 20) - contents.count)
    disk = SimulatedDisk("store", contents: contents)
  }

  mutating func live(cuts: Int) throws {
    for _ in 0..<cuts {
      disk.cutPower(after: random.below(120))
      do {
        let engine = DeviceEngine(
          try Qcow2.open(store: disk, writable: true), store: disk, pools: seed % 2 == 1)
        engine.keepsOrder = keepsOrder
        defer { pooled += engine.pooled }
        for _ in 0..<40 { try step(engine) }
      } catch let error as IOError where error.code == 5 || error.code == 28 {
      } catch let error as ImageError where [5, 28].contains(error.cause?.code ?? 0) {}
      disk = disk.afterPowerCut(using: &random)
      try inspect()
    }
  }

  private mutating func range() -> Range<Int> {
    let first = random.below(model.count)
    return first..<min(model.count, first + 1 + random.below(random.chance(80) ? 12 : 100))
  }

  private mutating func step(_ engine: DeviceEngine) throws {
    let range = range()
    switch random.below(10) {
    case 0..<5: try write(engine, range)
    case 5:
      stamp += 1
      _ = model.begin(range, stamp: stamp)
      try engine.beginWrite(range.lowerBound, Stamp.sectors(range.count, stamp))
    case 6, 7:
      let zeroing = random.chance(50)
      let write = zeroing ? model.begin(range, stamp: 0) : model.beginDiscard(range)
      try engine.discard(range.lowerBound, count: range.count, zeroing: zeroing)
      model.end(write)
    case 8:
      let start = model.beginFlush()
      try engine.flush { if random.chance(50) { try write(engine, range) } }
      model.flushed(start)
    default:
      try engine.finish()
      let bytes = try engine.read(range.lowerBound, count: range.count)
      for (index, sector) in range.enumerated() {
        let stamp = bytes.withUnsafeBytes { Stamp.read($0, at: index * 512) }
        guard let stamp, model.mayRead(stamp, sector: sector) else {
          throw Violation(description: "seed \(seed): sector \(sector) read as \(stamp as Any)")
        }
      }
    }
  }

  private mutating func write(_ engine: DeviceEngine, _ range: Range<Int>) throws {
    stamp += 1
    let write = model.begin(range, stamp: stamp)
    try engine.write(range.lowerBound, Stamp.sectors(range.count, stamp))
    model.end(write)
  }

  private mutating func inspect() throws {
    let report = try Qcow2.check(store: disk)
    guard report.corruptions == 0 else {
      throw Violation(description: "seed \(seed): corrupt: \(report.problems)")
    }
    leaks += Int(report.leaks)
    let engine = DeviceEngine(try Qcow2.open(store: disk, writable: false), store: disk)
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

@Suite struct Qcow2CrashTests {
  /// Lives per kind of image, of three cuts each: with DMU_DEPTH=30 more than 10,000 in all.
  static let seeds = Depth.seeds(9)

  @Test(arguments: CrashSeedImage.allCases) func powerCuts(kind: CrashSeedImage) throws {
    let image = try kind.make()
    let judge = try Judge()
    var (leaks, pooled) = (0, 0)
    for (number, seed) in Self.seeds.enumerated() {
      var run = Qcow2CrashRun(seed: seed, image: image)
      try run.live(cuts: 3)
      leaks += run.leaks
      pooled += run.pooled
      guard number % 60 == 0 else { continue }
      // Now and then QEMU says what it thinks: 0 is clean, 3 is leaks.
      try Data(run.disk.contents()).write(to: URL(fileURLWithPath: judge.path("disk.img")))
      let (output, status) = try judge.run("qemu-img", ["check", "-f", "qcow2", "disk.img"])
      #expect(status == 0 || status == 3, "seed \(seed): \(output)")
      // What leaks is found and repaired, and then both agree that nothing is wrong.
      let store = try judge.open("disk.img", writable: true)
      try Qcow2.repair(store: store, .leaks)
      #expect(try Qcow2.check(store: store).isClean)
      let (after, clean) = try judge.run("qemu-img", ["check", "-f", "qcow2", "disk.img"])
      #expect(clean == 0, "seed \(seed): \(after)")
    }
    // All blocks of the last have their places already.
    let hasPools = ![.extended, .extendedSnapshot, .lazy].contains(kind)
    #expect(hasPools ? pooled > 0 : pooled == 0)
    print(
      "qcow2 \(kind.rawValue): \(Self.seeds.count * 3) power cuts, \(pooled) placed in pools, "
        + "\(leaks) leaked clusters")
  }

  /// The suite must be able to fail: a commit whose stages are not kept apart is found
  /// out.
  @Test func brokenOrderIsFound() throws {
    let image = try CrashSeedImage.fresh512.make()
    var violations = 0
    let least = Depth.times(20)
    var tried = 0
    for seed in 0..<max(600, least) where seed < least || violations == 0 {
      tried += 1
      var run = Qcow2CrashRun(seed: UInt64(seed), image: image)
      run.keepsOrder = false
      do { try run.live(cuts: 3) } catch is Qcow2CrashRun.Violation { violations += 1 }
    }
    #expect(violations > 0)
    print("stages run together: \(violations) of \(tried) seeds found it")
  }

  /// Whichever call to the store fails, what a flush confirmed is there and nothing is
  /// corrupt; and a flush that is tried again succeeds.
  @Test(arguments: [CrashSeedImage.fresh512, .narrow, .extendedSnapshot, .snapshot])
  func anyCallFails(kind: CrashSeedImage) throws {
    let image = try kind.make()
    var failAt = 0
    var tried = 0
    while true {
      let memory = MemoryStore(bytes: image.bytes)
      let failing = FailingStore(memory, failAt: failAt, code: 28)
      var confirmed: [Int: UInt64] = [:]
      try Self.script(failing, &confirmed, pools: failAt % 2 == 1)
      let report = try Qcow2.check(store: memory)
      #expect(report.corruptions == 0, "call \(failAt): \(report.problems)")
      let engine = DeviceEngine(try Qcow2.open(store: memory, writable: false), store: memory)
      for (sector, stamp) in confirmed {
        let bytes = try engine.read(sector, count: 1)
        #expect(bytes == Stamp.sectors(1, stamp), "call \(failAt): sector \(sector)")
      }
      if failing.calls <= failAt { break }
      tried += 1
      failAt += max(1, 7 / Depth.factor)
    }
    print("qcow2 \(kind.rawValue): \(tried) of \(failAt) calls failed once")
  }

  /// Writes and flushes, each tried again when it fails.
  private static func script(
    _ store: FailingStore, _ confirmed: inout [Int: UInt64], pools: Bool
  ) throws {
    func attempt(_ body: () throws -> Void) throws {
      do {
        try body()
      } catch is IOError {
        try body()
      } catch let error as ImageError where error.code == .io {
        try body()
      }
    }
    var engine: DeviceEngine?
    try attempt {
      engine = DeviceEngine(
        try Qcow2.open(store: store, writable: true), store: store, pools: pools)
    }
    guard let engine else { return }
    for round in 0..<3 {
      var written: [Int: UInt64] = [:]
      for index in 0..<4 {
        let sector = (round * 97 + index * 61) % 300
        let stamp = UInt64(1000 + round * 10 + index)
        try attempt { try engine.write(sector, Stamp.sectors(9, stamp)) }
        for item in sector..<(sector + 9) { written[item] = stamp }
      }
      try attempt { try engine.flush() }
      confirmed.merge(written) { $1 }
    }
  }
}
