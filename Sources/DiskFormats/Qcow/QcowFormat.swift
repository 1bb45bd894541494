// SPDX-License-Identifier: Apache-2.0
// qcow, version 1, among the formats.

package import BlockIO

extension ImageKind {
  /// Version 1 of qcow.
  package static let qcow = ImageKind(QcowFormat.self)
}

/// Version 1 of qcow.
package enum QcowFormat: DiskFormat {
  package static let name = "qcow"
  package static let canWrite = true

  package static func isBeginning(_ bytes: [UInt8]) -> Bool { QcowHeader.isMagic(bytes) }

  package static func names(in store: any ByteStore) throws(ImageError) -> ImageNames {
    ImageNames(base: try QcowHeader.read(from: store).basePath)
  }

  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    try Qcow.info(of: store)
  }

  package static func open(_ parts: ImageParts) throws(ImageError) -> any ImageFormat {
    try Qcow.open(store: parts.store, base: parts.base, writable: parts.writable)
  }

  package static func open(
    alone parts: ImageParts, over under: any ByteStore
  ) throws(ImageError) -> any ImageFormat {
    try Qcow(
      store: parts.store, base: under, header: try .read(from: parts.store),
      writable: parts.writable)
  }

  package static func create(
    _ image: NewImage, in store: FileStore, open: (String) throws(ImageError) -> FileStore
  ) throws(ImageError) {
    try image.options.checkAllUsed()
    try Qcow.create(store: store, size: image.size, base: image.base?.path)
  }

  package static func check(
    _ store: any ByteStore, files: [any ByteStore], repair: Repair?
  ) throws(ImageError) -> CheckReport? {
    guard let repair else { return try Qcow.check(store: store) }
    return try Qcow.repair(store: store, repair)
  }
}
