// SPDX-License-Identifier: Apache-2.0
// One image of a chain by itself: what it says of every byte of its disk, and what it leaves to
// the image below. Whoever copies, compares or draws a chain asks its layers one by one.
//
// Each is opened over a stand-in for everything below, which is longer than any disk: an extent
// in device 1 then means that the image has nothing there.

package import Posix

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
  private final class Below: ByteStore {
    let below: (any ByteStore)?
    let size: UInt64 = 1 << 62
    let isWritable = false
    let name: String
    init(_ below: (any ByteStore)?) {
      self.below = below
      name = below?.name ?? "no base"
    }
    func identity() throws(IOError) -> StoreIdentity { StoreIdentity(size: size, modified: 0) }
    func allocatedBytes() -> UInt64 { 0 }
    func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
      guard let below else {
        buffer.initializeMemory(as: UInt8.self, repeating: 0)
        return
      }
      try below.read(buffer, at: offset)
    }
    func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
      throw IOError(9, "write", name)
    }
    func zero(at offset: UInt64, count: UInt64) throws(IOError) {
      throw IOError(9, "zero", name)
    }
    func resize(to size: UInt64) throws(IOError) { throw IOError(9, "resize", name) }
    func flush() {}
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

  /// Opens an image by itself.
  ///
  /// - Parameters:
  ///   - below: the disk under it, for what the image does by sectors, and to be known again.
  ///   - files: the files that hold its data, where that is not the store; see
  ///     `LayerChain.files`.
  /// - Throws: what the format throws; `baseChanged` where the image can tell.
  package init(
    _ store: any ByteStore, kind: ImageKind, below: (any ByteStore)?,
    files: [any ByteStore] = [], writable: Bool = false, snapshot: String? = nil
  ) throws(ImageError) {
    self.store = store
    self.kind = kind
    let under = Below(below)
    var parts = ImageParts(store)
    parts.files = files
    parts.base = below
    parts.writable = writable
    parts.snapshot = snapshot
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
      if let joined = store as? VmdkJoinedStore {
        let (part, offset) = try io { () throws(IOError) in try joined.place(place) }
        return (.data(part, offset), count)
      }
      // A flat part of a disk is as good as the image's own file.
      let isPlain = device == 0 || !(store is CompressedStore || store is VhdMixedBlocks)
      return (isPlain ? .data(store, place) : .made(store, place), count)
    }
  }
}
