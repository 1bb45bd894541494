// SPDX-License-Identifier: Apache-2.0
// Reading and writing footers and dynamic headers, field by field.
// Source: Microsoft, "Virtual Hard Disk Image Format Specification", 2006; sizes as QEMU and
// blktap understand them (creators that count in bytes, and those that count in cylinders).

package import BlockIO
import SystemIO

extension VhdHeader {
  private static let cookie = Array("conectix".utf8)
  private static let dynamicCookie = Array("cxsparse".utf8)
  /// Creators whose geometry is the disk's length; of all others the current size is. Source:
  /// QEMU, which writes the second, and Virtual PC, which writes the first.
  private static let geometricCreators = ["vpc ", "qemu"]
  /// QEMU's name for itself where the current size is meant.
  private static let exactCreator = "qem2"
  private static let xenServer = Array("tap\0".utf8)
  private static let largestGeometry: UInt64 = 65535 * 16 * 255

  /// The sum that both structures carry: all bytes but its own four, inverted.
  static func checksum(_ bytes: [UInt8], at offset: Int) -> UInt32 {
    let own = bytes.big(UInt32.self, at: offset)
    let ownBytes = (own >> 24) + (own >> 16 & 0xFF) + (own >> 8 & 0xFF) + (own & 0xFF)
    return ~(sum(bytes) &- ownBytes)
  }

  /// All bytes added up.
  static func sum(_ bytes: [UInt8]) -> UInt32 {
    bytes.withUnsafeBytes { bytes in
      // A loop over a pointer: the headers are read often, and a debug build takes its time.
      var sum: UInt32 = 0
      var index = 0
      while index < bytes.count {
        sum &+= UInt32(bytes[index])
        index += 1
      }
      return sum
    }
  }

  /// Whether bytes begin like a footer, whatever their sum.
  static func hasCookie(_ bytes: [UInt8]) -> Bool { bytes.starts(with: cookie) }

  static func isFooter(_ bytes: [UInt8]) -> Bool {
    bytes.count == 512 && hasCookie(bytes)
      && bytes.big(UInt32.self, at: 64) == checksum(bytes, at: 64)
  }

  private static func isFixed(_ footer: [UInt8]) -> Bool {
    footer.big(UInt32.self, at: 60) == VhdKind.fixed.rawValue
  }

  /// The footer of a store: the copy at the start that images with a table have, or the one
  /// at the end; nil when there is none. The first sector of a fixed image is the disk's, and
  /// the last one of an image that a power cut left may be: where one says fixed and the other
  /// not, neither is believed.
  ///
  /// - Throws: `corrupt` when there is one and its sum is wrong, or two of different kinds; `io`.
  static func footer(of store: any ByteStore) throws(ImageError) -> [UInt8]? {
    let first = try io { () throws(IOError) in try store.read(at: 0, count: 512) }
    let last = try endFooter(of: store)
    if isFooter(first), !isFixed(first) {
      if let last, isFooter(last), isFixed(last) {
        throw ImageError(
          .corrupt,
          "store \(store.name): a VHD image with a table by its first sector and a fixed one by "
            + "its last: a guest may have written either: restore it from a backup")
      }
      return first
    }
    if let last, isFooter(last) { return last }
    guard hasCookie(first) || last != nil else { return nil }
    throw ImageError(
      .corrupt,
      "store \(store.name): a VHD image whose footer is damaged (its checksum is wrong): restore "
        + "it from a backup, or, if it is a raw disk, say so (-f raw)")
  }

  /// What begins like a footer at the end of a store, whatever its sum; nil for none. Early
  /// Virtual PC wrote 511 bytes. Source: the VHD specification, "Hard Disk Footer Format".
  static func endFooter(of store: any ByteStore) throws(ImageError) -> [UInt8]? {
    let size = store.size
    for count in [512, 511] where size >= UInt64(count) {
      let bytes = try io { () throws(IOError) in
        try store.read(at: size - UInt64(count), count: count)
      }
      if hasCookie(bytes) { return bytes + [UInt8](repeating: 0, count: 512 - count) }
    }
    return nil
  }

  /// Reads the header of a store.
  ///
  /// - Throws: `notThisFormat`, `unsupported`, `corrupt` or `io`.
  package static func read(from store: any ByteStore) throws(ImageError) -> VhdHeader {
    guard let footer = try footer(of: store) else {
      throw ImageError(.notThisFormat, "store \(store.name): no VHD image: it has no footer")
    }
    do throws(ImageError) {
      var header = try VhdHeader(footer: footer)
      if header.kind == .fixed {
        guard header.size <= store.size - 512 else {
          throw ImageError(.corrupt, "cut short: \(store.size) bytes of \(header.size)")
        }
      } else {
        let offset = header.headerOffset
        let bytes = try io { () throws(IOError) in try store.read(at: offset, count: 1024) }
        try header.decodeDynamic(bytes, store)
        header.batmap = try header.findBatmap(in: store)
      }
      return header
    } catch {
      throw ImageError(error.code, "store \(store.name): \(error.message)", cause: error.cause)
    }
  }

  private init(footer: [UInt8]) throws(ImageError) {
    guard footer.big(UInt32.self, at: 12) >> 16 == 1 else {
      throw ImageError(.unsupported, "VHD version \(footer.big(UInt32.self, at: 12) >> 16)")
    }
    guard let kind = VhdKind(rawValue: footer.big(UInt32.self, at: 60)) else {
      throw ImageError(.unsupported, "VHD type \(footer.big(UInt32.self, at: 60))")
    }
    self.kind = kind
    self.footer = footer
    let maker = [UInt8](footer[28..<32])
    creator = maker
    creatorVersion = footer.big(UInt32.self, at: 32)
    timestamp = footer.big(UInt32.self, at: 24)
    uuid = [UInt8](footer[68..<84])
    let cylinders = UInt64(footer.big(UInt16.self, at: 56))
    let geometry = cylinders * UInt64(footer[58]) * UInt64(footer[59])
    let isGeometric = Self.geometricCreators.contains { Array($0.utf8) == maker }
    let counts = isGeometric && geometry < Self.largestGeometry && geometry > 0
    size = counts ? geometry * 512 : footer.big(UInt64.self, at: 48) / 512 * 512
    headerOffset = kind == .fixed ? 0 : footer.big(UInt64.self, at: 16)
    guard size > 0, size <= Self.largestDisk, headerOffset <= Self.largestDisk,
      headerOffset % 512 == 0
    else { throw ImageError(.corrupt, "a disk of \(size) bytes, its header at \(headerOffset)") }
  }

  private mutating func decodeDynamic(
    _ bytes: [UInt8], _ store: any ByteStore
  ) throws(ImageError) {
    guard Array(bytes[0..<8]) == Self.dynamicCookie,
      bytes.big(UInt32.self, at: 36) == Self.checksum(bytes, at: 36)
    else { throw ImageError(.corrupt, "no dynamic header at \(headerOffset)") }
    tableOffset = bytes.big(UInt64.self, at: 16)
    tableEntries = bytes.big(UInt32.self, at: 28)
    tableBlock = UInt64(bytes.big(UInt32.self, at: 32))
    guard tableBlock.nonzeroBitCount == 1, tableBlock >= 4096, tableBlock <= 256 << 20 else {
      throw ImageError(.corrupt, "blocks of \(tableBlock) bytes")
    }
    guard tableEntries <= Self.mostEntries,
      UInt64(tableEntries) >= (size + tableBlock - 1) / tableBlock
    else { throw ImageError(.corrupt, "\(tableEntries) blocks for a disk of \(size) bytes") }
    guard tableOffset % 512 == 0, tableOffset >= 512, tableOffset <= Self.largestDisk else {
      throw ImageError(.corrupt, "the header places the table at \(tableOffset)")
    }
    guard tableOffset + UInt64(tableEntries) * 4 <= store.size else {
      throw ImageError(
        .corrupt,
        "cut short: it has \(store.size) bytes, and its table ends at byte "
          + "\(tableOffset + UInt64(tableEntries) * 4)")
    }
    try readLocators(bytes)
    guard kind == .differencing else { return }
    baseUUID = [UInt8](bytes[40..<56])
    basePaths = try paths(bytes, store)
    guard !basePaths.isEmpty else { throw ImageError(.corrupt, "the base has no name") }
  }

  /// The locators of all codes.
  private mutating func readLocators(_ bytes: [UInt8]) throws(ImageError) {
    for start in stride(from: 576, to: 768, by: 24) {
      let code = [UInt8](bytes[start..<(start + 4)])
      // Sectors by the specification; many write bytes.
      let given = UInt64(bytes.big(UInt32.self, at: start + 4))
      let length = UInt64(bytes.big(UInt32.self, at: start + 8))
      let offset = bytes.big(UInt64.self, at: start + 16)
      guard code != [0, 0, 0, 0], offset > 0 else { continue }
      guard offset <= Self.largestDisk else {
        throw ImageError(.corrupt, "a locator of the base lies at byte \(offset)")
      }
      let space = given < 512 ? given * 512 : (given + 511) / 512 * 512
      locators.append(VhdLocator(code: code, offset: offset, length: length, space: space))
    }
  }

  /// The batmap behind the table, where its creator writes one and it is there.
  private func findBatmap(in store: any ByteStore) throws(ImageError) -> VhdBatmap? {
    guard creator == Self.xenServer else { return nil }
    let place = tableOffset + tableSize
    let bytes = try io { () throws(IOError) in try store.read(at: place, count: 512) }
    guard bytes.starts(with: VhdBatmap.cookie) else { return nil }
    let offset = bytes.big(UInt64.self, at: 8)
    let size = UInt64(bytes.big(UInt32.self, at: 16)) * 512
    guard offset % 512 == 0, offset >= 512, offset <= Self.largestDisk,
      size * 8 >= UInt64(tableEntries), size <= UInt64(Self.mostEntries)
    else { throw ImageError(.corrupt, "a batmap of \(size) bytes at byte \(offset)") }
    return VhdBatmap(
      headerOffset: place, offset: offset, size: size,
      checksum: bytes.big(UInt32.self, at: 24))
  }

  /// Whether the creator's version promises a batmap that is not there.
  var lacksBatmap: Bool {
    kind != .fixed && creator == Self.xenServer && batmap == nil
      && creatorVersion >= VhdBatmap.promisedFrom
  }

  /// The base's paths in the order that blktap prefers: the next counts when one leads nowhere. Its
  /// name counts where there is no path.
  private func paths(_ bytes: [UInt8], _ store: any ByteStore) throws(ImageError) -> [String] {
    var found: [String: String] = [:]
    for locator in locators where locator.length > 0 && locator.length <= 4096 {
      let (offset, length) = (locator.offset, Int(locator.length))
      let data = try io { () throws(IOError) in try store.read(at: offset, count: length) }
      let code = text(locator.code)
      switch code {
      case "MacX":
        let path = text(data.prefix { $0 != 0 })
        found[code] = path.hasPrefix("file://") ? String(path.dropFirst(7)) : path
      case "W2ru", "W2ku": found[code] = Self.slashes(Self.utf16(data, isBig: false))
      default: continue
      }
    }
    var paths: [String] = []
    for path in [found["MacX"], found["W2ru"], found["W2ku"]] {
      if let path, !path.isEmpty, !paths.contains(path) { paths.append(path) }
    }
    guard paths.isEmpty else { return paths }
    // A name without a folder: another file may bear it.
    let name = Self.slashes(Self.utf16([UInt8](bytes[64..<576]), isBig: true))
    return name.isEmpty ? [] : [name]
  }

  /// Hands out the blocks that have a place by the table, in order, and where their bitmaps
  /// begin in the file.
  ///
  /// - Throws: `io`, or what `body` throws.
  func forEachBlock(
    of store: any ByteStore, _ body: (UInt64, UInt64) throws(ImageError) -> Void
  ) throws(ImageError) {
    let piece: UInt64 = 1 << 18
    var block: UInt64 = 0
    while block < UInt64(tableEntries) {
      let count = min(piece, UInt64(tableEntries) - block)
      let start = tableOffset + block * 4
      let bytes = try io { () throws(IOError) in try store.read(at: start, count: Int(count) * 4) }
      for index in 0..<count {
        let entry = bytes.big(UInt32.self, at: Int(index) * 4)
        if entry != Self.unused { try body(block + index, UInt64(entry) * 512) }
      }
      block += count
    }
  }

  private static func slashes(_ path: String) -> String {
    String(path.map { $0 == "\\" ? "/" : $0 })
  }

  private static func utf16(_ bytes: [UInt8], isBig: Bool) -> String {
    var units: [UInt16] = []
    for start in stride(from: 0, to: bytes.count - 1, by: 2) {
      let unit = bytes.big(UInt16.self, at: start)
      if unit == 0 { break }
      units.append(isBig ? unit : unit.byteSwapped)
    }
    return String(decoding: units, as: UTF16.self)
  }

  /// The footer of a new image.
  func encodedFooter() -> [UInt8] {
    var bytes = Self.cookie
    bytes.appendBig(UInt32(2))
    bytes.appendBig(UInt32(0x0001_0000))
    bytes.appendBig(kind == .fixed ? UInt64.max : headerOffset)
    bytes.appendBig(timestamp)
    bytes += creator
    bytes.appendBig(creatorVersion)
    bytes += Array("Wi2k".utf8)
    bytes.appendBig(size)
    bytes.appendBig(size)
    bytes += geometry()
    bytes.appendBig(kind.rawValue)
    bytes.appendBig(UInt32(0))
    bytes += uuid
    bytes.pad(to: 512)
    bytes.putBig(Self.checksum(bytes, at: 64), at: 64)
    return bytes
  }

  /// The footer with another length. Its creator stays, save one whose geometry counts and
  /// cannot say the length.
  func resizedFooter(to size: UInt64) -> [UInt8] {
    var bytes = footer
    var other = self
    other.size = size
    let chs = other.geometry()
    bytes.putBig(size, at: 48)
    bytes.replaceSubrange(56..<60, with: chs)
    let said = (UInt64(chs[0]) << 8 | UInt64(chs[1])) * UInt64(chs[2]) * UInt64(chs[3])
    let isGeometric = Self.geometricCreators.contains { Array($0.utf8) == creator }
    if isGeometric, said * 512 != size, said < Self.largestGeometry {
      bytes.replaceSubrange(28..<32, with: Array(Self.exactCreator.utf8))
    }
    bytes.putBig(Self.checksum(bytes, at: 64), at: 64)
    return bytes
  }

  /// The footer with another version of its creator, or place of the dynamic header.
  func changedFooter(creatorVersion: UInt32, headerOffset: UInt64) -> [UInt8] {
    var bytes = footer
    bytes.putBig(headerOffset, at: 16)
    bytes.putBig(creatorVersion, at: 32)
    bytes.putBig(Self.checksum(bytes, at: 64), at: 64)
    return bytes
  }

  /// Puts the table's place and length, and the places of the locators, into a dynamic header.
  func putPlaces(in bytes: inout [UInt8]) {
    bytes.putBig(tableOffset, at: 16)
    bytes.putBig(tableEntries, at: 28)
    var places = locators[...]
    for start in stride(from: 576, to: 768, by: 24) {
      let isUsed = bytes[start..<(start + 4)].contains { $0 != 0 }
      guard isUsed, bytes.big(UInt64.self, at: start + 16) > 0 else { continue }
      guard let locator = places.popFirst() else { break }
      bytes.putBig(locator.offset, at: start + 16)
    }
    bytes.putBig(Self.checksum(bytes, at: 36), at: 36)
  }

  /// Cylinders, heads and sectors as the specification's appendix computes them.
  private func geometry() -> [UInt8] {
    let total = min(size / 512, Self.largestGeometry)
    var sectors: UInt64 = 255
    var heads: UInt64 = 16
    var tracks = total / sectors
    if total < 65535 * 16 * 63 {
      sectors = 17
      tracks = total / sectors
      heads = max(4, (tracks + 1023) / 1024)
      if tracks >= heads * 1024 || heads > 16 {
        sectors = 31
        heads = 16
        tracks = total / sectors
      }
      if tracks >= heads * 1024 {
        sectors = 63
        heads = 16
        tracks = total / sectors
      }
    }
    var bytes: [UInt8] = []
    bytes.appendBig(UInt16(min(65535, tracks / heads)))
    return bytes + [UInt8(heads), UInt8(sectors)]
  }

  /// The dynamic header of a new image. The base's path goes to byte 2048 as a locator, the last
  /// part of it into the header.
  func encodedDynamic() -> [UInt8] {
    var bytes = Self.dynamicCookie
    bytes.appendBig(UInt64.max)
    bytes.appendBig(tableOffset)
    bytes.appendBig(UInt32(0x0001_0000))
    bytes.appendBig(tableEntries)
    bytes.appendBig(UInt32(tableBlock))
    bytes.appendBig(UInt32(0))
    bytes += baseUUID
    bytes.pad(to: 64)
    // Its name alone: libvhd wants it to be the last part of every path.
    let name = basePath?.split(separator: "/").last ?? ""
    for unit in name.utf16.prefix(255) { bytes.appendBig(unit) }
    bytes += [UInt8](repeating: 0, count: 1024 - bytes.count)
    if let basePath {
      bytes.replaceSubrange(576..<580, with: Array("MacX".utf8))
      bytes.putBig(UInt32(512), at: 580)
      bytes.putBig(UInt32(("file://" + basePath).utf8.count), at: 584)
      bytes.putBig(Self.locatorOffset, at: 592)
    }
    bytes.putBig(Self.checksum(bytes, at: 36), at: 36)
    return bytes
  }

  static let locatorOffset: UInt64 = 2048
  static let longestPath = 480
}
