// Checking a qcow2 image: every use of every cluster is counted by walking all tables, and
// compared with the refcounts. Repair of leaks lowers refcounts in place; repair of all
// writes a whole new set of refcounts into free space and then points the header to it, so
// that a power cut finds either the old set or the new.
//
// Memory is bounded: clusters are counted in windows, and the tables are walked once for
// each. An image of up to 2 TiB in clusters of 64 KiB is one window.

public import Posix

extension Qcow2 {
  /// Checks an image.
  ///
  /// - Throws: what `Qcow2Header.read(from:)` throws, `io`. What is wrong with tables is
  ///   reported, not thrown.
  public static func check(store: any ByteStore) throws(ImageError) -> CheckReport {
    try Qcow2Checker(store).run(repair: nil)
  }

  /// Checks and repairs an image that nobody has open; reports what was found and how much
  /// of it was mended.
  ///
  /// - Throws: what `check(store:)` throws; `corrupt` when it cannot be done.
  @discardableResult
  public static func repair(
    store: any ByteStore, _ what: Repair
  ) throws(ImageError) -> CheckReport {
    try Qcow2Checker(store).run(repair: what)
  }
}

/// One check of one image.
private final class Qcow2Checker {
  /// Clusters that are counted at a time.
  private static let window: UInt64 = 1 << 25

  private let store: any ByteStore
  private let header: Qcow2Header
  private let cache: MetadataCache
  private let refcounts: Qcow2Refcounts
  private let clusterSize: UInt64
  private var report = CheckReport()
  /// The clusters that are counted now, and how often each is used.
  private var range: Range<UInt64> = 0..<0
  private var uses: [UInt32] = []
  /// Whether the walk says what is wrong: only the first does.
  private var speaks = true
  /// The last cluster that is used.
  private var last: UInt64 = 0
  private let fileClusters: UInt64
  /// Entries whose sign of being the only user is wrong: the byte of each, and the value.
  private var wrongSigns: [(offset: UInt64, value: UInt64)] = []

  init(_ store: any ByteStore) throws(ImageError) {
    self.store = store
    header = try Qcow2Header.read(from: store)
    cache = MetadataCache(store)
    refcounts = Qcow2Refcounts(store, cache, header)
    clusterSize = header.clusterSize
    fileClusters = (store.size + clusterSize - 1) / clusterSize
    report.clusterSize = clusterSize
  }

  func run(repair: Repair?) throws(ImageError) -> CheckReport {
    let reach = refcounts.tableEntries * refcounts.perBlock
    let most = max(1, min(reach, max(fileClusters, 1)))
    var start: UInt64 = 0
    while start < most {
      range = start..<min(most, start + Self.window)
      uses = [UInt32](repeating: 0, count: range.count)
      try walk()
      try compare(repair: repair)
      speaks = false
      start = range.upperBound
    }
    report.imageEnd = (last + 1) * clusterSize
    try reportBlocksPastEnd(from: most)
    guard repair == .all else { return report }
    let isMarked =
      header.incompatible
      & (Qcow2Header.Incompatible.dirty | Qcow2Header.Incompatible.corrupt) != 0
    guard report.corruptions > 0 || isMarked else { return report }
    try rebuild()
    return report
  }

  private func say(_ words: String) { if speaks { report.corruption(words) } }

  /// Counts a use of clusters.
  private func use(_ first: UInt64, _ count: UInt64, _ what: @autoclosure () -> String) {
    guard count > 0 else { return }
    guard first + count <= fileClusters else {
      say("\(what()) lies past the end of the file, at cluster \(first)")
      return
    }
    last = max(last, first + count - 1)
    for cluster in max(
      first, range.lowerBound)..<max(
        max(first, range.lowerBound), min(first + count, range.upperBound))
    {
      uses[Int(cluster - range.lowerBound)] += 1
    }
  }

  private func use(bytes offset: UInt64, _ count: UInt64, _ what: String) {
    use(offset / clusterSize, (count + clusterSize - 1) / clusterSize, what)
  }

  /// How many entries of a table the file has: past its end there is nothing to walk.
  private func present(_ entries: UInt64, at offset: UInt64) -> UInt64 {
    let bytes = fileClusters * clusterSize
    return offset < bytes ? min(entries, (bytes - offset) / 8) : 0
  }

  // MARK: The walk

  private func walk() throws(ImageError) {
    use(bytes: 0, clusterSize, "the header")
    use(bytes: header.refcountTableOffset, refcounts.tableEntries * 8, "the refcount table")
    for index in 0..<present(refcounts.tableEntries, at: header.refcountTableOffset) {
      do throws(ImageError) {
        guard let block = try refcounts.block(index) else { continue }
        use(bytes: block, clusterSize, "refcount block \(index)")
      } catch {
        guard error.code == .corrupt else { throw error }
        say(error.message)
      }
    }
    try walk(l1: header.l1Offset, UInt64(header.l1Size), isActive: true)
    let table = try Qcow2SnapshotTable(store, header)
    use(bytes: header.snapshotsOffset, table.length, "the snapshot table")
    for snapshot in table.snapshots {
      try walk(l1: snapshot.l1Offset, UInt64(snapshot.l1Size), isActive: false)
    }
    guard let area = header.bitmaps, header.autoclear & Qcow2Header.Autoclear.bitmaps != 0
    else { return }
    use(bytes: area.directoryOffset, area.directorySize, "the bitmap directory")
    for bitmap in try Qcow2Bitmaps.read(store, header) {
      use(bytes: bitmap.tableOffset, UInt64(bitmap.tableEntries) * 8, "a bitmap's table")
      for index in 0..<UInt64(bitmap.tableEntries) {
        let entry = try cache.big(UInt64.self, at: bitmap.tableOffset + index * 8)
        let offset = entry & Qcow2Bits.offset
        if offset != 0 { use(bytes: offset, clusterSize, "a bitmap") }
      }
    }
  }

  private func walk(l1 offset: UInt64, _ entries: UInt64, isActive: Bool) throws(ImageError) {
    use(bytes: offset, entries * 8, "an L1 table")
    let entries = present(entries, at: offset)
    var visited: Set<UInt64> = []
    for index in 0..<entries {
      let entry = try cache.big(UInt64.self, at: offset + index * 8)
      let table = entry & Qcow2Bits.offset
      guard table != 0 else { continue }
      guard table % clusterSize == 0, table / clusterSize < fileClusters else {
        say("L2 table \(index) lies at byte \(table)")
        continue
      }
      use(bytes: table, clusterSize, "L2 table \(index)")
      // Walked twice it would only say the same, and a hostile image could have us walk it
      // millions of times.
      guard visited.insert(table).inserted else {
        say("L2 table \(index) is also another's")
        continue
      }
      if isActive { try checkSign(entry, at: offset + index * 8, cluster: table / clusterSize) }
      try walk(table: table, index: index, isActive: isActive)
    }
  }

  /// Whether an entry's sign of being the only user agrees with the refcount.
  private func checkSign(
    _ entry: UInt64, at offset: UInt64, cluster: UInt64
  ) throws(ImageError) {
    guard speaks, cluster < fileClusters else { return }
    let isOnly: Bool
    do throws(ImageError) {
      isOnly = try refcounts.count(of: cluster) == 1
    } catch {
      guard error.code == .corrupt else { throw error }
      return
    }
    guard isOnly != (entry & Qcow2Bits.copied != 0) else { return }
    say("the entry at byte \(offset) is wrong about being the only user of cluster \(cluster)")
  }

  private func walk(table: UInt64, index: UInt64, isActive: Bool) throws(ImageError) {
    for position in 0..<header.l2Entries {
      let offset = table + position * header.entrySize
      var entry = Qcow2Entry(raw: try cache.big(UInt64.self, at: offset))
      if header.hasSubclusters {
        entry.bitmap = try cache.big(UInt64.self, at: offset + 8)
      }
      guard entry.raw != 0 || entry.bitmap != 0 else { continue }
      let guest = (index * header.l2Entries + position) * clusterSize
      do throws(ImageError) {
        for subcluster in 0..<header.subclusters {
          _ = try header.state(entry, subcluster: subcluster, guestOffset: guest)
        }
      } catch {
        say(error.message)
        continue
      }
      let clusters = entry.clusters(header)
      use(clusters.lowerBound, UInt64(clusters.count), "data of byte \(guest)")
      if entry.isCompressed {
        if entry.isOwned { say("compressed data of byte \(guest) claims to be the only user") }
      } else if isActive, !clusters.isEmpty {
        try checkSign(entry.raw, at: offset, cluster: clusters.lowerBound)
      }
    }
  }

  // MARK: The comparison

  private func compare(repair: Repair?) throws(ImageError) {
    for cluster in range {
      let expected = UInt64(uses[Int(cluster - range.lowerBound)])
      let found: UInt64
      do throws(ImageError) {
        found = try refcounts.count(of: cluster)
      } catch {
        guard error.code == .corrupt else { throw error }
        if expected > 0 { report.corruption("cluster \(cluster) has no refcount") }
        continue
      }
      guard found != expected else { continue }
      let words = "cluster \(cluster) is used \(expected) times and counted \(found) times"
      if found < expected {
        report.corruption(words)
        continue
      }
      report.leak(words)
      // Everything is counted anew when there is more to repair.
      guard repair != nil else { continue }
      try lower(cluster, to: expected)
    }
  }

  private func lower(_ cluster: UInt64, to value: UInt64) throws(ImageError) {
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

  /// Refcounts of clusters that the file does not have are leaks.
  private func reportBlocksPastEnd(from first: UInt64) throws(ImageError) {
    let end = refcounts.tableEntries * refcounts.perBlock
    var cluster = first
    // A block of refcounts may be named by every entry of the table: enough is enough.
    let reach = min(end, first + Self.window / 4)
    while cluster < reach {
      let index = cluster / refcounts.perBlock
      let end = min(reach, (index + 1) * refcounts.perBlock)
      do throws(ImageError) {
        if try refcounts.block(index) != nil {
          for item in cluster..<end where try refcounts.count(of: item) > 0 {
            report.leak("cluster \(item), past the end of the file, is counted")
          }
        }
      } catch {
        guard error.code == .corrupt else { throw error }
      }
      cluster = end
    }
  }

  // MARK: Counting anew

  private func rebuild() throws(ImageError) {
    guard fileClusters <= Self.window else {
      throw ImageError(.unsupported, "\(store.name): too large to count anew; use qemu-img")
    }
    // The uses as they are without the old refcounts.
    range = 0..<max(1, fileClusters)
    uses = [UInt32](repeating: 0, count: range.count)
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
        if cluster < range.upperBound, uses[Int(cluster)] > 0 { uses[Int(cluster)] -= 1 }
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
      cluster < first ? UInt64(self.uses[Int(cluster)]) : cluster < used ? 1 : 0
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
      uses[Int(cluster)] == 1 ? entry | Qcow2Bits.copied : entry & ~Qcow2Bits.copied
    if right != entry { wrongSigns.append((offset, right)) }
  }
}
