// SPDX-License-Identifier: Apache-2.0
// Reading and writing the header of a qcow2 image, field by field.
// Source: the qcow2 specification, sections "Header" and "Header extensions".

package import BlockIO
import SystemIO

extension Qcow2Header {
  private static let names: [(bit: UInt64, name: String)] = [
    (0, "dirty bit"), (1, "corrupt bit"), (2, "external data file"),
    (3, "compression type"), (4, "extended L2 entries"),
  ]
  private enum Extension {
    static let end: UInt32 = 0
    static let baseFormat: UInt32 = 0xE279_2ACA
    static let featureNames: UInt32 = 0x6803_F857
    static let bitmaps: UInt32 = 0x2385_2875
    static let encryption: UInt32 = 0x0537_BE77
    static let dataFile: UInt32 = 0x4441_5441
  }

  /// Whether these bytes begin a qcow2 image, of whatever version from 2 on.
  static func isMagic(_ bytes: [UInt8]) -> Bool {
    bytes.count >= 8 && bytes.big(UInt32.self, at: 0) == magic
      && bytes.big(UInt32.self, at: 4) >= 2
  }

  /// Reads the header of a store.
  ///
  /// - Throws: `notThisFormat`, `unsupported`, `corrupt` or `io`.
  package static func read(from store: any ByteStore) throws(ImageError) -> Qcow2Header {
    do throws(ImageError) {
      let fixed = try io { () throws(IOError) in try store.read(at: 0, count: 112) }
      var header = try Qcow2Header(fixed: fixed)
      let bytes = try io { () throws(IOError) in
        try store.read(at: 0, count: Int(header.clusterSize))
      }
      try header.decodeExtensions(bytes)
      try header.check()
      return header
    } catch {
      throw ImageError(error.code, "store \(store.name): \(error.message)", cause: error.cause)
    }
  }

  private init(fixed bytes: [UInt8]) throws(ImageError) {
    guard bytes.big(UInt32.self, at: 0) == Self.magic else {
      throw ImageError(.notThisFormat, "not a qcow2 image: its first bytes are others")
    }
    version = bytes.big(UInt32.self, at: 4)
    guard version == 2 || version == 3 else {
      let code: ImageError.Code = version == 1 ? .notThisFormat : .unsupported
      throw ImageError(code, "qcow version \(version), where 2 and 3 are known")
    }
    clusterBits = bytes.big(UInt32.self, at: 20)
    guard clusterBits >= 9, clusterBits <= 21 else {
      throw ImageError(.corrupt, "clusters of 2^\(clusterBits) bytes")
    }
    size = bytes.big(UInt64.self, at: 24)
    try Self.refuseEncryption(bytes.big(UInt32.self, at: 32))
    l1Size = bytes.big(UInt32.self, at: 36)
    l1Offset = bytes.big(UInt64.self, at: 40)
    refcountTableOffset = bytes.big(UInt64.self, at: 48)
    refcountTableClusters = bytes.big(UInt32.self, at: 56)
    snapshotCount = bytes.big(UInt32.self, at: 60)
    snapshotsOffset = bytes.big(UInt64.self, at: 64)
    headerLength = 72
    guard version == 3 else { return }
    incompatible = bytes.big(UInt64.self, at: 72)
    compatible = bytes.big(UInt64.self, at: 80)
    autoclear = bytes.big(UInt64.self, at: 88)
    refcountOrder = bytes.big(UInt32.self, at: 96)
    headerLength = bytes.big(UInt32.self, at: 100)
    guard headerLength >= 104, headerLength % 8 == 0, UInt64(headerLength) <= clusterSize
    else { throw ImageError(.corrupt, "a header of \(headerLength) bytes") }
    let type = headerLength > 104 ? bytes[104] : 0
    guard let compression = Qcow2Compression(rawValue: type) else {
      throw ImageError(.unsupported, "compression type \(type), where zlib and zstd are known")
    }
    self.compression = compression
    guard (incompatible & Incompatible.compression != 0) == (type != 0) else {
      throw ImageError(.corrupt, "compression type \(type) contradicts its feature bit")
    }
  }

  private static func refuseEncryption(_ method: UInt32) throws(ImageError) {
    switch method {
    case 0: return
    case 1:
      throw ImageError(.unsupported, "encrypted (AES): convert it with qemu-img and its key")
    case 2:
      throw ImageError(.unsupported, "encrypted (LUKS): convert it with qemu-img and its key")
    default: throw ImageError(.unsupported, "encrypted by method \(method)")
    }
  }

  private mutating func decodeExtensions(_ bytes: [UInt8]) throws(ImageError) {
    let baseOffset = bytes.big(UInt64.self, at: 8)
    let baseCount = bytes.big(UInt32.self, at: 16)
    var end = bytes.count
    if baseOffset != 0 {
      guard baseCount <= Self.longestPath, baseOffset >= UInt64(headerLength),
        baseOffset <= UInt64(bytes.count), UInt64(baseCount) <= UInt64(bytes.count) - baseOffset
      else {
        throw ImageError(.corrupt, "a base's path of \(baseCount) bytes at \(baseOffset)")
      }
      end = Int(baseOffset)
      if baseCount > 0 { basePath = text(bytes[end..<(end + Int(baseCount))]) }
    }
    var names: [UInt8: String] = [:]
    var offset = Int(headerLength)
    while offset + 8 <= end {
      let type = bytes.big(UInt32.self, at: offset)
      let length = Int(bytes.big(UInt32.self, at: offset + 4))
      guard type != Extension.end else { break }
      guard length <= end - offset - 8 else {
        throw ImageError(.corrupt, "a header extension of \(length) bytes at \(offset)")
      }
      let data = [UInt8](bytes[(offset + 8)..<(offset + 8 + length)])
      try decode(type, data, &names)
      offset += 8 + (length + 7) / 8 * 8
    }
    try refuseUnknown(names)
    if autoclear & Autoclear.bitmaps != 0, bitmaps == nil {
      throw ImageError(.corrupt, "consistent bitmaps, and no bitmaps extension")
    }
  }

  private mutating func decode(
    _ type: UInt32, _ data: [UInt8], _ names: inout [UInt8: String]
  ) throws(ImageError) {
    switch type {
    case Extension.baseFormat: baseFormat = text(data)
    case Extension.dataFile: dataFilePath = text(data)
    case Extension.featureNames:
      for start in stride(from: 0, through: data.count - 48, by: 48) where data[start] == 0 {
        names[data[start + 1]] = text(data[(start + 2)..<(start + 48)].prefix { $0 != 0 })
      }
    case Extension.bitmaps:
      guard data.count == 24 else {
        throw ImageError(.corrupt, "a bitmaps extension of \(data.count) bytes")
      }
      let found = Qcow2BitmapsExtension(
        count: data.big(UInt32.self, at: 0), directorySize: data.big(UInt64.self, at: 8),
        directoryOffset: data.big(UInt64.self, at: 16))
      guard found.count > 0, found.count <= 65535, found.directorySize <= 64 << 20,
        found.directoryOffset > 0, found.directoryOffset % clusterSize == 0,
        found.directoryOffset < 1 << 56
      else { throw ImageError(.corrupt, "a bitmap directory at \(found.directoryOffset)") }
      bitmaps = found
    case Extension.encryption:
      throw ImageError(.unsupported, "encrypted: convert it with qemu-img and its key")
    default: unknownExtensions.append(type)
    }
  }

  private func refuseUnknown(_ names: [UInt8: String]) throws(ImageError) {
    let unknown = incompatible & ~Incompatible.known
    guard unknown != 0 else { return }
    let words = (0..<64).filter { unknown >> UInt64($0) & 1 == 1 }.map { bit in
      names[UInt8(bit)].map { "'\($0)'" } ?? "number \(bit)"
    }
    throw ImageError(
      .unsupported, "needs features that are unknown here: \(words.joined(separator: ", "))")
  }

  /// The first cluster. Throws `badRequest` when the names do not fit.
  func encoded() throws(ImageError) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBig(Self.magic)
    bytes.appendBig(version)
    bytes.appendBig(UInt64(0))
    bytes.appendBig(UInt32(0))
    bytes.appendBig(clusterBits)
    bytes.appendBig(size)
    bytes.appendBig(UInt32(0))
    bytes.appendBig(l1Size)
    bytes.appendBig(l1Offset)
    bytes.appendBig(refcountTableOffset)
    bytes.appendBig(refcountTableClusters)
    bytes.appendBig(snapshotCount)
    bytes.appendBig(snapshotsOffset)
    if version == 3 {
      bytes.appendBig(incompatible)
      bytes.appendBig(compatible)
      bytes.appendBig(autoclear)
      bytes.appendBig(refcountOrder)
      bytes.appendBig(UInt32(112))
      bytes += [compression.rawValue, 0, 0, 0, 0, 0, 0, 0]
    }
    func add(_ type: UInt32, _ data: [UInt8]) {
      bytes.appendBig(type)
      bytes.appendBig(UInt32(data.count))
      bytes += data
      bytes.pad(to: 8)
    }
    if let baseFormat, basePath != nil { add(Extension.baseFormat, Array(baseFormat.utf8)) }
    if let dataFilePath { add(Extension.dataFile, Array(dataFilePath.utf8)) }
    // The smallest cluster has no room for names beside a path.
    if version == 3, clusterSize >= 4096 { add(Extension.featureNames, Self.nameTable()) }
    add(Extension.end, [])
    if let basePath {
      let path = Array(basePath.utf8)
      guard path.count <= Self.longestPath else {
        throw ImageError(
          .badRequest, "the base's path is longer than \(Self.longestPath) bytes: shorten it")
      }
      bytes.putBig(UInt64(bytes.count), at: 8)
      bytes.putBig(UInt32(path.count), at: 16)
      bytes += path
    }
    guard bytes.count <= Int(clusterSize) else {
      throw ImageError(
        .badRequest,
        "the names of base and data file do not fit a cluster of \(clusterSize) bytes: "
          + "shorten them or choose larger clusters")
    }
    bytes.pad(to: Int(clusterSize))
    return bytes
  }

  private static func nameTable() -> [UInt8] {
    var table: [UInt8] = []
    func add(_ type: UInt8, _ bit: UInt64, _ name: String) {
      let field = [type, UInt8(bit)] + Array(name.utf8)
      table += field + [UInt8](repeating: 0, count: 48 - field.count)
    }
    for (bit, name) in names { add(0, bit, name) }
    add(1, 0, "lazy refcounts")
    add(2, 0, "bitmaps")
    add(2, 1, "raw external data")
    return table
  }
}
