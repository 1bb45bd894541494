// SPDX-License-Identifier: Apache-2.0
// The bitmap as it stands on the store: one bit a block, set when the block has a place in
// the store, bit b % 8 of byte b / 8 for block b (which makes little-endian words of any
// width). Pages of 4096 bytes are read when needed and kept in a direct-mapped cache.
//
// Invariants:
// - A cached page equals the one on the store, save that a page of which a commit plan is
//   being written may be ahead there. Nothing here is ever waiting to be written.
// - Memory is bounded by the cache, whatever the size of the disk.

import BlockIO
import DiskModel
import SystemIO

/// The durable half of a dscow mapping.
struct DscowBitmap {
  /// Blocks that one page speaks of.
  static let blocksPerPage = DscowHeader.pageSize * 8
  private static let words = Int(DscowHeader.pageSize) / 8
  /// At most so many pages are kept: 4 MiB.
  private static let slots: UInt64 = 1024

  /// A page's bits.
  enum Page {
    case empty
    case full
    case mixed([UInt64])

    init(_ words: [UInt64]) {
      if words.allSatisfy({ $0 == 0 }) {
        self = .empty
      } else if words.allSatisfy({ $0 == .max }) {
        self = .full
      } else {
        self = .mixed(words)
      }
    }

    /// The bits as 64-bit words.
    var words: [UInt64] {
      switch self {
      case .empty: [UInt64](repeating: 0, count: DscowBitmap.words)
      case .full: [UInt64](repeating: .max, count: DscowBitmap.words)
      case .mixed(let words): words
      }
    }
  }

  private struct Slot {
    var index: UInt64
    var page: Page
  }

  private let store: any ByteStore
  private let offset: UInt64
  private var cache: [Slot?]
  private var scratch = [UInt64](repeating: 0, count: words)

  init(store: any ByteStore, header: DscowHeader) {
    self.store = store
    self.offset = header.bitmapOffset
    let pages = (header.blocks - 1) / Self.blocksPerPage + 1
    cache = [Slot?](repeating: nil, count: Int(min(pages, Self.slots)))
  }

  /// Where a page stands on the store, in bytes.
  func place(ofPage index: UInt64) -> UInt64 { offset + index * DscowHeader.pageSize }

  /// A page, from the cache or the store.
  mutating func page(_ index: UInt64) throws(ImageError) -> Page {
    let slot = Int(index % UInt64(cache.count))
    if let kept = cache[slot], kept.index == index { return kept.page }
    let page = try load(index)
    cache[slot] = Slot(index: index, page: page)
    return page
  }

  private mutating func load(_ index: UInt64) throws(ImageError) -> Page {
    var failure: IOError?
    let offset = place(ofPage: index)
    scratch.withUnsafeMutableBytes { buffer in
      do throws(IOError) {
        try store.read(buffer, at: offset)
      } catch { failure = error }
    }
    if let failure { throw ImageError(failure) }
    #if _endian(big)
      for word in scratch.indices { scratch[word] = UInt64(littleEndian: scratch[word]) }
    #endif
    return Page(scratch)
  }

  /// Whether a block's bit is set, and how many from it on, up to `limit` and to the end of
  /// its page, are alike.
  mutating func run(
    from block: UInt64, limit: UInt64
  ) throws(ImageError) -> (isSet: Bool, count: UInt64) {
    let start = block % Self.blocksPerPage
    let limit = min(limit, Self.blocksPerPage - start)
    switch try page(block / Self.blocksPerPage) {
    case .empty: return (false, limit)
    case .full: return (true, limit)
    case .mixed(let words): return Self.run(in: words, from: Int(start), limit: limit)
    }
  }

  private static func run(
    in words: [UInt64], from start: Int, limit: UInt64
  ) -> (isSet: Bool, count: UInt64) {
    let isSet = words[start / 64] >> UInt64(start % 64) & 1 == 1
    let flip: UInt64 = isSet ? .max : 0
    var word = start / 64
    // Bits that differ from the first; those before it are made alike.
    var differing = (words[word] ^ flip) & (.max << UInt64(start % 64))
    while differing == 0 {
      word += 1
      guard word < words.count, UInt64(word * 64 - start) < limit else { return (isSet, limit) }
      differing = words[word] ^ flip
    }
    let end = word * 64 + differing.trailingZeroBitCount
    return (isSet, min(limit, UInt64(end - start)))
  }

  /// The page with more bits set, as bytes; runs lie within the page.
  mutating func bytes(
    ofPage index: UInt64, adding runs: [PendingPlacements.Run]
  ) throws(ImageError) -> [UInt8] {
    var words = try page(index).words
    for run in runs { Self.set(run.blocks, in: &words) }
    #if _endian(big)
      for word in words.indices { words[word] = words[word].littleEndian }
    #endif
    return words.withUnsafeBytes { [UInt8]($0) }
  }

  /// Notes that runs of a page have been written to the store.
  mutating func set(_ runs: [PendingPlacements.Run], inPage index: UInt64) {
    let slot = Int(index % UInt64(cache.count))
    guard let kept = cache[slot], kept.index == index else { return }
    var words = kept.page.words
    for run in runs { Self.set(run.blocks, in: &words) }
    cache[slot] = Slot(index: index, page: Page(words))
  }

  private static func set(_ run: BlockRange, in words: inout [UInt64]) {
    var bit = Int(run.first % blocksPerPage)
    let end = bit + Int(run.count)
    while bit < end {
      let count = min(64 - bit % 64, end - bit)
      let mask: UInt64 = count == 64 ? .max : (1 << UInt64(count)) - 1
      words[bit / 64] |= mask << UInt64(bit % 64)
      bit += count
    }
  }
}
