// SPDX-License-Identifier: Apache-2.0
// A new format is a folder and a line: one that is only read, in no list but this one, is found,
// named, opened, read as a base, and refused for what it cannot do.

import BlockIO
import DiskFormats
import DiskModel
import Fakes
import Testing
import TestSupport

@Suite struct NewFormatTests {
  /// The line.
  static let formats = FormatList.all.adding(ToyFormat.self)
  static let toy = ImageKind(ToyFormat.self)
  static let sectors = 24

  /// The disk's bytes.
  static let disk: [UInt8] = (0..<sectors).flatMap { Stamp.sectors(1, UInt64($0 + 1)) }

  static func image() -> MemoryStore {
    var bytes = ToyFormat.mark + [UInt8](repeating: 0, count: 504)
    bytes[8] = UInt8(disk.count & 255)
    bytes[9] = UInt8(disk.count >> 8)
    for sector in (0..<sectors).reversed() { bytes += disk[(sector * 512)..<(sector * 512 + 512)] }
    return MemoryStore("disk.toy", bytes: bytes)
  }

  static func never(_ request: NamedFile) throws(ImageError) -> any ByteStore {
    throw ImageError(.badRequest, "nothing names \(request.path)")
  }

  @Test func isProbed() throws {
    #expect(try Self.formats.probe(Self.image()) == Self.toy)
    #expect(try FormatList.all.probe(Self.image()) == .raw)
    let decision = try FormatDecision.decide(
      FormatStatement(nil), of: Self.image(), among: Self.formats)
    #expect(decision == FormatDecision(kind: Self.toy, isGuessed: true))
  }

  @Test func isNamed() throws {
    #expect(Self.formats.names == (FormatList.all.names + ["toy"]).sorted())
    #expect(Self.formats.named("toy") == Self.toy)
    #expect(FormatList.all.named("toy") == nil)
    let error = #expect(throws: ImageError.self) { try Self.formats.stated("foo") }
    #expect(
      error?.message
        == "format 'foo' is unknown: use one of raw, dscow, qcow, qcow2, vpc, vmdk, toy")
  }

  @Test(arguments: [nil, toy]) func isReadByItself(kind: ImageKind?) throws {
    let image = Self.image()
    let format = try Chain(image, kind: kind, among: Self.formats, resolve: Self.never).disk()
    #expect(try DeviceEngine(format, store: image).read(0, count: Self.sectors) == Self.disk)
    let chain = try Chain(image, kind: kind, among: Self.formats, resolve: Self.never).layers()
    #expect(try chain.flat().read(at: 0, count: Self.disk.count) == Self.disk)
  }

  @Test func isReadAsABase() throws {
    let top = MemoryStore("top")
    var options = Qcow2Options()
    options.base = ("disk.toy", "toy")
    try Qcow2.create(store: top, size: UInt64(Self.disk.count), options: options)
    func resolve(_ request: NamedFile) throws(ImageError) -> any ByteStore {
      Self.image()
    }
    let image = try Chain(top, kind: .qcow2, among: Self.formats, resolve: resolve).disk(
      writable: true)
    let engine = DeviceEngine(image, store: top)
    #expect(try engine.read(0, count: Self.sectors) == Self.disk)
    let fresh = Stamp.sectors(2, 99)
    try engine.write(5, fresh)
    try engine.flush()
    let chain = try Chain(top, kind: .qcow2, among: Self.formats, resolve: resolve).layers()
    var expected = Self.disk
    expected.replaceSubrange((5 * 512)..<(7 * 512), with: fresh)
    #expect(try chain.flat().read(at: 0, count: expected.count) == expected)
    #expect(chain.layers.map(\.kind) == [.qcow2, Self.toy])
    // A list that lacks it says so.
    let error = #expect(throws: ImageError.self) {
      try Chain(top, kind: .qcow2, resolve: resolve).disk()
    }
    #expect(
      error?.message
        == "base disk.toy is of format 'toy', which is not read here: convert it")
  }

  @Test func isRefusedForWriting() throws {
    let error = #expect(throws: ImageError.self) {
      try Chain(Self.image(), kind: Self.toy, among: Self.formats, resolve: Self.never).disk(
        writable: true)
    }
    #expect(error?.code == .unsupported)
    #expect(
      error?.message
        == "store disk.toy: images of format toy can only be read here: convert it")
    let open = try Chain(Self.image(), kind: Self.toy, resolve: Self.never).disk()
    #expect(throws: ImageError.self) { try open.place(BlockRange(0), whole: true) }
    #expect(throws: ImageError.self) { try open.discard(BlockRange(0), zeroing: true) }
  }

  /// What a format does not say that it can is refused, with the object, the reason and, where
  /// there is one, the way round.
  @Test func isRefusedForTheRest() throws {
    let folder = try TemporaryFolder()
    let path = folder.file("new.toy")
    let (file, _) = try ImageFile.create(path)
    let image = NewImage(
      kind: Self.toy, size: 1 << 20, base: nil, options: try ImageOptions([], for: Self.toy))
    func refused(_ message: String, _ body: () throws -> Void) {
      let error = #expect(throws: ImageError.self) { try body() }
      #expect(error?.message == message)
    }
    refused("\(path): images of format toy are not made here: choose another") {
      try ToyFormat.create(image, in: file) { _ throws(ImageError) in file }
    }
    refused("disk.toy: a toy image cannot be given another base: convert it with -B") {
      try ToyFormat.rename(base: nil, of: Self.image())
    }
    refused("disk.toy: a toy image cannot be emptied: commit it with -d") {
      try ToyFormat.checkCanEmpty(Self.image())
    }
    var parts = ImageParts(Self.image())
    parts.writable = true
    refused("store disk.toy: images of format toy can only be read here: convert it") {
      try ToyFormat.resize(parts, to: 1 << 20)
    }
    #expect(try ToyFormat.check(Self.image(), files: [], repair: nil) == nil)
    #expect(try ToyFormat.names(in: Self.image()) == ImageNames())
    #expect(!ToyFormat.makesStores && !ToyFormat.canCompress)
  }
}
