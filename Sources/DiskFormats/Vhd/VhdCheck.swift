// SPDX-License-Identifier: Apache-2.0
// Checking a VHD image, mending its footer and giving back what it does not use, and saying
// what it is.

package import BlockIO
import SystemIO

extension Vhd {
  /// Checks an image: footers, and that no two blocks share space.
  ///
  /// - Throws: what `VhdHeader.read(from:)` throws, `io`.
  package static func check(store: any ByteStore) throws(ImageError) -> CheckReport {
    try survey(store).report
  }

  /// Checks an image that nobody has open; shortens its file to what is in use, puts the
  /// footer behind that, and mends the batmap. What lies between structures and blocks is left
  /// as it is: others keep things there that no header names.
  ///
  /// - Throws: what `check(store:)` throws.
  @discardableResult
  package static func repair(
    store: any ByteStore, _ what: Repair
  ) throws(ImageError) -> CheckReport {
    var (report, header, faults) = try survey(store)
    guard report.corruptions == 0, header.kind != .fixed, report.leaks > 0 else { return report }
    if faults.batmap || faults.promise {
      let image = try Vhd(store: store, base: nil, header: header, writable: true)
      if faults.batmap {
        try image.renewBatmap(header.footer)
      } else {
        try image.putFooters(
          header.changedFooter(
            creatorVersion: VhdBatmap.unpromised, headerOffset: header.headerOffset))
      }
      header = image.header
    }
    let end =
      store.isFixedSize
      ? (store.size - VhdHeader.footerSize) / 512 * 512
      : report.imageEnd - VhdHeader.footerSize
    let footer = header.footer
    try io { () throws(IOError) in
      // The copy at the start holds meanwhile.
      try store.write(footer, at: end)
      try store.resize(to: end + VhdHeader.footerSize)
      try store.flush()
    }
    report.repaired = report.leaks
    return report
  }

  /// What of the batmap a repair has to mend.
  private typealias Faults = (batmap: Bool, promise: Bool)

  private static func survey(
    _ store: any ByteStore
  ) throws(ImageError) -> (report: CheckReport, header: VhdHeader, faults: Faults) {
    let header = try VhdHeader.read(from: store)
    var report = CheckReport()
    report.clusterSize = UInt64(header.blockSize)
    guard header.kind != .fixed else { return (report, header, (false, false)) }
    var space = UsedSpace(fileSize: store.size)
    for (range, name) in header.structures {
      space.use(range.lowerBound, UInt64(range.count), &report, name)
    }
    try header.forEachBlock(of: store) { block, offset throws(ImageError) in
      let disk = header.size - min(header.size, block * header.tableBlock)
      space.use(
        offset, header.bitmapSize + header.tableBlock,
        mayEndEarly: offset + header.bitmapSize + min(disk, header.tableBlock) <= store.size,
        &report, "block \(block)")
    }
    space.keep(upTo: header.structuresEnd)
    if store.isFixedSize {
      // What a device has left is nobody's leak.
      space.keep(upTo: store.size - min(store.size, VhdHeader.footerSize))
    }
    space.finish(&report, tail: VhdHeader.footerSize)
    if try VhdHeader.endFooter(of: store).map(VhdHeader.isFooter) != true {
      report.leak("the footer at the end of the file is missing: its copy at the start holds")
    }
    let faults = report.corruptions == 0 ? try checkBatmap(store, header, &report) : (false, false)
    return (report, header, faults)
  }

  private static func checkBatmap(
    _ store: any ByteStore, _ header: VhdHeader, _ report: inout CheckReport
  ) throws(ImageError) -> Faults {
    if header.lacksBatmap {
      report.leak(
        "creator and version promise XenServer a batmap, and there is none: vhd-util refuses that")
      return (false, true)
    }
    guard let batmap = header.batmap else { return (false, false) }
    let found = try io { () throws(IOError) in
      try store.read(at: batmap.offset, count: Int(batmap.size))
    }
    guard batmap.checksum == VhdBatmap.sum(found) else {
      report.leak("the sum of the batmap is wrong: vhd-util and tapdisk refuse that")
      return (true, false)
    }
    let whole = try bits(of: batmap, in: store, header)
    for block in 0..<UInt64(header.tableEntries)
    where VhdBatmap.isSet(block, in: found) && !VhdBatmap.isSet(block, in: whole) {
      report.leak("the batmap says of block \(block) that it is whole, and it is not")
      return (true, false)
    }
    return (false, false)
  }

  /// What there is to say of an image, without its base.
  ///
  /// - Throws: what `VhdHeader.read(from:)` throws.
  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    let header = try VhdHeader.read(from: store)
    var details: [(name: String, value: String)] = [
      ("type", "\(header.kind)"), ("creator", text(header.creator.prefix { $0 != 0 })),
      ("identity", hexadecimal(header.uuid)),
    ]
    if header.kind == .differencing {
      details.append(("base identity", hexadecimal(header.baseUUID)))
    }
    if header.batmap != nil { details.append(("batmap", "yes")) }
    return ImageInfo(
      format: VhdFormat.name, size: header.size, clusterSize: UInt64(header.blockSize),
      basePath: header.basePath, baseFormat: header.baseFormat, details: details)
  }

  private static func hexadecimal(_ bytes: [UInt8]) -> String {
    bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
  }
}
