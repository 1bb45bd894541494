// SPDX-License-Identifier: Apache-2.0
// An image that is open for reading, as a flat byte store: what the base of another image is
// when it is itself an image. Reads go through user space; whoever can ask `resolve` first
// gets the place in one of the image's own devices, and then they do not.

package import Posix
import Synchronization

/// A read-only image as a byte store of its disk's contents. Safe from any thread.
package final class ImageStore: ByteStore {
  /// Holds the image, which is no more than one thread's at a time.
  private struct Guarded: @unchecked Sendable {
    // Guarded by the mutex around it: nobody else has a reference.
    let image: any ImageFormat
    /// The last answers, by the block asked for. A run is looked beyond to see where it ends,
    /// and each image of a chain looks beyond what the one below it has just said: without
    /// these a chain would be asked twice as often with every image in it.
    var recent: [(limit: UInt64, extent: Extent)] = []
    var next = 0

    mutating func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
      for known in recent where known.extent.blocks.first == block {
        var extent = known.extent
        // It ended there by itself, or is asked for no further than it is known.
        guard extent.blocks.count < known.limit || limit <= known.limit else { continue }
        extent.blocks.count = min(extent.blocks.count, limit)
        return extent
      }
      let extent = try image.find(block, limit: limit)
      if recent.count < 8 {
        recent.append((limit, extent))
      } else {
        recent[next] = (limit, extent)
        next = (next + 1) % recent.count
      }
      return extent
    }
  }

  private let guarded: Mutex<Guarded>
  /// What errors call it: the image's store.
  package let name: String
  /// Length of the disk in bytes.
  package let size: UInt64
  /// Never.
  package let isWritable = false
  /// Bytes of a block of the image.
  package let blockSize: UInt32
  /// The image's devices, by number.
  package let devices: [any ByteStore]
  /// The image's store.
  let store: any ByteStore

  /// Takes over an image that was opened for reading, and on which nobody calls from now on.
  ///
  /// - Parameters:
  ///   - store: the image's store, for its name and identity.
  ///   - base: the base that the image was opened with, if its `devices` is nil.
  package convenience init(
    _ image: sending any ImageFormat, store: any ByteStore, base: (any ByteStore)? = nil
  ) {
    self.init(alone: image, store: store, base: base)
  }

  /// As the other, for an image of which the caller promises that nobody else has it.
  init(alone image: any ImageFormat, store: any ByteStore, base: (any ByteStore)? = nil) {
    self.store = store
    name = store.name
    size = image.size
    blockSize = image.blockSize
    devices = image.devices ?? [store] + (base.map { [$0] } ?? [])
    guarded = Mutex(Guarded(image: image))
  }

  /// Where a byte of the disk, a multiple of 512, lives: the device and its byte, or nil for
  /// zeroes; and for how many bytes that goes on, `count` at most.
  ///
  /// - Throws: EIO for an image that contradicts itself, or what its store threw.
  package func resolve(
    at offset: UInt64, count: UInt64
  ) throws(IOError) -> (device: Int?, offset: UInt64, count: UInt64) {
    guard offset < size else { return (nil, 0, count) }
    let blockSize = UInt64(blockSize)
    let first = offset / blockSize
    let last = (offset + min(count, size - offset) - 1) / blockSize
    let found = guarded.withLock { (guarded) -> Result<Extent, ImageError> in
      do throws(ImageError) {
        return .success(try guarded.find(first, limit: last - first + 1))
      } catch { return .failure(error) }
    }
    switch found {
    case .failure(let error):
      throw error.cause ?? IOError(5, "understand (\(error.message))", name)
    case .success(let extent):
      let ahead = offset - first * blockSize
      let end = min(extent.blocks.end * blockSize, size)
      let length = min(count, end - offset)
      switch extent.place {
      case .zero: return (nil, 0, length)
      case .device(let device, let sector):
        return (Int(device), sector * 512 + ahead, length)
      }
    }
  }

  /// Identity of the image's store, of which its length is the disk's.
  package func identity() throws(IOError) -> StoreIdentity {
    StoreIdentity(size: size, modified: try store.identity().modified)
  }

  /// Space that the image's store takes.
  package func allocatedBytes() throws(IOError) -> UInt64 { try store.allocatedBytes() }

  /// Reads the disk; past its end, zeroes.
  package func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    var done = 0
    while done < buffer.count {
      let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
      let position = offset + UInt64(done)
      guard position < size else {
        rest.initializeMemory(as: UInt8.self, repeating: 0)
        return
      }
      let found = try resolve(at: position, count: UInt64(rest.count))
      let piece = UnsafeMutableRawBufferPointer(rebasing: rest[..<Int(found.count)])
      if let device = found.device {
        try devices[device].read(piece, at: found.offset)
      } else {
        piece.initializeMemory(as: UInt8.self, repeating: 0)
      }
      done += piece.count
    }
  }

  /// Throws EBADF.
  package func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    throw IOError(9, "write", name)
  }

  /// Throws EBADF.
  package func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    throw IOError(9, "zero", name)
  }

  /// Throws EBADF.
  package func resize(to size: UInt64) throws(IOError) { throw IOError(9, "resize", name) }

  /// There is nothing to flush.
  package func flush() {}
}
