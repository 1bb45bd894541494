// SPDX-License-Identifier: Apache-2.0
// A disk that is read from beginning to end: where its data lies, holes of files left out.

import BlockIO
import DiskFormats
import Glibc
import SystemIO

/// A chain, and what is known of the holes of its files. Used from one thread at a time.
final class DiskReader {
  /// Data of the disk: so many bytes at a place of a store, and where they belong.
  struct Piece {
    var store: any ByteStore
    var place: UInt64
    /// From the start of what was asked for.
    var at: Int
    var count: Int

    /// Reads the piece to its place in a buffer.
    func read(into buffer: UnsafeMutableRawBufferPointer) throws(IOError) {
      try store.read(
        UnsafeMutableRawBufferPointer(rebasing: buffer[at..<(at + count)]), at: place)
    }
  }

  /// A file, and the data in it that was found last.
  private struct Known {
    let file: FileStore
    let hasHoles: Bool
    var from: UInt64 = 0
    var data: Range<UInt64> = 0..<0
  }

  let chain: Layers
  private var known: [ObjectIdentifier: Known] = [:]
  var size: UInt64 { chain.size }

  init(_ chain: Layers) {
    self.chain = chain
  }

  /// What a run of the disk is.
  enum Kind {
    /// No image says anything.
    case absent
    /// Zeroes; of a hole in a file as well.
    case zero
    /// Data at a place of a store.
    case data(any ByteStore, UInt64)
  }

  /// What the disk is from a byte on, and for how long.
  func run(at offset: UInt64, limit: UInt64) throws(ImageError) -> (kind: Kind, count: UInt64) {
    let run = try chain.run(at: offset, limit: limit)
    switch run.content {
    case .absent: return (.absent, run.count)
    case .zero: return (.zero, run.count)
    case .made(let store, let place): return (.data(store, place), run.count)
    case .data(let store, let place):
      let (isHole, count) = try hole(store, at: place, limit: run.count)
      return (isHole ? .zero : .data(store, place), count)
    }
  }

  /// Whether a store has a hole at a byte, and for how long that is so.
  func hole(
    _ store: any ByteStore, at place: UInt64, limit: UInt64
  ) throws(ImageError) -> (Bool, UInt64) {
    let id = ObjectIdentifier(store)
    if known[id] == nil {
      guard let file = store.file else { return (false, limit) }
      let allocated = try toolIO { () throws(IOError) in try file.allocatedBytes() }
      // A few bytes less are the end of the last block, or what a file system packs away.
      known[id] = Known(
        file: file, hasHoles: !file.isBlockDevice && allocated + 65536 < file.size)
    }
    guard var it = known[id], it.hasHoles else { return (false, limit) }
    if place < it.from || place >= it.data.upperBound {
      let next = try toolIO { () throws(IOError) in try it.file.nextData(from: place) }
      it.from = place
      it.data = next ?? (UInt64.max - 1)..<UInt64.max
      known[id] = it
    }
    guard place < it.data.lowerBound else {
      return (false, min(limit, it.data.upperBound - place))
    }
    return (true, min(limit, it.data.lowerBound - place))
  }

  /// Adds the data of a range to `pieces`; what is left out reads as zeroes.
  func pieces(
    from start: UInt64, to end: UInt64, into pieces: inout [Piece]
  ) throws(ImageError) {
    var offset = start
    while offset < end {
      let (kind, count) = try run(at: offset, limit: end - offset)
      if case .data(let store, let place) = kind {
        let at = Int(offset - start)
        if let last = pieces.last, last.store === store, last.at + last.count == at,
          last.place + UInt64(last.count) == place, store.file != nil
        {
          pieces[pieces.count - 1].count += Int(count)
        } else {
          pieces.append(Piece(store: store, place: place, at: at, count: Int(count)))
        }
      }
      offset += count
    }
  }

  /// The first byte from one on that may be other than zero, `end` at most.
  func nextData(from start: UInt64, to end: UInt64) throws(ImageError) -> UInt64 {
    var offset = start
    // Where data goes on nobody needs to know here how far.
    var limit: UInt64 = 1 << 16
    while offset < end {
      let (kind, count) = try run(at: offset, limit: min(limit, end - offset))
      if case .data = kind { break }
      offset += count
      limit = min(limit * 8, 1 << 40)
    }
    return offset
  }
}

/// Whether all bytes are zero.
func isZero(_ bytes: UnsafeRawBufferPointer) -> Bool {
  guard let base = bytes.baseAddress, bytes.count >= 16 else {
    return bytes.allSatisfy { $0 == 0 }
  }
  // When the first bytes are, and each is like the one so many before it, all are.
  let head =
    base.loadUnaligned(as: UInt64.self) | base.loadUnaligned(fromByteOffset: 8, as: UInt64.self)
  return head == 0 && memcmp(base, base + 16, bytes.count - 16) == 0
}
