// SPDX-License-Identifier: Apache-2.0
// Two stores behind a VMDK disk: several sparse extents as one range of bytes, so that first
// writes have one device to go to; and the compressed grains of one.

import BlockIO
import Glibc
import SystemIO

/// Several files as one. File i begins at i << 41 bytes, which is as far as a sparse extent
/// can name sectors.
final class VmdkJoinedStore: JoinedStore {
  static let bits: UInt64 = 41
  let parts: [any ByteStore]
  let name: String
  let isWritable: Bool
  var size: UInt64 { UInt64(parts.count) << Self.bits }
  var joined: (any JoinedStore)? { self }

  init(_ parts: [any ByteStore], name: String) {
    self.parts = parts
    self.name = name
    isWritable = parts.allSatisfy(\.isWritable)
  }

  /// Nothing that anybody could know again.
  func identity() -> StoreIdentity { StoreIdentity(size: size, modified: 0) }

  func allocatedBytes() throws(IOError) -> UInt64 {
    var sum: UInt64 = 0
    for part in parts { sum += try part.allocatedBytes() }
    return sum
  }

  private func part(at offset: UInt64, _ count: Int) throws(IOError) -> any ByteStore {
    let (end, overflow) = offset.addingReportingOverflow(UInt64(max(count, 1) - 1))
    let index = offset >> Self.bits
    guard !overflow, end >> Self.bits == index, index < parts.count else {
      throw IOError(EINVAL, "reach byte \(offset) of", name)
    }
    return parts[Int(index)]
  }

  func place(_ offset: UInt64) throws(IOError) -> (store: any ByteStore, offset: UInt64) {
    (try part(at: offset, 1), Self.local(offset))
  }

  private static func local(_ offset: UInt64) -> UInt64 { offset & ((1 << bits) - 1) }

  /// Within one file.
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    try part(at: offset, buffer.count).read(buffer, at: Self.local(offset))
  }

  /// Within one file.
  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    try part(at: offset, buffer.count).write(buffer, at: Self.local(offset))
  }

  /// Within one file.
  func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    try part(at: offset, Int(count)).zero(at: Self.local(offset), count: count)
  }

  /// Throws EINVAL: the files have lengths of their own.
  func resize(to size: UInt64) throws(IOError) { throw IOError(EINVAL, "resize", name) }

  func flush() throws(IOError) {
    for part in parts { try part.flush() }
  }
}

extension CompressedStore {
  /// From one sector's grain to the next one's, were there one: a grain may well be squeezed
  /// into one sector, and must not seem to be continued by the next.
  static func vmdkStride(_ header: VmdkHeader) -> UInt64 { header.grain * 1024 }

  /// The compressed grains of a sparse extent, known by the sectors where they begin.
  convenience init(_ store: any ByteStore, _ header: VmdkHeader) {
    let grain = header.grain * 512
    // The disk may end within its last grain, and some writers end the grain there.
    let last = (header.capacity - 1) / header.grain * header.grain
    let short = Int((header.capacity - last) * 512)
    let hasMarkers = header.flags & VmdkHeader.Flag.markers != 0
    self.init(name: store.name, unit: grain, stride: Self.vmdkStride(header)) {
      sector throws(IOError) in
      let start = sector * 512
      // As much as deflate can make of a grain, and its marker.
      let most = Int(grain + grain / 100 + 1024)
      var bytes = try store.read(at: start, count: most)
      var isLast = true
      if hasMarkers {
        isLast = bytes.u64(at: 0) == last
        let count = Int(bytes.u32(at: 8))
        guard count > 0, count <= most - 12 else {
          throw IOError(EIO, "understand the grain at sector \(sector) of", store.name)
        }
        bytes = Array(bytes[12..<(12 + count)])
      }
      let least = isLast ? short : nil
      guard
        let grain = Decompression.inflate(bytes, Int(grain), wrapped: true, short: least)
      else {
        throw IOError(EIO, "decompress the grain at sector \(sector) of", store.name)
      }
      return grain
    }
  }
}
