// Checking a VHD image, mending its footer and giving back what it does not use, and saying
// what it is.

public import Posix

extension Vhd {
  /// Checks an image: footers, and that no two blocks share space.
  ///
  /// - Throws: what `VhdHeader.read(from:)` throws, `io`.
  public static func check(store: any ByteStore) throws(ImageError) -> CheckReport {
    try survey(store).report
  }

  /// Checks an image that nobody has open; shortens its file to what is in use and puts the
  /// footer behind that. Space between blocks that nothing names is given back to the file
  /// system.
  ///
  /// - Throws: what `check(store:)` throws.
  @discardableResult
  public static func repair(
    store: any ByteStore, _ what: Repair
  ) throws(ImageError) -> CheckReport {
    var (report, space, header) = try survey(store)
    guard report.corruptions == 0, header.kind != .fixed else { return report }
    let end = report.imageEnd - VhdHeader.footerSize
    try io { () throws(IOError) in
      for gap in space.gaps { try store.zero(at: gap.lowerBound, count: UInt64(gap.count)) }
      guard report.leaks > 0 else { return try store.flush() }
      // The copy at the start holds meanwhile.
      try store.write(header.footer, at: end)
      try store.resize(to: end + VhdHeader.footerSize)
      try store.flush()
    }
    report.repaired = report.leaks
    return report
  }

  private static func survey(
    _ store: any ByteStore
  ) throws(ImageError) -> (report: CheckReport, space: UsedSpace, header: VhdHeader) {
    let header = try VhdHeader.read(from: store)
    var report = CheckReport()
    report.clusterSize = UInt64(header.blockSize)
    let fileSize = store.size
    var space = UsedSpace(fileSize: fileSize)
    guard header.kind != .fixed else { return (report, space, header) }
    let cache = MetadataCache(store)
    space.use(0, 512, &report, "the footer's copy")
    space.use(header.headerOffset, 1024, &report, "the dynamic header")
    for locator in header.locators {
      space.use(locator.lowerBound, UInt64(locator.count), &report, "a locator of the base")
    }
    space.use(header.tableOffset, UInt64(header.tableEntries) * 4, &report, "the table")
    for block in 0..<UInt64(header.tableEntries) where header.tableOffset + block * 4 < fileSize {
      let entry = try cache.big(UInt32.self, at: header.tableOffset + block * 4)
      guard entry != VhdHeader.unused else { continue }
      space.use(
        UInt64(entry) * 512, header.bitmapSize + header.tableBlock, &report, "block \(block)")
    }
    space.finish(&report, tail: VhdHeader.footerSize)
    let start = fileSize < 512 ? 0 : fileSize - 512
    let last = try io { () throws(IOError) in try store.read(at: start, count: 512) }
    if !VhdHeader.isFooter(last) {
      report.leak("the footer at the end of the file is missing: its copy at the start holds")
    }
    return (report, space, header)
  }

  /// What there is to say of an image, without its base.
  ///
  /// - Throws: what `VhdHeader.read(from:)` throws.
  public static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    let header = try VhdHeader.read(from: store)
    var details: [(name: String, value: String)] = [
      ("type", "\(header.kind)"), ("creator", text(header.creator.prefix { $0 != 0 })),
      ("identity", hexadecimal(header.uuid)),
    ]
    if header.kind == .differencing {
      details.append(("base identity", hexadecimal(header.baseUUID)))
    }
    return ImageInfo(
      format: ImageKind.vhd.rawValue, size: header.size, clusterSize: UInt64(header.blockSize),
      basePath: header.basePath, baseFormat: nil, details: details)
  }

  private static func hexadecimal(_ bytes: [UInt8]) -> String {
    bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
  }
}
