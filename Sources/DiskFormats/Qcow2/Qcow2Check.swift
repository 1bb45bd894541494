// SPDX-License-Identifier: Apache-2.0
// Checking a qcow2 image: every use of every cluster is counted by walking all tables, and
// compared with the refcounts. Repair of leaks lowers refcounts in place; repair of all
// writes a whole new set of refcounts into free space and then points the header to it, so
// that a power cut finds either the old set or the new.
//
// Memory is bounded: clusters are counted in windows, and the tables are walked once for
// each. An image of up to 1 TiB in clusters of 64 KiB is one window. A longer file is walked once
// more, ahead, to find where anything is used or counted, and only these parts are windows: a
// sparse file may be of any length. Tables are read in the order in which they lie in the file,
// those that touch together.

package import BlockIO
import Glibc
import SystemIO

extension Qcow2 {
  /// Checks an image.
  ///
  /// - Throws: what `Qcow2Header.read(from:)` throws, `io`. What is wrong with tables is
  ///   reported, not thrown.
  package static func check(store: any ByteStore) throws(ImageError) -> CheckReport {
    try Qcow2Checker(store).run(repair: nil)
  }

  /// Checks and repairs an image that nobody has open; reports what was found and how much
  /// of it was mended.
  ///
  /// - Throws: what `check(store:)` throws; `corrupt` when it cannot be done.
  @discardableResult
  package static func repair(
    store: any ByteStore, _ what: Repair
  ) throws(ImageError) -> CheckReport {
    try Qcow2Checker(store).run(repair: what)
  }
}

/// One check of one image.
final class Qcow2Checker {
  /// Clusters that are counted at a time, in 8 bytes each.
  static let window: UInt64 = 1 << 24
  /// What is used or counted is noted in so many clusters at a time.
  private static let part: UInt64 = 1 << 15
  /// An image in more windows, or with more parts than those have, is refused: no sound one
  /// reaches so far.
  private static let mostWindows = 1 << 10
  private static let mostParts = mostWindows * Int(window / part)
  /// Tables and refcounts are read in pieces of at most so many bytes.
  private static let piece: UInt64 = 2 << 20

  let store: any ByteStore
  let header: Qcow2Header
  let cache: MetadataCache
  let refcounts: Qcow2Refcounts
  let clusterSize: UInt64
  var report = CheckReport()
  /// The clusters that are counted now, and how often each is used.
  var range: Range<UInt64> = 0..<0
  var uses = Qcow2Counts(0)
  /// What the refcounts say of the same clusters.
  var found = Qcow2Counts(0)
  /// Whether signs are compared with refcounts.
  var checksSigns = true
  /// Whether the walk says what is wrong: only the first does.
  var speaks = true
  /// The parts in which a cluster is used or counted, while they are looked for.
  private var parts: Set<UInt64>?
  private var lastPart = UInt64.max
  /// The last cluster that is used.
  private var last: UInt64 = 0
  let fileClusters: UInt64
  /// Entries whose sign of being the only user is wrong: the byte of each, and the value.
  var wrongSigns: [(offset: UInt64, value: UInt64)] = []

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
    for window in try windows(to: most) {
      range = window
      uses = Qcow2Counts(range.count)
      found = Qcow2Counts(range.count)
      try loadCounts()
      try walk()
      try compare(repair: repair)
      speaks = false
    }
    report.imageEnd = (last + 1) * clusterSize
    report.totalClusters = (header.size + clusterSize - 1) / clusterSize
    try reportBlocksPastEnd(from: most)
    guard repair == .all else { return report }
    let isMarked =
      header.incompatible
      & (Qcow2Header.Incompatible.dirty | Qcow2Header.Incompatible.corrupt) != 0
    guard report.corruptions > 0 || isMarked else { return report }
    try rebuild()
    return report
  }

  /// The ranges of clusters to count, one after the other. They hold every cluster below `most`
  /// that is used or counted.
  private func windows(to most: UInt64) throws(ImageError) -> [Range<UInt64>] {
    guard most > Self.window else { return [0..<most] }
    parts = []
    try walk()
    for index in 0..<present(refcounts.tableEntries, at: header.refcountTableOffset) {
      // The walk has reported a wrong entry.
      guard isFull == false, try isCounted(index) else { continue }
      note(index * refcounts.perBlock, refcounts.perBlock)
    }
    speaks = false
    var windows: [Range<UInt64>] = []
    for part in (parts ?? []).sorted() where part * Self.part < most {
      let (start, end) = (part * Self.part, min(most, (part + 1) * Self.part))
      if let last = windows.last, end - last.lowerBound <= Self.window {
        windows[windows.count - 1] = last.lowerBound..<end
      } else {
        windows.append(start..<end)
      }
    }
    guard !isFull, windows.count <= Self.mostWindows else {
      throw ImageError(
        .unsupported,
        "\(store.name): its clusters are scattered too widely to be counted, over more than "
          + "\(Self.mostWindows) ranges of \(Self.window) clusters: convert the image")
    }
    parts = nil
    return windows
  }

  private var isFull: Bool { (parts?.count ?? 0) > Self.mostParts }

  private func isCounted(_ index: UInt64) throws(ImageError) -> Bool {
    do throws(ImageError) {
      return try refcounts.block(index) != nil
    } catch {
      guard error.code == .corrupt else { throw error }
      return false
    }
  }

  /// Notes that clusters are used or counted.
  private func note(_ first: UInt64, _ count: UInt64) {
    let last = min(first + count, fileClusters) - 1
    guard first <= last, !isFull else { return }
    for part in (first / Self.part)...(last / Self.part) where part != lastPart {
      lastPart = part
      parts?.insert(part)
    }
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
    if parts != nil { note(first, count) }
    for cluster in max(
      first, range.lowerBound)..<max(
        max(first, range.lowerBound), min(first + count, range.upperBound))
    {
      uses[cluster - range.lowerBound] += 1
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

  func walk() throws(ImageError) {
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
    let l1 = try io { () throws(IOError) in
      try store.read(at: offset, count: Int(entries) * 8)
    }
    var tables: [(offset: UInt64, index: UInt64)] = []
    for index in 0..<entries {
      let entry = l1.big(UInt64.self, at: Int(index) * 8)
      let table = entry & Qcow2Bits.offset
      guard table != 0 else { continue }
      guard table % clusterSize == 0, table / clusterSize < fileClusters else {
        say("L2 table \(index) lies at byte \(table)")
        continue
      }
      use(bytes: table, clusterSize, "L2 table \(index)")
      if isActive { checkSign(entry, at: offset + index * 8, cluster: table / clusterSize) }
      tables.append((table, index))
    }
    tables.sort { ($0.offset, $0.index) < ($1.offset, $1.index) }
    // Walked twice it would only say the same, and a hostile image could have us walk it
    // millions of times.
    var different: [(offset: UInt64, index: UInt64)] = []
    for table in tables {
      if table.offset == different.last?.offset {
        say("L2 table \(table.index) is also another's")
      } else {
        different.append(table)
      }
    }
    try walk(different, isActive: isActive)
  }

  /// Walks tables that are in the order of their places.
  private func walk(
    _ tables: [(offset: UInt64, index: UInt64)], isActive: Bool
  ) throws(ImageError) {
    let most = max(1, Int(Self.piece / clusterSize))
    let buffer = UnsafeMutableRawBufferPointer.allocate(
      byteCount: min(most, max(1, tables.count)) * Int(clusterSize), alignment: 4096)
    defer { buffer.deallocate() }
    var first = 0
    while first < tables.count {
      var end = first + 1
      while end < tables.count, end - first < most,
        tables[end].offset == tables[end - 1].offset + clusterSize
      {
        end += 1
      }
      let part = UnsafeMutableRawBufferPointer(
        rebasing: buffer[..<((end - first) * Int(clusterSize))])
      try io { () throws(IOError) in try store.read(part, at: tables[first].offset) }
      for number in first..<end {
        let start = (number - first) * Int(clusterSize)
        let entries = UnsafeRawBufferPointer(
          rebasing: part[start..<(start + Int(clusterSize))])
        walk(entries, at: tables[number].offset, index: tables[number].index, isActive)
      }
      first = end
    }
  }

  /// Whether an entry's sign of being the only user agrees with the refcount.
  private func checkSign(_ entry: UInt64, at offset: UInt64, cluster: UInt64) {
    guard checksSigns, range.contains(cluster) else { return }
    let isOnly = found[cluster - range.lowerBound] == 1
    guard isOnly != (entry & Qcow2Bits.copied != 0) else { return }
    report.corruption(
      "the entry at byte \(offset) is wrong about being the only user of cluster \(cluster)")
  }

  /// Walks the entries of one table. What most of them are, plain clusters or none, is dealt
  /// with here, everything else one by one.
  private func walk(
    _ entries: UnsafeRawBufferPointer, at table: UInt64, index: UInt64, _ isActive: Bool
  ) {
    let step = Int(header.entrySize)
    let bits = UInt64(header.clusterBits)
    let plain = !header.hasSubclusters && !header.hasDataFile
    let odd = (clusterSize - 1) | Qcow2Bits.compressed
    let (lower, upper) = (range.lowerBound, range.upperBound)
    let checks = isActive && checksSigns
    var expected: UInt64 = 0
    var (allocated, fragmented): (UInt64, UInt64) = (0, 0)
    for position in 0..<Int(header.l2Entries) {
      let raw = UInt64(
        bigEndian: entries.loadUnaligned(fromByteOffset: position * step, as: UInt64.self))
      if raw == 0, plain { continue }
      let offset = raw & Qcow2Bits.offset
      let cluster = offset >> bits
      guard plain, raw & odd == 0, offset != 0, cluster < fileClusters else {
        let bitmap =
          header.hasSubclusters
          ? UInt64(
            bigEndian: entries.loadUnaligned(
              fromByteOffset: position * step + 8, as: UInt64.self)) : 0
        walk(
          Qcow2Entry(raw: raw, bitmap: bitmap), at: table + UInt64(position * step),
          guest: (index * header.l2Entries + UInt64(position)) * clusterSize, isActive, &expected)
        continue
      }
      allocated += 1
      if expected != 0, expected != cluster { fragmented += 1 }
      expected = cluster + 1
      if cluster > last { last = cluster }
      if parts != nil { note(cluster, 1) }
      guard cluster >= lower, cluster < upper else { continue }
      uses[cluster - lower] &+= 1
      if checks, (found[cluster - lower] == 1) != (raw & Qcow2Bits.copied != 0) {
        checkSign(raw, at: table + UInt64(position * step), cluster: cluster)
      }
    }
    guard isActive, speaks else { return }
    report.allocatedClusters += allocated
    report.fragmentedClusters += fragmented
  }

  private func walk(
    _ entry: Qcow2Entry, at offset: UInt64, guest: UInt64, _ isActive: Bool,
    _ expected: inout UInt64
  ) {
    guard entry.raw != 0 || entry.bitmap != 0 else { return }
    do throws(ImageError) {
      for subcluster in 0..<header.subclusters {
        _ = try header.state(entry, subcluster: subcluster, guestOffset: guest)
      }
    } catch {
      say(error.message)
      return
    }
    let clusters = entry.clusters(header)
    use(clusters.lowerBound, UInt64(clusters.count), "data of byte \(guest)")
    if isActive, speaks, !clusters.isEmpty || header.hasDataFile {
      report.allocatedClusters += 1
      if entry.isCompressed {
        // As QEMU has it: what is compressed is also called fragmented.
        report.compressedClusters += 1
        report.fragmentedClusters += 1
      } else if !clusters.isEmpty {
        if expected != 0, expected != clusters.lowerBound { report.fragmentedClusters += 1 }
        expected = clusters.upperBound
      }
    }
    if entry.isCompressed {
      if entry.isOwned { say("compressed data of byte \(guest) claims to be the only user") }
    } else if isActive, !clusters.isEmpty {
      checkSign(entry.raw, at: offset, cluster: clusters.lowerBound)
    }
  }

  // MARK: The comparison

  /// Reads the refcounts of the clusters that are counted now.
  private func loadCounts() throws(ImageError) {
    let width = refcounts.width
    let perBlock = refcounts.perBlock
    var cluster = range.lowerBound
    while cluster < range.upperBound {
      let index = cluster / perBlock
      let end = min(range.upperBound, (index + 1) * perBlock)
      defer { cluster = end }
      let block: UInt64?
      do throws(ImageError) {
        block = try refcounts.block(index)
      } catch {
        guard error.code == .corrupt else { throw error }
        continue
      }
      guard let block else { continue }
      let bytes = try io { () throws(IOError) in
        try store.read(at: block, count: Int(clusterSize))
      }
      let first = Int(cluster - index * perBlock)
      let base = cluster - range.lowerBound
      if width.order == 4 {
        bytes.withUnsafeBytes { bytes in
          for item in 0..<Int(end - cluster) {
            found[base + UInt64(item)] = UInt32(
              UInt16(
                bigEndian: bytes.loadUnaligned(
                  fromByteOffset: (first + item) * 2, as: UInt16.self)))
          }
        }
      } else {
        for item in 0..<Int(end - cluster) {
          found[base + UInt64(item)] = UInt32(clamping: width.get(bytes, first + item))
        }
      }
    }
  }

  private func compare(repair: Repair?) throws(ImageError) {
    for item in 0..<UInt64(range.count) where uses[item] != found[item] {
      let cluster = range.lowerBound + item
      let (expected, count) = (UInt64(uses[item]), UInt64(found[item]))
      let words = "cluster \(cluster) is used \(expected) times and counted \(count) times"
      if count < expected {
        report.corruption(words)
        continue
      }
      report.leak(words)
      // Everything is counted anew when there is more to repair.
      guard repair != nil else { continue }
      try lower(cluster, to: expected)
    }
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
}

/// A number for each of many clusters. Memory that was never written to costs nothing.
final class Qcow2Counts {
  let count: Int
  private let numbers: UnsafeMutablePointer<UInt32>

  init(_ count: Int) {
    self.count = count
    guard let memory = calloc(max(1, count), 4) else {
      fatalError("there is no memory for the counts of \(count) clusters")
    }
    numbers = memory.assumingMemoryBound(to: UInt32.self)
  }

  deinit { free(numbers) }

  @inline(__always)
  subscript(_ index: UInt64) -> UInt32 {
    get {
      assert(index < UInt64(count))
      return numbers[Int(index)]
    }
    set {
      assert(index < UInt64(count))
      numbers[Int(index)] = newValue
    }
  }
}
