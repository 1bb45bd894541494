// SPDX-License-Identifier: Apache-2.0
// Changing the length of a VHD disk. Nothing may be pending; no target may serve the disk. The
// creator stays, and so do locators and batmap.
//
// Dynamic and differencing, growing:
// 1. what an earlier change left in the table past the end is taken out;
// 2. where the table is too short, blocks that stand where the front needs room are copied to
//    the end and then named there; a new dynamic header, a longer table, a batmap and the
//    locators are written behind the old ones; the copy of the footer at the start, one
//    sector, then names them all at once;
// 3. blocks under which the base shows something past the old end get places, with zeroes;
// 4. the copy of the footer at the start says the new length, then the one at the end.
// A power cut or kill before 4 leaves the old length, and the same change can be done again.
//
// Shrinking: the footers say the length first, without a batmap where that speaks of blocks
// past the end; then those go out of the table and the batmap, and the batmap is named again.
//
// Fixed, growing: a footer with the old length is written at the new end, which makes the file
// that long; the old one, which is the disk's from now on, is zeroed; then the one at the end
// says the new length. Shrinking: the one at the end says the new length, then one is written
// behind the new end, then the file is cut off behind that.

import BlockIO
import SystemIO

extension Vhd {
  /// Gives the disk another length, rounded up to 512.
  ///
  /// - Throws: `badRequest` when it cannot be that long or has uncommitted placements; `io`.
  package func resize(to newSize: UInt64) throws(ImageError) {
    guard isWritable, pending.isEmpty else {
      throw ImageError(.badRequest, "\(store.name) is in use or open for reading only")
    }
    guard let newSize = roundedUp(newSize, to: 512), newSize > 0, newSize <= 2040 << 30 else {
      throw ImageError(.badRequest, "a VHD disk has 512 bytes to 2040 GiB, not \(newSize)")
    }
    if header.kind == .fixed { return try resizeFixed(to: newSize) }
    guard newSize != size else { return try putFooterAtEnd() }
    if newSize > size { try grow(to: newSize) } else { try shrink(to: newSize) }
  }

  // MARK: Fixed

  private func resizeFixed(to newSize: UInt64) throws(ImageError) {
    guard !store.isFixedSize else {
      throw ImageError(
        .unsupported, "\(store.name) is a device, and a fixed VHD image fills it: convert it")
    }
    let (old, store) = (size, store)
    let footer = header.resizedFooter(to: newSize)
    let own = header.footer
    try io { () throws(IOError) in
      if newSize > old {
        // Writing behind the end makes the file longer in the same step.
        if store.size < newSize + VhdHeader.footerSize {
          try store.write(own, at: newSize)
          try store.flush()
        }
        let end = store.size - VhdHeader.footerSize
        try store.zero(at: old, count: min(newSize - old, end - old))
        try store.flush()
        try store.write(footer, at: end)
        try store.flush()
      } else if newSize < old {
        try store.write(footer, at: store.size - VhdHeader.footerSize)
        try store.flush()
      }
      guard store.size != newSize + VhdHeader.footerSize else { return }
      try store.write(footer, at: newSize)
      try store.flush()
      try store.resize(to: newSize + VhdHeader.footerSize)
      try store.flush()
    }
    header = try VhdHeader.read(from: store)
  }

  // MARK: With a table

  private func grow(to newSize: UInt64) throws(ImageError) {
    let old = size
    try zeroTail(from: old)
    // A power cut may have left what an earlier change meant to take out.
    try clearTable(from: tableBlocks(for: old))
    try growTable(for: newSize)
    header.size = newSize
    try hide(from: old, on: store)
    try putFooters(header.resizedFooter(to: newSize))
  }

  private func shrink(to newSize: UInt64) throws(ImageError) {
    var smaller = header
    smaller.size = newSize
    let first = tableBlocks(for: newSize)
    let footer = header.resizedFooter(to: newSize)
    guard let batmap = header.batmap, try speaks(batmap, from: first) else {
      try putFooters(footer)
      return try clearTable(from: first)
    }
    smaller.footer = footer
    try putFooters(
      smaller.changedFooter(
        creatorVersion: VhdBatmap.unpromised, headerOffset: header.headerOffset))
    try clearTable(from: first)
    try renewBatmap(footer)
  }

  /// Writes a footer to both its places, the one that counts first, and reads it back.
  func putFooters(_ footer: [UInt8]) throws(ImageError) {
    let (place, store) = (footerOffset, store)
    try io { () throws(IOError) in
      try store.write(footer, at: 0)
      try store.flush()
      try store.write(footer, at: place)
      try store.flush()
    }
    header = try VhdHeader.read(from: store)
    footerPlace = place
    cache.dropAll()
  }

  /// An earlier change may have been broken off between the two footers.
  private func putFooterAtEnd() throws(ImageError) {
    if let last = try VhdHeader.endFooter(of: store), last == header.footer { return }
    try putFooters(header.footer)
  }

  /// Blocks of the table that a disk of so many bytes has.
  private func tableBlocks(for size: UInt64) -> UInt64 {
    (size + header.tableBlock - 1) / header.tableBlock
  }

  private func clearTable(from block: UInt64) throws(ImageError) {
    guard block < UInt64(header.tableEntries) else { return }
    let unused = [UInt8](
      repeating: 0xFF, count: Int((UInt64(header.tableEntries) - block) * 4))
    let (store, place) = (store, header.tableOffset + block * 4)
    try io { () throws(IOError) in
      try store.write(unused, at: place)
      try store.flush()
    }
    cache.dropAll()
  }

  /// Makes a table with an entry for each block of a longer disk, and whatever stands with it in
  /// front of the blocks, anew.
  private func growTable(for newSize: UInt64) throws(ImageError) {
    let needed = tableBlocks(for: newSize)
    guard needed > UInt64(header.tableEntries) else { return }
    guard needed <= UInt64(VhdHeader.mostEntries) else {
      throw ImageError(.badRequest, "\(needed) blocks are too many: convert to larger ones")
    }
    var new = header
    new.tableEntries = UInt32(needed)
    new.headerOffset = header.structuresEnd
    new.tableOffset = new.headerOffset + VhdHeader.dynamicSize
    var next = new.tableOffset + new.tableSize
    if header.batmap != nil {
      let bits = (needed + 4095) / 4096 * 512
      new.batmap = VhdBatmap(
        headerOffset: next, offset: next + 512, size: bits, checksum: 0)
      next += 512 + bits
    }
    for index in new.locators.indices where new.locators[index].length > 0 {
      let count = new.locators[index].room.count
      new.locators[index].offset = next
      next += UInt64(count)
    }
    try moveBlocks(outOf: new.headerOffset..<next)
    try copyFront(to: new)
    try putFooters(
      header.changedFooter(
        creatorVersion: header.creatorVersion, headerOffset: new.headerOffset))
  }

  /// Copies blocks that stand in a range to the end of the file, and has the table name them
  /// there, one after the other.
  private func moveBlocks(outOf range: Range<UInt64>) throws(ImageError) {
    let stride = header.bitmapSize + header.tableBlock
    var moved: [(block: UInt64, offset: UInt64)] = []
    try header.forEachBlock(of: store) { block, offset throws(ImageError) in
      if (offset..<(offset + stride)).overlaps(range) { moved.append((block, offset)) }
    }
    end = max(end, (range.upperBound + 511) / 512 * 512)
    for (block, offset) in moved {
      let start = try newPlace() - header.bitmapSize
      let (store, entry) = (store, header.tableOffset + block * 4)
      try io { () throws(IOError) in
        var done: UInt64 = 0
        while done < stride {
          let count = Int(min(1 << 20, stride - done))
          try store.write(try store.read(at: offset + done, count: count), at: start + done)
          done += UInt64(count)
        }
        try store.flush()
        var bytes: [UInt8] = []
        bytes.appendBig(UInt32(start / 512))
        try store.write(bytes, at: entry)
        try store.flush()
      }
    }
    cache.dropAll()
  }

  /// Writes a dynamic header, a table, a batmap and locators as a new header places them, from
  /// those that hold.
  private func copyFront(to new: VhdHeader) throws(ImageError) {
    let (store, old) = (store, header)
    try io { () throws(IOError) in
      let end = new.structuresEnd
      if !store.isFixedSize, store.size < end + VhdHeader.footerSize {
        try store.resize(to: end + VhdHeader.footerSize)
      }
      var table = try store.read(at: old.tableOffset, count: Int(old.tableEntries) * 4)
      table += [UInt8](repeating: 0xFF, count: Int(new.tableSize) - table.count)
      try store.write(table, at: new.tableOffset)
      if let from = old.batmap, let to = new.batmap {
        var bits = try store.read(at: from.offset, count: Int(from.size))
        bits.removeLast(max(0, bits.count - Int(to.size)))
        bits += [UInt8](repeating: 0, count: Int(to.size) - bits.count)
        try store.write(bits, at: to.offset)
        let head = try store.read(at: from.headerOffset, count: 512)
        try store.write(to.encoded(bits, keeping: head), at: to.headerOffset)
      }
      for (from, to) in zip(old.locators, new.locators) where from.length > 0 {
        let count = Int(from.data.count)
        try store.zero(at: to.offset, count: UInt64(to.room.count))
        try store.write(try store.read(at: from.offset, count: count), at: to.offset)
      }
      var dynamic = try store.read(at: old.headerOffset, count: Int(VhdHeader.dynamicSize))
      new.putPlaces(in: &dynamic)
      try store.write(dynamic, at: new.headerOffset)
      try store.flush()
    }
  }
}
