// SPDX-License-Identifier: Apache-2.0
// Putting a dscow store over another base, and what a commit into the base leaves of it.
// Nobody may serve the disk.
//
// A commit into the base: the header is marked, blocks are written into the base, the base is
// flushed; then the header knows the base as it is now and the mark goes; then the bits are
// cleared and the space is given back. While the mark is there every block in which the base
// may have changed is in the store, so that the disk is right whatever was written.

package import BlockIO
import SystemIO

extension Dscow {
  /// Names another base, or none: the disk then shows that one wherever the store has nothing.
  /// Whether it is the right one is the caller's to know.
  ///
  /// - Throws: what `header(of:)` throws, `badRequest`, `io`.
  @discardableResult
  package static func rename(
    base: (any ByteStore)?, path: String?, of store: any ByteStore
  ) throws(ImageError) -> DscowHeader {
    var changed = try header(of: store, writable: true).header
    if let base, let path {
      try checkDistinct(store, base)
      changed.base = try stamp(durably: base, path: path)
      changed.stampFlags = DscowHeader.stampIsDurable
    } else {
      changed.base = nil
    }
    changed.compatible &= ~DscowHeader.committing
    return try rewrite(changed, on: store)
  }

  /// Marks a store as being committed into its base, and notes what of that the commit leaves
  /// alone. Throws what `header(of:)` throws, `io`.
  package static func beginCommit(
    of store: any ByteStore, base: any ByteStore
  ) throws(ImageError) {
    var changed = try header(of: store, writable: true).header
    guard let known = changed.base else {
      throw ImageError(.badRequest, "store \(store.name) has no base to commit into")
    }
    changed.compatible |= DscowHeader.committing
    changed.stampFlags |= DscowHeader.hasUntouched
    changed.untouched = try untouched(store, changed, base, size: known.size)
    _ = try rewrite(changed, on: store)
  }

  /// Takes back `beginCommit` when nothing of the base was written: a base that changes is
  /// noticed again. Throws what `header(of:)` throws, `io`.
  package static func cancelCommit(of store: any ByteStore) throws(ImageError) {
    var changed = try header(of: store, writable: true).header
    changed.compatible &= ~DscowHeader.committing
    changed.stampFlags &= ~DscowHeader.hasUntouched
    changed.untouched = 0
    _ = try rewrite(changed, on: store)
  }

  /// Ends a commit of which everything is in the base and durable: the store then knows the
  /// base as it is, and with `emptying` has no block of its own any more.
  ///
  /// - Throws: what `header(of:)` throws, `io`.
  package static func endCommit(
    of store: any ByteStore, base: any ByteStore, emptying: Bool
  ) throws(ImageError) {
    var changed = try header(of: store, writable: true).header
    guard let known = changed.base else { return }
    changed.base = try stamp(durably: base, path: known.path)
    changed.compatible &= ~DscowHeader.committing
    changed.stampFlags = DscowHeader.stampIsDurable
    changed.untouched = 0
    let header = try rewrite(changed, on: store)
    guard emptying else { return }
    try io { () throws(IOError) in
      try store.zero(at: header.bitmapOffset, count: header.bitmapBytes)
      try store.flush()
      let end = header.isBitmapBehind ? header.bitmapOffset : header.storeSize
      try store.zero(at: header.firstBlock, count: end - header.firstBlock)
      try store.flush()
    }
  }
}
