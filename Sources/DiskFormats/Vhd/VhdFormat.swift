// SPDX-License-Identifier: Apache-2.0
// VHD among the formats.

package import BlockIO
import Glibc

extension ImageKind {
  /// VHD, which QEMU calls vpc.
  package static let vhd = ImageKind(VhdFormat.self)
}

/// VHD, which QEMU calls vpc.
package enum VhdFormat: DiskFormat {
  package static let name = "vpc"
  package static let specName = "vhd"
  package static let canWrite = true
  package static let options: [ImageOptions.Known] = [
    ("subformat", ["dynamic", "fixed"]), ("block_size", []),
  ]

  /// Its mark stands at the end, and only in most images at the start as well.
  package static func isImage(_ store: any ByteStore) throws(ImageError) -> Bool {
    try VhdHeader.footer(of: store) != nil
  }

  package static func names(in store: any ByteStore) throws(ImageError) -> ImageNames {
    let header = try VhdHeader.read(from: store)
    var names = ImageNames(base: header.basePath, baseFormat: header.baseFormat)
    names.otherBases = Array(header.basePaths.dropFirst())
    return names
  }

  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    try Vhd.info(of: store)
  }

  package static func open(_ parts: ImageParts) throws(ImageError) -> any ImageFormat {
    try Vhd.open(store: parts.store, base: parts.base, writable: parts.writable)
  }

  package static func open(
    alone parts: ImageParts, over under: any ByteStore
  ) throws(ImageError) -> any ImageFormat {
    try Vhd.open(alone: parts.store, over: parts.base, under, writable: parts.writable)
  }

  package static func create(
    _ image: NewImage, in store: FileStore, open: (String) throws(ImageError) -> FileStore
  ) throws(ImageError) {
    var options = image.options
    let kinds: [(String, VhdKind)] = [("dynamic", .dynamic), ("fixed", .fixed)]
    let kind = try options.word("subformat", kinds) ?? .dynamic
    let blockSize = try options.bytes("block_size") ?? 2 << 20
    try options.checkAllUsed()
    let parent = try parent(of: image, kind)
    var random = SystemRandomNumberGenerator()
    let uuid = (0..<16).map { _ in UInt8.random(in: 0...255, using: &random) }
    // Seconds since the year 2000. Source: the VHD specification, "Timestamp".
    let seconds = UInt32(clamping: max(0, time(nil) - 946_684_800))
    try Vhd.create(
      store: store, size: image.size, kind: parent == nil ? kind : .differencing,
      blockSize: blockSize, uuid: uuid, timestamp: seconds, base: parent)
  }

  /// The base as a new image remembers it: its path, and its identity, zeroes for a raw disk.
  private static func parent(
    of image: NewImage, _ kind: VhdKind
  ) throws(ImageError) -> (path: String, uuid: [UInt8])? {
    guard let base = image.base else { return nil }
    guard kind == .dynamic else {
      throw ImageError(.badRequest, "subformat=fixed: a fixed image has no base")
    }
    guard base.kind == .vhd || base.kind == .raw else {
      throw ImageError(
        .badRequest,
        "base \(base.path) is of format \(base.kind): that of a VHD image has to be "
          + "vpc or raw, since it can remember no other")
    }
    let none = [UInt8](repeating: 0, count: 16)
    let own = base.kind == .vhd ? try VhdHeader.read(from: base.file).uuid : none
    guard base.kind == .raw || own != none else {
      throw ImageError(
        .badRequest,
        "base \(base.path) has no identity, without which it would be taken for a raw disk: "
          + "convert it first")
    }
    return (base.path, own)
  }

  package static func check(
    _ store: any ByteStore, files: [any ByteStore], repair: Repair?
  ) throws(ImageError) -> CheckReport? {
    guard let repair else { return try Vhd.check(store: store) }
    return try Vhd.repair(store: store, repair)
  }
}
