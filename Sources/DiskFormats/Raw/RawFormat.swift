// SPDX-License-Identifier: Apache-2.0
// Raw disks among the formats. What is raw is nothing else: no bytes say it, and it names no file.

package import BlockIO
import SystemIO

extension ImageKind {
  /// A file or device as it is.
  package static let raw = ImageKind(RawFormat.self)
}

/// A file or device whose bytes are the disk's.
package enum RawFormat: DiskFormat {
  package static let name = "raw"
  /// What only says where the bytes come from is raw, too.
  package static let baseWords = ["raw", "file", "host_device"]
  package static let canWrite = true
  package static let options: [ImageOptions.Known] = [
    ("preallocation", ["off", "falloc", "full"])
  ]

  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    ImageInfo(
      format: name, size: (store.size + 511) / 512 * 512, clusterSize: 0, basePath: nil,
      baseFormat: nil, details: [])
  }

  package static func open(_ parts: ImageParts) throws(ImageError) -> any ImageFormat {
    try Raw(store: parts.store, writable: parts.writable)
  }

  package static func create(
    _ image: NewImage, in store: FileStore, open: (String) throws(ImageError) -> FileStore
  ) throws(ImageError) {
    var options = image.options
    let much = try options.preallocation() ?? .off
    try options.checkAllUsed()
    guard image.base == nil else {
      throw ImageError(.badRequest, "a raw image has no base: use qcow2, dscow or vpc")
    }
    try Raw.create(store: store, size: image.size, preallocation: much)
  }

  package static func resize(_ parts: ImageParts, to size: UInt64) throws(ImageError) {
    let store = parts.store
    guard store.file?.isBlockDevice != true else {
      throw ImageError(.unsupported, "\(store.name) is a device: resize it with its own tools")
    }
    try io { () throws(IOError) in
      try store.resize(to: size)
      try store.flush()
    }
  }
}
