// SPDX-License-Identifier: Apache-2.0
// Opening an image with everything under it: its data file, its base, the base of that, and so
// on, of whatever formats. Paths that stand in images are not opened here: whoever calls is
// asked for each, and may refuse.
//
// A chain is found first: files are opened and headers read from the top down, and nothing is
// written. Then it is opened, from the bottom up, in one of two ways:
//
// - `disk`: the image on top is a disk to be served or written. What is under it is a flat store,
//   of which places are handed on (`ImageStore`), so that reads need not go through every image.
// - `layers`: every image by itself, for whoever has to know which of them says what.

package import BlockIO

/// An image and everything under it: found, and not opened as images yet.
package struct Chain {
  /// Answers requests for paths.
  package typealias Resolver = (NamedFile) throws(ImageError) -> any ByteStore

  /// So many images in a row unless asked otherwise. A raw base at the end is none.
  package static let usualDepth = 32

  /// The images, the top first; the last one may be a raw disk.
  private let links: [ChainLink]

  /// Finds an image and everything under it.
  ///
  /// - Parameters:
  ///   - kind: the format; nil to look at the first bytes: the image may then name no file.
  ///   - baseKind: the format of the image's base, whatever the image says of it.
  ///   - above: stores that may not be met again.
  ///   - depth: how many images there may be in a row.
  ///   - formats: those that there are.
  ///   - resolve: opens paths for reading (a file with data of a writable image: for writing).
  /// - Throws: what the formats throw of headers; `unsupported` for an image that may name no
  ///   file, and for too long a chain; `corrupt` for a loop; what `resolve` throws.
  package init(
    _ store: any ByteStore, kind: ImageKind? = nil, baseKind: ImageKind? = nil,
    above: [any ByteStore] = [], depth: Int = usualDepth, among formats: FormatList = .all,
    resolve: Resolver
  ) throws(ImageError) {
    let decision = try FormatDecision.decide(FormatStatement(kind), of: store, among: formats)
    try self.init(
      store, decision, baseKind: baseKind, above: above, depth: depth, among: formats,
      resolve: resolve)
  }

  /// As the other, for an image of which the format is decided.
  package init(
    _ store: any ByteStore, _ decision: FormatDecision, baseKind: ImageKind? = nil,
    above: [any ByteStore] = [], depth: Int = usualDepth, among formats: FormatList = .all,
    resolve: Resolver
  ) throws(ImageError) {
    var links: [ChainLink] = []
    var next: (store: any ByteStore, decision: FormatDecision)? = (store, decision)
    var stated = baseKind
    var above = above
    while let (store, decision) = next {
      guard decision.kind == .raw || above.count < depth else {
        throw ImageError(
          .unsupported, "more than \(depth) images in a row, down to \(store.name): merge some")
      }
      let link = try ChainLink(store, decision, above: above, resolve: resolve)
      links.append(link)
      above.append(store)
      next = nil
      guard let below = try link.openBase(resolve) else { break }
      for upper in above {
        guard try !Dscow.same(upper, below) else {
          throw ImageError(.corrupt, "store \(below.name) is, through others, its own base")
        }
      }
      let statement = FormatStatement(stated, named: link.names.baseFormat)
      next = (below, try FormatDecision.decide(statement, of: below, among: formats))
      stated = nil
    }
    self.links = links
  }

  private init(_ links: [ChainLink]) { self.links = links }

  /// The image on top.
  package var top: ChainLink { links[0] }

  /// Everything under the image on top; nil when that names no base.
  package var below: Chain? { links.count > 1 ? Chain(Array(links.dropFirst())) : nil }

  // MARK: As a disk

  /// Opens the image on top as a disk.
  ///
  /// - Parameters:
  ///   - force: take a base that has changed, where the format notices that.
  ///   - snapshot: the internal snapshot to open instead of the disk, by id or name.
  ///   - contentID: what the image shall bear instead of a random number, where opening it for
  ///     writing renews that (VMDK).
  /// - Throws: what the formats throw.
  package func disk(
    writable: Bool = false, force: Bool = false, snapshot: String? = nil, contentID: UInt32? = nil
  ) throws(ImageError) -> any ImageFormat {
    var parts = try parts()
    parts.writable = writable
    parts.force = force
    parts.snapshot = snapshot
    parts.contentID = contentID
    return try top.kind.format.opened(parts)
  }

  /// What the image on top is opened with: everything under it is open for reading.
  package func parts() throws(ImageError) -> ImageParts {
    top.parts(over: try Self.flat(links.dropFirst()))
  }

  /// The disk as a flat byte store, for reading: the store itself where that is the disk.
  package func flat() throws(ImageError) -> any ByteStore {
    try Self.flat(links[...]) ?? top.store
  }

  private static func flat(
    _ links: ArraySlice<ChainLink>
  ) throws(ImageError) -> (any ByteStore)? {
    guard let link = links.first else { return nil }
    guard link.kind != .raw else { return link.store }
    let parts = link.parts(over: try flat(links.dropFirst()))
    let image = try link.kind.format.opened(parts)
    return ImageStore(alone: image, store: link.store, base: parts.base)
  }

  // MARK: As layers

  /// Opens every image by itself, for reading. `snapshot` is one of the image on top, by id or
  /// name, which is then open in place of its disk.
  package func layers(snapshot: String? = nil) throws(ImageError) -> Layers {
    var layers: [ImageLayer] = []
    for link in links.dropFirst().reversed() {
      layers.insert(try link.layer(over: layers.isEmpty ? nil : Layers(layers).flat()), at: 0)
    }
    let below = layers.isEmpty ? nil : Layers(layers).flat()
    layers.insert(try top.layer(over: below, snapshot: snapshot), at: 0)
    return Layers(layers)
  }
}
