// SPDX-License-Identifier: Apache-2.0
// What a commit of a qcow2 image writes, and in which order.
//
// 0. zeroes for what of the last block lies past the disk's end, when that is placed;
// 1. the counts of clusters that were given out, new tables and new blocks of refcounts
//    (nothing refers to them yet);
// 2. where there are new blocks of refcounts: their places in the refcount table, or the
//    place of a new refcount table in the header;
// 3. entries of L2 tables and of the L1 table: now the data is reachable;
// 4. the counts of clusters that are no longer used.
//
// The store is flushed after each. A power cut after 1 or 2 leaves clusters that are counted
// and not used, one after 3 clusters that are counted once too often: leaks, which a check
// finds and repairs. Counts of what was given out are set, not raised, and entries are put
// whole, so that a plan that failed half way can be made and run again. Sectors may tear:
// no entry crosses one.

import BlockIO
package import DiskModel
import SystemIO

/// Places of tables that a commit has to make, kept until a plan with them has run: a plan
/// that failed may have made some of them reachable.
struct Qcow2Planned {
  /// L2 tables by their index in the L1 table.
  var tables: [UInt64: UInt64] = [:]
  /// Blocks of refcounts by their index in the refcount table.
  var blocks: [UInt64: UInt64] = [:]
  /// A longer refcount table.
  var refcountTable: (offset: UInt64, entries: UInt64)?
}

/// A plan that was handed out and has not run, as far as anybody has said.
struct Qcow2InFlight {
  var mark: Mark
  var draft: CommitDraft
  var counted: Set<UInt64> = []
  /// Clusters that lose uses, and how many.
  var dropped: [UInt64: UInt64] = [:]
  /// Of those, the ones that blocks may still be read from.
  var lingering: Set<UInt64> = []
  var tables: [UInt64] = []
  var blocks: [UInt64] = []
  var refcountTable: (offset: UInt64, entries: UInt64)?
  /// Entries of the refcount table that wait for what they lead to.
  var places: [(offset: UInt64, value: UInt64)] = []
}

extension Qcow2 {
  /// Entries to write once everything that they lead to is there.
  private typealias Late = [(offset: UInt64, values: [UInt64])]

  /// What makes every placement up to a mark durable; see the head of this file.
  package func commitPlan(upTo mark: Mark) throws(ImageError) -> CommitPlan {
    let groups = pending.runs(upTo: mark)
    guard !groups.isEmpty else {
      return CommitPlan(upTo: mark, stages: [])
    }
    var plan = Qcow2InFlight(
      mark: mark, draft: CommitDraft(cache, clusterSize: header.clusterSize))
    var late: Late = []
    let tails =
      header.hasDataFile
      ? [] : groups.flatMap(\.runs).flatMap { tail(of: $0.blocks, at: $0.offset) }
    try mendSpoiled(groups.flatMap(\.runs))
    for (index, runs) in groups {
      late += try enter(runs, table: index, in: &plan)
    }
    try count(&plan)
    plan.draft.seal()
    try putPlaces(&plan)
    plan.draft.seal()
    for (offset, values) in late {
      for (index, value) in values.enumerated() {
        try plan.draft.putBig(value, at: offset + UInt64(index) * 8)
      }
    }
    plan.draft.seal()
    try drop(&plan)
    plan.draft.seal()
    inFlight = plan
    let first = tails.isEmpty ? [] : [tails]
    return CommitPlan(upTo: mark, stages: first + plan.draft.stages)
  }

  /// Enters the runs of one L2 table. Into a table that nothing refers to yet at once; what
  /// has to wait is returned.
  private func enter(
    _ runs: [PendingPlacements.Run], table index: UInt64, in plan: inout Qcow2InFlight
  ) throws(ImageError) -> Late {
    let (old, owned) = try table(index)
    var late: Late = []
    let target: UInt64
    let isNew = old == 0 || !owned
    if isNew {
      target = try newTable(index)
      plan.tables.append(index)
      plan.counted.insert(target / header.clusterSize)
      plan.draft.begin(cluster: target)
      if old != 0 {
        let bytes = try io { () throws(IOError) in
          try store.read(at: old, count: Int(header.clusterSize))
        }
        try plan.draft.put(sectors: bytes, at: target)
        plan.dropped[old / header.clusterSize, default: 0] += 1
      }
      late.append((l1.offset + index * 8, [target | Qcow2Bits.copied]))
    } else {
      target = old
    }
    for (cluster, entry) in try entries(runs) {
      let before = try self.entry(cluster, table: old)
      account(for: entry, before: before, in: &plan)
      let offset = target + cluster % header.l2Entries * header.entrySize
      let values = header.hasSubclusters ? [entry.raw, entry.bitmap] : [entry.raw]
      if isNew {
        for (index, value) in values.enumerated() {
          try plan.draft.putBig(value, at: offset + UInt64(index) * 8)
        }
      } else {
        late.append((offset, values))
      }
    }
    return late
  }

  private func newTable(_ index: UInt64) throws(ImageError) -> UInt64 {
    if let table = planned.tables[index] { return table }
    let table = try refcounts.allocate(upTo: 1).first * header.clusterSize
    planned.tables[index] = table
    return table
  }

  /// The entries that runs make of the clusters that they touch.
  private func entries(
    _ runs: [PendingPlacements.Run]
  ) throws(ImageError) -> [(cluster: UInt64, entry: Qcow2Entry)] {
    var entries: [(cluster: UInt64, entry: Qcow2Entry)] = []
    for run in runs {
      guard header.hasSubclusters else {
        for index in 0..<run.blocks.count {
          let place = run.offset + index * header.clusterSize
          entries.append((run.blocks.first + index, Qcow2Entry(raw: place | Qcow2Bits.copied)))
        }
        continue
      }
      let cluster = run.blocks.first / header.subclusters
      let first = run.blocks.first % header.subclusters
      let place = run.offset - first * UInt64(blockSize)
      if entries.last?.cluster != cluster {
        let before = try entry(cluster, table: try table(cluster / header.l2Entries).offset)
        // The rest of a compressed cluster was copied whole.
        let bitmap = before.isCompressed ? 0xFFFF_FFFF : before.bitmap
        entries.append((cluster, Qcow2Entry(raw: place | Qcow2Bits.copied, bitmap: bitmap)))
      }
      let bits: UInt64 = ((1 << run.blocks.count) - 1) << first
      entries[entries.count - 1].entry.bitmap |= bits
      entries[entries.count - 1].entry.bitmap &= ~(bits << 32)
    }
    return entries
  }

  /// Notes which clusters an entry newly uses and which it no longer does.
  private func account(
    for entry: Qcow2Entry, before: Qcow2Entry, in plan: inout Qcow2InFlight
  ) {
    let now = entry.clusters(header)
    let then = before.clusters(header)
    guard now != then || before.isCompressed else { return }
    for cluster in now { plan.counted.insert(cluster) }
    for cluster in then {
      plan.dropped[cluster, default: 0] += 1
      // With subclusters a block that was not placed anew may still be read from there.
      if header.hasSubclusters { plan.lingering.insert(cluster) }
    }
  }

  /// Makes new blocks of refcounts part of the image: by their places in the refcount table,
  /// or by the place of a longer table in the header.
  func putPlaces(_ plan: inout Qcow2InFlight) throws(ImageError) {
    for (offset, value) in plan.places { try plan.draft.putBig(value, at: offset) }
    guard let table = plan.refcountTable else { return }
    try plan.draft.putBig(table.offset, at: 48)
    try plan.draft.putBig(UInt32(table.entries * 8 / header.clusterSize), at: 56)
  }

  /// Sets the counts of all clusters that are new, making what blocks of them need.
  func count(_ plan: inout Qcow2InFlight) throws(ImageError) {
    var done: Set<UInt64> = []
    var newBlocks: [UInt64: UInt64] = [:]
    while true {
      let queue = plan.counted.subtracting(done).sorted()
      if queue.isEmpty {
        let needed = (newBlocks.keys.max() ?? 0) + 1
        guard needed > plan.refcountTable?.entries ?? refcounts.tableEntries else { break }
        let table = try longerTable(needed)
        plan.refcountTable = table
        for offset in stride(from: 0, to: table.entries * 8, by: Int(header.clusterSize)) {
          plan.draft.begin(cluster: table.offset + offset)
          plan.counted.insert((table.offset + offset) / header.clusterSize)
        }
        continue
      }
      for cluster in queue {
        done.insert(cluster)
        let index = cluster / refcounts.perBlock
        let block: UInt64
        if let old = try refcounts.block(index) {
          block = old
        } else if let new = newBlocks[index] {
          block = new
        } else {
          block = try newBlock(index)
          newBlocks[index] = block
          plan.blocks.append(index)
          plan.draft.begin(cluster: block)
          plan.counted.insert(block / header.clusterSize)
        }
        try set(1, of: cluster, block: block, in: &plan)
      }
    }
    guard let table = plan.refcountTable else {
      plan.places = newBlocks.map { (refcounts.tableOffset + $0.key * 8, $0.value) }
      return
    }
    try fill(table.offset, newBlocks, in: &plan)
  }

  private func set(
    _ value: UInt64, of cluster: UInt64, block: UInt64, in plan: inout Qcow2InFlight
  ) throws(ImageError) {
    let sector = (block + refcounts.byte(of: cluster)) / 512 * 512
    try plan.draft.change(at: sector) { bytes, _ in
      self.refcounts.width.put(value, &bytes, self.refcounts.index(of: cluster))
    }
  }

  private func newBlock(_ index: UInt64) throws(ImageError) -> UInt64 {
    if let block = planned.blocks[index] { return block }
    let block = try refcounts.allocate(upTo: 1).first * header.clusterSize
    planned.blocks[index] = block
    return block
  }

  /// A refcount table of at least so many entries, and half as many again.
  private func longerTable(
    _ needed: UInt64
  ) throws(ImageError) -> (offset: UInt64, entries: UInt64) {
    if let table = planned.refcountTable, table.entries >= needed { return table }
    let most = Qcow2Header.largestRefcountTable
    let clusters = min(
      (needed * 12 + header.clusterSize - 1) / header.clusterSize + 1, most / header.clusterSize)
    let entries = clusters * header.clusterSize / 8
    guard entries >= needed else {
      throw ImageError(.unsupported, "\(store.name): the refcount table can grow no further")
    }
    let first = try refcounts.allocateAtEnd(clusters).first
    let table = (offset: first * header.clusterSize, entries: entries)
    planned.refcountTable = table
    return table
  }

  /// The contents of a longer refcount table; the old one loses its clusters.
  private func fill(
    _ table: UInt64, _ newBlocks: [UInt64: UInt64], in plan: inout Qcow2InFlight
  ) throws(ImageError) {
    let bytes = try io { () throws(IOError) in
      try store.read(at: refcounts.tableOffset, count: Int(refcounts.tableEntries * 8))
    }
    try plan.draft.put(sectors: bytes, at: table)
    for (index, block) in newBlocks { try plan.draft.putBig(block, at: table + index * 8) }
    let first = refcounts.tableOffset / header.clusterSize
    for cluster in first..<(first + refcounts.tableEntries * 8 / header.clusterSize) {
      plan.dropped[cluster, default: 0] += 1
    }
  }

  /// Lowers the counts of clusters that are no longer used.
  func drop(_ plan: inout Qcow2InFlight) throws(ImageError) {
    for (cluster, uses) in plan.dropped.sorted(by: { $0.key < $1.key }) {
      guard let block = try refcounts.block(cluster / refcounts.perBlock) else { continue }
      let count = try refcounts.count(of: cluster)
      try set(count > uses ? count - uses : 0, of: cluster, block: block, in: &plan)
    }
  }

  /// The plan up to this mark has run.
  package func committed(upTo mark: Mark) {
    guard let plan = inFlight, plan.mark == mark else { return }
    inFlight = nil
    cache.unpin(sectors: plan.draft.sectors.keys, fresh: plan.draft.fresh, size: header.clusterSize)
    for cluster in plan.counted { refcounts.counted(cluster) }
    for cluster in plan.dropped.keys {
      refcounts.freed(cluster, keep: plan.lingering.contains(cluster))
    }
    for index in plan.tables { planned.tables[index] = nil }
    for index in plan.blocks { planned.blocks[index] = nil }
    if let table = plan.refcountTable {
      planned.refcountTable = nil
      refcounts.move(
        table: table.offset, bytes: table.entries * 8, from: refcounts.tableOffset,
        oldBytes: refcounts.tableEntries * 8)
      header.refcountTableOffset = table.offset
      header.refcountTableClusters = UInt32(table.entries * 8 / header.clusterSize)
    }
    pending.commit(upTo: mark)
  }
}
