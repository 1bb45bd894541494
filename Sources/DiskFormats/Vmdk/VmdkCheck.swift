// SPDX-License-Identifier: Apache-2.0
// Checking a VMDK image, making both copies of its tables alike and giving back what it does
// not use, and saying what it is.

package import BlockIO
import SystemIO

extension Vmdk {
  /// Checks an image: that every table and grain lies in its file, and no two share space.
  /// Where the two copies of a table differ the second counts as leaking: a power cut leaves
  /// that, and only the first is read.
  ///
  /// - Parameter extents: the files that `VmdkLayout.extentPaths` names, in that order.
  /// - Throws: what `VmdkLayout.read(from:)` throws, `badRequest`, `io`.
  package static func check(
    store: any ByteStore, extents: [any ByteStore] = []
  ) throws(ImageError) -> CheckReport {
    try run(store, extents, repairing: false)
  }

  /// Checks an image that nobody has open; makes second copies of tables like the first, and
  /// shortens files to what is in use.
  ///
  /// - Throws: what `check(store:extents:)` throws.
  @discardableResult
  package static func repair(
    store: any ByteStore, extents: [any ByteStore] = [], _ what: Repair
  ) throws(ImageError) -> CheckReport {
    try run(store, extents, repairing: true)
  }

  private static func run(
    _ store: any ByteStore, _ extents: [any ByteStore], repairing: Bool
  ) throws(ImageError) -> CheckReport {
    let parts = try VmdkParts(store, try VmdkLayout.read(from: store), extents)
    var report = CheckReport()
    for piece in parts.pieces {
      guard case .flat(let device, let sector) = piece.kind else { continue }
      let file = device == 0 ? parts.primary : parts.own[Int(device) - 2]
      if file.size / 512 < sector + UInt64(piece.sectors.count) {
        report.corruption("the extent \(file.name) is shorter than the descriptor says")
      }
    }
    for sparse in parts.sparse {
      var check = VmdkCheck(sparse.store, sparse.header)
      try check.walk()
      if repairing { try check.mend() }
      report.add(check.report)
    }
    return report
  }

  /// What there is to say of an image, without its base and extents.
  ///
  /// - Throws: what `VmdkLayout.read(from:)` throws.
  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    let layout = try VmdkLayout.read(from: store)
    let descriptor = layout.descriptor
    var details: [(name: String, value: String)] = [
      ("create type", descriptor.createType),
      ("cid", VmdkDescriptor.digits(descriptor.contentID)),
      ("parent cid", VmdkDescriptor.digits(descriptor.parentContentID)),
    ]
    if layout.header?.isCompressed == true { details.append(("compressed", "true")) }
    for (index, line) in descriptor.extents.enumerated() {
      details.append(("extent \(index)", line.text))
    }
    return ImageInfo(
      format: VmdkFormat.name, size: layout.size,
      clusterSize: (layout.header?.grain ?? 128) * 512, basePath: descriptor.basePath,
      baseFormat: descriptor.basePath == nil ? nil : VmdkFormat.name, details: details)
  }
}

extension CheckReport {
  /// Takes in what was found in another part of the image.
  fileprivate mutating func add(_ other: CheckReport) {
    corruptions += other.corruptions
    leaks += other.leaks
    repaired += other.repaired
    clusterSize = max(clusterSize, other.clusterSize)
    imageEnd = max(imageEnd, other.imageEnd)
    problems += other.problems.prefix(Self.mostWords - problems.count)
  }
}

/// A check of one sparse extent.
private struct VmdkCheck {
  let store: any ByteStore
  let header: VmdkHeader
  let cache: MetadataCache
  let fileSize: UInt64
  var report = CheckReport()
  private var space: UsedSpace
  /// Entries of second copies that have to become others: the place, and the number.
  private var wrong: [(place: UInt64, value: UInt32)] = []
  private var tailLeaks: UInt64 = 0

  init(_ store: any ByteStore, _ header: VmdkHeader) {
    self.store = store
    self.header = header
    cache = MetadataCache(store)
    fileSize = store.size
    space = UsedSpace(fileSize: fileSize)
    report.clusterSize = header.grain * 512
  }

  private mutating func use(_ sector: UInt64, _ count: UInt64, _ what: @autoclosure () -> String) {
    space.use(sector * 512, count, &report, what())
  }

  private func entry(_ place: UInt64) throws(ImageError) -> UInt32 {
    place < fileSize ? try cache.little(UInt32.self, at: place) : 0
  }

  mutating func walk() throws(ImageError) {
    let name = store.name
    use(0, 512, "\(name): the header")
    use(header.descriptorOffset, header.descriptorSectors * 512, "the descriptor")
    use(header.directoryOffset, header.tables * 4, "the grain directory")
    if header.redundantOffset > 0 {
      use(header.redundantOffset, header.tables * 4, "the second grain directory")
    }
    var seen: Set<UInt32> = []
    for index in 0..<header.tables {
      let table = try entry(header.directoryOffset * 512 + index * 4)
      let copy =
        header.redundantOffset == 0 ? 0 : try entry(header.redundantOffset * 512 + index * 4)
      for (place, what) in [(table, "grain table"), (copy, "second grain table")] where place > 0 {
        guard seen.insert(place).inserted else {
          report.corruption("\(store.name): \(what) \(index), at sector \(place), is another's")
          continue
        }
        use(UInt64(place), header.tableEntries * 4, "\(name): \(what) \(index)")
        if place == table { try walk(table: UInt64(place) * 512, index: index) }
      }
      if table > 0, copy > 0 { try compare(UInt64(table) * 512, UInt64(copy) * 512) }
    }
    // QEMU opens no file that ends before the place where grains may begin.
    space.keep(upTo: min(header.overhead, fileSize / 512) * 512)
    // What a device has left is nobody's leak.
    if store.isFixedSize { space.keep(upTo: fileSize) }
    let before = report.leaks
    // A stream ends with a directory and a footer; and what is compressed is not shortened.
    if header.isCompressed {
      var other = CheckReport()
      other.clusterSize = report.clusterSize
      space.finish(&other)
      report.corruptions += other.corruptions
    } else {
      space.finish(&report)
      tailLeaks = report.leaks - before
    }
  }

  private mutating func walk(table: UInt64, index: UInt64) throws(ImageError) {
    let name = store.name
    for item in 0..<header.tableEntries {
      let sector = UInt64(try entry(table + item * 4))
      guard sector > 0, sector > 1 || !header.hasZeroGrains else { continue }
      let number = index * header.tableEntries + item
      guard sector >= header.leastGrain else {
        report.corruption("\(store.name): grain \(number) lies over the header, at \(sector)")
        continue
      }
      let length = header.isCompressed ? 512 : header.grain * 512
      space.use(
        sector * 512, length, mayEndEarly: true, &report, "\(name): grain \(number)")
    }
  }

  private mutating func compare(_ table: UInt64, _ copy: UInt64) throws(ImageError) {
    for item in 0..<header.tableEntries {
      let (one, other) = (try entry(table + item * 4), try entry(copy + item * 4))
      guard one != other else { continue }
      report.leak("\(store.name): the second table at byte \(copy) differs in entry \(item)")
      wrong.append((copy + item * 4, one))
    }
  }

  mutating func mend() throws(ImageError) {
    guard report.corruptions == 0, !header.isCompressed else { return }
    // What lies between tables and grains is left as it is: it may be somebody's.
    let (entries, end) = (wrong, tailLeaks > 0 ? report.imageEnd : nil)
    let store = store
    try io { () throws(IOError) in
      for (place, value) in entries {
        var bytes = [UInt8](repeating: 0, count: 4)
        bytes.put(value, at: 0)
        try store.write(bytes, at: place)
      }
      if let end { try store.resize(to: end) }
      try store.flush()
    }
    report.repaired = report.leaks
  }
}
