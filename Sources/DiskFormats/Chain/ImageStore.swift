// SPDX-License-Identifier: Apache-2.0
// The disk of images that are open for reading, as a flat byte store: what the base of another
// image is when it is itself an image, and what tools read. Reads go through user space; whoever
// can ask `resolve` first gets the place in one of the image's own devices, and then they do not.

package import BlockIO
import DiskModel
import Glibc
import Synchronization
package import SystemIO

/// A read-only image, or layers of images, as a byte store of the disk's contents. Safe from any
/// thread.
package final class ImageStore: ReadOnlyStore, MappedStore {
  /// Holds the images, which are no more than one thread's at a time.
  private struct Guarded: @unchecked Sendable {
    // Guarded by the mutex around it: nobody else has a reference.
    enum Source {
      case image(any ImageFormat)
      case layers(Layers)
    }
    let source: Source
    /// The last answers of an image, by the block asked for. A run is looked beyond to see where
    /// it ends, and each image of a chain looks beyond what the one below it has just said: without
    /// these a chain would be asked twice as often with every image in it.
    var recent: [(limit: UInt64, extent: Extent)] = []
    var next = 0

    mutating func find(
      _ image: any ImageFormat, _ block: UInt64, limit: UInt64
    ) throws(ImageError) -> Extent {
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

  /// Where a run of the disk lives: nil for zeroes.
  private typealias Found = (store: (any ByteStore)?, offset: UInt64, count: UInt64)

  private let guarded: Mutex<Guarded>
  /// What errors call it: the image's store.
  package let name: String
  /// Length of the disk in bytes.
  package let size: UInt64
  /// The devices of an image, by number; none of layers.
  package let devices: [any ByteStore]
  /// The store of the image on top.
  let store: any ByteStore
  private let blockSize: UInt64
  private let isLayered: Bool

  /// The store of the image on top.
  package var image: (any ByteStore)? { store }
  /// Itself, for an image; layers have no devices in common.
  package var mapped: (any MappedStore)? { isLayered ? nil : self }

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
    blockSize = UInt64(image.blockSize)
    devices = image.devices ?? [store] + (base.map { [$0] } ?? [])
    isLayered = false
    guarded = Mutex(Guarded(source: .image(image)))
  }

  /// The disk of layers, of which the caller promises that nobody uses them while this is read.
  init(_ layers: Layers) {
    store = layers.layers[0].store
    name = store.name
    size = layers.size
    blockSize = 512
    devices = []
    isLayered = true
    guarded = Mutex(Guarded(source: .layers(layers)))
  }

  /// Asks the images. Throws EIO for one that contradicts itself, or what its store threw.
  private func ask<Answer: Sendable>(
    _ question: (inout Guarded) throws(ImageError) -> Answer
  ) throws(IOError) -> Answer {
    let answer = guarded.withLock { guarded -> Result<Answer, ImageError> in
      do throws(ImageError) { return .success(try question(&guarded)) } catch {
        return .failure(error)
      }
    }
    switch answer {
    case .success(let answer): return answer
    case .failure(let error):
      throw error.cause ?? IOError(EIO, "understand (\(error.message))", name)
    }
  }

  /// Where a byte of an image's disk, a multiple of 512, lives; see `MappedStore`. Zeroes from
  /// its end on.
  ///
  /// - Throws: EIO for an image that contradicts itself, or what its store threw.
  package func resolve(
    at offset: UInt64, count: UInt64
  ) throws(IOError) -> (device: Int?, offset: UInt64, count: UInt64) {
    guard offset < size else { return (nil, 0, count) }
    let first = offset / blockSize
    let last = (offset + min(count, size - offset) - 1) / blockSize
    let extent = try ask { guarded throws(ImageError) in
      guard case .image(let image) = guarded.source else {
        preconditionFailure("layers have no devices")
      }
      return try guarded.find(image, first, limit: last - first + 1)
    }
    let ahead = offset - first * blockSize
    let end = min(extent.blocks.end * blockSize, size)
    let length = min(count, end - offset)
    switch extent.place {
    case .zero: return (nil, 0, length)
    case .device(let device, let sector): return (Int(device), sector * 512 + ahead, length)
    }
  }

  private func locate(_ offset: UInt64, count: UInt64) throws(IOError) -> Found {
    guard isLayered else {
      let found = try resolve(at: offset, count: count)
      return (found.device.map { devices[$0] }, found.offset, found.count)
    }
    let run = try ask { guarded throws(ImageError) in
      guard case .layers(let layers) = guarded.source else {
        preconditionFailure("an image is no layers")
      }
      return try layers.run(at: offset, limit: count)
    }
    switch run.content {
    case .data(let store, let place), .made(let store, let place): return (store, place, run.count)
    case .zero, .absent: return (nil, 0, run.count)
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
      let found = try locate(position, count: UInt64(rest.count))
      let piece = UnsafeMutableRawBufferPointer(rebasing: rest[..<Int(found.count)])
      if let store = found.store {
        try store.read(piece, at: found.offset)
      } else {
        piece.initializeMemory(as: UInt8.self, repeating: 0)
      }
      done += piece.count
    }
  }
}
