// SPDX-License-Identifier: Apache-2.0
// What a tool asks of a format that makes an image.

package import BlockIO

/// An image that shall be made.
package struct NewImage {
  /// A base of it: the path as the image shall say it, its format, its file, and the disk in that.
  package typealias Base = (
    path: String, kind: ImageKind, file: any ByteStore, disk: any ByteStore
  )

  /// Its format.
  package var kind: ImageKind
  /// Length of the disk in bytes.
  package var size: UInt64
  /// Its base, if it has one.
  package var base: Base?
  /// What it shall be like besides.
  package var options: ImageOptions

  /// An image from its parts.
  package init(kind: ImageKind, size: UInt64, base: Base?, options: ImageOptions) {
    self.kind = kind
    self.size = size
    self.base = base
    self.options = options
  }
}
