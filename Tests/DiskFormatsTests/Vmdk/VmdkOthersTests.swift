// SPDX-License-Identifier: Apache-2.0
// VMDK images as others make them: descriptors in every spelling, streams whose last grain is
// short, files that are cut short, devices.

import Fakes
import Foundation
import SystemIO
import Testing
import TestSupport

@testable import DiskFormats

@Suite struct VmdkOthersTests {
  @Test(
    .enabled(if: Faults.isThere, "../shared/faults is missing"),
    arguments: ["open-vmdk-1000-sectors.vmdk", "vmdkstream-1000-sectors.vmdk"])
  func shortLastGrain(name: String) throws {
    let judge = try Judge()
    try Faults.unpack(name, into: judge.path("disk.vmdk"))
    let store = try judge.open("disk.vmdk", writable: false)
    #expect(try FormatList.all.probe(store) == .vmdk)
    let engine = DeviceEngine(try judge.chain(store, kind: .vmdk, writable: false), store: store)
    #expect(engine.sectors == 1000)
    let bytes = try engine.read(0, count: 1000)
    #expect(bytes.contains { $0 != 0 })
    #expect(try Vmdk.check(store: store).corruptions == 0)
    // Grain by grain, and the last sectors alone.
    #expect(try engine.read(960, count: 40)[...] == bytes[(960 * 512)...])
  }

  private static let lines = [
    "version=1", "CID=12345678", "parentCID=ffffffff", "createType=\"monolithicFlat\"",
    "RW 128 FLAT \"disk-flat.vmdk\" 0",
  ]

  private static func open(_ text: String) throws -> any ImageFormat {
    let store = MemoryStore("disk", bytes: Array(text.utf8))
    #expect(try FormatList.all.probe(store) == .vmdk, "\(text.prefix(60))")
    return try Chain(store, kind: .vmdk) { request in
      #expect(request.path == "disk-flat.vmdk")
      return MemoryStore("flat", size: 65536)
    }.disk()
  }

  /// First lines, line ends, marks and comments as the writers have them.
  @Test(arguments: [
    "# Disk DescriptorFile\n", "# Disk Descriptor File\n", "#Disk DescriptorFile\n",
    "#disk descriptorfile\n", "# DISK DESCRIPTORFILE \n", "#\tDisk  DescriptorFile\n",
    "\u{FEFF}# Disk DescriptorFile\n", "# made by somebody\n\n# Disk DescriptorFile\n",
    "\n# Disk DescriptorFile\n", "# Description file\n",
  ])
  func firstLines(first: String) throws {
    for end in ["\n", "\r\n"] {
      let text = (first + Self.lines.joined(separator: "\n") + "\n")
        .split(separator: "\n", omittingEmptySubsequences: false).joined(separator: end)
      #expect(try Self.open(text).size == 65536)
    }
  }

  @Test func lineSpellings() throws {
    let start = "# Disk DescriptorFile\nversion = 1\nencoding=\"UTF-8\"\n"
    for line in [
      "RW 128 FLAT disk-flat.vmdk 0", "RW 128 FLAT disk-flat.vmdk",
      "RW\t128\tFLAT\t\"disk-flat.vmdk\"",
      "  RW  128  VMFS  \"disk-flat.vmdk\"", "RW 128 FLAT \"disk-flat.vmdk\" 0 extra",
    ] {
      for type in ["createType=\"vmfs\"", "CreateType = vmfs"] {
        // Without a CID, as QEMU has it.
        #expect(try Self.open(start + type + "\n" + line + "\n").size == 65536)
      }
    }
    // Not every text is one.
    for text in ["version=4\n", "# nothing\nversion\n", "#!/bin/sh\n", "\n\n"] {
      #expect(try FormatList.all.probe(MemoryStore("t", bytes: Array(text.utf8))) == .raw)
    }
  }

  /// A content ID is renewed where it stands, quoted or not, and a descriptor without one opens.
  @Test func contentIDInPlace() throws {
    for id in ["CID=12345678", "CID = \"12345678\"", "cid=1234"] {
      let text =
        "# Disk DescriptorFile\r\nversion=1\r\n\(id)\r\ncreateType=\"monolithicFlat\"\r\n"
        + "RW 128 FLAT \"f\" 0\r\n"
      let store = MemoryStore("disk", bytes: Array(text.utf8))
      let flat = MemoryStore("f", size: 65536)
      let before = try Vmdk.contentID(of: store)
      let image = try Vmdk.open(store: store, extents: [flat], writable: true)
      #expect(try Vmdk.contentID(of: store) != before)
      try image.resize(to: 1 << 20)
      let again = try VmdkLayout.read(from: store)
      #expect(again.size == 1 << 20 && flat.size == 1 << 20)
      #expect(
        String(decoding: store.contents(), as: UTF8.self).contains("RW 2048 FLAT \"f\" 0\r\n"))
    }
  }

  @Test func cutShort() throws {
    let store = MemoryStore("store")
    try Vmdk.create(store: store, size: 4 << 20)
    let engine = DeviceEngine(try Vmdk.open(store: store, writable: true), store: store)
    for grain in 0..<8 {
      try engine.write(grain * 128, [UInt8](repeating: 7, count: 65536))
    }
    try engine.flush()
    let whole = store.contents()
    for length in [whole.count - 65536, whole.count / 2, 30000, 12000] {
      let short = MemoryStore("short", bytes: [UInt8](whole[..<length]))
      let error = #expect(throws: ImageError.self) {
        let image = DeviceEngine(try Vmdk.open(store: short, writable: false), store: short)
        _ = try image.read(0, count: 1024)
      }
      #expect(error?.code == .corrupt, "\(length)")
    }
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"x\"\nRW 128 FLAT \"f\" 0\n"
    let error = #expect(throws: ImageError.self) {
      try Vmdk.open(
        store: MemoryStore("t", bytes: Array(text.utf8)), extents: [MemoryStore("f", size: 65024)],
        writable: false)
    }
    #expect(error?.code == .corrupt)
  }

  /// On a device grains go behind what is in use, not behind its end.
  @Test func onADevice() throws {
    let device = SimulatedDisk("device", size: 2 << 20)
    try Vmdk.create(store: device, size: 8 << 20)
    for round in 0..<3 {
      let engine = DeviceEngine(try Vmdk.open(store: device, writable: true), store: device)
      for grain in 0..<4 {
        try engine.write(
          (round * 4 + grain) * 128, [UInt8](repeating: UInt8(grain + 1), count: 65536))
      }
      try engine.flush()
      let report = try Vmdk.check(store: device)
      #expect(report.isClean, "\(report.problems)")
    }
    try Vmdk.repair(store: device, .all)
    let engine = DeviceEngine(try Vmdk.open(store: device, writable: false), store: device)
    for grain in 0..<12 {
      #expect(
        try engine.read(grain * 128, count: 128)
          == [UInt8](repeating: UInt8(grain % 4 + 1), count: 65536))
    }
  }

  /// A commit that is broken off between the base's new content ID and the overlay's knowing of
  /// it: the overlay opens and is committed again; another overlay notices.
  @Test func commitsBrokenOff() throws {
    let base = MemoryStore("base")
    try Vmdk.create(store: base, size: 1 << 20)
    func overlay(_ name: String) throws -> MemoryStore {
      let store = MemoryStore(name)
      var options = VmdkOptions()
      options.name = name
      options.base = ("base", try Vmdk.contentID(of: base))
      try Vmdk.create(store: store, size: 1 << 20, options: options)
      return store
    }
    let (mine, other) = (try overlay("mine"), try overlay("other"))
    func opens(_ store: MemoryStore, writable: Bool = false) -> Bool {
      do {
        let below = ImageStore(try Vmdk.open(store: base, writable: false), store: base)
        _ = try Vmdk.open(store: store, base: below, writable: writable)
        return true
      } catch { return false }
    }
    let next = try Vmdk.beginCommit(of: mine, into: base)
    _ = try Vmdk.open(store: base, writable: true, contentID: next)
    #expect(try Vmdk.contentID(of: base) == next)
    #expect(opens(mine) && !opens(other))
    // Opened for writing it remembers; and so it does when the commit is done again.
    #expect(opens(mine, writable: true) && opens(mine))
    let again = try Vmdk.beginCommit(of: mine, into: base)
    #expect(again != next)
    _ = try Vmdk.open(store: base, writable: true, contentID: again)
    let third = try Vmdk.beginCommit(of: mine, into: base)
    _ = try Vmdk.open(store: base, writable: true, contentID: third)
    try Vmdk.adopt(base: base, of: mine)
    #expect(opens(mine) && !opens(other))
    _ = try Vmdk.open(store: base, writable: true)
    #expect(!opens(mine))
  }
}
