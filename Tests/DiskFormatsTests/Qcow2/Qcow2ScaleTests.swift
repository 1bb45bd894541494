// SPDX-License-Identifier: Apache-2.0
// A disk of 2 TiB in which every table is visited: memory stays within its bound.

import DiskFormats
import DiskModel
import Foundation
import Testing
import TestSupport

@Suite(.serialized) struct Qcow2ScaleTests {
  private static func resident() throws -> Int {
    let text = try String(contentsOfFile: "/proc/self/statm", encoding: .utf8)
    return (Int(text.split(separator: " ")[1]) ?? 0) * 4096
  }

  /// All clusters of a 2 TiB disk have their places (as after being written in full); reads
  /// and first writes at random all over it.
  @Test func twoTebibytes() throws {
    let judge = try Judge()
    let size: UInt64 = 2 << 40
    let path = judge.path("disk.img")
    try Data().write(to: URL(fileURLWithPath: path))
    let store = try judge.open("disk.img", writable: true)
    var options = Qcow2Options()
    options.preallocation = .metadata
    try Qcow2.create(store: store, size: size, options: options)
    try judge.must("qemu-img", "create", "-q", "-f", "qcow2", "other.img", "2T")
    let before = try Self.resident()
    let full = try Qcow2.open(store: store, writable: true)
    let other = try judge.open("other.img", writable: true)
    let fresh = try Qcow2.open(store: other, writable: true)
    let engine = DeviceEngine(fresh, store: other)
    var random = SplitMix64(seed: 1)
    let blocks = size / 65536
    let rounds = Depth.times(2)
    for _ in 0..<rounds {
      for _ in 0..<2000 { _ = try full.find(random.next() % blocks, limit: 1) }
      for _ in 0..<400 {
        let extent = try fresh.place(BlockRange(random.next() % blocks), whole: true).extent
        #expect(extent.blocks.count == 1)
        if extent.mark > 0 { engine.note(extent) }
      }
      try engine.flush()
    }
    let grown = try Self.resident() - before
    print(
      "qcow2 of 2 TiB: \(rounds * 2000) finds in a full one, \(rounds * 400) first writes in "
        + "\(rounds) commits: \(grown >> 20) MiB more resident")
    #expect(grown < 64 << 20)
    let report = try Qcow2.check(store: other)
    #expect(report.corruptions == 0)
  }
}
