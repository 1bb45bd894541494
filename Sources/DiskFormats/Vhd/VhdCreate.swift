// SPDX-License-Identifier: Apache-2.0
// Making a VHD image, and opening one.
//
// Order of creation: what was there is made unreadable and that is flushed; the table is
// written and flushed; then both copies of the footer.

package import BlockIO
import SystemIO

extension Vhd {
  /// Makes an image. Differencing when there is a base, else as `kind` says.
  ///
  /// - Parameters:
  ///   - size: length of the disk in bytes; is rounded up to 512.
  ///   - uuid: sixteen bytes that no other image has.
  ///   - base: the base's path and, when it is a VHD image itself, its identity.
  /// - Throws: `badRequest`, or `io` when the store fails.
  @discardableResult
  package static func create(
    store: any ByteStore, size: UInt64, kind: VhdKind = .dynamic, blockSize: UInt64 = 2 << 20,
    uuid: [UInt8], timestamp: UInt32 = 0, base: (path: String, uuid: [UInt8])? = nil
  ) throws(ImageError) -> VhdHeader {
    guard let size = roundedUp(size, to: 512), size > 0, size <= 2040 << 30, uuid.count == 16
    else { throw ImageError(.badRequest, "a VHD disk has 512 bytes to 2040 GiB, not \(size)") }
    guard blockSize.nonzeroBitCount == 1, blockSize >= 4096, blockSize <= 256 << 20 else {
      throw ImageError(.badRequest, "block size \(blockSize) is not from 4 KiB to 256 MiB")
    }
    guard (kind == .differencing) == (base != nil) else {
      throw ImageError(.badRequest, "a differencing image, and only that, has a base")
    }
    if let base, base.path.utf8.count > VhdHeader.longestPath || base.uuid.count != 16 {
      throw ImageError(.badRequest, "the base's path is longer than 480 bytes: shorten it")
    }
    var header = VhdHeader(
      kind: kind, size: size, uuid: uuid, creator: Array("tap\0".utf8), timestamp: timestamp)
    if kind != .fixed {
      let entries = (size + blockSize - 1) / blockSize
      guard entries <= UInt64(VhdHeader.mostEntries) else {
        throw ImageError(.badRequest, "\(entries) blocks are too many: choose larger ones")
      }
      header.headerOffset = 512
      header.tableOffset = 4096
      header.tableEntries = UInt32(entries)
      header.tableBlock = blockSize
      header.basePaths = base.map { [$0.path] } ?? []
      header.baseUUID = base?.uuid ?? header.baseUUID
    }
    if kind == .fixed, store.isFixedSize, store.size != size + VhdHeader.footerSize {
      throw ImageError(
        .badRequest,
        "a fixed VHD image of \(size) bytes fills \(size + VhdHeader.footerSize), and "
          + "\(store.name), a device, has \(store.size): make a dynamic one")
    }
    header.footer = header.encodedFooter()
    try io { () throws(IOError) in try write(header, to: store) }
    return header
  }

  private static func write(_ header: VhdHeader, to store: any ByteStore) throws(IOError) {
    try store.zero(at: 0, count: 512)
    try store.flush()
    try store.resize(to: 0)
    guard header.kind != .fixed else {
      try store.resize(to: header.size + 512)
      try store.zero(at: 0, count: header.size)
      try store.flush()
      try store.write(header.footer, at: header.size)
      return try store.flush()
    }
    let tableBytes = (UInt64(header.tableEntries) * 4 + 511) / 512 * 512
    var end = header.tableOffset + tableBytes
    try store.resize(to: end + 512)
    if store.isFixedSize { end = (store.size - 512) / 512 * 512 }
    try store.write(
      [UInt8](repeating: 0xFF, count: Int(tableBytes)), at: header.tableOffset)
    if let path = header.basePath {
      try store.write(Array(("file://" + path).utf8), at: VhdHeader.locatorOffset)
    }
    try store.write(header.encodedDynamic(), at: header.headerOffset)
    try store.flush()
    try store.write(header.footer, at: end)
    try store.write(header.footer, at: 0)
    try store.flush()
  }

  /// Opens an image as a disk.
  ///
  /// - Parameters:
  ///   - base: the base of a differencing image; one that is itself an image as `ImageStore`.
  ///   - piece: bytes of a block of the disk over a base, a power of two from 4096 on, where the
  ///     image's own are larger.
  /// - Throws: what `VhdHeader.read(from:)` throws; `baseMissing`, `baseChanged`,
  ///   `badRequest`.
  package static func open(
    store: any ByteStore, base: (any ByteStore)? = nil, writable: Bool,
    piece: UInt64 = largestPiece
  ) throws(ImageError) -> Vhd {
    let header = try VhdHeader.read(from: store)
    if let path = header.basePath, base == nil {
      throw ImageError(.baseMissing, "store \(store.name) needs its base \(path): give it")
    }
    return try open(
      alone: store, over: base, header.basePath == nil ? nil : base, writable: writable,
      piece: piece)
  }

  /// Opens an image over `under`, whatever it says of a base; `base` is the one to know again.
  static func open(
    alone store: any ByteStore, over base: (any ByteStore)?, _ under: (any ByteStore)?,
    writable: Bool, piece: UInt64 = largestPiece
  ) throws(ImageError) -> Vhd {
    let header = try VhdHeader.read(from: store)
    guard !writable || store.isWritable else {
      throw ImageError(.badRequest, "\(store.name) is open for reading only")
    }
    if header.basePath != nil, let base {
      if !header.isBaseRaw, let image = base.image, let footer = try VhdHeader.footer(of: image) {
        guard [UInt8](footer[68..<84]) == header.baseUUID else {
          throw ImageError(
            .baseChanged,
            "base \(base.name) is not the one that store \(store.name) was made "
              + "from: its identity differs: put the old base back")
        }
      }
    }
    return try Vhd(
      store: store, base: under, header: header, writable: writable, piece: piece)
  }
}
