// SPDX-License-Identifier: Apache-2.0
// Changing the length of a qcow disk. Nothing may be pending; no target may serve the disk.
//
// Growing: a longer L1 table is written at the end of the file and flushed; then the header names
// it; then what a longer base would show past the old end is hidden by clusters; then the header
// says the length. Shrinking: one sector of the header changes the
// length; then tables lose what lies past the end.

import BlockIO
import SystemIO

extension Qcow {
  /// Gives the disk another length, rounded up to 512.
  ///
  /// - Throws: `badRequest` when it cannot be that long or has uncommitted placements; `io`.
  package func resize(to newSize: UInt64) throws(ImageError) {
    guard isWritable, pending.isEmpty else {
      throw ImageError(.badRequest, "\(store.name) is in use or open for reading only")
    }
    var longer = header
    guard let newSize = roundedUp(newSize, to: 512), newSize > 0, newSize <= 1 << 50 else {
      throw ImageError(.badRequest, "\(newSize) bytes are too many or none for \(store.name)")
    }
    longer.size = newSize
    guard longer.l1Entries <= QcowHeader.mostL1Entries else {
      throw ImageError(.badRequest, "\(newSize) bytes are too many for \(store.name)")
    }
    let old = size
    guard newSize != old else { return }
    if newSize < old { return try shrink(to: longer) }
    try zeroTail(from: old)
    // A power cut may have left what an earlier change meant to take out.
    try clear(tables: header.l1Entries)
    var longTable = longer
    longTable.size = old
    if longer.l1Entries > header.l1Entries {
      let bytes = longer.l1Entries * 8
      longTable.l1Offset = try take((bytes + 4095) / 4096 * 4096)
      longer.l1Offset = longTable.l1Offset
      let count = Int(header.l1Entries * 8)
      let (from, to) = (header.l1Offset, longer.l1Offset)
      try io { () throws(IOError) in
        try store.zero(at: to, count: bytes)
        try store.write(try store.read(at: from, count: count), at: to)
        try store.flush()
      }
    }
    // What shows past the old end is hidden before the disk reaches there: a kill before the
    // last step leaves the old length, and the same change can be done again.
    try put(longTable)
    header.size = newSize
    try hide(from: old, on: store)
    try put(longer)
  }

  /// Makes a header's length and place of the L1 table the image's, both at once.
  private func put(_ new: QcowHeader) throws(ImageError) {
    let store = store
    try io { () throws(IOError) in
      var sector = try store.read(at: 0, count: 512)
      sector.putBig(new.size, at: 24)
      sector.putBig(new.l1Offset, at: 40)
      // The first sector may hold more than the file has.
      try store.write([UInt8](sector[..<QcowHeader.length]), at: 0)
      try store.flush()
    }
    header = new
    cache.dropAll()
    for range in new.reserved { protect(range) }
  }

  private func shrink(to new: QcowHeader) throws(ImageError) {
    let tables = header.l1Entries
    try put(new)
    try clear(tables: tables)
  }

  /// Takes what lies past the end out of so many tables.
  private func clear(tables: UInt64) throws(ImageError) {
    let first = blockCount
    let zero = [UInt8](repeating: 0, count: 8)
    for index in min(tables, first / header.l2Entries)..<tables {
      let table = try table(index)
      guard table != 0 else { continue }
      let start = first > index * header.l2Entries ? first - index * header.l2Entries : 0
      let place = header.l1Offset + index * 8
      let (at, count) = (table + start * 8, (header.l2Entries - start) * 8)
      try io { () throws(IOError) in
        if start == 0 {
          try store.write(zero, at: place)
        } else {
          try store.write([UInt8](repeating: 0, count: Int(count)), at: at)
        }
      }
    }
    try io { () throws(IOError) in try store.flush() }
    cache.dropAll()
  }
}
