// SPDX-License-Identifier: Apache-2.0
// What power cuts leave of images whose format has no counts of use: they open, a check finds
// nothing worse than leaks, every sector holds what the last flush confirmed or something
// written since, and what nobody wrote reads as before.

import BlockIO
import DiskFormats
import Fakes
import SystemIO
import Testing
import TestSupport

/// Lives of a disk in an image, of three power cuts each.
struct PowerCuts {
  /// What went wrong, with the seed to see it again.
  struct Violation: Error, CustomStringConvertible {
    let description: String
  }

  static let sectors = 256
  /// What bases hold: each sector its number from 1 on.
  static let base = (0..<sectors).flatMap { Stamp.sectors(1, UInt64($0 + 1)) }

  let name: String
  /// The image that each life begins with.
  let image: [UInt8]
  /// Files beside it that hold parts of the disk, each on a medium of its own; the stores that
  /// `open`, `check` and `repair` are given have them as `others`.
  var others: [[UInt8]] = []
  /// Whether it is over a base of stamps, as `base` makes it; else its disk is of zeroes.
  let isFull: Bool
  let open: (any ByteStore, _ writable: Bool) throws -> any ImageFormat
  let check: (any ByteStore) throws -> CheckReport
  /// Whether the format has pools.
  var hasPools = false
  /// Leaves nothing to find.
  let repair: (any ByteStore) throws -> Void

  func run(seeds: [UInt64]) throws {
    var (leaks, pooled) = (UInt64(0), 0)
    for seed in seeds {
      do {
        let found = try live(seed: seed)
        leaks += found.leaks
        pooled += found.pooled
      } catch {
        Issue.record("\(name), seed \(seed): \(error)")
      }
    }
    #expect(pooled > 0 || !hasPools, "\(name): no place of a pool was used")
    print(
      "\(name): \(seeds.count) seeds, \(seeds.count * 3) power cuts, \(pooled) placed in pools, "
        + "\(leaks) leaks")
  }

  /// The suite must be able to fail: a commit whose stages are not kept apart is found out.
  func findBrokenOrder() throws {
    for seed in 0..<UInt64(600) {
      do { _ = try live(seed: seed, keepsOrder: false) } catch let error as Violation {
        return print("\(name), stages run together: seed \(seed) found it: \(error)")
      }
    }
    Issue.record("\(name): 600 seeds with stages run together found nothing")
  }

  private func live(
    seed: UInt64, keepsOrder: Bool = true
  ) throws -> (leaks: UInt64, pooled: Int) {
    var pooled = 0
    var random = SplitMix64(seed: seed)
    let isFull = isFull
    var model = NaiveDisk(sectors: Self.sectors) { isFull ? UInt64($0 + 1) : 0 }
    let room = [UInt8](repeating: 0, count: 1 << 20)
    let images = [image] + others
    var disks = images.map { SimulatedDisk("store", contents: $0 + room) }
    var used = images.map { UInt64($0.count) }
    var stamp: UInt64 = 1 << 32
    var leaks: UInt64 = 0
    for _ in 0..<3 {
      // A file grows where a disk cannot: each life goes on where the last one ended.
      let store = GrowingDisk(disks, used: used, fuse: GrowingDisk.Fuse(random.below(90)))
      do {
        let engine = DeviceEngine(try open(store, true), store: store, pools: seed % 2 == 1)
        engine.keepsOrder = keepsOrder
        defer { pooled += engine.pooled }
        for _ in 0..<40 { try step(engine, &model, &stamp, &random) }
      } catch let error as IOError where error.code == 5 || error.code == 28 {
      } catch let error as ImageError where [5, 28].contains(error.cause?.code ?? 0) {}
      used = store.sizes
      disks = disks.map { $0.afterPowerCut(using: &random) }
      let after = GrowingDisk(disks, used: used)
      let report = try check(after)
      guard report.corruptions == 0 else {
        throw Violation(description: "\(report.problems)")
      }
      leaks += report.leaks
      if random.chance(30) {
        try repair(after)
        let again = try check(after)
        guard again.isClean else {
          throw Violation(description: "repaired: \(again.problems)")
        }
        used = after.sizes
      }
      try inspect(after, &model)
    }
    return (leaks, pooled)
  }

  /// Cuts the power while the disk is given another length: it has the old one or the new, what
  /// it had is there, and what is new is zeroes; and then it is given a third one.
  func runResizes(
    seeds: [UInt64], _ resize: (any ImageFormat, UInt64) throws -> Void
  ) throws {
    for seed in seeds {
      do { try resizeLife(seed, resize) } catch {
        Issue.record("\(name), resize, seed \(seed): \(error)")
      }
    }
    print("\(name): \(seeds.count) power cuts while resizing")
  }

  private func resizeLife(
    _ seed: UInt64, _ resize: (any ImageFormat, UInt64) throws -> Void
  ) throws {
    var random = SplitMix64(seed: seed)
    var disk = SimulatedDisk("store", contents: image + [UInt8](repeating: 0, count: 1 << 20))
    var store = GrowingDisk(disk, used: UInt64(image.count))
    let engine = DeviceEngine(try open(store, true), store: store)
    var model = (0..<Self.sectors).map { UInt64($0 + 1) }
    try engine.write(0, model.flatMap { Stamp.sectors(1, $0) })
    try engine.flush()
    for _ in 0..<4 {
      let sectors = 9 + random.below(600)
      disk.cutPower(after: random.below(16))
      do { try resize(try open(store, true), UInt64(sectors * 512)) } catch is IOError {
      } catch let error as ImageError where error.code == .io {}
      let used = store.size
      disk = disk.afterPowerCut(using: &random)
      store = GrowingDisk(disk, used: used)
      let report = try check(store)
      guard report.corruptions == 0 else {
        throw Violation(description: "\(report.problems)")
      }
      let engine = DeviceEngine(try open(store, false), store: store)
      guard engine.sectors == sectors || engine.sectors == model.count else {
        throw Violation(description: "\(engine.sectors) sectors, not \(sectors)")
      }
      model = Array(model.prefix(engine.sectors))
      model += [UInt64](repeating: 0, count: engine.sectors - model.count)
      let bytes = try engine.read(0, count: engine.sectors)
      for (sector, stamp) in model.enumerated() {
        let found = bytes.withUnsafeBytes { Stamp.read($0, at: sector * 512) }
        guard found == stamp else {
          throw Violation(description: "sector \(sector): \(found as Any), not \(stamp)")
        }
      }
    }
  }

  private func step(
    _ engine: DeviceEngine, _ model: inout NaiveDisk, _ stamp: inout UInt64,
    _ random: inout SplitMix64
  ) throws {
    let first = random.below(Self.sectors)
    let range = first..<min(Self.sectors, first + 1 + random.below(20))
    func write() throws {
      stamp += 1
      let write = model.begin(range, stamp: stamp)
      try engine.write(range.lowerBound, Stamp.sectors(range.count, stamp))
      model.end(write)
    }
    switch random.below(10) {
    case 0..<7: try write()
    case 7:
      let write = model.begin(range, stamp: 0)
      try engine.discard(range.lowerBound, count: range.count, zeroing: true)
      model.end(write)
    default:
      let start = model.beginFlush()
      try engine.flush { try write() }
      model.flushed(start)
    }
  }

  private func inspect(_ store: any ByteStore, _ model: inout NaiveDisk) throws {
    let engine = DeviceEngine(try open(store, false), store: store)
    let bytes = try engine.read(0, count: Self.sectors)
    var found: [UInt64] = []
    for sector in 0..<Self.sectors {
      let stamp = bytes.withUnsafeBytes { Stamp.read($0, at: sector * 512) }
      guard let stamp, model.mayHold(stamp, sector: sector) else {
        throw Violation(description: "sector \(sector) holds \(stamp as Any)")
      }
      found.append(stamp)
    }
    model.settle(found)
  }
}

/// A part of a simulated disk, as a file that grows up to the disk's end. Used from one thread.
final class GrowingDisk: ByteStore, @unchecked Sendable {
  /// What may still be done before the power of all files goes.
  final class Fuse {
    var left: Int
    init(_ left: Int) { self.left = left }
  }

  // Guarded by the tests, which are single-threaded.
  private var used: UInt64
  private let disk: SimulatedDisk
  private let fuse: Fuse?
  /// The files beside this one.
  let others: [GrowingDisk]
  /// Lengths of this file and of those beside it.
  var sizes: [UInt64] { [used] + others.map(\.used) }
  var name: String { disk.name }
  var size: UInt64 { used }
  let isWritable = true

  convenience init(_ disk: SimulatedDisk, used: UInt64) { self.init([disk], used: [used]) }

  /// One file and those beside it, by their media and lengths.
  init(_ disks: [SimulatedDisk], used: [UInt64], fuse: Fuse? = nil) {
    disk = disks[0]
    self.used = used[0]
    self.fuse = fuse
    others = zip(disks, used).dropFirst().map { GrowingDisk([$0], used: [$1], fuse: fuse) }
  }

  /// The medium's own fuse is the common one.
  private func burn(_ count: Int = 1) {
    guard let fuse else { return }
    disk.cutPower(after: fuse.left)
    fuse.left = max(-1, fuse.left - count)
  }

  func identity() -> StoreIdentity { disk.identity() }
  func allocatedBytes() -> UInt64 { used }
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    burn(0)
    try disk.read(buffer, at: offset)
  }
  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    burn()
    try disk.write(buffer, at: offset)
    used = max(used, offset + UInt64(buffer.count))
  }
  func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    burn()
    try disk.zero(at: offset, count: count)
  }
  func resize(to size: UInt64) throws(IOError) {
    try disk.resize(to: size)
    used = size
  }
  func flush() throws(IOError) {
    burn()
    try disk.flush()
  }
}
