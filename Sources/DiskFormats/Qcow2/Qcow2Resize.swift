// SPDX-License-Identifier: Apache-2.0
// Changing the length of a qcow2 disk. Nothing may be pending; no target may serve the disk.
//
// Growing: the rest of the last cluster is zeroed and what an earlier change left past the end
// taken out; a longer L1 table is written and counted, then the header names it, then the old
// table's clusters are given back; what a longer base would show past the old end is hidden by
// clusters; then one sector of the header says the length. A kill before that leaves the old
// length, and the same change can be done again.
//
// Shrinking: one sector of the header changes the size; then tables lose what lies past the
// end, and then the clusters are given back.

import BlockIO
import SystemIO

extension Qcow2 {
  /// Gives the disk another length, rounded up to 512.
  ///
  /// - Throws: `badRequest` when it cannot be that long, has uncommitted placements or, for
  ///   version 2, has snapshots; `io`.
  package func resize(to newSize: UInt64) throws(ImageError) {
    guard isWritable, pending.isEmpty else {
      throw ImageError(.badRequest, "\(store.name) is in use or open for reading only")
    }
    guard header.version > 2 || header.snapshotCount == 0 else {
      throw ImageError(
        .badRequest,
        "\(store.name) has snapshots and is of version 2, which cannot remember "
          + "their lengths: delete them, or convert the image to version 3")
    }
    guard let newSize = roundedUp(newSize, to: 512), newSize <= 1 << 61,
      header.l1Entries(for: newSize) <= Qcow2Header.mostL1Entries
    else {
      throw ImageError(.badRequest, "\(newSize) bytes are too many for \(store.name)")
    }
    let old = size
    if newSize > old {
      try zeroTail(from: old)
      try clearPast(old)
      if header.hasDataFile, data.size < newSize {
        try io { () throws(IOError) in try data.resize(to: newSize) }
      }
      try growTable(for: newSize)
      size = newSize
      try hide(from: old, on: store)
      try putSize(newSize)
    } else if newSize < old {
      try shrink(to: newSize)
    }
  }

  private func run(_ plan: Qcow2InFlight) throws(ImageError) {
    try CommitPlan(upTo: plan.mark, stages: plan.draft.stages).carryOut(on: store)
    inFlight = plan
    committed(upTo: plan.mark)
  }

  /// Gives the image an L1 table for a longer disk.
  private func growTable(for newSize: UInt64) throws(ImageError) {
    let entries = header.l1Entries(for: newSize)
    guard entries > UInt64(header.l1Size) else { return }
    var plan = Qcow2InFlight(
      mark: pending.lastMark, draft: CommitDraft(cache, clusterSize: header.clusterSize))
    let clusters = (entries * 8 + header.clusterSize - 1) / header.clusterSize
    let first = try refcounts.allocateAtEnd(clusters).first
    for cluster in first..<(first + clusters) {
      plan.draft.begin(cluster: cluster * header.clusterSize)
      plan.counted.insert(cluster)
    }
    for index in 0..<UInt64(header.l1Size) {
      let entry = try cache.big(UInt64.self, at: header.l1Offset + index * 8)
      let offset = first * header.clusterSize + index * 8
      if entry != 0 { try plan.draft.putBig(entry, at: offset) }
    }
    let oldBytes = UInt64(header.l1Size) * 8
    let oldFirst = header.l1Offset / header.clusterSize
    // An empty table has a cluster all the same where one was made for it.
    let oldClusters = (oldBytes + header.clusterSize - 1) / header.clusterSize
    for cluster in oldFirst..<(oldFirst + oldClusters) { plan.dropped[cluster, default: 0] += 1 }
    let table = first * header.clusterSize
    try count(&plan)
    plan.draft.seal()
    try putPlaces(&plan)
    plan.draft.seal()
    try plan.draft.putBig(UInt32(entries), at: 36)
    try plan.draft.putBig(table, at: 40)
    plan.draft.seal()
    try drop(&plan)
    plan.draft.seal()
    try run(plan)
    refcounts.move(
      table: table, bytes: entries * 8, from: header.l1Offset,
      oldBytes: UInt64(header.l1Size) * 8)
    header.l1Offset = table
    header.l1Size = UInt32(entries)
    l1 = (table, entries)
  }

  private func shrink(to newSize: UInt64) throws(ImageError) {
    try putSize(newSize)
    try clearPast(newSize)
  }

  /// Has the header say the length.
  private func putSize(_ newSize: UInt64) throws(ImageError) {
    var plan = Qcow2InFlight(
      mark: pending.lastMark, draft: CommitDraft(cache, clusterSize: header.clusterSize))
    try plan.draft.putBig(newSize, at: 24)
    plan.draft.seal()
    try run(plan)
    header.size = newSize
    size = newSize
  }

  /// Takes whatever lies in clusters past a length out of the tables.
  private func clearPast(_ newSize: UInt64) throws(ImageError) {
    let firstCluster = (newSize + header.clusterSize - 1) / header.clusterSize
    for index
      in (firstCluster / header.l2Entries)..<max(
        firstCluster / header.l2Entries, UInt64(header.l1Size))
    {
      try clear(table: index, from: max(firstCluster, index * header.l2Entries))
    }
  }

  /// Takes every entry from a cluster on out of an L2 table, or the table out of the L1 table
  /// when all of it goes.
  func clear(
    table index: UInt64, from first: UInt64, punching: Bool = false
  ) throws(ImageError) {
    let (table, owned) = try table(index)
    let isWhole = first == index * header.l2Entries
    // Of a table that a snapshot shares a part cannot go; growing hides what it says.
    guard table != 0, owned || isWhole else { return }
    var plan = Qcow2InFlight(
      mark: pending.lastMark, draft: CommitDraft(cache, clusterSize: header.clusterSize))
    for cluster in first..<((index + 1) * header.l2Entries) {
      let entry = try entry(cluster, table: table)
      guard entry.raw != 0 || entry.bitmap != 0 else { continue }
      for used in entry.clusters(header) { plan.dropped[used, default: 0] += 1 }
      guard !isWhole else { continue }
      let offset = table + cluster % header.l2Entries * header.entrySize
      try plan.draft.putBig(UInt64(0), at: offset)
      if header.hasSubclusters { try plan.draft.putBig(UInt64(0), at: offset + 8) }
    }
    if isWhole {
      plan.dropped[table / header.clusterSize, default: 0] += 1
      try plan.draft.putBig(UInt64(0), at: l1.offset + index * 8)
    }
    plan.draft.seal()
    try drop(&plan)
    plan.draft.seal()
    try run(plan)
    guard punching else { return }
    for cluster in plan.dropped.keys.sorted() where try refcounts.count(of: cluster) == 0 {
      let place = cluster * header.clusterSize
      try io { () throws(IOError) in try store.zero(at: place, count: header.clusterSize) }
    }
  }
}
