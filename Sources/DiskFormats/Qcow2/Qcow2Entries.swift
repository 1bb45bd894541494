// SPDX-License-Identifier: Apache-2.0
// What the entries of a qcow2 image's L1 and L2 tables say.
// Source: the qcow2 specification, section "Cluster mapping".

/// Bits of table entries.
enum Qcow2Bits {
  /// The cluster is used once, by this entry.
  static let copied: UInt64 = 1 << 63
  static let compressed: UInt64 = 1 << 62
  /// Reads as zeroes (only without subclusters).
  static let zero: UInt64 = 1
  /// A cluster's place: bits 9 to 55.
  static let offset: UInt64 = 0x00FF_FFFF_FFFF_FE00
}

/// Where a block lives as far as one image knows.
enum Qcow2State: Equatable {
  case unallocated
  case zero
  /// At a byte of the data device; writable when nobody else uses the cluster.
  case data(UInt64, owned: Bool)
  /// At a byte of the decompressing device.
  case compressed(UInt64)

  /// Whether this is where the block `blocks` after `first` must be to continue it.
  func continues(_ first: Qcow2State, by bytes: UInt64) -> Bool {
    switch (first, self) {
    case (.unallocated, .unallocated), (.zero, .zero): true
    case (.data(let start, let owned), .data(let here, let alsoOwned)):
      owned == alsoOwned && here == start + bytes
    default: false
    }
  }
}

/// An L2 entry: the descriptor and, where there are subclusters, their bitmap.
struct Qcow2Entry: Equatable {
  var raw: UInt64
  var bitmap: UInt64 = 0

  var isCompressed: Bool { raw & Qcow2Bits.compressed != 0 }
  var isOwned: Bool { raw & Qcow2Bits.copied != 0 }
  var offset: UInt64 { raw & Qcow2Bits.offset }

  /// The bytes of compressed data: where they begin, and at most how many they are.
  func compressedRange(_ clusterBits: UInt32) -> (offset: UInt64, count: UInt64) {
    let shift = UInt64(62 - (clusterBits - 8))
    let offset = raw & ((1 << shift) - 1)
    let sectors = raw >> shift & ((1 << UInt64(clusterBits - 8)) - 1)
    return (offset, (sectors + 1) * 512 - offset % 512)
  }

  /// The clusters of the store that the entry uses, each once: none for data in a file of
  /// its own.
  func clusters(_ header: Qcow2Header) -> Range<UInt64> {
    let size = header.clusterSize
    if isCompressed {
      let (offset, count) = compressedRange(header.clusterBits)
      return (offset / size)..<((offset + count - 1) / size + 1)
    }
    let first = offset / size
    return first..<(first + (offset == 0 || header.hasDataFile ? 0 : 1))
  }
}

extension Qcow2Header {
  /// What an entry says of one of its blocks. Throws `corrupt` for one that cannot be.
  func state(
    _ entry: Qcow2Entry, subcluster: UInt64, guestOffset: UInt64
  ) throws(ImageError) -> Qcow2State {
    if entry.isCompressed {
      guard !hasDataFile else {
        throw ImageError(.corrupt, "compressed data beside an external data file")
      }
      let offset = entry.compressedRange(clusterBits).offset
      // A device's sectors have 48 bits, and an address on the decompressing device is the
      // file's times the cluster size.
      guard offset < 1 << UInt64(57 - clusterBits) else {
        throw ImageError(
          .unsupported,
          "compressed data at \(offset), beyond the first \(1 << (57 - UInt64(clusterBits))) "
            + "bytes: convert the image to clusters that are smaller")
      }
      return .compressed(offset << UInt64(clusterBits) + subcluster * UInt64(blockSize))
    }
    let offset = entry.offset
    guard offset % clusterSize == 0 else {
      throw ImageError(.corrupt, "a cluster at \(offset), which is no cluster's start")
    }
    let isAllocated = offset != 0 || (hasDataFile && entry.isOwned)
    if hasSubclusters {
      let allocated = entry.bitmap >> subcluster & 1 == 1
      let zero = entry.bitmap >> (32 + subcluster) & 1 == 1
      guard !(allocated && (zero || !isAllocated)) else {
        throw ImageError(.corrupt, "subclusters that contradict each other")
      }
      guard allocated else { return zero ? .zero : .unallocated }
    } else if entry.raw & Qcow2Bits.zero != 0 {
      guard version >= 3 else {
        throw ImageError(.corrupt, "a zero cluster in a version 2 image")
      }
      return .zero
    } else if !isAllocated {
      return .unallocated
    }
    guard !hasDataFile || offset == guestOffset else {
      throw ImageError(.corrupt, "data of \(guestOffset) at \(offset) of the data file")
    }
    return .data(offset + subcluster * UInt64(blockSize), owned: entry.isOwned)
  }
}
