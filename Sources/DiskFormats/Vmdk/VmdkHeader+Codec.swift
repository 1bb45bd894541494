// SPDX-License-Identifier: Apache-2.0
// Reading and writing the header of a sparse extent. Nothing is used before it is checked.

import BlockIO
import SystemIO

extension VmdkHeader {
  static func isMagic(_ bytes: [UInt8]) -> Bool {
    let first = Array(bytes.prefix(4))
    return first == magic || first == esxMagic
  }

  /// Reads the header of a sparse extent.
  ///
  /// - Throws: `notThisFormat`, `unsupported`, `corrupt` or `io`.
  static func read(from store: any ByteStore) throws(ImageError) -> VmdkHeader {
    do throws(ImageError) {
      let bytes = try io { () throws(IOError) in try store.read(at: 0, count: 512) }
      if Array(bytes.prefix(4)) == esxMagic { return try VmdkHeader(esx: bytes) }
      var header = try VmdkHeader(hosted: bytes)
      guard header.directoryOffset == atEnd else {
        try header.check()
        return header
      }
      guard store.size >= 2048 else { throw ImageError(.corrupt, "it has no footer") }
      let start = store.size / 512 * 512 - 1024
      let footer = try io { () throws(IOError) in try store.read(at: start, count: 512) }
      header = try VmdkHeader(hosted: footer)
      guard header.directoryOffset != atEnd else {
        throw ImageError(.corrupt, "its footer does not say where the grain directory is")
      }
      try header.check()
      return header
    } catch {
      throw ImageError(error.code, "store \(store.name): \(error.message)", cause: error.cause)
    }
  }

  private init(hosted bytes: [UInt8]) throws(ImageError) {
    guard Array(bytes[0..<4]) == Self.magic else {
      throw ImageError(.notThisFormat, "no sparse extent: its magic is not KDMV or COWD")
    }
    self.init(capacity: bytes.u64(at: 12))
    version = bytes.u32(at: 4)
    flags = bytes.u32(at: 8)
    grain = bytes.u64(at: 20)
    descriptorOffset = bytes.u64(at: 28)
    descriptorSectors = bytes.u64(at: 36)
    tableEntries = UInt64(bytes.u32(at: 44))
    redundantOffset = flags & Flag.redundant == 0 ? 0 : bytes.u64(at: 48)
    directoryOffset = bytes.u64(at: 56)
    overhead = bytes.u64(at: 64)
    guard (1...3).contains(version) else {
      throw ImageError(.unsupported, "sparse extents of version \(version)")
    }
    guard flags & ~Self.Flag.known & 0xFFFF_0000 == 0 else {
      throw ImageError(.unsupported, "flags 0x\(String(flags, radix: 16)) of its sparse extent")
    }
    guard flags & Flag.newlines == 0 || Array(bytes[73..<77]) == [10, 32, 13, 10] else {
      throw ImageError(.corrupt, "newlineTest: somebody has transferred it as text: fetch it anew")
    }
    let compression = UInt16(bytes[77]) | UInt16(bytes[78]) << 8
    guard isCompressed ? compression == 1 : compression == 0 else {
      throw ImageError(.unsupported, "compressAlgorithm \(compression)")
    }
  }

  private init(esx bytes: [UInt8]) throws(ImageError) {
    self.init(capacity: UInt64(bytes.u32(at: 12)))
    isESX = true
    version = bytes.u32(at: 4)
    flags = 0
    grain = UInt64(bytes.u32(at: 16))
    directoryOffset = UInt64(bytes.u32(at: 20))
    tableEntries = 4096
    let entries = UInt64(bytes.u32(at: 24))
    guard version == 1 else { throw ImageError(.unsupported, "COWD of version \(version)") }
    try check()
    guard entries >= tables else {
      throw ImageError(.corrupt, "\(entries) grain tables for \(capacity) sectors")
    }
  }

  private func check() throws(ImageError) {
    guard grain.nonzeroBitCount == 1, grain <= 4096 else {
      throw ImageError(.corrupt, "grainSize is \(grain) sectors, no power of two up to 4096")
    }
    guard tableEntries.nonzeroBitCount == 1, tableEntries <= (isESX ? 4096 : 512) else {
      throw ImageError(.corrupt, "numGTEsPerGT is \(tableEntries), no power of two up to 512")
    }
    guard capacity > 0, capacity <= 1 << 41, tables <= Self.mostTables else {
      throw ImageError(.corrupt, "capacity of \(capacity) sectors in grains of \(grain)")
    }
    guard directoryOffset > 0, directoryOffset < Self.mostSectors else {
      throw ImageError(.corrupt, "gdOffset is sector \(directoryOffset)")
    }
    guard redundantOffset < Self.mostSectors else {
      throw ImageError(.corrupt, "rgdOffset is sector \(redundantOffset)")
    }
    guard descriptorOffset < Self.mostSectors, descriptorSectors <= 2048 else {
      throw ImageError(
        .corrupt, "a descriptor of \(descriptorSectors) sectors at \(descriptorOffset)")
    }
  }

  /// A sector with the header of a hosted sparse extent.
  func encoded() -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: 512)
    bytes.replaceSubrange(0..<4, with: Self.magic)
    bytes.put(version, at: 4)
    bytes.put(flags, at: 8)
    bytes.put(capacity, at: 12)
    bytes.put(grain, at: 20)
    bytes.put(descriptorOffset, at: 28)
    bytes.put(descriptorSectors, at: 36)
    bytes.put(UInt32(tableEntries), at: 44)
    bytes.put(redundantOffset, at: 48)
    bytes.put(directoryOffset, at: 56)
    bytes.put(overhead, at: 64)
    bytes.replaceSubrange(73..<77, with: [10, 32, 13, 10])
    bytes[77] = isCompressed ? 1 : 0
    return bytes
  }
}
