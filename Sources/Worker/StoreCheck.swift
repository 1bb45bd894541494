// SPDX-License-Identifier: Apache-2.0
// Whether a store is still the one on which uncommitted placements were made.
//
// Nobody can change a store whose lock is held. When daemon and worker are both gone, nobody holds
// it, and another program may have given the same bytes of the file to another block, or the same
// block another place. Committing the old placements would then give one block the bytes of
// another. What a placement relies on is looked up in the store as it is now:
//
// - its blocks have no committed, writable place other than this one, or the guest's write would
//   have gone there;
// - no other block of the disk lives in the bytes of its place;
// - no table of the format's lies there.
//
// What else the format knows of its space, it checks when it takes the placement up.

import DiskFormats
import DiskModel

enum StoreCheck {
  /// An extent in device 0, in sectors of the disk and of the device.
  private struct Claim {
    let blocks: Range<UInt64>
    let place: Range<UInt64>

    /// nil for an extent that lies elsewhere.
    init?(_ extent: Extent, blockSectors: UInt64) {
      guard case .device(0, let sector) = extent.place else { return nil }
      blocks = extent.blocks.first * blockSectors..<extent.blocks.end * blockSectors
      place = sector..<sector + (blocks.upperBound - blocks.lowerBound)
    }

    /// Whether both put a sector of the disk, or one of the device, in the same place.
    func agrees(with other: Claim) -> Bool {
      blocks.lowerBound &- place.lowerBound == other.blocks.lowerBound &- other.place.lowerBound
    }
  }

  /// Has `format` take placements up, if the store is still theirs. Throws `stale`, and what the
  /// format throws.
  static func restore(
    _ format: any ImageFormat, _ extents: [Extent], name: String
  ) throws(ImageError) {
    try verify(format, extents, name: name)
    do throws(ImageError) {
      try format.restore(extents)
    } catch {
      // What was right when it was placed does not fit any more.
      guard error.code == .badRequest else { throw error }
      throw stale(name, error.message)
    }
  }

  /// Compares every extent of the disk with the placements, before `format` has taken them up.
  /// Reads the whole mapping. Throws `stale`, and what the format throws.
  static func verify(
    _ format: any ImageFormat, _ extents: [Extent], name: String
  ) throws(ImageError) {
    let blockSectors = UInt64(format.blockSize) / 512
    let blocks = (format.size + UInt64(format.blockSize) - 1) / UInt64(format.blockSize)
    for extent in extents where extent.blocks.end > blocks {
      throw stale(name, "block \(extent.blocks.first) lies past the disk's end")
    }
    let claims = extents.compactMap { Claim($0, blockSectors: blockSectors) }
    if try format.usesForTables(
      claims.map { $0.place.lowerBound * 512..<$0.place.upperBound * 512 })
    {
      throw stale(name, "its tables lie where such a write is")
    }
    let byBlock = claims.sorted { $0.blocks.lowerBound < $1.blocks.lowerBound }
    let byPlace = claims.sorted { $0.place.lowerBound < $1.place.lowerBound }
    var block: UInt64 = 0
    while block < blocks {
      let found = try format.findMerged(block, limit: blocks - block)
      block = found.blocks.end
      guard let mine = Claim(found, blockSectors: blockSectors) else { continue }
      if let other = conflict(mine, in: byPlace, by: \.place) {
        throw stale(name, "two blocks share sector \(other.place.lowerBound)")
      }
      if found.writable, let other = conflict(mine, in: byBlock, by: \.blocks) {
        throw stale(name, "block \(other.blocks.lowerBound / blockSectors) has another place")
      }
    }
  }

  /// A claim that overlaps in one respect and does not agree. The claims are sorted by it, and
  /// none of them overlaps another.
  private static func conflict(
    _ mine: Claim, in claims: [Claim], by range: (Claim) -> Range<UInt64>
  ) -> Claim? {
    var low = 0
    var high = claims.count
    while low < high {
      let middle = (low + high) / 2
      if range(claims[middle]).upperBound <= range(mine).lowerBound {
        low = middle + 1
      } else {
        high = middle
      }
    }
    while low < claims.count, range(claims[low]).lowerBound < range(mine).upperBound {
      if !claims[low].agrees(with: mine) { return claims[low] }
      low += 1
    }
    return nil
  }

  private static func stale(_ name: String, _ what: String) -> ImageError {
    ImageError(
      .stale,
      "\(name) was changed by another program since writes were acknowledged that are not"
        + " committed to it (\(what)): bring the store back as it was, or discard those writes")
  }
}
