// SPDX-License-Identifier: Apache-2.0
// qcow images of version 1: power cuts and hostile bytes. What QEMU makes is in the matrix.

import DiskFormats
import Fakes
import Foundation
import SystemIO
import Testing
import TestSupport

@Suite struct QcowTests {
  private static func cuts(overBase: Bool) throws -> PowerCuts {
    let fresh = MemoryStore()
    try Qcow.create(
      store: fresh, size: UInt64(PowerCuts.sectors * 512), base: overBase ? "base" : nil)
    let base = MemoryStore("base", bytes: PowerCuts.base)
    return PowerCuts(
      name: "qcow", image: fresh.contents(), isFull: overBase,
      open: { try Qcow.open(store: $0, base: base, writable: $1) },
      check: { try Qcow.check(store: $0) }, hasPools: true,
      repair: { try Qcow.repair(store: $0, .all) })
  }

  @Test(arguments: [false, true]) func powerCuts(overBase: Bool) throws {
    try Self.cuts(overBase: overBase).run(seeds: Depth.seeds(20))
  }

  @Test func powerCutsWhileResizing() throws {
    try Self.cuts(overBase: false).runResizes(seeds: Depth.seeds(40)) { format, size in
      try #require(format as? Qcow).resize(to: size)
    }
  }

  @Test func brokenOrderIsFound() throws { try Self.cuts(overBase: true).findBrokenOrder() }

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
    for seed in Depth.seeds(30) {
      var random = SplitMix64(seed: seed)
      var bytes = image
      for _ in 0...random.below(6) {
        bytes[random.below(random.chance(50) ? 64 : bytes.count)] =
          UInt8(truncatingIfNeeded: random.next())
      }
      try use(bytes)
    }
  }
}
