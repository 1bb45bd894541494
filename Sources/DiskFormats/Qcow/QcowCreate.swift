// SPDX-License-Identifier: Apache-2.0
// Making a qcow image of version 1, and opening one.
//
// Order of creation: what was there is made unreadable and that is flushed; the L1 table is zeroed
// and flushed; then the header is written.

package import BlockIO
import SystemIO

extension Qcow {
  /// Makes an image.
  ///
  /// - Parameters:
  ///   - size: length of the disk in bytes; is rounded up to 512.
  ///   - base: the base's path.
  /// - Throws: `badRequest`, or `io` when the store fails.
  @discardableResult
  package static func create(
    store: any ByteStore, size: UInt64, base: String? = nil
  ) throws(ImageError) -> QcowHeader {
    guard let size = roundedUp(size, to: 512), size > 0, size <= 1 << 50,
      base?.utf8.count ?? 0 <= Qcow2Header.longestPath
    else { throw ImageError(.badRequest, "a disk of \(size) bytes, or too long a base's path") }
    // Over a base small clusters, so that little is copied: as QEMU chooses.
    var header = QcowHeader(
      size: size, clusterBits: base == nil ? 12 : 9, l2Bits: base == nil ? 9 : 12,
      l1Offset: 0, basePath: base)
    header.l1Offset = UInt64((header.encoded().count + 7) / 8 * 8)
    guard header.l1Entries <= QcowHeader.mostL1Entries else {
      throw ImageError(.badRequest, "\(size) bytes are too many for a qcow image")
    }
    try io { () throws(IOError) in
      let end = header.l1Offset + header.l1Entries * 8
      try store.zero(at: 0, count: 512)
      try store.flush()
      try store.resize(to: 0)
      try store.resize(to: (end + 511) / 512 * 512)
      try store.zero(at: 0, count: end)
      try store.flush()
      try store.write(header.encoded(), at: 0)
      try store.flush()
    }
    return header
  }

  /// Opens an image as a disk.
  ///
  /// - Parameter base: the base that the header names; one that is an image as `ImageStore`.
  /// - Throws: what `QcowHeader.read(from:)` throws; `baseMissing`; `badRequest`.
  package static func open(
    store: any ByteStore, base: (any ByteStore)? = nil, writable: Bool
  ) throws(ImageError) -> Qcow {
    let header = try QcowHeader.read(from: store)
    guard !writable || store.isWritable else {
      throw ImageError(.badRequest, "\(store.name) is open for reading only")
    }
    if let path = header.basePath, base == nil {
      throw ImageError(.baseMissing, "store \(store.name) needs its base \(path): give it")
    }
    return try Qcow(
      store: store, base: header.basePath == nil ? nil : base, header: header,
      writable: writable)
  }
}
