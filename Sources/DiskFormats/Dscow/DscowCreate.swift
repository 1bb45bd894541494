// SPDX-License-Identifier: Apache-2.0
// Making a dscow store, opening one, and rewriting its header. These write to the store
// directly; once a disk is open only commit plans do.
//
// Order of creation: what was there is made unreadable and that is flushed; then the
// metadata is zeroed, the length set, and that is flushed; then a mark that the store is not
// finished takes the first sector; then the second copy of the header is written, then the first
// without its first sector, then that; each is flushed. A store that a power cut left half made
// has no valid header, or one copy, and can be made again: it is empty, or bears the mark.
//
// Order of a header's rewrite: the copy that does not hold, flush, the other, flush. At
// every instant one copy is valid.

package import BlockIO
import Glibc
import SystemIO

extension Dscow {
  /// The block size unless asked otherwise: what guests write at least. A first write of a whole
  /// block copies nothing.
  package static let defaultBlockSize: UInt32 = 4096

  /// Makes a store.
  ///
  /// - Parameters:
  ///   - store: written to; must be empty, or begin with 8 KiB of zeroes, unless
  ///     `overwrite`. Is flushed.
  ///   - base: nil for a disk that reads as zeroes where nobody wrote.
  ///   - baseName: the path to remember for the base.
  ///   - size: length of the disk in bytes; unless given, that of the base rounded up to
  ///     512, the rest of which reads as zeroes.
  /// - Throws: `badRequest`, or `io` when the store or base fails.
  @discardableResult
  package static func create(
    store: any ByteStore, base: (any ByteStore)?, baseName: String,
    blockSize: UInt32 = defaultBlockSize, size: UInt64? = nil, overwrite: Bool = false
  ) throws(ImageError) -> DscowHeader {
    if let base { try checkDistinct(store, base) }
    guard let wanted = size ?? base?.size else {
      throw ImageError(.badRequest, "a disk without a base needs a size")
    }
    guard wanted > 0 else {
      throw ImageError(
        .badRequest, "the base \(baseName) is empty: give the disk a size of its own")
    }
    var header = try DscowHeader(
      size: roundedUp(wanted, to: 512) ?? .max, blockSize: blockSize,
      base: try base.map { base throws(ImageError) in try stamp(durably: base, path: baseName) })
    header.stampFlags = DscowHeader.stampIsDurable
    if !overwrite { try checkEmpty(store) }
    do throws(IOError) {
      try write(new: header, to: store)
    } catch {
      let needed = "\(header.storeSize) bytes"
      let reason =
        switch (error.code, error.operation) {
        case (EFBIG, _): "its file system has no files of \(needed): use another, or a device"
        case (ENOSPC, "resize"): "it has \(store.size) bytes, \(needed) are needed"
        default: "\(error)"
        }
      throw ImageError(.io, "cannot make a dscow store of \(store.name): \(reason)", cause: error)
    }
    return header
  }

  /// Throws `badRequest` when a store is to be its own base.
  static func checkDistinct(
    _ store: any ByteStore, _ base: any ByteStore
  ) throws(ImageError) {
    guard try !same(store, base) else {
      throw ImageError(.badRequest, "\(store.name) cannot be its own base")
    }
  }

  private static func checkEmpty(_ store: any ByteStore) throws(ImageError) {
    let head = try io { () throws(IOError) in
      try store.read(at: 0, count: 2 * DscowHeader.copySize)
    }
    guard head.allSatisfy({ $0 == 0 }) || DscowHeader.isUnfinished(head) else {
      throw ImageError(
        .badRequest,
        "\(store.name) is not empty: choose another store or force it to be made anew (-f)")
    }
  }

  private static func write(new header: DscowHeader, to store: any ByteStore) throws(IOError) {
    let headers = 2 * UInt64(DscowHeader.copySize)
    // A store that cannot be so long is left as it was.
    if store.size < header.storeSize { try store.resize(to: header.storeSize) }
    try store.zero(at: 0, count: headers)
    try store.flush()
    // Whatever a file held goes at once; on a device this changes nothing.
    try store.resize(to: 0)
    try store.resize(to: header.storeSize)
    try store.zero(at: headers, count: header.firstBlock - headers)
    try store.flush()
    let copy = header.encoded()
    for (bytes, offset) in [
      (DscowHeader.unfinished, 0), (copy, DscowHeader.copySize), ([UInt8](copy[512...]), 512),
      ([UInt8](copy[..<512]), 0),
    ] {
      try store.write(bytes, at: UInt64(offset))
      try store.flush()
    }
  }

  /// The header of a store, from which the base's path can be had before there is a base.
  ///
  /// - Throws: `notThisFormat`, `unsupported`, `corrupt` or `io`.
  package static func header(
    of store: any ByteStore, writable: Bool = false
  ) throws(ImageError) -> (header: DscowHeader, copies: DscowHeader.CopyState) {
    let size = DscowHeader.copySize
    let (first, second) = try io { () throws(IOError) in
      (try store.read(at: 0, count: size), try store.read(at: UInt64(size), count: size))
    }
    do throws(ImageError) {
      let (header, copies) = try DscowHeader.choose(
        first, second, writable: writable)
      guard store.size >= header.storeSize else {
        throw ImageError(
          .corrupt,
          "cut short: it has \(store.size) bytes where \(header.storeSize) belong: "
            + "copy it again or restore it from a backup")
      }
      return (header, copies)
    } catch {
      throw ImageError(error.code, "store \(store.name): \(error.message)", cause: error.cause)
    }
  }

  /// Opens a store as a disk.
  ///
  /// - Parameters:
  ///   - base: the base that the header names (`header(of:)`), if it names one.
  ///   - force: take a base that has changed; when `writable`, the store is stamped with
  ///     it as it is now.
  /// - Throws: what `header(of:)` throws; `baseMissing`; `baseChanged`; `badRequest`.
  package static func open(
    store: any ByteStore, base: (any ByteStore)?, writable: Bool, force: Bool = false
  ) throws(ImageError) -> Dscow {
    if writable, !store.isWritable {
      throw ImageError(.badRequest, "\(store.name) is open for reading only")
    }
    var (header, copies) = try header(of: store, writable: writable)
    let changed = try difference(store: store, header: header, base: base)
    if let changed {
      guard force else { throw changed.error }
      if writable {
        let path = changed.stamp.path
        header = try restamp(
          store, header,
          base: try base.map { base throws(ImageError) in try stamp(durably: base, path: path) }
            ?? changed.stamp)
        copies = .both
      }
    }
    return Dscow(
      store: store, baseSize: header.base == nil ? 0 : base?.size ?? 0,
      base: header.base == nil ? nil : base, header: header,
      copies: copies, writable: writable, durableBlocks: try countAllocated(store, header))
  }

  /// Opens a store over whatever is given: an extent in the base is one that the store does not
  /// have. Without a base nothing is compared.
  static func open(
    alone store: any ByteStore, over base: (any ByteStore)?, writable: Bool
  ) throws(ImageError) -> Dscow {
    if writable, !store.isWritable {
      throw ImageError(.badRequest, "\(store.name) is open for reading only")
    }
    let (header, copies) = try header(of: store, writable: writable)
    if base != nil, let changed = try difference(store: store, header: header, base: base) {
      throw changed.error
    }
    return Dscow(
      store: store, baseSize: header.size, base: nil, header: header, copies: copies,
      writable: writable,
      durableBlocks: 0)
  }

  private static func difference(
    store: any ByteStore, header: DscowHeader, base: (any ByteStore)?
  ) throws(ImageError) -> (stamp: DscowBase, error: ImageError)? {
    guard let known = header.base else { return nil }
    guard let base else {
      throw ImageError(
        .baseMissing, "store \(store.name) needs its base \(known.path): give it")
    }
    try checkDistinct(store, base)
    let stamp = try stamp(base, path: known.path)
    // While the store is committed into its base that changes, where the store has blocks.
    var reason = difference(known, stamp)
    if header.isCommitting, stamp.size >= known.size {
      let isWatched = header.stampFlags & DscowHeader.hasUntouched != 0
      guard isWatched, try untouched(store, header, base, size: known.size) != header.untouched
      else { return nil }
      reason = "it differs where the commit that is under way leaves it alone"
    }
    return reason.map { reason in
      let error = ImageError(
        .baseChanged,
        "base \(base.name) has changed since store \(store.name) was made from it (\(reason)): "
          + "put the old base back, or, if the disk is known to be right with this one, run "
          + "'dscow_tool accept \(store.name)'")
      return (stamp, error)
    }
  }

  /// Stamps a store with its base as it is now, under the same path or a new one.
  ///
  /// - Throws: what `header(of:)` throws, `badRequest`, `io`.
  @discardableResult
  package static func accept(
    store: any ByteStore, base: any ByteStore, baseName: String? = nil
  ) throws(ImageError) -> DscowHeader {
    let header = try header(of: store, writable: true).header
    guard let known = header.base else {
      throw ImageError(.badRequest, "store \(store.name) has no base that could change")
    }
    try checkDistinct(store, base)
    let stamp = try stamp(durably: base, path: baseName ?? known.path)
    return try restamp(store, header, base: stamp)
  }

  private static func restamp(
    _ store: any ByteStore, _ header: DscowHeader, base: DscowBase
  ) throws(ImageError) -> DscowHeader {
    var changed = header
    changed.base = base
    changed.stampFlags = DscowHeader.stampIsDurable
    return try rewrite(changed, on: store)
  }

  /// Writes a header with the next sequence number over both copies, one after the other,
  /// first the one that does not hold. Returns it.
  static func rewrite(
    _ header: DscowHeader, on store: any ByteStore
  ) throws(ImageError) -> DscowHeader {
    var changed = header
    changed.sequence += 1
    changed.raw = changed.encoded()
    let size = DscowHeader.copySize
    return try io { () throws(IOError) in
      let first = try store.read(at: 0, count: size)
      let order: [UInt64] = first == header.raw ? [1, 0] : [0, 1]
      for copy in order {
        try store.write(changed.raw, at: copy * UInt64(size))
        try store.flush()
      }
      return changed
    }
  }
}
