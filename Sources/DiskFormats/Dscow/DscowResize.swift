// SPDX-License-Identifier: Apache-2.0
// Giving a dscow disk another length, and moving its bitmap. Nobody may serve the disk.
//
// Order: what of the last block lies past the old end is zeroed, with a commit of its own where
// the block is not here; a whole new bitmap is written where nothing is (behind everything), and
// flushed; the header then names size and bitmap at once; then the bitmap moves to the front
// where it fits, in the same two steps; then space is given back. At every instant one bitmap
// and one size hold, together.

package import BlockIO
import DiskModel
import SystemIO

extension Dscow {
  /// Gives the disk another length, rounded up to 512. What is new reads as zeroes.
  ///
  /// - Parameter base: the disk under it, when its header names one.
  /// - Throws: what `open` throws; `badRequest` for a length outside the limits, `io`.
  package static func resize(
    store: any ByteStore, base: (any ByteStore)?, to newSize: UInt64
  ) throws(ImageError) {
    let disk = try open(store: store, base: base, writable: true)
    guard let newSize = roundedUp(newSize, to: 512) else {
      throw ImageError(.badRequest, "\(newSize) bytes are too many for \(store.name)")
    }
    var header = disk.header
    guard newSize != header.size else { return }
    if newSize > header.size { try closeTail(disk, store, base) }
    if let grown = try growInFront(store, header, to: newSize, baseSize: base?.size ?? 0) {
      return try giveBack(store, grown, old: disk.header)
    }
    let blocksEnd = header.blocksEnd(size: newSize, blockSize: header.blockSize)
    if header.isBitmapBehind {
      // New blocks may lie where the bitmap is.
      header = try move(store, header, to: header.size, behind: blocksEnd, hiding: 0)
    }
    header = try move(store, header, to: newSize, behind: blocksEnd, hiding: base?.size ?? 0)
    header = try bringForward(store, header)
    try giveBack(store, header, old: disk.header)
  }

  /// Grows a disk whose longer bitmap fits before the blocks, and under which nothing new shows:
  /// its new bits are zeroes, and only the header changes. nil where that is not so.
  private static func growInFront(
    _ store: any ByteStore, _ header: DscowHeader, to newSize: UInt64, baseSize: UInt64
  ) throws(ImageError) -> DscowHeader? {
    guard newSize > header.size, !header.isBitmapBehind,
      baseSize <= header.blocks * UInt64(header.blockSize),
      newSize <= DscowHeader.largestDisk
    else { return nil }
    let blocks = (newSize - 1) / UInt64(header.blockSize) + 1
    let bytes = (blocks + 7) / 8
    guard let end = roundedUp(header.bitmapOffset + bytes, to: DscowHeader.pageSize),
      end <= header.firstBlock
    else { return nil }
    let grown = try header.with(size: newSize, bitmapOffset: header.bitmapOffset)
    try lengthen(store, to: grown.storeSize)
    let oldEnd = header.bitmapOffset + header.bitmapBytes
    try io { () throws(IOError) in
      try store.zero(at: oldEnd, count: end - oldEnd)
      try store.flush()
    }
    return try rewrite(grown, on: store)
  }

  /// Writes a bitmap for a size behind everything, and has the header name both.
  private static func move(
    _ store: any ByteStore, _ header: DscowHeader, to newSize: UInt64, behind end: UInt64,
    hiding baseSize: UInt64
  ) throws(ImageError) -> DscowHeader {
    let behind = try spare(max(end, header.storeSize))
    let moved = try header.with(size: newSize, bitmapOffset: behind)
    try lengthen(store, to: moved.storeSize)
    try copyBitmap(store, from: header, to: moved, hiding: baseSize)
    return try rewrite(moved, on: store)
  }

  static func spare(_ offset: UInt64) throws(ImageError) -> UInt64 {
    guard let place = roundedUp(offset, to: DscowHeader.pageSize), place < 1 << 62 else {
      throw ImageError(.badRequest, "there is no room behind byte \(offset)")
    }
    return place
  }

  static func lengthen(_ store: any ByteStore, to size: UInt64) throws(ImageError) {
    guard store.size < size else { return }
    do throws(IOError) {
      try store.resize(to: size)
    } catch {
      throw ImageError(
        .io,
        "store \(store.name) has \(store.size) bytes and needs \(size) to be resized: "
          + "give it more room, or convert it into another store",
        cause: error)
    }
  }

  /// Makes the bytes of the last block that lie past the disk's end zeroes, if anybody could
  /// come to see others.
  private static func closeTail(
    _ disk: Dscow, _ store: any ByteStore, _ base: (any ByteStore)?
  ) throws(ImageError) {
    let unit = UInt64(disk.blockSize)
    let tail = disk.size % unit
    guard tail > 0 else { return }
    let block = disk.size / unit
    let extent = try disk.find(block, limit: 1)
    if extent.writable {
      let place = disk.header.firstBlock + block * unit
      return try io { () throws(IOError) in
        try store.zero(at: place + tail, count: unit - tail)
        try store.flush()
      }
    }
    guard let base, base.size > disk.size else { return }
    let place = try disk.place(BlockRange(block), whole: true)
    let start = disk.header.firstBlock + block * unit
    try io { () throws(IOError) in
      let bytes = try base.read(at: block * unit, count: Int(tail))
      try store.zero(at: start, count: unit)
      try store.write(bytes, at: start)
      try store.flush()
    }
    let plan = try disk.commitPlan(upTo: place.extent.mark)
    try plan.carryOut(on: store)
    disk.committed(upTo: place.extent.mark)
  }

  /// Writes the bitmap of a header that is not in force yet from the one that is: its bits as
  /// far as both disks go, and bits for new blocks under which the base has something, whose
  /// places are made zeroes.
  private static func copyBitmap(
    _ store: any ByteStore, from old: DscowHeader, to new: DscowHeader, hiding baseSize: UInt64
  ) throws(ImageError) {
    let unit = UInt64(old.blockSize)
    let baseBlocks = min(new.blocks, baseSize == 0 ? 0 : (baseSize - 1) / unit + 1)
    let hidden = old.blocks..<max(old.blocks, baseBlocks)
    if !hidden.isEmpty {
      let place = new.firstBlock + hidden.lowerBound * unit
      try io { () throws(IOError) in
        try store.zero(at: place, count: UInt64(hidden.count) * unit)
      }
    }
    let (from, to) = (old.bitmapOffset, new.bitmapOffset)
    try io { () throws(IOError) in try store.zero(at: to, count: new.bitmapBytes) }
    var page: UInt64 = 0
    let perPage = DscowBitmap.blocksPerPage
    while page * perPage < new.blocks {
      let first = page * perPage
      var bytes = [UInt8](repeating: 0, count: Int(DscowHeader.pageSize))
      if first < old.blocks {
        bytes = try io { () throws(IOError) in
          try store.read(
            at: from + page * DscowHeader.pageSize, count: Int(DscowHeader.pageSize))
        }
      }
      // Neither bits past the old end nor past the new one; and those that hide the base.
      clear(&bytes, from: min(old.blocks, new.blocks) - min(first, min(old.blocks, new.blocks)))
      for block in hidden.clamped(to: first..<(first + perPage)) {
        bytes[Int(block - first) / 8] |= 1 << UInt8((block - first) % 8)
      }
      if bytes.contains(where: { $0 != 0 }) {
        let place = to + page * DscowHeader.pageSize
        try io { () throws(IOError) in try store.write(bytes, at: place) }
      }
      page += 1
    }
    try io { () throws(IOError) in try store.flush() }
  }

  /// Clears the bits of a page from one on.
  private static func clear(_ page: inout [UInt8], from bit: UInt64) {
    guard bit < DscowBitmap.blocksPerPage else { return }
    let byte = Int(bit / 8)
    page[byte] &= UInt8((1 << (bit % 8)) - 1)
    for index in (byte + 1)..<max(byte + 1, page.count) { page[index] = 0 }
  }

  /// Moves a bitmap that lies behind the blocks to the front, where it fits there.
  static func bringForward(
    _ store: any ByteStore, _ header: DscowHeader
  ) throws(ImageError) -> DscowHeader {
    let front = 2 * UInt64(DscowHeader.copySize)
    guard header.isBitmapBehind, front + header.bitmapBytes <= header.firstBlock else {
      return header
    }
    let moved = try header.with(size: header.size, bitmapOffset: front)
    try copyBitmap(store, from: header, to: moved, hiding: 0)
    return try rewrite(moved, on: store)
  }

  /// Gives back space that nothing uses any more: a file ends where the store does, and what a
  /// bitmap or a block left behind is punched.
  static func giveBack(
    _ store: any ByteStore, _ header: DscowHeader, old: DscowHeader
  ) throws(ImageError) {
    let front = 2 * UInt64(DscowHeader.copySize)
    try io { () throws(IOError) in
      if header.isBitmapBehind {
        try store.zero(at: front, count: header.firstBlock - front)
        try store.zero(at: header.blocksEnd, count: header.bitmapOffset - header.blocksEnd)
      }
      if old.isBitmapBehind, old.bitmapOffset < header.blocksEnd {
        let end = min(old.bitmapOffset + old.bitmapBytes, header.blocksEnd)
        try store.zero(at: old.bitmapOffset, count: end - old.bitmapOffset)
      }
      try store.resize(to: header.storeSize)
      try store.flush()
    }
  }
}
