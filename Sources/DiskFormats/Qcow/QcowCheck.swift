// SPDX-License-Identifier: Apache-2.0
// Checking a qcow image of version 1, giving back what it does not use, and saying what it is.

package import BlockIO
import SystemIO

extension Qcow {
  /// Checks an image: that every table and cluster lies in the file, and no two share space.
  ///
  /// - Throws: what `QcowHeader.read(from:)` throws, `io`.
  package static func check(store: any ByteStore) throws(ImageError) -> CheckReport {
    try survey(store)
  }

  /// Checks an image that nobody has open, and shortens its file to what is in use. What lies
  /// between tables and clusters is left as it is.
  ///
  /// - Throws: what `check(store:)` throws.
  @discardableResult
  package static func repair(
    store: any ByteStore, _ what: Repair
  ) throws(ImageError) -> CheckReport {
    var report = try survey(store)
    // What is used twice, or lies outside, is not to be mended without knowing better.
    guard report.corruptions == 0 else { return report }
    try io { () throws(IOError) in
      if report.leaks > 0 { try store.resize(to: report.imageEnd) }
      try store.flush()
    }
    report.repaired = report.leaks
    return report
  }

  private static func survey(
    _ store: any ByteStore
  ) throws(ImageError) -> CheckReport {
    let header = try QcowHeader.read(from: store)
    var report = CheckReport()
    report.clusterSize = header.clusterSize
    let fileSize = store.size
    var space = UsedSpace(fileSize: fileSize)
    let cache = MetadataCache(store)
    space.use(0, header.end, &report, "the header")
    if header.pathRange.lowerBound >= header.end {
      space.use(
        header.pathRange.lowerBound, UInt64(header.pathRange.count), &report, "the base's path")
    }
    space.use(
      header.l1Offset, header.l1Entries * 8, mayEndEarly: true, &report, "the L1 table")
    var tables: Set<UInt64> = []
    for index in 0..<header.l1Entries {
      let place = header.l1Offset + index * 8
      guard place < fileSize else { break }
      let table = try cache.big(UInt64.self, at: place)
      guard table != 0 else { continue }
      guard table % 512 == 0, table < 1 << 56, tables.insert(table).inserted else {
        report.corruption("L2 table \(index) at byte \(table) is another's, or at no sector")
        continue
      }
      space.use(table, header.l2Entries * 8, &report, "L2 table \(index)")
      guard table < fileSize else { continue }
      for item in 0..<header.l2Entries {
        let entry = try cache.big(UInt64.self, at: table + item * 8)
        guard entry != 0 else { continue }
        let block = index * header.l2Entries + item
        if entry & QcowHeader.compressed != 0 {
          // Compressed clusters share sectors; their bytes are their own.
          let bits = UInt64(63 - header.clusterBits)
          let count = (entry & ~QcowHeader.compressed) >> bits & (header.clusterSize - 1)
          space.use(entry & ((1 << bits) - 1), count, &report, "compressed block \(block)")
        } else if entry % 512 != 0 || entry < header.end || entry >= 1 << 56 {
          report.corruption("block \(block) at byte \(entry)")
        } else {
          space.use(entry, header.clusterSize, mayEndEarly: true, &report, "block \(block)")
        }
      }
    }
    // What a device has left is nobody's leak.
    if store.isFixedSize { space.keep(upTo: fileSize) }
    space.finish(&report)
    return report
  }

  /// What there is to say of an image, without its base.
  ///
  /// - Throws: what `QcowHeader.read(from:)` throws.
  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    let header = try QcowHeader.read(from: store)
    return ImageInfo(
      format: QcowFormat.name, size: header.size, clusterSize: header.clusterSize,
      basePath: header.basePath, baseFormat: nil,
      details: [("version", "1"), ("entries of an L2 table", "\(header.l2Entries)")])
  }
}
