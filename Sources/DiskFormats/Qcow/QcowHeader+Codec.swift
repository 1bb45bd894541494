// SPDX-License-Identifier: Apache-2.0
// Reading and writing the header of a qcow image. Nothing is used before it is checked.

package import BlockIO
import SystemIO

extension QcowHeader {
  static func isMagic(_ bytes: [UInt8]) -> Bool {
    bytes.count >= 8 && bytes.big(UInt32.self, at: 0) == Qcow2Header.magic
      && bytes.big(UInt32.self, at: 4) == 1
  }

  /// Reads the header of a store.
  ///
  /// - Throws: `notThisFormat`, `unsupported`, `corrupt` or `io`.
  package static func read(from store: any ByteStore) throws(ImageError) -> QcowHeader {
    let bytes = try io { () throws(IOError) in try store.read(at: 0, count: length) }
    func refuse(_ code: ImageError.Code, _ words: String) -> ImageError {
      ImageError(code, "store \(store.name): \(words)")
    }
    guard isMagic(bytes) else { throw refuse(.notThisFormat, "no qcow image of version 1") }
    let header = QcowHeader(
      size: bytes.big(UInt64.self, at: 24) / 512 * 512, clusterBits: bytes[32],
      l2Bits: bytes[33], l1Offset: bytes.big(UInt64.self, at: 40), basePath: nil)
    let encryption = bytes.big(UInt32.self, at: 36)
    guard encryption == 0 else {
      throw refuse(.unsupported, "encrypted: convert it with qemu-img and its key")
    }
    guard header.clusterBits >= 9, header.clusterBits <= 16, header.l2Bits >= 6,
      header.l2Bits <= 13
    else { throw refuse(.corrupt, "clusters of 2^\(header.clusterBits) bytes") }
    guard header.size > 0, header.size <= 1 << 61, header.l1Entries <= mostL1Entries,
      header.l1Offset % 8 == 0, header.l1Offset >= UInt64(length), header.l1Offset < 1 << 56
    else { throw refuse(.corrupt, "an L1 table at \(header.l1Offset) for \(header.size) bytes") }
    let offset = bytes.big(UInt64.self, at: 8)
    let count = bytes.big(UInt32.self, at: 16)
    guard offset != 0 else { return header }
    guard count <= Qcow2Header.longestPath, count > 0, offset < 1 << 56 else {
      throw refuse(.corrupt, "a base's path of \(count) bytes at \(offset)")
    }
    let path = try io { () throws(IOError) in try store.read(at: offset, count: Int(count)) }
    var named = header
    named.basePath = text(path)
    named.pathRange = offset..<(offset + UInt64(count))
    if offset < 4096 { named.end = max(named.end, offset + UInt64(count)) }
    return named
  }

  /// The header and the base's path, at the start of a new image.
  func encoded() -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBig(Qcow2Header.magic)
    bytes.appendBig(UInt32(1))
    bytes.appendBig(basePath == nil ? UInt64(0) : UInt64(Self.length))
    bytes.appendBig(UInt32(basePath?.utf8.count ?? 0))
    bytes.appendBig(UInt32(0))
    bytes.appendBig(size)
    bytes += [clusterBits, l2Bits, 0, 0]
    bytes.appendBig(UInt32(0))
    bytes.appendBig(l1Offset)
    return bytes + Array((basePath ?? "").utf8)
  }
}
