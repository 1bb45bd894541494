// SPDX-License-Identifier: Apache-2.0
// VMDK among the formats.

package import BlockIO

extension ImageKind {
  /// VMware's.
  package static let vmdk = ImageKind(VmdkFormat.self)
}

/// VMware's format.
package enum VmdkFormat: DiskFormat {
  package static let name = "vmdk"
  package static let canWrite = true
  package static let options: [ImageOptions.Known] = [
    ("subformat", VmdkSubformat.allCases.map(\.rawValue)),
    ("adapter_type", ["ide", "lsilogic", "buslogic", "legacyESX"]),
  ]
  package static let checksFiles = true

  package static func isBeginning(_ bytes: [UInt8]) -> Bool { VmdkLayout.isMagic(bytes) }

  package static func names(in store: any ByteStore) throws(ImageError) -> ImageNames {
    let layout = try VmdkLayout.read(from: store)
    let base = layout.descriptor.basePath
    var names = ImageNames(base: base, baseFormat: base == nil ? nil : name)
    for line in layout.descriptor.extents where layout.header == nil && line.kind != .zero {
      // Flat extents may be parts of one file.
      let isFlat = line.kind == .flat || line.kind == .vmfs
      names.files.append(ImageNames.File(role: .extent, path: line.path, isShared: isFlat))
    }
    return names
  }

  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    try Vmdk.info(of: store)
  }

  package static func open(_ parts: ImageParts) throws(ImageError) -> any ImageFormat {
    try Vmdk.open(
      store: parts.store, extents: parts.files, base: parts.base, writable: parts.writable,
      contentID: parts.contentID)
  }

  package static func open(
    alone parts: ImageParts, over under: any ByteStore
  ) throws(ImageError) -> any ImageFormat {
    try Vmdk.open(
      alone: parts.store, extents: parts.files, over: parts.base, under,
      writable: parts.writable)
  }

  /// What a new image shall be like, by its options and its base; its extents are named after
  /// it. `given` are the options that are left to look at. Throws `badRequest`.
  package static func options(
    of image: NewImage, _ given: inout ImageOptions, name path: String
  ) throws(ImageError) -> VmdkOptions {
    var options = VmdkOptions()
    let kinds = VmdkSubformat.allCases.map { ($0.rawValue, $0) }
    if let kind = try given.word("subformat", kinds) { options.subformat = kind }
    if let adapter = given.take("adapter_type") { options.adapter = adapter }
    options.name = path.split(separator: "/").last.map(String.init) ?? path
    if let base = image.base {
      guard base.kind == .vmdk else {
        throw ImageError(
          .badRequest,
          "base \(base.path) is of format \(base.kind): that of a vmdk image has to be vmdk")
      }
      options.base = (base.path, try Vmdk.contentID(of: base.file))
    }
    return options
  }

  package static func create(
    _ image: NewImage, in store: FileStore, open: (String) throws(ImageError) -> FileStore
  ) throws(ImageError) {
    var given = image.options
    let options = try options(of: image, &given, name: store.name)
    try given.checkAllUsed()
    var extents: [any ByteStore] = []
    for name in options.extentNames(size: image.size) { extents.append(try open(name)) }
    try Vmdk.create(store: store, size: image.size, options: options, extents: extents)
  }

  package static func check(
    _ store: any ByteStore, files: [any ByteStore], repair: Repair?
  ) throws(ImageError) -> CheckReport? {
    guard let repair else { return try Vmdk.check(store: store, extents: files) }
    return try Vmdk.repair(store: store, extents: files, repair)
  }

  package static func nextContentID(
    of base: any ByteStore, for store: any ByteStore
  ) throws(ImageError) -> UInt32? { try Vmdk.beginCommit(of: store, into: base) }

  package static func adopt(
    base: any ByteStore, of store: any ByteStore
  ) throws(ImageError) { try Vmdk.adopt(base: base, of: store) }
}
