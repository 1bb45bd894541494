// SPDX-License-Identifier: Apache-2.0
// A format as small as one can be: only read, without a base. With a line in a list it is one of
// the formats; see NewFormatTests.
//
//     offset  length
//     0       8       "TOY DISK"
//     8       8       length of the disk in bytes, little endian, a multiple of 512
//     16      496     anything
//     512     ...     the sectors of the disk, the last one first

import BlockIO
import DiskFormats
import DiskModel
import SystemIO

/// The toy among the formats.
enum ToyFormat: DiskFormat {
  static let name = "toy"
  static let mark = Array("TOY DISK".utf8)

  static func isBeginning(_ bytes: [UInt8]) -> Bool { bytes.starts(with: mark) }

  static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    ImageInfo(
      format: name, size: try Toy(store).size, clusterSize: 512, basePath: nil, baseFormat: nil,
      details: [])
  }

  static func open(_ parts: ImageParts) throws(ImageError) -> any ImageFormat {
    try Toy(parts.store)
  }
}

/// A toy image that is open as a disk.
final class Toy: ReadOnlyImage {
  let size: UInt64
  let blockSize: UInt32 = 512

  init(_ store: any ByteStore) throws(ImageError) {
    let head: [UInt8]
    do throws(IOError) { head = try store.read(at: 0, count: 16) } catch {
      throw ImageError(error)
    }
    guard head.starts(with: ToyFormat.mark) else {
      throw ImageError(.notThisFormat, "store \(store.name): no toy image")
    }
    size = head[8...].reversed().reduce(0) { $0 << 8 | UInt64($1) }
    guard size > 0, size % 512 == 0, size < store.size else {
      throw ImageError(.corrupt, "store \(store.name): a disk of \(size) bytes")
    }
  }

  /// The sectors stand in the file from the last to the first.
  func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    let sectors = size / 512
    guard block < sectors else {
      throw ImageError(.badRequest, "block \(block) of a disk of \(sectors) blocks")
    }
    let place = Place.device(0, sector: sectors - block)
    return Extent(BlockRange(block), place, writable: false)
  }
}
