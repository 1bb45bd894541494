// SPDX-License-Identifier: Apache-2.0
// The images of a chain, each open by itself: which of them has a byte of the disk, and where.

package import BlockIO

/// An image and everything under it, for reading. Used from one thread.
package final class Layers {
  /// A run of bytes of the disk.
  package struct Run {
    /// Which image says so: 0 the top; nil when none says anything, and zeroes show.
    package var depth: Int?
    /// What it says; never `absent` where there is a depth.
    package var content: ImageLayer.Content
    /// How many bytes.
    package var count: UInt64
    /// The image at which the search ended without an answer: one that is too short to have
    /// these bytes hides what is below it.
    package var reached = 0
  }

  /// The images, the top first.
  package let layers: [ImageLayer]
  /// Length of the disk in bytes.
  package let size: UInt64

  init(_ layers: [ImageLayer]) {
    self.layers = layers
    size = layers[0].size
  }

  /// Where the bytes from `offset` on live, and for how many of them that goes on, `limit` at
  /// most. `above`: only images above that depth are asked.
  package func run(
    at offset: UInt64, limit: UInt64, above: Int = .max
  ) throws(ImageError) -> Run {
    var limit = min(limit, size - offset)
    var depth = 0
    while depth < min(above, layers.count), offset < layers[depth].size {
      let layer = layers[depth]
      let (content, count) = try layer.run(at: offset, limit: limit)
      // What lies past the end of this image is no longer its to say.
      limit = count
      if case .absent = content {
        depth += 1
        continue
      }
      return Run(depth: depth, content: content, count: count)
    }
    return Run(depth: nil, content: .absent, count: limit, reached: depth)
  }

  /// The disk as a byte store, to be read from any thread while nobody else uses these layers:
  /// the store itself where that is the disk.
  package func flat() -> any ByteStore {
    layers[0].kind == .raw ? layers[0].store : ImageStore(self)
  }
}
