// SPDX-License-Identifier: Apache-2.0
// Images that were made to do harm: whatever their bytes, opening, reading, writing,
// committing and checking end in an answer or an error, never in a trap.

import DiskFormats
import Fakes
import Foundation
import SystemIO
import Testing
import TestSupport

@Suite struct Qcow2HostileTests {
  /// Does everything to an image; errors of this program's own are fine.
  static func use(_ bytes: [UInt8]) throws {
    let store = MemoryStore("hostile", bytes: bytes)
    func attempt(_ body: () throws -> Void) throws {
      do { try body() } catch is ImageError {} catch is IOError {}
    }
    try attempt { _ = try Qcow2.check(store: store) }
    try attempt { _ = try Qcow2.snapshots(of: store) }
    try attempt {
      let base = MemoryStore("base", size: 1 << 20)
      let format = try Qcow2.open(store: store, base: base, dataFile: base, writable: true)
      let engine = DeviceEngine(format, store: store)
      let sectors = min(engine.sectors, 4096)
      guard sectors > 64 else { return }
      for sector in stride(from: 0, to: sectors - 64, by: 64) {
        try attempt { _ = try engine.read(sector, count: 64) }
      }
      try attempt { try engine.write(9, [UInt8](repeating: 5, count: 512 * 20)) }
      try attempt { try engine.discard(0, count: sectors, zeroing: true) }
      try attempt { try engine.flush() }
      try attempt { try engine.write(engine.sectors - 5, [UInt8](repeating: 6, count: 512 * 5)) }
      try attempt { try engine.flush() }
    }
    try attempt { _ = try Qcow2.repair(store: store, .all) }
  }

  @Test func everyHeaderByte() throws {
    for kind in [CrashSeedImage.fresh4k, .extendedSnapshot] {
      let image = try kind.make().bytes
      for offset in Depth.some(20, of: Array(0..<600)) {
        for flip in [UInt8(1), 0xFF] {
          var bytes = image
          bytes[offset] ^= flip
          try Self.use(bytes)
        }
      }
    }
  }

  @Test func everyTruncation() throws {
    let image = try CrashSeedImage.extendedSnapshot.make().bytes
    let lengths = Array(0..<600) + Array(stride(from: 600, to: image.count, by: 509))
    for length in Depth.some(lengths.count / 30 + 1, of: lengths) {
      try Self.use([UInt8](image[..<length]))
    }
  }

  @Test(arguments: CrashSeedImage.allCases) func mutations(kind: CrashSeedImage) throws {
    let image = try kind.make().bytes
    let seeds = Depth.seeds(14)
    for seed in seeds {
      var random = SplitMix64(seed: seed)
      var bytes = image
      for _ in 0...random.below(12) {
        let reach = random.chance(50) ? min(bytes.count, 4096) : bytes.count
        let offset = random.below(reach / 8) * 8
        switch random.below(4) {
        case 0: bytes[offset + random.below(8)] ^= UInt8(1 << random.below(8))
        case 1: for index in 0..<8 { bytes[offset + index] = 0xFF }
        case 2: for index in 0..<8 { bytes[offset + index] = 0 }
        default:
          let from = random.below(bytes.count / 8) * 8
          for index in 0..<8 { bytes[offset + index] = bytes[from + index] }
        }
      }
      try Self.use(bytes)
    }
    print("qcow2 \(kind.rawValue): \(seeds) mutations used")
  }

  @Test func unknownFeatureIsRefusedByName() throws {
    var image = try CrashSeedImage.fresh4k.make().bytes
    image[72] = 0x80
    let store = MemoryStore(bytes: image)
    let error = #expect(throws: ImageError.self) { try Qcow2Header.read(from: store) }
    #expect(error?.code == .unsupported)
    #expect(error?.message.contains("number 63") == true)
  }
}
