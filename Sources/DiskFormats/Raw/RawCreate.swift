// SPDX-License-Identifier: Apache-2.0
// Making a raw disk: a file of a length, or the beginning of a device.

package import BlockIO
import SystemIO

extension Raw {
  /// Makes a disk in a store, whatever that holds.
  ///
  /// - Throws: `badRequest` for a device that is too short, and for tables, which there are none
  ///   of; `io`.
  package static func create(
    store: FileStore, size: UInt64, preallocation: Preallocation = .off
  ) throws(ImageError) {
    guard preallocation != .metadata else {
      throw ImageError(
        .badRequest, "preallocation=metadata: a raw image has none: use off, falloc or full")
    }
    guard !store.isBlockDevice || size <= store.size else {
      throw ImageError(
        .badRequest,
        "\(store.name) is a device of \(store.size) bytes, \(size) are needed: make it longer")
    }
    try io { () throws(IOError) in try layOut(store, size, preallocation) }
  }

  private static func layOut(
    _ store: FileStore, _ size: UInt64, _ much: Preallocation
  ) throws(IOError) {
    try store.resize(to: 0)
    try store.resize(to: size)
    switch much {
    case .off, .metadata:
      // Nothing there shall look like the image that the device held.
      if store.isBlockDevice { try store.zero(at: 0, count: min(512, store.size)) }
    case .falloc:
      // A device has its space, and keeps what it held.
      if store.isBlockDevice { try store.zero(at: 0, count: size) }
      try store.allocate(at: 0, count: size)
    case .full: try store.fill(from: 0, to: size)
    }
  }
}
