// SPDX-License-Identifier: Apache-2.0
// Extents that continue each other, made one before they reach the target.

import DiskFormats
import DiskModel

extension ImageFormat {
  /// Where a block lives, for as many blocks from it on as follow it there: a format looks
  /// at a table or so at a time, and neighbouring tables often go on alike. At most 16
  /// questions to the format.
  func findMerged(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    var extent = try find(block, limit: limit)
    let blocks = (size + UInt64(blockSize) - 1) / UInt64(blockSize)
    let end = min(blocks, block + limit)
    for _ in 0..<15 where extent.blocks.end < end {
      let next: Extent
      do throws(ImageError) {
        next = try find(extent.blocks.end, limit: end - extent.blocks.end)
      } catch {
        // Not what was asked for: it is told when somebody asks for it.
        return extent
      }
      let sectors = extent.blocks.count * UInt64(blockSize) / 512
      guard next.mark == extent.mark, next.writable == extent.writable,
        next.place == extent.place.advanced(by: sectors)
      else { break }
      extent.blocks.count += next.blocks.count
    }
    return extent
  }
}
