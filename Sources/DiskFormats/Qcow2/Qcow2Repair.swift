// SPDX-License-Identifier: Apache-2.0
// Repairing a qcow2 image: lowering single refcounts, and counting everything anew into free
// space, to which the header is then pointed.

import BlockIO
import SystemIO

extension Qcow2Checker {
  func lower(_ cluster: UInt64, to value: UInt64) throws(ImageError) {
    guard let block = try refcounts.block(cluster / refcounts.perBlock) else { return }
    let sector = (block + refcounts.byte(of: cluster)) / 512 * 512
    try io { () throws(IOError) in
      var bytes = try store.read(at: sector, count: 512)
      refcounts.width.put(value, &bytes, refcounts.index(of: cluster))
      try store.write(bytes, at: sector)
    }
    cache.dropAll()
    report.repaired += 1
  }

  func rebuild() throws(ImageError) {
    guard fileClusters <= Self.window else {
      throw ImageError(.unsupported, "\(store.name): too large to count anew; use qemu-img")
    }
    // The uses as they are without the old refcounts.
    range = 0..<max(1, fileClusters)
    uses = Qcow2Counts(range.count)
    found = Qcow2Counts(0)
    checksSigns = false
    let before = report
    try walkWithoutRefcounts()
    let size = clusterSize
    var table: UInt64 = 1
    var blocks: UInt64 = 1
    while true {
      let total = fileClusters + table + blocks
      let needed = (total + refcounts.perBlock - 1) / refcounts.perBlock
      let longer = max(table, (needed * 8 + size - 1) / size)
      if needed <= blocks, longer == table { break }
      blocks = max(blocks, needed)
      table = longer
    }
    guard table * size <= Qcow2Header.largestRefcountTable else {
      throw ImageError(.unsupported, "\(store.name): too large to count anew")
    }
    let first = fileClusters
    try write(table: table, blocks: blocks, at: first)
    report = before
    try mendSigns()
    report.repaired = before.corruptions + before.leaks
  }

  private func walkWithoutRefcounts() throws(ImageError) {
    speaks = false
    try walk()
    func forget(_ offset: UInt64, _ count: UInt64) {
      for cluster in (offset / clusterSize)..<(offset / clusterSize + count) {
        if cluster < range.upperBound, uses[cluster] > 0 { uses[cluster] -= 1 }
      }
    }
    forget(header.refcountTableOffset, UInt64(header.refcountTableClusters))
    for index in 0..<refcounts.tableEntries {
      do throws(ImageError) {
        guard let block = try refcounts.block(index) else { continue }
        forget(block, 1)
      } catch {
        guard error.code == .corrupt else { throw error }
      }
    }
  }

  private func write(table: UInt64, blocks: UInt64, at first: UInt64) throws(ImageError) {
    let width = refcounts.width
    let size = clusterSize
    let used = first + table + blocks
    var entries: [UInt8] = []
    for index in 0..<blocks { entries.appendBig((first + table + index) * size) }
    entries.pad(to: Int(size))
    let count = { (cluster: UInt64) -> UInt64 in
      cluster < first ? UInt64(self.uses[cluster]) : cluster < used ? 1 : 0
    }
    for cluster in 0..<first where count(cluster) > width.most {
      throw ImageError(
        .unsupported, "cluster \(cluster) is used more often than its refcount can say")
    }
    try io { () throws(IOError) in
      try store.write(entries, at: first * size)
      for index in 0..<blocks {
        var bytes = [UInt8](repeating: 0, count: Int(size))
        for item in 0..<refcounts.perBlock {
          let value = count(index * refcounts.perBlock + item)
          if value > 0 { width.put(value, &bytes, Int(item)) }
        }
        try store.write(bytes, at: (first + table + index) * size)
      }
      try store.flush()
    }
    var place: [UInt8] = []
    place.appendBig(first * size)
    place.appendBig(UInt32(table))
    try io { () throws(IOError) in
      try store.write(place, at: 48)
      try store.flush()
    }
  }

  /// Puts right which entries are the only users, by the new refcounts, and takes away the
  /// marks of an image that was not closed.
  private func mendSigns() throws(ImageError) {
    cache.dropAll()
    let l1 = header.l1Offset
    for index in 0..<UInt64(header.l1Size) {
      let entry = try cache.big(UInt64.self, at: l1 + index * 8)
      let table = entry & Qcow2Bits.offset
      guard table != 0, table % clusterSize == 0, table / clusterSize < fileClusters else {
        continue
      }
      mend(entry, at: l1 + index * 8, cluster: table / clusterSize)
      for position in 0..<header.l2Entries {
        let offset = table + position * header.entrySize
        let entry = Qcow2Entry(raw: try cache.big(UInt64.self, at: offset))
        let clusters = entry.clusters(header)
        guard !entry.isCompressed, !clusters.isEmpty else { continue }
        mend(entry.raw, at: offset, cluster: clusters.lowerBound)
      }
    }
    let marks = Qcow2Header.Incompatible.dirty | Qcow2Header.Incompatible.corrupt
    let incompatible = header.incompatible & ~marks
    let signs = wrongSigns
    try io { () throws(IOError) in
      for (offset, value) in signs {
        var bytes: [UInt8] = []
        bytes.appendBig(value)
        try store.write(bytes, at: offset)
      }
      try store.flush()
      guard header.version >= 3 else { return }
      var bytes: [UInt8] = []
      bytes.appendBig(incompatible)
      try store.write(bytes, at: 72)
      try store.flush()
    }
  }

  private func mend(_ entry: UInt64, at offset: UInt64, cluster: UInt64) {
    guard cluster < UInt64(uses.count) else { return }
    let right =
      uses[cluster] == 1 ? entry | Qcow2Bits.copied : entry & ~Qcow2Bits.copied
    if right != entry { wrongSigns.append((offset, right)) }
  }
}
