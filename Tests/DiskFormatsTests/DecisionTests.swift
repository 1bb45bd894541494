// SPDX-License-Identifier: Apache-2.0
// Whom to believe of an image's format: every cell of the table in docs/spec.md, on every way
// that opens images; and formats that are known and not read.

import BlockIO
import Fakes
import Foundation
import Testing
import TestSupport

@testable import DiskFormats

@Suite struct DecisionTests {
  private static func padded(_ bytes: [UInt8], at offset: Int = 0, size: Int = 1 << 16) -> [UInt8] {
    var all = [UInt8](repeating: 0, count: size)
    all.replaceSubrange(offset..<(offset + bytes.count), with: bytes)
    return all
  }

  /// A qcow2 image that names a base, as a guest may have written it into its disk.
  private static func naming(_ name: String = "store") throws -> MemoryStore {
    let store = MemoryStore(name)
    var options = Qcow2Options()
    options.base = ("secret", "raw")
    try Qcow2.create(store: store, size: 1 << 20, options: options)
    return store
  }

  private static func alone(_ name: String = "store") throws -> MemoryStore {
    let store = MemoryStore(name)
    try Qcow2.create(store: store, size: 1 << 20, options: Qcow2Options())
    return store
  }

  // MARK: The table

  @Test func stated() throws {
    for kind in FormatList.all.kinds {
      for store in [try Self.naming(), MemoryStore("store", size: 512)] {
        let found = try FormatDecision.decide(FormatStatement(kind), of: store)
        #expect(found == FormatDecision(kind: kind))
        // Whoever runs the command goes before the image above.
        let both = FormatStatement(kind, named: "qcow2")
        #expect(try FormatDecision.decide(both, of: store) == FormatDecision(kind: kind))
        try found.checkMayName("secret", store)
      }
    }
  }

  @Test func named() throws {
    let store = try Self.naming()
    for (name, kind) in [
      ("raw", ImageKind.raw), ("file", .raw), ("host_device", .raw), ("qcow2", .qcow2),
      ("qcow", .qcow), ("vpc", .vhd), ("vmdk", .vmdk), ("dscow", .dscow),
    ] {
      let found = try FormatDecision.decide(FormatStatement(nil, named: name), of: store)
      #expect(found == FormatDecision(kind: kind))
      try found.checkMayName("secret", store)
    }
    let error = #expect(throws: ImageError.self) {
      try FormatDecision.decide(FormatStatement(nil, named: "vhdx"), of: store)
    }
    #expect(error?.code == .unsupported && error?.message.contains("'vhdx'") == true)
  }

  @Test func nobody() throws {
    let nothing = FormatStatement(nil)
    let raw = try FormatDecision.decide(nothing, of: MemoryStore("store", size: 1 << 20))
    #expect(raw == FormatDecision(kind: .raw))
    let image = try Self.naming()
    let found = try FormatDecision.decide(nothing, of: image)
    #expect(found == FormatDecision(kind: .qcow2, isGuessed: true))
    let error = #expect(throws: ImageError.self) { try found.checkMayName("secret", image) }
    #expect(error?.code == .unsupported && error?.message.contains("-f") == true)
  }

  // MARK: Who asks it

  /// What names a file and is an image only by its first bytes is followed by nobody.
  @Test func guessesNameNothing() throws {
    let image = try Self.naming()
    func never(_ request: NamedFile) throws(ImageError) -> any ByteStore {
      Issue.record("somebody asked for \(request.path)")
      return MemoryStore("secret", size: 1 << 20)
    }
    func refused(_ body: () throws -> Void) {
      let error = #expect(throws: ImageError.self) { try body() }
      #expect(error?.code == .unsupported)
      #expect(error?.message.contains("nobody says") == true, "\(error as Any)")
    }
    refused { _ = try Chain(image, resolve: never).disk() }
    refused { _ = try Chain(image, resolve: never).layers() }
    // As the base of an image that has no place for the format.
    let qcow = MemoryStore("qcow")
    try Qcow.create(store: qcow, size: 1 << 20, base: "base")
    func base(_ request: NamedFile) throws(ImageError) -> any ByteStore {
      guard request.path == "base" else { return try never(request) }
      return image
    }
    refused { _ = try Chain(qcow, kind: .qcow, resolve: base).disk() }
    refused { _ = try Chain(qcow, kind: .qcow, resolve: base).layers() }
    refused { _ = try Chain(image, above: [MemoryStore("x", size: 512)], resolve: never).flat() }
    // Stated, it is.
    for kind in [ImageKind.qcow2, .raw] {
      let format = try Chain(qcow, kind: .qcow, baseKind: kind) {
        asked in
        asked.path == "base" ? image : MemoryStore("secret", size: 1 << 20)
      }.disk()
      #expect(format.size == 1 << 20)
    }
    // A guess that names nothing harms nobody.
    _ = try Chain(try Self.alone(), resolve: never).disk()
    // Data files and extents are named, too.
    let data = MemoryStore("store")
    var options = Qcow2Options()
    options.dataFile = "secret"
    try Qcow2.create(
      store: data, size: 1 << 20, options: options, dataFile: MemoryStore("d", size: 1 << 20))
    refused { _ = try Chain(data, resolve: never).disk() }
    let text = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
    let flat = MemoryStore(
      "store", bytes: Array((text + "createType=\"vmfs\"\nRW 128 FLAT \"secret\" 0\n").utf8))
    refused { _ = try Chain(flat, resolve: never).layers() }
  }

  // MARK: Known and not read

  static let foreign: [(String, [UInt8], Int)] = [
    ("vhdx", Array("vhdxfile".utf8), 0), ("vdi", [0x7F, 0x10, 0xDA, 0xBE], 64),
    ("qed", Array("QED\0".utf8), 0), ("parallels", Array("WithoutFreeSpace".utf8), 0),
    ("parallels", Array("WithouFreSpacExt".utf8), 0),
    ("luks", Array("LUKS".utf8) + [0xBA, 0xBE], 0),
    ("cloop", Array("#!/bin/sh\n#V2.0 Format\n".utf8), 0),
    ("dmg", Array("koly".utf8) + [0, 0, 0, 4, 0, 0, 2, 0], 65536 - 512),
    ("xz", [0xFD, 0x37, 0x7A, 0x58, 0x5A, 0], 0), ("gz", [0x1F, 0x8B, 8], 0),
    ("zstd", [0x28, 0xB5, 0x2F, 0xFD], 0),
    ("bz2", Array("BZh9".utf8) + [0x31, 0x41, 0x59, 0x26, 0x53, 0x59], 0),
    ("zip", [0x50, 0x4B, 3, 4], 0), ("tar", Array("ustar".utf8), 257),
    ("iso", Array("CD001".utf8), 32769), ("seSparse", [0xBE, 0xBA, 0xFE, 0xCA, 0, 0, 0, 0], 0),
  ]

  @Test func foreignFormats() throws {
    for (name, bytes, offset) in Self.foreign {
      let store = MemoryStore("store", bytes: Self.padded(bytes, at: offset))
      for body in [
        { _ = try FormatList.all.probe(store) },
        { _ = try Chain(store) { _ in store }.disk() },
        { _ = try Chain(store) { _ in store }.layers() },
      ] {
        let error = #expect(throws: ImageError.self) { try body() }
        #expect(error?.code == .unsupported)
        #expect(error?.message.contains(name) == true && error?.message.contains("-f raw") == true)
      }
      // Who says so gets the bytes.
      let raw = try Chain(store, kind: .raw) { _ in store }.disk()
      #expect(raw.size == 65536)
    }
    // Text that begins like one is none.
    let text = MemoryStore("text", bytes: Self.padded(Array("BZh9 is a name".utf8)))
    #expect(try FormatList.all.probe(text) == .raw)
  }

  /// A damaged header is that, not a raw disk.
  @Test func damagedHeaders() throws {
    var images: [MemoryStore] = [try Self.alone(), MemoryStore("dscow"), MemoryStore("vhd")]
    try Dscow.create(store: images[1], base: nil, baseName: "", size: 1 << 20)
    try Vhd.create(store: images[2], size: 1 << 20, uuid: [UInt8](repeating: 1, count: 16))
    let vmdk = MemoryStore("vmdk")
    try Vmdk.create(store: vmdk, size: 1 << 20)
    images.append(vmdk)
    for (store, places) in zip(
      images, [[20, 21], [100, 4196], [100, Int(images[2].size) - 400], [20]])
    {
      for place in places { try store.write([0xEE, 0xEE], at: UInt64(place)) }
      let error = #expect(throws: ImageError.self) {
        _ = try Chain(store) { _ in store }.disk()
      }
      #expect(error?.code == .corrupt, "\(store.name): \(error as Any)")
    }
  }
}
