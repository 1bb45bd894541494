// SPDX-License-Identifier: Apache-2.0
// dscow among the formats.

package import BlockIO

extension ImageKind {
  /// The project's own.
  package static let dscow = ImageKind(DscowFormat.self)
}

/// The project's own format.
package enum DscowFormat: DiskFormat {
  package static let name = "dscow"
  package static let canWrite = true
  package static let options: [ImageOptions.Known] = [("block_size", [])]
  package static let wantsAbsoluteBase = true
  package static let makesStores = true
  package static let canRebase = true
  package static let canEmpty = true

  package static func howToMake(_ path: String) -> String {
    "make it with 'dscow_tool -c \(path) BASE'"
  }

  package static func isBeginning(_ bytes: [UInt8]) -> Bool { DscowHeader.isMagic(bytes) }

  package static func names(in store: any ByteStore) throws(ImageError) -> ImageNames {
    ImageNames(base: try Dscow.header(of: store).header.base?.path)
  }

  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    let (header, copies) = try Dscow.header(of: store)
    let allocated = try Dscow.countBits(store, header)
    var details = [
      ("first block", "\(header.firstBlock)"), ("blocks", "\(header.blocks)"),
      ("allocated blocks", "\(allocated)"), ("header copies", DscowTool.describe(copies)),
    ]
    if header.isCommitting { details.append(("commit", "under way: commit it again")) }
    return ImageInfo(
      format: name, size: header.size, clusterSize: UInt64(header.blockSize),
      basePath: header.base?.path, baseFormat: nil, details: details)
  }

  package static func open(_ parts: ImageParts) throws(ImageError) -> any ImageFormat {
    try Dscow.open(
      store: parts.store, base: parts.base, writable: parts.writable, force: parts.force)
  }

  package static func open(
    alone parts: ImageParts, over under: any ByteStore
  ) throws(ImageError) -> any ImageFormat {
    try Dscow.open(alone: parts.store, over: parts.base, writable: parts.writable)
  }

  package static func create(
    _ image: NewImage, in store: FileStore, open: (String) throws(ImageError) -> FileStore
  ) throws(ImageError) {
    var options = image.options
    let blockSize = try options.bytes("block_size") ?? UInt64(Dscow.defaultBlockSize)
    try options.checkAllUsed()
    try Dscow.create(
      store: store, base: image.base?.disk, baseName: image.base?.path ?? "",
      blockSize: UInt32(clamping: blockSize), size: image.size, overwrite: true)
  }

  package static func make(_ new: NewStore) throws(ImageError) {
    try Dscow.create(
      store: new.store, base: new.base, baseName: new.basePath,
      blockSize: new.blockSize ?? Dscow.defaultBlockSize)
  }

  package static func check(
    _ store: any ByteStore, files: [any ByteStore], repair: Repair?
  ) throws(ImageError) -> CheckReport? { try Dscow.report(store: store, repair: repair) }

  package static func resize(_ parts: ImageParts, to size: UInt64) throws(ImageError) {
    try Dscow.resize(store: parts.store, base: parts.base, to: size)
  }

  package static func rename(
    base: NamedBase?, of store: any ByteStore
  ) throws(ImageError) { try Dscow.rename(base: base?.disk, path: base?.path, of: store) }

  package static func beginCommit(
    of store: any ByteStore, into base: any ByteStore
  ) throws(ImageError) { try Dscow.beginCommit(of: store, base: base) }

  package static func cancelCommit(of store: any ByteStore) throws(ImageError) {
    try Dscow.cancelCommit(of: store)
  }

  package static func endCommit(_ parts: ImageParts, emptying: Bool) throws(ImageError) {
    guard let base = parts.base else { return }
    try Dscow.endCommit(of: parts.store, base: base, emptying: emptying)
  }
}
