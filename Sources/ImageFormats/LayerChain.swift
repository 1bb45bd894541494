// SPDX-License-Identifier: Apache-2.0
// A chain of images, each open by itself: which of them has a byte of the disk, and where.

package import Posix
import Synchronization

/// An image and everything under it, for reading. Used from one thread.
package final class LayerChain {
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

  /// Opens an image and everything under it. See `ImageChain.open`; also opens a base that
  /// nobody is asked for when `over` is given: the image is then read over that chain.
  package static func open(
    _ store: any ByteStore, kind: ImageKind? = nil, baseKind: ImageKind? = nil,
    snapshot: String? = nil, depth: Int = ImageChain.usualDepth,
    among formats: DiskFormats = .all, resolve: ImageChain.Resolver
  ) throws(ImageError) -> LayerChain {
    LayerChain(
      try layers(
        store, FormatStatement(kind), baseKind, formats, snapshot: snapshot, above: [],
        depth: depth, resolve: resolve))
  }

  /// Opens everything under an image that names its base; nil when it names none.
  package static func below(
    _ store: any ByteStore, _ decision: FormatDecision, baseKind: ImageKind? = nil,
    among formats: DiskFormats = .all, resolve: ImageChain.Resolver
  ) throws(ImageError) -> LayerChain? {
    let layers = try base(
      of: store, try decision.kind.format.names(in: store), decision, baseKind, formats, above: [],
      depth: ImageChain.usualDepth, resolve: resolve)
    return layers.isEmpty ? nil : LayerChain(layers)
  }

  private static func layers(
    _ store: any ByteStore, _ statement: FormatStatement, _ baseKind: ImageKind?,
    _ formats: DiskFormats, snapshot: String?, above: [any ByteStore], depth: Int,
    resolve: ImageChain.Resolver
  ) throws(ImageError) -> [ImageLayer] {
    guard above.count < depth else {
      throw ImageError(
        .unsupported, "more than \(depth) images in a row, down to \(store.name): merge some")
    }
    let decision = try FormatDecision.decide(statement, of: store, among: formats)
    let names = try decision.kind.format.names(in: store)
    let below = try base(
      of: store, names, decision, baseKind, formats, above: above, depth: depth,
      resolve: resolve)
    let top = try ImageLayer(
      store, kind: decision.kind, below: below.isEmpty ? nil : LayerChain(below).flat(),
      files: try ImageChain.files(of: store, names, decision, above: above, resolve),
      snapshot: snapshot)
    return [top] + below
  }

  /// The files that hold an image's data where that is not the store, opened: the data file of
  /// a qcow2 image, the extents of a VMDK image.
  ///
  /// - Throws: what the headers' readers throw; `baseMissing`, `corrupt`; `unsupported` for an
  ///   image that may name none.
  package static func files(
    of store: any ByteStore, _ decision: FormatDecision, above: [any ByteStore] = [],
    resolve: ImageChain.Resolver
  ) throws(ImageError) -> [any ByteStore] {
    try ImageChain.files(
      of: store, try decision.kind.format.names(in: store), decision, above: above, resolve)
  }

  private static func base(
    of store: any ByteStore, _ names: ImageNames, _ decision: FormatDecision,
    _ baseKind: ImageKind?, _ formats: DiskFormats, above: [any ByteStore], depth: Int,
    resolve: ImageChain.Resolver
  ) throws(ImageError) -> [ImageLayer] {
    guard let below = try ImageChain.openBase(of: store, names, decision, resolve) else {
      return []
    }
    for upper in above + [store] {
      guard try !Dscow.same(upper, below) else {
        throw ImageError(.corrupt, "store \(below.name) is, through others, its own base")
      }
    }
    return try layers(
      below, FormatStatement(baseKind, named: names.baseFormat), nil, formats, snapshot: nil,
      above: above + [store], depth: depth, resolve: resolve)
  }

  /// The disk as a byte store, to be read from any thread while nobody else uses this chain:
  /// the store itself where that is the disk.
  package func flat() -> any ByteStore {
    layers[0].kind == .raw ? layers[0].store : FlatChain(self)
  }
}

/// The disk of a chain as a flat byte store. Safe from any thread.
final class FlatChain: ByteStore {
  /// Guarded by the mutex around it: nobody else uses the chain.
  private struct Guarded: @unchecked Sendable {
    let chain: LayerChain
  }

  private let guarded: Mutex<Guarded>
  /// The store of the image on top.
  let store: any ByteStore
  let kind: ImageKind
  let name: String
  let size: UInt64
  let isWritable = false

  init(_ chain: LayerChain) {
    store = chain.layers[0].store
    kind = chain.layers[0].kind
    name = store.name
    size = chain.size
    guarded = Mutex(Guarded(chain: chain))
  }

  func identity() throws(IOError) -> StoreIdentity {
    StoreIdentity(size: size, modified: try store.identity().modified)
  }

  func allocatedBytes() throws(IOError) -> UInt64 { try store.allocatedBytes() }

  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    var done = 0
    while done < buffer.count {
      let rest = UnsafeMutableRawBufferPointer(rebasing: buffer[done...])
      let position = offset + UInt64(done)
      guard position < size else {
        rest.initializeMemory(as: UInt8.self, repeating: 0)
        return
      }
      let count = UInt64(rest.count)
      let found = guarded.withLock { guarded -> Result<LayerChain.Run, ImageError> in
        do throws(ImageError) {
          return .success(try guarded.chain.run(at: position, limit: count))
        } catch { return .failure(error) }
      }
      let run: LayerChain.Run
      switch found {
      case .success(let it): run = it
      case .failure(let error):
        throw error.cause ?? IOError(5, "understand (\(error.message))", name)
      }
      let piece = UnsafeMutableRawBufferPointer(rebasing: rest[..<Int(run.count)])
      switch run.content {
      case .data(let store, let place), .made(let store, let place):
        try store.read(piece, at: place)
      case .zero, .absent: piece.initializeMemory(as: UInt8.self, repeating: 0)
      }
      done += piece.count
    }
  }

  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    throw IOError(9, "write", name)
  }
  func zero(at offset: UInt64, count: UInt64) throws(IOError) { throw IOError(9, "zero", name) }
  func resize(to size: UInt64) throws(IOError) { throw IOError(9, "resize", name) }
  func flush() {}
}
