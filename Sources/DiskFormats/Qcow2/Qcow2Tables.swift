// SPDX-License-Identifier: Apache-2.0
// Where a qcow2 image's own tables lie.

extension Qcow2 {
  /// See `ImageFormat`: the L2 tables, the refcount blocks and what belongs to snapshots. The
  /// header, the L1 table and the refcount table are seen to when places are taken up.
  package func usesForTables(_ ranges: [Range<UInt64>]) throws(ImageError) -> Bool {
    let sorted = ranges.sorted { $0.lowerBound < $1.lowerBound }
    func isHit(_ offset: UInt64, _ bytes: UInt64) -> Bool {
      guard bytes > 0 else { return false }
      var low = 0
      var high = sorted.count
      while low < high {
        let middle = (low + high) / 2
        if sorted[middle].upperBound <= offset { low = middle + 1 } else { high = middle }
      }
      return low < sorted.count && sorted[low].lowerBound < offset + bytes
    }
    guard !header.hasDataFile else { return false }
    for index in 0..<UInt64(header.l1Size) {
      let table = try table(index).offset
      if table != 0, isHit(table, header.clusterSize) { return true }
    }
    for index in 0..<refcounts.tableEntries {
      if let block = try refcounts.block(index), isHit(block, header.clusterSize) { return true }
    }
    let table = try Qcow2SnapshotTable(store, header)
    if isHit(header.snapshotsOffset, table.length) { return true }
    return table.snapshots.contains { isHit($0.l1Offset, UInt64($0.l1Size) * 8) }
  }
}
