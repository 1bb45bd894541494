// Reading and writing footers and dynamic headers, field by field.
// Source: Microsoft, "Virtual Hard Disk Image Format Specification", 2006; sizes as QEMU and
// blktap understand them (creators that count in bytes, and those that count in cylinders).

public import Posix

extension VhdHeader {
  private static let cookie = Array("conectix".utf8)
  private static let dynamicCookie = Array("cxsparse".utf8)
  /// Creators whose current size is the disk's; of others the geometry is.
  private static let exactCreators = ["win ", "qem2", "d2v ", "tap\0", "CTXS", "wa\0\0"]
  private static let largestGeometry: UInt64 = 65535 * 16 * 255

  /// The sum that both structures carry: all bytes but its own four, inverted.
  private static func checksum(_ bytes: [UInt8], at offset: Int) -> UInt32 {
    var sum: UInt32 = 0
    for (index, byte) in bytes.enumerated() where !(offset..<(offset + 4)).contains(index) {
      sum &+= UInt32(byte)
    }
    return ~sum
  }

  static func isFooter(_ bytes: [UInt8]) -> Bool {
    bytes.count == 512 && Array(bytes[0..<8]) == cookie
      && bytes.big(UInt32.self, at: 64) == checksum(bytes, at: 64)
  }

  /// The footer of a store: the copy at the start that images with a table have, or the one
  /// at the end; nil when neither holds.
  static func footer(of store: any ByteStore) throws(ImageError) -> [UInt8]? {
    let first = try io { () throws(IOError) in try store.read(at: 0, count: 512) }
    if isFooter(first), first.big(UInt32.self, at: 60) != VhdKind.fixed.rawValue { return first }
    guard store.size >= 512 else { return nil }
    let end = store.size - 512
    let last = try io { () throws(IOError) in try store.read(at: end, count: 512) }
    return isFooter(last) ? last : nil
  }

  /// Reads the header of a store.
  ///
  /// - Throws: `notThisFormat`, `unsupported`, `corrupt` or `io`.
  public static func read(from store: any ByteStore) throws(ImageError) -> VhdHeader {
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
    timestamp = footer.big(UInt32.self, at: 24)
    uuid = [UInt8](footer[68..<84])
    let cylinders = UInt64(footer.big(UInt16.self, at: 56))
    let geometry = cylinders * UInt64(footer[58]) * UInt64(footer[59])
    let isExact = Self.exactCreators.contains { Array($0.utf8) == maker }
    let counts = !isExact && geometry < Self.largestGeometry && geometry > 0
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
    guard kind == .differencing else { return }
    baseUUID = [UInt8](bytes[40..<56])
    basePath = try basePath(bytes, store)
    guard basePath != nil else { throw ImageError(.corrupt, "the base has no name") }
  }

  /// The base's path: relative before absolute, in the order that blktap prefers.
  private mutating func basePath(
    _ bytes: [UInt8], _ store: any ByteStore
  ) throws(ImageError) -> String? {
    var found: [String: String] = [:]
    for start in stride(from: 576, to: 768, by: 24) {
      let code = text(bytes[start..<(start + 4)])
      let length = Int(bytes.big(UInt32.self, at: start + 8))
      let offset = bytes.big(UInt64.self, at: start + 16)
      guard length > 0, length <= 4096, offset <= Self.largestDisk else { continue }
      let data = try io { () throws(IOError) in try store.read(at: offset, count: length) }
      if code == "MacX" || code == "W2ru" || code == "W2ku" {
        locators.append(offset..<(offset + UInt64(length)))
      }
      switch code {
      case "MacX":
        let path = text(data.prefix { $0 != 0 })
        found[code] = path.hasPrefix("file://") ? String(path.dropFirst(7)) : path
      case "W2ru", "W2ku":
        let path = Self.utf16(data, isBig: false)
        found[code] = String(path.map { $0 == "\\" ? "/" : $0 })
      default: continue
      }
    }
    let name = Self.utf16([UInt8](bytes[64..<576]), isBig: true)
    let path = found["MacX"] ?? found["W2ru"] ?? found["W2ku"] ?? name
    return path.isEmpty ? nil : path
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
    bytes.appendBig(UInt32(0x0001_0003))
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

  /// The footer with another length and maker.
  func resizedFooter(to size: UInt64, creator: [UInt8]) -> [UInt8] {
    var bytes = footer
    var other = self
    other.size = size
    bytes.replaceSubrange(28..<32, with: creator)
    bytes.putBig(size, at: 48)
    bytes.replaceSubrange(56..<60, with: other.geometry())
    bytes.putBig(Self.checksum(bytes, at: 64), at: 64)
    return bytes
  }

  /// Puts the table's place and length into a dynamic header.
  func putTable(in bytes: inout [UInt8]) {
    bytes.putBig(tableOffset, at: 16)
    bytes.putBig(tableEntries, at: 28)
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

  /// The dynamic header of a new image. The base's path goes to byte 2048 as a locator.
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
    let units = Array((basePath ?? "").utf16.prefix(255))
    for unit in units { bytes.appendBig(unit) }
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
