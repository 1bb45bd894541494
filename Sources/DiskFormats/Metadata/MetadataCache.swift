// SPDX-License-Identifier: Apache-2.0
// Tables of an image as they stand on the store, in pages of 4096 bytes read when needed.
//
// Invariants:
// - A page that a commit plan changes is pinned from the making of the plan until it has run:
//   what is read here is always the state before the plan, however far it has come.
// - A page that a plan has changed is dropped, not patched, when the plan has run.
// - Memory is bounded by the cache, whatever the size of the image, save for pinned pages.

import BlockIO
import SystemIO

/// The durable half of an image's tables.
final class MetadataCache {
  static let pageSize: UInt64 = 4096
  /// At most so many pages are kept: 8 MiB.
  private static let slots: UInt64 = 2048

  private struct Slot {
    var index: UInt64
    var bytes: [UInt8]
  }

  private let store: any ByteStore
  private var cache: [Slot?]
  private var pinned: [UInt64: [UInt8]] = [:]
  /// The page that was asked for last.
  private var lastIndex = UInt64.max
  private var last: [UInt8] = []

  init(_ store: any ByteStore) {
    self.store = store
    cache = [Slot?](repeating: nil, count: Int(Self.slots))
  }

  private func slot(_ index: UInt64) -> Int {
    // Tables begin at clusters: without the shift their first pages would all meet in one slot.
    Int((index ^ (index >> 11) ^ (index >> 22)) % Self.slots)
  }

  /// A page by its number.
  func page(_ index: UInt64) throws(ImageError) -> [UInt8] {
    if index == lastIndex { return last }
    let bytes = try load(index)
    lastIndex = index
    last = bytes
    return bytes
  }

  private func load(_ index: UInt64) throws(ImageError) -> [UInt8] {
    if let bytes = pinned[index] { return bytes }
    let slot = slot(index)
    if let kept = cache[slot], kept.index == index { return kept.bytes }
    guard index < UInt64(Int64.max) / Self.pageSize else {
      throw ImageError(.corrupt, "\(store.name): a table lies at page \(index), past any file")
    }
    let bytes = try io { () throws(IOError) in
      try store.read(at: index * Self.pageSize, count: Int(Self.pageSize))
    }
    cache[slot] = Slot(index: index, bytes: bytes)
    return bytes
  }

  /// The big-endian number at a byte offset that is a multiple of its size.
  func big<Number: FixedWidthInteger>(
    _ type: Number.Type, at offset: UInt64
  ) throws(ImageError) -> Number {
    let index = offset / Self.pageSize
    if index == lastIndex { return last.big(type, at: Int(offset % Self.pageSize)) }
    return try page(index).big(type, at: Int(offset % Self.pageSize))
  }

  /// The little-endian number at a byte offset that is a multiple of its size.
  func little<Number: FixedWidthInteger>(
    _ type: Number.Type, at offset: UInt64
  ) throws(ImageError) -> Number {
    try big(type, at: offset).byteSwapped
  }

  /// A sector of 512 bytes by its number.
  func sector(_ index: UInt64) throws(ImageError) -> [UInt8] {
    let start = Int(index % 8) * 512
    return [UInt8](try page(index / 8)[start..<(start + 512)])
  }

  /// Keeps the page of a sector as it is now until `unpin`.
  func pin(sector: UInt64) throws(ImageError) {
    let index = sector / 8
    if pinned[index] == nil { pinned[index] = try load(index) }
  }

  /// A plan that changed these sectors, and clusters of a size, has run.
  func unpin(sectors: some Sequence<UInt64>, fresh: some Sequence<UInt64>, size: UInt64) {
    for sector in sectors { drop(page: sector / 8) }
    for start in fresh {
      for page in (start / Self.pageSize)...((start + size - 1) / Self.pageSize) {
        drop(page: page)
      }
    }
    pinned = [:]
    lastIndex = .max
  }

  /// Bytes that are pinned nowhere were written by a plan that has run.
  func drop(from start: UInt64, to end: UInt64) {
    for page in (start / Self.pageSize)...((end - 1) / Self.pageSize) { drop(page: page) }
    lastIndex = .max
  }

  /// Forgets everything, because the store was written to directly.
  func dropAll() {
    precondition(pinned.isEmpty, "a plan is under way")
    cache = [Slot?](repeating: nil, count: Int(Self.slots))
    lastIndex = .max
  }

  private func drop(page index: UInt64) {
    let slot = slot(index)
    if cache[slot]?.index == index { cache[slot] = nil }
  }
}
