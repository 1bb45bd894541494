// SPDX-License-Identifier: Apache-2.0
// Persistent bitmaps of a qcow2 image: kept, and marked as in use before the first write,
// because this program does not keep them up. Whoever does then knows that they may miss
// changes.
// Source: the qcow2 specification, section "Bitmaps".

import BlockIO
import SystemIO

/// A bitmap of a qcow2 image.
package struct Qcow2Bitmap: Sendable, Equatable {
  /// Its name.
  package var name: String
  /// Bytes that one bit speaks of.
  package var granularity: UInt64
  /// Whether it may miss changes.
  package var inUse: Bool
  /// Whether it is kept up by those who can.
  package var auto: Bool
  var tableOffset: UInt64
  var tableEntries: UInt32
  /// Where its directory entry begins, from the start of the directory.
  var position: Int
}

/// The bitmap directory of an image.
enum Qcow2Bitmaps {
  private static let flagInUse: UInt32 = 1
  private static let mostEntries: UInt32 = 1 << 22

  /// The bitmaps that a header's extension names. Throws `corrupt`.
  static func read(
    _ store: any ByteStore, _ header: Qcow2Header
  ) throws(ImageError) -> [Qcow2Bitmap] {
    guard let area = header.bitmaps else { return [] }
    let bytes = try io { () throws(IOError) in
      try store.read(at: area.directoryOffset, count: Int(area.directorySize))
    }
    var bitmaps: [Qcow2Bitmap] = []
    var position = 0
    for number in 0..<area.count {
      func refuse() -> ImageError {
        ImageError(.corrupt, "\(store.name): bitmap \(number) of the directory")
      }
      guard position + 24 <= bytes.count else { throw refuse() }
      let flags = bytes.big(UInt32.self, at: position + 12)
      let nameCount = Int(bytes.big(UInt16.self, at: position + 18))
      let extraCount = Int(bytes.big(UInt32.self, at: position + 20))
      let entries = bytes.big(UInt32.self, at: position + 8)
      let offset = bytes.big(UInt64.self, at: position)
      let bits = bytes[position + 17]
      let name = position + 24 + extraCount
      guard extraCount <= bytes.count, name + nameCount <= bytes.count, bits <= 62,
        entries <= mostEntries, offset % header.clusterSize == 0, offset < 1 << 56
      else { throw refuse() }
      bitmaps.append(
        Qcow2Bitmap(
          name: text(bytes[name..<(name + nameCount)]), granularity: 1 << UInt64(bits),
          inUse: flags & flagInUse != 0, auto: flags & 2 != 0, tableOffset: offset,
          tableEntries: entries, position: position))
      position = (name + nameCount + 7) / 8 * 8
    }
    return bitmaps
  }

  /// Marks every consistent bitmap as in use, durably.
  static func markInUse(_ store: any ByteStore, _ header: Qcow2Header) throws(ImageError) {
    guard let area = header.bitmaps, header.autoclear & Qcow2Header.Autoclear.bitmaps != 0
    else { return }
    let stale = try read(store, header).filter { !$0.inUse }
    guard !stale.isEmpty else { return }
    try io { () throws(IOError) in
      for bitmap in stale {
        let at = area.directoryOffset + UInt64(bitmap.position) + 12
        var flags = try store.read(at: at, count: 4)
        flags[3] |= UInt8(flagInUse)
        try store.write(flags, at: at)
      }
      try store.flush()
    }
  }
}
