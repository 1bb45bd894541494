// SPDX-License-Identifier: Apache-2.0
// What a dscow store looks like from outside: how much of it is used, where everything is,
// and whether it is sound.
//
// Damage: a header copy that is gone, bits of blocks that the disk does not have, a store
// that is cut short. Leftovers: an older header copy (an update was cut off), and data at
// the places of blocks without a bit (a power cut came between a write and its commit).
// Leftovers harm nobody; `repair` mends every kind but a store that is cut short.

package import BlockIO
package import DiskModel
import SystemIO

/// What a check found.
package struct DscowCheck: Sendable {
  /// One thing that is not as it should be.
  package struct Finding: Sendable, Equatable {
    /// Whether it is damage; otherwise it is a leftover and harms nobody.
    package let isDamage: Bool
    /// Whether it is damage to a spare, which what is left makes up for: a power cut leaves that.
    package var isSpare = false
    /// One sentence without a final stop.
    package let message: String
    /// Whether it was mended.
    package var isRepaired = false
  }

  /// The header, when one copy holds.
  package internal(set) var header: DscowHeader?
  /// Everything found.
  package internal(set) var findings: [Finding] = []
  /// Blocks with a place in the store.
  package internal(set) var allocatedBlocks: UInt64 = 0
  /// Blocks without one that take up space in it all the same; 0 where the store cannot tell.
  package internal(set) var leakedBlocks: UInt64 = 0

  /// Whether damage is left.
  package var isDamaged: Bool { findings.contains { $0.isDamage && !$0.isRepaired } }
  /// Whether leftovers are left.
  package var hasLeftovers: Bool { findings.contains { !$0.isDamage && !$0.isRepaired } }

  mutating func add(
    damage: Bool, _ message: String, repaired: Bool = false, spare: Bool = false
  ) {
    findings.append(
      Finding(isDamage: damage, isSpare: spare, message: message, isRepaired: repaired))
  }
}

extension Dscow {
  /// A bitmap up to so many bytes is counted when a store is opened.
  private static let countedBitmap: UInt64 = 32 << 20
  /// The bitmap is read in pieces of so many bytes.
  private static let piece: UInt64 = 65536

  /// Checks a store, and with `repair` mends what it can.
  ///
  /// - Parameters:
  ///   - base: compared with what the header says of it, unless nil.
  ///   - leaksOnly: a repair gives back space and leaves everything else.
  /// - Throws: `notThisFormat`, `unsupported`, `io`, `badRequest`. Damage is a finding.
  package static func check(
    store: any ByteStore, base: (any ByteStore)? = nil, repair: Bool = false,
    leaksOnly: Bool = false
  ) throws(ImageError) -> DscowCheck {
    let repairAll = repair && !leaksOnly
    var result = DscowCheck()
    let header: DscowHeader
    let copies: DscowHeader.CopyState
    do throws(ImageError) {
      (header, copies) = try Self.header(of: store, writable: repair)
    } catch  where error.code == .corrupt {
      result.add(damage: true, error.message)
      return result
    }
    result.header = header
    try checkCopies(store, header, copies, repairAll, &result)
    try checkTail(store, header, repairAll, &result)
    try checkLeaks(store, header, repair, &result)
    result.allocatedBlocks = try countBits(store, header)
    if let base, let known = header.base,
      let reason = difference(known, try stamp(base, path: known.path))
    {
      result.add(damage: true, "base \(base.name) has changed: \(reason)")
    }
    if repair { try io { () throws(IOError) in try store.flush() } }
    return result
  }

  /// As `check`, in the words that are common to all formats: leftovers, and a spare that is
  /// damaged, are leaks. What was mended is counted as repaired and not again.
  package static func report(
    store: any ByteStore, repair: Repair?
  ) throws(ImageError) -> CheckReport {
    let found = try check(store: store, repair: repair != nil, leaksOnly: repair == .leaks)
    var report = CheckReport()
    for finding in found.findings {
      if finding.isDamage, !finding.isSpare {
        report.corruption(finding.message)
      } else {
        report.leak(finding.message)
      }
      if finding.isRepaired { report.repaired += 1 }
    }
    if let header = found.header {
      report.clusterSize = UInt64(header.blockSize)
      report.imageEnd = header.storeSize
      report.totalClusters = header.blocks
      report.allocatedClusters = found.allocatedBlocks
    }
    return report
  }

  private static func checkCopies(
    _ store: any ByteStore, _ header: DscowHeader, _ copies: DscowHeader.CopyState,
    _ repair: Bool, _ result: inout DscowCheck
  ) throws(ImageError) {
    let names = ["first", "second"]
    switch copies {
    case .both: return
    case .stale(let copy):
      result.add(
        damage: false, "the \(names[copy]) copy of the header is out of date", repaired: repair)
    case .damaged(let copy):
      result.add(
        damage: true, "the \(names[copy]) copy of the header is damaged", repaired: repair,
        spare: true)
    }
    if repair { _ = try rewrite(header, on: store) }
  }

  /// Bits of blocks past the disk's end.
  private static func checkTail(
    _ store: any ByteStore, _ header: DscowHeader, _ repair: Bool, _ result: inout DscowCheck
  ) throws(ImageError) {
    let perPage = DscowBitmap.blocksPerPage
    let used = Int((header.blocks - 1) % perPage) + 1
    let place = header.bitmapOffset + (header.blocks - 1) / perPage * DscowHeader.pageSize
    var page = try io { () throws(IOError) in
      try store.read(at: place, count: Int(DscowHeader.pageSize))
    }
    let before = page
    if used % 8 != 0 { page[used / 8] &= UInt8(1 << (used % 8)) - 1 }
    for index in ((used + 7) / 8)..<page.count { page[index] = 0 }
    guard page != before else { return }
    result.add(
      damage: true, "the bitmap speaks of blocks past the disk's end", repaired: repair)
    let mended = page
    if repair { try io { () throws(IOError) in try store.write(mended, at: place) } }
  }

  /// Data at places of blocks that have no bit, where the store can tell data from holes.
  private static func checkLeaks(
    _ store: any ByteStore, _ header: DscowHeader, _ repair: Bool, _ result: inout DscowCheck
  ) throws(ImageError) {
    guard let file = store.file, !file.isBlockDevice else { return }
    var bitmap = DscowBitmap(store: store, header: header)
    let unit = UInt64(header.blockSize)
    var block: UInt64 = 0
    while block < header.blocks {
      let from = header.firstBlock + block * unit
      let data = try io { () throws(IOError) in try file.nextData(from: from) }
      guard let data, data.lowerBound < header.storeSize else { break }
      block = max(block, (data.lowerBound - header.firstBlock) / unit)
      let end = min(header.blocks, (data.upperBound - header.firstBlock - 1) / unit + 1)
      while block < end {
        let run = try bitmap.run(from: block, limit: end - block)
        if !run.isSet {
          result.leakedBlocks += run.count
          let (place, count) = (header.firstBlock + block * unit, run.count * unit)
          if repair { try io { () throws(IOError) in try store.zero(at: place, count: count) } }
        }
        block += run.count
      }
    }
    guard result.leakedBlocks > 0 else { return }
    result.add(
      damage: false, "\(result.leakedBlocks) blocks take up space without being in use",
      repaired: repair)
  }

  /// Says where every block lives: runs in order, as long as they can be.
  ///
  /// - Throws: what `header(of:)` throws, or whatever `visit` throws.
  package static func map(
    store: any ByteStore, visit: (Extent) -> Void
  ) throws(ImageError) -> DscowHeader {
    let header = try Self.header(of: store).header
    let unit = UInt64(header.blockSize)
    let baseEnd = header.base.map { ($0.size + unit - 1) / unit } ?? 0
    var bitmap = DscowBitmap(store: store, header: header)
    func tell(_ first: UInt64, _ end: UInt64, _ place: Place) {
      guard first < end else { return }
      visit(Extent(BlockRange(first, end - first), place, writable: false))
    }
    var block: UInt64 = 0
    while block < header.blocks {
      let first = block
      // Not only to the end of a page.
      let (isSet, count) = try bitmap.run(from: block, limit: header.blocks - block)
      block += count
      while block < header.blocks, block % DscowBitmap.blocksPerPage == 0 {
        let next = try bitmap.run(from: block, limit: header.blocks - block)
        guard next.isSet == isSet else { break }
        block += next.count
      }
      guard !isSet else {
        tell(first, block, .device(storeDevice, sector: (header.firstBlock + first * unit) / 512))
        continue
      }
      tell(first, min(block, baseEnd), .device(baseDevice, sector: first * unit / 512))
      tell(max(first, baseEnd), block, .zero)
    }
    return header
  }

  /// The bits that are set; where more than 32 MiB of them are no hole, an estimate from the
  /// space in use.
  static func countAllocated(
    _ store: any ByteStore, _ header: DscowHeader
  ) throws(ImageError) -> UInt64 {
    if let count = try countBits(store, header, atMost: countedBitmap) { return count }
    let bytes = try io { () throws(IOError) in try store.allocatedBytes() }
    return min(bytes / UInt64(header.blockSize), header.blocks)
  }

  /// How many blocks have a place in the store: reads the whole bitmap. Throws `io`.
  package static func countBits(
    _ store: any ByteStore, _ header: DscowHeader
  ) throws(ImageError) -> UInt64 {
    try countBits(store, header, atMost: .max) ?? 0
  }

  /// Counts bits; nil when more than `atMost` bytes had to be read.
  private static func countBits(
    _ store: any ByteStore, _ header: DscowHeader, atMost: UInt64
  ) throws(ImageError) -> UInt64? {
    var words = [UInt64](repeating: 0, count: Int(piece) / 8)
    let bytes = (header.blocks + 63) / 64 * 8
    var (offset, done): (UInt64, UInt64) = (0, 0)
    var count = 0
    while true {
      offset += try hole(store, at: header.bitmapOffset + offset)
      guard offset < bytes else { return min(UInt64(count), header.blocks) }
      guard done < atMost else { return nil }
      let length = Int(min(piece, bytes - offset))
      var failure: IOError?
      words.withUnsafeMutableBytes { buffer in
        do throws(IOError) {
          try store.read(
            UnsafeMutableRawBufferPointer(rebasing: buffer[..<length]),
            at: header.bitmapOffset + offset)
        } catch { failure = error }
      }
      if let failure { throw ImageError(failure) }
      for word in words[..<(length / 8)] where word != 0 { count += word.nonzeroBitCount }
      offset += UInt64(length)
      done += UInt64(length)
    }
  }

  /// How long the hole at an offset is, in whole 64-bit words; 0 where a store cannot tell.
  /// A large disk's bitmap is mostly that.
  private static func hole(_ store: any ByteStore, at place: UInt64) throws(ImageError) -> UInt64 {
    let data = try io { () throws(IOError) in try store.nextData(from: place) }
    let next = data?.lowerBound ?? max(store.size, place)
    return (max(next, place) - place) / 8 * 8
  }
}
