// SPDX-License-Identifier: Apache-2.0
// What lies past a disk's end in its last block is zeroes from the first write on: a program that
// makes the disk longer shows it.

import BlockIO
import DiskModel
import Fakes
import Foundation
import Testing
import TestSupport

@testable import DiskFormats

@Suite struct TailTests {
  private static let size: UInt64 = (200 << 10) + 1536
  private static let dirt = [UInt8](repeating: 0xDD, count: 2 << 20)

  /// A device full of what was there before, and an image made on it.
  private static func device(_ make: (any ByteStore) throws -> Void) throws -> SimulatedDisk {
    let device = SimulatedDisk("device", contents: dirt)
    try make(device)
    return device
  }

  /// Where the last block ends up, and what of it lies past the end.
  private static func judge(
    _ store: any ByteStore, _ open: () throws -> any ImageFormat, writing sectors: Int,
    _ name: String
  ) throws {
    let engine = DeviceEngine(try open(), store: store)
    try engine.write(engine.sectors - sectors, [UInt8](repeating: 7, count: sectors * 512))
    try engine.flush()
    let again = try open()
    let last = again.blockCount - 1
    guard case .device(0, let sector) = try again.find(last, limit: 1).place else {
      Issue.record("\(name): the last block has no place")
      return
    }
    let used = Int(again.size % UInt64(again.blockSize))
    // Over a base qcow has clusters of a sector.
    guard used > 0 else { return }
    let tail = try store.read(
      at: sector * 512 + UInt64(used), count: Int(again.blockSize) - used)
    #expect(tail.allSatisfy { $0 == 0 }, "\(name), \(sectors) sectors")
  }

  @Test(arguments: [1, 3, 40]) func onDevices(sectors: Int) throws {
    let long = MemoryStore("base", bytes: [UInt8](repeating: 0x55, count: 1 << 20))
    for base in [nil, long] {
      let vhd = try Self.device {
        let none = [UInt8](repeating: 0, count: 16)
        try Vhd.create(
          store: $0, size: Self.size, kind: base == nil ? .dynamic : .differencing,
          blockSize: 65536, uuid: [UInt8](repeating: 1, count: 16),
          base: base == nil ? nil : ("base", none))
      }
      try Self.judge(
        vhd, { try Vhd.open(store: vhd, base: base, writable: true) }, writing: sectors, "vhd")
      let qcow = try Self.device {
        try Qcow.create(store: $0, size: Self.size, base: base == nil ? nil : "base")
      }
      // A header is all that QEMU leaves of the length on a device.
      try Self.judge(
        qcow, { try Qcow.open(store: qcow, base: base, writable: true) }, writing: sectors, "qcow")
      let qcow2 = try Self.device {
        var options = Qcow2Options()
        options.base = base == nil ? nil : ("base", "raw")
        try Qcow2.create(store: $0, size: Self.size, options: options)
      }
      try Self.judge(
        qcow2, { try Qcow2.open(store: qcow2, base: base, writable: true) }, writing: sectors,
        "qcow2")
    }
    let vmdk = try Self.device { try Vmdk.create(store: $0, size: Self.size) }
    try Self.judge(
      vmdk, { try Vmdk.open(store: vmdk, writable: true) }, writing: sectors, "vmdk")
  }

  /// Compressed clusters that were freed are used again; QEMU makes the disk longer and looks.
  @Test func freedClusters() throws {
    let judge = try Judge()
    var random = SplitMix64(seed: 1)
    var bytes: [UInt8] = []
    for _ in 0..<4 {
      bytes += (0..<32768).map { _ in UInt8(random.below(256)) }
      bytes += [UInt8](repeating: 0, count: 32768)
    }
    bytes += [UInt8](repeating: 0x65, count: 512)
    try Data(bytes).write(to: URL(fileURLWithPath: judge.path("s.raw")))
    try judge.must("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "s.raw", "t.qcow2")
    do {
      let store = try judge.open("t.qcow2", writable: true)
      let engine = DeviceEngine(
        try judge.chain(store, kind: .qcow2, writable: true), store: store)
      try engine.write(0, [UInt8](repeating: 0x66, count: 256 << 10))
      try engine.flush()
      try engine.write(512, [UInt8](repeating: 0x77, count: 512))
      try engine.flush()
    }
    try judge.must("qemu-img", "resize", "-q", "-f", "qcow2", "t.qcow2", "320k")
    let (output, status) = try judge.run(
      "qemu-io", ["-f", "qcow2", "-c", "read -P 0 262656 65024", "t.qcow2"])
    #expect(status == 0 && !output.contains("failed"), "\(output)")
    try judge.must("qemu-img", "check", "-q", "-f", "qcow2", "t.qcow2")
  }

  /// A write into a cluster with subclusters that comes to nothing does not show after the
  /// commit of another write to that cluster.
  @Test func aWriteThatFailed() throws {
    let store = MemoryStore("store")
    var options = Qcow2Options()
    options.extendedL2 = true
    let plain = [UInt8](repeating: 0x31, count: 65536)
    let builder = try Qcow2Builder(store, size: 1 << 20, options: options, dataFile: nil)
    let compressor = try Qcow2Compressor(clusterSize: 65536, compression: .zlib)
    let room = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 17, alignment: 16)
    defer { room.deallocate() }
    let count = try #require(plain.withUnsafeBytes { compressor.compress($0, into: room) })
    let place = try builder.placeCompressed(0, bytes: count)
    try store.write([UInt8](room[..<count]), at: place)
    try builder.finish(durable: true)
    let engine = DeviceEngine(try Qcow2.open(store: store, writable: true), store: store)
    #expect(try engine.read(0, count: 128) == plain)
    try engine.write(0, [UInt8](repeating: 0x41, count: 2048))
    // Placed; a part of the data is written, and then there is no space.
    let block = 5
    let placement = try engine.format.place(BlockRange(UInt64(block), 1), whole: false)
    guard case .device(0, let sector) = placement.extent.place else {
      Issue.record("no place")
      return
    }
    try store.write([UInt8](repeating: 0xEE, count: 1024), at: sector * 512)
    engine.format.abandon(placement.extent.mark)
    try engine.write(8, [UInt8](repeating: 0x42, count: 2048))
    try engine.flush()
    let again = DeviceEngine(try Qcow2.open(store: store, writable: false), store: store)
    var model = plain
    model.replaceSubrange(0..<2048, with: repeatElement(0x41, count: 2048))
    model.replaceSubrange(4096..<6144, with: repeatElement(0x42, count: 2048))
    #expect(try again.read(0, count: 128) == model)
  }

  /// Images that end too early, of qcow and qcow2.
  @Test func cutShort() throws {
    for kind in [ImageKind.qcow, .qcow2] {
      let store = MemoryStore("store")
      if kind == .qcow {
        try Qcow.create(store: store, size: 1 << 20)
      } else {
        try Qcow2.create(store: store, size: 1 << 20)
      }
      func open(_ store: any ByteStore, _ writable: Bool) throws -> DeviceEngine {
        DeviceEngine(
          try Chain(store, kind: kind) { _ in store }.disk(writable: writable), store: store)
      }
      let engine = try open(store, true)
      for part in 0..<4 { try engine.write(part * 512, [UInt8](repeating: 7, count: 65536)) }
      try engine.flush()
      let whole = store.contents()
      // Files of qcow2 images are made longer by the megabyte.
      let lengths =
        kind == .qcow2
        ? [5 << 16, 4 << 16, 3 << 16] : [whole.count * 3 / 4, whole.count / 2, whole.count / 4]
      for length in lengths {
        let short = MemoryStore("short", bytes: [UInt8](whole[..<length]))
        let error = #expect(throws: ImageError.self, "\(kind), \(length) of \(whole.count)") {
          _ = try open(short, false).read(0, count: 2048)
        }
        #expect(error?.code == .corrupt && error?.message.contains("cut short") == true)
      }
    }
  }

  /// A cluster of a qcow image over the base's path, a table or the header.
  @Test func hostileQcow() throws {
    let base = MemoryStore("base", size: 1 << 20)
    let store = MemoryStore("store")
    try Qcow.create(store: store, size: 1 << 20, base: "base")
    let engine = DeviceEngine(
      try Qcow.open(store: store, base: base, writable: true), store: store)
    try engine.write(0, [UInt8](repeating: 7, count: 65536))
    try engine.flush()
    let header = try QcowHeader.read(from: store)
    let table = try store.read(at: header.l1Offset, count: 8).big(UInt64.self, at: 0)
    // The path may stand anywhere.
    let far = (store.size + 511) / 512 * 512
    for target in [0, header.l1Offset / 512 * 512, table, far] {
      let copy = MemoryStore("store", bytes: store.contents())
      try copy.write(Array("base".utf8) + [UInt8](repeating: 0, count: 508), at: far)
      if target == far {
        var place: [UInt8] = []
        place.appendBig(far)
        try copy.write(place, at: 8)
      }
      var entry: [UInt8] = []
      entry.appendBig(target)
      if target > 0 { try copy.write(entry, at: table + 8) }
      if target == 0 {
        entry = []
        entry.appendBig(UInt64(512))
        continue
      }
      let error = #expect(throws: ImageError.self) {
        try Qcow.open(store: copy, base: base, writable: true)
      }
      #expect(error?.code == .corrupt && error?.message.contains("lies over") == true)
      let reading = #expect(throws: ImageError.self) {
        let engine = DeviceEngine(
          try Qcow.open(store: copy, base: base, writable: false), store: copy)
        _ = try engine.read(0, count: 8)
      }
      #expect(reading?.code == .corrupt)
      #expect(try Qcow.check(store: copy).corruptions > 0)
    }
  }
}
