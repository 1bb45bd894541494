// SPDX-License-Identifier: Apache-2.0
// XenServer's batmap, which stands behind the table of its images: reading it, and making it anew.
// Source: the layout that vhd-util and tapdisk of XenServer read; docs/formats/vhd.md.

import BlockIO
import SystemIO

extension VhdBatmap {
  /// The inverted sum of the bits.
  static func sum(_ bits: [UInt8]) -> UInt32 { ~VhdHeader.sum(bits) }

  static func isSet(_ block: UInt64, in bits: [UInt8]) -> Bool {
    bits[Int(block / 8)] >> UInt8(7 - block % 8) & 1 == 1
  }

  /// The header's sector for these bits; what else stands in `head`, the old one, is kept.
  func encoded(_ bits: [UInt8], keeping head: [UInt8]) -> [UInt8] {
    var bytes = head
    bytes.replaceSubrange(0..<8, with: Self.cookie)
    bytes.putBig(offset, at: 8)
    bytes.putBig(UInt32(size / 512), at: 16)
    bytes.putBig(UInt32(0x0001_0002), at: 20)
    bytes.putBig(Self.sum(bits), at: 24)
    return bytes
  }
}

extension Vhd {
  /// Whether a batmap has bits of blocks from one on.
  func speaks(_ batmap: VhdBatmap, from block: UInt64) throws(ImageError) -> Bool {
    let store = store
    let bits = try io { () throws(IOError) in
      try store.read(at: batmap.offset, count: Int(batmap.size))
    }
    return bits.enumerated().contains { index, byte in
      let before = block - min(block, UInt64(index) * 8)
      return before < 8 && byte & UInt8(0xFF >> before) != 0
    }
  }

  /// The bits as they ought to be: of blocks that are whole.
  static func bits(
    of batmap: VhdBatmap, in store: any ByteStore, _ header: VhdHeader
  ) throws(ImageError) -> [UInt8] {
    var bits = [UInt8](repeating: 0, count: Int(batmap.size))
    try header.forEachBlock(of: store) { block, offset throws(ImageError) in
      let own = try io { () throws(IOError) in
        try store.read(at: offset, count: Int(header.bitmapSize))
      }
      let isWhole = own.prefix(Int(header.tableBlock / 512 / 8)).allSatisfy { $0 == 0xFF }
      if isWhole { bits[Int(block / 8)] |= 1 << UInt8(7 - block % 8) }
    }
    return bits
  }

  /// Makes the batmap anew. It is without its name while its bits and their sum may differ;
  /// the footers do not promise it then, and in the end are what is given.
  func renewBatmap(_ footer: [UInt8]) throws(ImageError) {
    guard let batmap = header.batmap else { return }
    let bits = try Self.bits(of: batmap, in: store, header)
    let unpromised = header.changedFooter(
      creatorVersion: VhdBatmap.unpromised, headerOffset: header.headerOffset)
    if header.footer != unpromised { try putFooters(unpromised) }
    let store = store
    try io { () throws(IOError) in
      let head = try store.read(at: batmap.headerOffset, count: 512)
      try store.write([UInt8](repeating: 0, count: 512), at: batmap.headerOffset)
      try store.flush()
      try store.write(bits, at: batmap.offset)
      try store.flush()
      try store.write(batmap.encoded(bits, keeping: head), at: batmap.headerOffset)
      try store.flush()
    }
    try putFooters(footer)
  }
}
