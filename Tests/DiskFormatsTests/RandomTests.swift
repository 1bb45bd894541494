// SPDX-License-Identifier: Apache-2.0
// Random requests to a disk of several bitmap pages against the naive model, the store
// opened anew now and then.

import BlockIO
import DiskFormats
import Fakes
import Testing
import TestSupport

@Suite struct RandomTests {
  static let sectors = 70_000 * 8 - 3

  /// Mostly about where bitmap pages meet, where the base ends, and where the disk does.
  static func range(_ random: inout SplitMix64) -> Range<Int> {
    let places = [0, 32_768 * 8, 65_536 * 8, 66_000 * 8, sectors - 60]
    let place = places[random.below(places.count)] - 30 + random.below(60)
    let first = random.chance(80) ? min(max(0, place), sectors - 1) : random.below(sectors)
    return first..<min(sectors, first + 1 + random.below(40))
  }

  @Test(arguments: Depth.seeds(4, offset: 1)) func agreesWithTheModel(seed: UInt64) throws {
    var random = SplitMix64(seed: seed)
    let store = MemoryStore("store")
    let base = MemoryStore("base", size: 66_000 * 4096 - 700)
    for sector in [0, 32_768 * 8 - 1, 32_768 * 8, 65_536 * 8, 65_999 * 8] {
      try base.write(Stamp.sectors(1, UInt64(sector + 1)), at: UInt64(sector * 512))
    }
    var model = NaiveDisk(sectors: Self.sectors) { sector in
      [0, 32_768 * 8 - 1, 32_768 * 8, 65_536 * 8, 65_999 * 8].contains(sector)
        ? UInt64(sector + 1) : 0
    }
    try Dscow.create(
      store: store, base: base, baseName: "base", blockSize: 4096,
      size: UInt64(Self.sectors * 512))
    for round in 0..<20 {
      let disk = try Dscow.open(store: store, base: base, writable: true)
      let engine = MiniEngine(disk, store: store, base: base)
      for step in 0..<30 {
        let range = Self.range(&random)
        switch random.below(6) {
        case 0..<3:
          let stamp = UInt64(1 << 32 + round * 100 + step)
          model.end(model.begin(range, stamp: stamp))
          try engine.write(range.lowerBound, Stamp.sectors(range.count, stamp))
        case 3:
          let isZeroing = random.chance(70)
          model.end(isZeroing ? model.begin(range, stamp: 0) : model.beginDiscard(range))
          try engine.discard(range.lowerBound, count: range.count, zeroing: isZeroing)
        default:
          let bytes = try engine.read(range.lowerBound, count: range.count)
          for (index, sector) in range.enumerated() {
            let stamp = bytes.withUnsafeBytes { Stamp.read($0, at: index * 512) }
            #expect(
              stamp.map { model.mayRead($0, sector: sector) } == true,
              "seed \(seed), round \(round): sector \(sector) read as \(stamp as Any)")
          }
        }
      }
      try engine.flush()
      let allocated = disk.allocatedBlocks
      #expect(try Dscow.open(store: store, base: base, writable: true).allocatedBlocks == allocated)
      #expect(try Dscow.check(store: store, base: base).findings.isEmpty)
    }
  }
}
