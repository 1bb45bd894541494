// SPDX-License-Identifier: Apache-2.0
// What lies under an image, seen in the image's own blocks: nothing, a raw file or device, or
// another image, of which runs that lie in a row in one of its devices are handed on as that
// device's, and only the rest is read through user space.
//
// Device numbers: 0 the store, 1 the base as a flat byte store, then what the format adds,
// then the devices of the base when it is an image.

import BlockIO
import DiskModel
import SystemIO

/// The base of an image, if it has one.
struct BaseView {
  /// A byte store without a byte, where there is no base.
  private final class Nothing: ReadOnlyStore {
    let name = "no base"
    let size: UInt64 = 0
    func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) {
      buffer.initializeMemory(as: UInt8.self, repeating: 0)
    }
  }

  private let store: any ByteStore
  private let image: (any MappedStore)?
  private let blockSize: UInt64
  private let firstDevice: Int
  /// All devices of the image over this base.
  let devices: [any ByteStore]

  /// `own` are the devices that the format adds, from number 2 on.
  init(
    _ base: (any ByteStore)?, blockSize: UInt64, store data: any ByteStore,
    own: [any ByteStore] = []
  ) {
    store = base ?? Nothing()
    image = base?.mapped
    self.blockSize = blockSize
    firstDevice = 2 + own.count
    devices = [data, store] + own + (image?.devices ?? [])
  }

  /// Where a block lives, and how many from it on, up to `limit`, follow it there.
  func run(
    from block: UInt64, limit: UInt64
  ) throws(ImageError) -> (place: Place, count: UInt64) {
    let offset = block * blockSize
    let size = store.size
    guard offset < size else { return (.zero, limit) }
    let limit = min(limit, (size - 1) / blockSize + 1 - block)
    guard let image else { return (.device(1, sector: offset / 512), limit) }
    let found = try io { () throws(IOError) in
      try image.resolve(at: offset, count: limit * blockSize)
    }
    // A base that ends within a block reads as zeroes from there on; its device may not.
    guard found.count >= blockSize else { return (.device(1, sector: offset / 512), 1) }
    let count = found.count / blockSize
    guard let device = found.device else { return (.zero, count) }
    let number = firstDevice + device
    guard found.offset % 512 == 0, number < Int(UInt16.max) else {
      return (.device(1, sector: offset / 512), count)
    }
    return (.device(UInt16(number), sector: found.offset / 512), count)
  }
}
