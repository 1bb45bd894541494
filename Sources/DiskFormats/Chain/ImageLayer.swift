// SPDX-License-Identifier: Apache-2.0
// One image of a chain by itself: what it says of every byte of its disk, and what it leaves to
// the image below. Whoever copies, compares or draws a chain asks its layers one by one.
//
// Each is opened over a stand-in for everything below, which is longer than any disk: an extent
// in device 1 then means that the image has nothing there.

package import BlockIO
import DiskModel
import SystemIO

/// An image of a chain, open by itself. Used from one thread.
package final class ImageLayer {
  /// What an image says of a run of bytes.
  package enum Content {
    /// Nothing: whatever is below shows.
    case absent
    /// Zeroes.
    case zero
    /// They lie in this store from this byte on.
    case data(any ByteStore, UInt64)
    /// They are made from what lies elsewhere (decompressed): read them from this store at this
    /// byte, no more than the run at a time.
    case made(any ByteStore, UInt64)
  }

  /// What is below an image, for its own reads; absent runs are not read from here.
  private final class Below: ReadOnlyStore {
    let below: (any ByteStore)?
    let size: UInt64 = 1 << 62
    let name: String
    init(_ below: (any ByteStore)?) {
      self.below = below
      name = below?.name ?? "no base"
    }
    func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
      guard let below else {
        buffer.initializeMemory(as: UInt8.self, repeating: 0)
        return
      }
      try below.read(buffer, at: offset)
    }
  }

  /// What kind of image it is.
  package let kind: ImageKind
  /// The file or device.
  package let store: any ByteStore
  /// Length of the disk in bytes.
  package var size: UInt64 { format.size }
  /// The image itself, open over nothing: an extent in device 1 is one that it does not have.
  package let format: any ImageFormat
  /// The format's devices, by number.
  package let devices: [any ByteStore]

  /// Opens an image by itself: `parts.base` is the disk under it, for what the image does by
  /// sectors, and to be known again. Throws what the format throws.
  package init(_ parts: ImageParts, kind: ImageKind) throws(ImageError) {
    store = parts.store
    self.kind = kind
    let under = Below(parts.base)
    format = try kind.format.opened(parts, over: under)
    devices = format.devices ?? [store, under]
  }

  /// What the image says of the bytes from `offset` on, which lies within the disk, and for how
  /// many of them, `limit` at most.
  package func run(
    at offset: UInt64, limit: UInt64
  ) throws(ImageError) -> (content: Content, count: UInt64) {
    let blockSize = UInt64(format.blockSize)
    let end = offset + min(limit, size - offset)
    let first = offset / blockSize
    let extent = try format.find(first, limit: (end - 1) / blockSize - first + 1)
    let count = min(end, extent.blocks.end * blockSize) - offset
    switch extent.place {
    case .zero: return (.zero, count)
    case .device(1, _): return (.absent, count)
    case .device(let device, let sector):
      let place = sector * 512 + (offset - first * blockSize)
      let store = devices[Int(device)]
      if let joined = store.joined {
        let (part, offset) = try io { () throws(IOError) in try joined.place(place) }
        return (.data(part, offset), count)
      }
      // A flat part of a disk is as good as the image's own file.
      return (device == 0 || !store.isMade ? .data(store, place) : .made(store, place), count)
    }
  }
}
