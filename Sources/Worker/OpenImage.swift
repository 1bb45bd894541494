// SPDX-License-Identifier: Apache-2.0
// An image that is open, and the way to it: whatever files it names are asked for one by
// one, so that whoever opens them may be this process or the daemon.

package import BlockIO
package import DiskFormats
package import WorkerLink

/// An image that is open, and what it lives in.
package struct OpenImage {
  /// Answers a request for a file.
  package typealias Opener = (FileNeed) throws(ImageError) -> any ByteStore

  /// Name of its format.
  package let formatName: String
  /// The image.
  package let format: any ImageFormat
  /// The store.
  package let store: any ByteStore
  /// What a question to the image has to wait for: its stores are behind this.
  let gate: MetadataGate
  /// The devices that the image's extents name by number.
  package let devices: [any ByteStore]
  /// The base as it stands in the image.
  package let basePath: String?
  /// Whether the disk is only read.
  package let readOnly: Bool

  /// Opens or makes an image. Throws what the format says of it, and what `opener` throws.
  package init(
    _ name: FormatName, store: any ByteStore, _ request: ImageRequest, opener: Opener
  ) throws(ImageError) {
    let gate = MetadataGate()
    var named: String?
    var base: (any ByteStore)?
    let resolve = { (asked: NamedFile) throws(ImageError) -> any ByteStore in
      let isTop = asked.from == store.name
      guard isTop, asked.role == .base else {
        let found = try opener(
          FileNeed(
            role: asked.role.rawValue, path: Self.path(asked.path, from: asked.from),
            writable: isTop && !request.readOnly))
        return GatedStore(found, gate)
      }
      named = asked.path
      let found = try opener(Self.base(of: store, named: asked.path, request))
      base = found
      return GatedStore(found, gate)
    }
    if request.create { try Self.make(name, store, request, opener, resolve) }
    format = try Chain(
      GatedStore(store, gate), kind: name.kind, baseKind: request.baseFormat?.kind,
      depth: request.depth, resolve: resolve
    ).disk(writable: !request.readOnly, force: request.force)
    if named == nil, let given = request.basePath {
      throw ImageError(
        .badRequest, "store \(store.name) has no base, and \(given) was given: leave it out")
    }
    formatName = name.name
    basePath = named
    self.store = store
    self.gate = gate
    let all = format.devices ?? [store] + (base.map { [$0] } ?? [])
    devices = all.map(\.underlying)
    readOnly = request.readOnly
  }

  /// Opens a store by a plugin: its name and the address of its `dmu_plugin`. `base` is what was
  /// given as such; its own images name no others.
  init(
    plugin name: String, _ entry: UnsafeMutableRawPointer, store: FileStore, base: FileStore?,
    _ request: ImageRequest
  ) throws(ImageError) {
    var devices: [any ByteStore] = [store]
    if let base {
      devices.append(
        try Chain(
          base, kind: request.baseFormat?.kind ?? .raw, above: [store]
        ) { asked throws(ImageError) in
          throw ImageError(
            .unsupported, "base \(asked.from) names \(asked.path): a plugin's base has no base")
        }.flat())
    }
    let format = try PluginFormat(
      entry: entry, name: name, store: store, base: devices.count > 1 ? devices[1] : nil,
      writable: !request.readOnly)
    formatName = name
    self.format = format
    self.store = store
    gate = MetadataGate()
    self.devices = format.devices ?? devices
    readOnly = request.readOnly
    basePath = nil
  }

  private static func base(
    of store: any ByteStore, named path: String, _ request: ImageRequest
  ) -> FileNeed {
    FileNeed(
      role: NamedFile.Role.base.rawValue,
      path: request.basePath ?? Self.path(path, from: store.name), writable: false)
  }

  /// A path as an image means it: what is relative starts at the image's folder.
  static func path(_ path: String, from image: String) -> String {
    guard !path.hasPrefix("/"), let slash = image.lastIndex(of: "/") else { return path }
    return image[...slash] + path
  }

  // MARK: Making

  /// Makes the image, unless a worker before this one has done so.
  private static func make(
    _ name: FormatName, _ store: any ByteStore, _ request: ImageRequest,
    _ opener: Opener, _ resolve: Chain.Resolver
  ) throws(ImageError) {
    guard let path = request.basePath else {
      throw ImageError(.badRequest, "store \(store.name) cannot be made without a base")
    }
    let format = name.kind.format
    guard format.makesStores else {
      let others = FormatList.all.kinds.map(\.format).filter { $0.makesStores }.map { $0.specName }
      throw ImageError(
        .badRequest,
        "store \(store.name) does not exist, and stores of format \(name.name) are not made here:"
          + " make it with 'qemu-img create', or use \(others.joined(separator: " or "))")
    }
    guard try !format.isMade(store) else { return }
    let file = try opener(base(of: store, named: path, request))
    let base = try Chain(
      file, kind: request.baseFormat?.kind, above: [store], depth: request.depth,
      resolve: resolve
    ).flat()
    try format.make(
      NewStore(
        store, basePath: path, baseFile: file, baseKind: request.baseFormat?.kind, base: base,
        blockSize: request.blockSize))
  }
}
