// Changing the length of a VHD disk. Nothing may be pending; no target may serve the disk.
//
// Dynamic and differencing: where the table is too short a longer one is written to the end of
// the file and flushed, then one sector of the dynamic header names it; then the footers say
// the length, the copy at the start first, which is the one that counts. Shrinking changes the
// footers first and then takes what lies past the end out of the table.
//
// Fixed: the footer at the new end is written before the old one is zeroed or cut off. A power
// cut between leaves the old footer's 512 bytes as data behind the old end.

import Posix

extension Vhd {
  /// Gives the disk another length, rounded up to 512. The image then counts as made by this
  /// program, whose images are exactly as long as they say.
  ///
  /// - Throws: `badRequest` when it cannot be that long or has uncommitted placements; `io`.
  public func resize(to newSize: UInt64) throws(ImageError) {
    guard isWritable, pending.isEmpty else {
      throw ImageError(.badRequest, "\(store.name) is in use or open for reading only")
    }
    guard let newSize = roundedUp(newSize, to: 512), newSize > 0, newSize <= 2040 << 30 else {
      throw ImageError(.badRequest, "a VHD disk has 512 bytes to 2040 GiB, not \(newSize)")
    }
    let old = size
    guard newSize != old else { return }
    var new = header
    new.size = newSize
    new.creator = Array("tap\0".utf8)
    new.footer = header.resizedFooter(to: newSize, creator: new.creator)
    guard header.kind != .fixed else { return try resizeFixed(new) }
    if newSize > old {
      try zeroTail(from: old)
      // A power cut may have left what an earlier shrinking meant to take out.
      try clearTable(from: blockCount)
    }
    try growTable(&new)
    let end = max(try findEnd(), store.size < 512 ? 0 : (store.size - 512) / 512 * 512)
    let footer = new.footer
    try io { () throws(IOError) in
      try store.write(footer, at: 0)
      try store.flush()
      try store.write(footer, at: end)
      try store.flush()
    }
    header = new
    cache.dropAll()
    if newSize > old {
      try hide(from: old, on: store)
    } else {
      try clearTable(from: blockCount)
    }
    // Whatever was placed is the footer's neighbour now.
    self.end = nil
  }

  private func resizeFixed(_ new: VhdHeader) throws(ImageError) {
    let (old, newSize) = (size, new.size)
    try io { () throws(IOError) in
      if newSize > old { try store.resize(to: newSize + VhdHeader.footerSize) }
      try store.write(new.footer, at: newSize)
      try store.flush()
      if newSize > old {
        try store.zero(at: old, count: min(newSize - old, VhdHeader.footerSize))
      } else {
        try store.resize(to: newSize + VhdHeader.footerSize)
      }
      try store.flush()
    }
    header = new
  }

  /// Makes a table with an entry for each block of a longer disk.
  private func growTable(_ new: inout VhdHeader) throws(ImageError) {
    let needed = (new.size + new.tableBlock - 1) / new.tableBlock
    guard needed > UInt64(header.tableEntries) else { return }
    guard needed <= UInt64(VhdHeader.mostEntries) else {
      throw ImageError(.badRequest, "\(needed) blocks are too many: convert to larger ones")
    }
    let old = header
    let place = max(try findEnd(), store.size)
    let offset = (place + 511) / 512 * 512
    new.tableOffset = offset
    new.tableEntries = UInt32(needed)
    let (count, bytes) = (Int(old.tableEntries) * 4, Int((needed * 4 + 511) / 512 * 512))
    let fixed = new
    try io { () throws(IOError) in
      var table = try store.read(at: old.tableOffset, count: count)
      table += [UInt8](repeating: 0xFF, count: bytes - count)
      try store.resize(to: offset + UInt64(bytes) + VhdHeader.footerSize)
      try store.write(table, at: offset)
      try store.flush()
      // Fields and sum lie in the header's first sector, which is written whole or not at all.
      var dynamic = try store.read(at: old.headerOffset, count: 1024)
      fixed.putTable(in: &dynamic)
      try store.write([UInt8](dynamic[..<512]), at: old.headerOffset)
      try store.flush()
    }
    header.tableOffset = offset
    header.tableEntries = UInt32(needed)
    end = nil
    cache.dropAll()
  }

  private func clearTable(from block: UInt64) throws(ImageError) {
    guard block < UInt64(header.tableEntries) else { return }
    let unused = [UInt8](
      repeating: 0xFF, count: Int((UInt64(header.tableEntries) - block) * 4))
    try io { () throws(IOError) in
      try store.write(unused, at: header.tableOffset + block * 4)
      try store.flush()
    }
    cache.dropAll()
  }
}
