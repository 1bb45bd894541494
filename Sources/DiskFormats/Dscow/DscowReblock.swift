// SPDX-License-Identifier: Apache-2.0
// Giving a dscow store blocks of another size. Nobody may serve the disk.
//
// No data moves: a block of 64 KiB is sixteen of 4 KiB that lie one after the other, and the first
// block begins where it did. What changes is how many bits say that it is there.
//
// Order: the new bitmap is written where nothing is (behind everything), and flushed; the header
// then names block size and bitmap at once; then the bitmap moves to the front where it fits, and
// space is given back, as after a resize. A cut leaves the old store or the new one.

package import BlockIO
import SystemIO

extension Dscow {
  /// Gives a store blocks of another size, and returns its header.
  ///
  /// Smaller blocks can always be had. Larger ones only where all the small blocks of each are
  /// alike, in the store or not, and where the first block lies at a multiple of the new size.
  ///
  /// - Parameter blockSize: bytes of a block, a power of two from 4 KiB to 4 MiB.
  /// - Throws: what `header(of:)` throws; `badRequest` for a size that cannot be had, and for a
  ///   store that is being committed; `io`.
  @discardableResult
  package static func reblock(
    store: any ByteStore, to blockSize: UInt32
  ) throws(ImageError) -> DscowHeader {
    let old = try header(of: store, writable: true).header
    guard !old.isCommitting else {
      throw ImageError(
        .badRequest,
        "store \(store.name) is being committed into its base: commit it to the end first")
    }
    guard old.blockSize != blockSize else { return old }
    let unit = UInt64(blockSize)
    try DscowHeader.check(blockSize: blockSize, size: old.size, .badRequest)
    guard old.firstBlock % unit == 0 else {
      throw ImageError(
        .badRequest,
        "the first block of store \(store.name) lies at \(old.firstBlock), which is no multiple of"
          + " \(unit): choose smaller blocks, or convert the disk into another store")
    }
    let blocksEnd = old.blocksEnd(size: old.size, blockSize: blockSize)
    let behind = try spare(max(blocksEnd, old.storeSize))
    var header = try old.with(size: old.size, bitmapOffset: behind, blockSize: blockSize)
    if blockSize > old.blockSize {
      // What cannot be had is refused before anything is written.
      try forEachPage(of: header) { page throws(ImageError) in
        _ = try regrouped(page, from: old, to: header, store)
      }
    }
    try lengthen(store, to: header.storeSize)
    try io { () throws(IOError) in try store.zero(at: behind, count: header.bitmapBytes) }
    try forEachPage(of: header) { page throws(ImageError) in
      let bytes = try regrouped(page, from: old, to: header, store)
      guard bytes.contains(where: { $0 != 0 }) else { return }
      let offset = behind + page * DscowHeader.pageSize
      try io { () throws(IOError) in try store.write(bytes, at: offset) }
    }
    try io { () throws(IOError) in try store.flush() }
    header = try rewrite(header, on: store)
    header = try bringForward(store, header)
    try giveBack(store, header, old: old)
    return header
  }

  private static func forEachPage(
    of header: DscowHeader, _ body: (UInt64) throws(ImageError) -> Void
  ) throws(ImageError) {
    var page: UInt64 = 0
    while page * DscowBitmap.blocksPerPage < header.blocks {
      try body(page)
      page += 1
    }
  }

  /// A page of the new bitmap.
  private static func regrouped(
    _ page: UInt64, from old: DscowHeader, to new: DscowHeader, _ store: any ByteStore
  ) throws(ImageError) -> [UInt8] {
    let first = page * DscowBitmap.blocksPerPage
    let count = Int(min(DscowBitmap.blocksPerPage, new.blocks - first))
    // Both block sizes are powers of two, 1024 apart at most: what is read begins with a byte.
    let start = first * UInt64(new.blockSize) / UInt64(old.blockSize)
    let end = min(
      (first + UInt64(count)) * UInt64(new.blockSize) / UInt64(old.blockSize) + 1, old.blocks)
    let bits = try io { () throws(IOError) in
      try store.read(at: old.bitmapOffset + start / 8, count: Int((end - start + 7) / 8))
    }
    func isSet(_ bit: Int) -> Bool { bits[bit / 8] & 1 << UInt8(bit % 8) != 0 }
    var bytes = [UInt8](repeating: 0, count: Int(DscowHeader.pageSize))
    guard bits.contains(where: { $0 != 0 }) else { return bytes }
    if new.blockSize < old.blockSize {
      let each = Int(old.blockSize / new.blockSize)
      for bit in 0..<count where isSet(bit / each) { bytes[bit / 8] |= 1 << UInt8(bit % 8) }
      return bytes
    }
    let each = Int(new.blockSize / old.blockSize)
    for bit in 0..<count {
      let group = bit * each..<min((bit + 1) * each, Int(old.blocks - start))
      guard isSet(group.lowerBound) else {
        guard !group.contains(where: isSet) else { throw mixed(first + UInt64(bit), new, store) }
        continue
      }
      guard group.allSatisfy(isSet) else { throw mixed(first + UInt64(bit), new, store) }
      bytes[bit / 8] |= 1 << UInt8(bit % 8)
    }
    return bytes
  }

  private static func mixed(
    _ block: UInt64, _ new: DscowHeader, _ store: any ByteStore
  ) -> ImageError {
    ImageError(
      .badRequest,
      "of the \(new.blockSize) bytes from byte \(block * UInt64(new.blockSize)) on, store \(store.name)"
        + " has only a part: choose smaller blocks, or convert the disk into another store")
  }
}
