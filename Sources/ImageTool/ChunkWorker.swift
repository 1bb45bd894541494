// SPDX-License-Identifier: Apache-2.0
// What one thread does with a chunk of the disk: read it, tell data from zeroes, compress.

import DiskFormats
import Glibc
import SystemIO

/// The buffers of one thread, used again for every chunk.
final class ChunkWorker {
  /// The chunk.
  let buffer: UnsafeMutableRawBufferPointer
  private var other: UnsafeMutableRawBufferPointer?
  private var packed: UnsafeMutableRawBufferPointer?
  private let compressor: Qcow2Compressor?
  private let unit: Int

  init(chunk: Int, unit: Int, compression: Qcow2Compression?) throws(ImageError) {
    self.unit = unit
    buffer = .allocate(byteCount: chunk, alignment: 4096)
    guard let compression else {
      compressor = nil
      return
    }
    compressor = try Qcow2Compressor(clusterSize: unit, compression: compression)
    packed = .allocate(byteCount: chunk, alignment: 4096)
  }

  deinit {
    buffer.deallocate()
    other?.deallocate()
    packed?.deallocate()
  }

  private func rounded(_ count: Int) -> Int { (count + unit - 1) / unit * unit }

  private static func fill(
    _ buffer: UnsafeMutableRawBufferPointer, _ pieces: [DiskReader.Piece], to end: Int
  ) throws(ImageError) {
    var done = 0
    for piece in pieces {
      clear(buffer, done, piece.at)
      try toolIO { () throws(IOError) in try piece.read(into: buffer) }
      done = piece.at + piece.count
    }
    clear(buffer, done, end)
  }

  private static func clear(_ buffer: UnsafeMutableRawBufferPointer, _ start: Int, _ end: Int) {
    guard start < end, let base = buffer.baseAddress else { return }
    memset(base + start, 0, end - start)
  }

  /// Reads pieces into the buffer; what lies between them and up to a whole unit is zeroes.
  func read(_ pieces: [DiskReader.Piece], count: Int) throws(ImageError) {
    try Self.fill(buffer, pieces, to: rounded(count))
  }

  /// What of the buffer has to be written, where nothing shows by itself: units that are not
  /// all zeroes. Runs of zeroes shorter than `sparse` go with the data around them.
  func parts(
    _ pieces: [DiskReader.Piece], count: Int, sparse: UInt64, zeroes: Bool
  ) -> [Chunk.Part] {
    let end = rounded(count)
    guard sparse > 0 else { return data(from: 0, to: end) }
    var parts: [Chunk.Part] = []
    /// The run of data that is being collected, and where the zeroes after it begin.
    var run: (start: Int, end: Int)?
    var done = 0
    func close() {
      guard let it = run else { return }
      parts += data(from: it.start, to: it.end)
      run = nil
      done = it.end
    }
    func gap(to next: Int) {
      guard zeroes, next > done else { return }
      parts.append(.zero(at: done, count: next - done))
      done = next
    }
    var position = 0
    for piece in pieces {
      position = max(position, piece.at / unit * unit)
      while position < min(end, rounded(piece.at + piece.count)) {
        let bytes = UnsafeRawBufferPointer(rebasing: buffer[position..<(position + unit)])
        if !isZero(bytes) {
          if let it = run, position > it.end, UInt64(position - it.end) >= sparse { close() }
          if run == nil {
            gap(to: position)
            run = (position, position)
          }
          run?.end = position + unit
        }
        position += unit
      }
    }
    close()
    gap(to: end)
    return parts
  }

  /// A run of data as parts: compressed unit by unit where that is asked for.
  private func data(from start: Int, to end: Int) -> [Chunk.Part] {
    guard let compressor, let packed else { return [.data(at: start, count: end - start)] }
    var parts: [Chunk.Part] = []
    for at in stride(from: start, to: end, by: unit) {
      // A unit's compressed bytes lie close after those of the one before.
      let room = UnsafeMutableRawBufferPointer(rebasing: packed[packedBytes...])
      let unitBytes = UnsafeRawBufferPointer(rebasing: buffer[at..<(at + unit)])
      guard let count = compressor.compress(unitBytes, into: room) else {
        if case .data(let first, let length) = parts.last, first + length == at {
          parts[parts.count - 1] = .data(at: first, count: length + unit)
        } else {
          parts.append(.data(at: at, count: unit))
        }
        continue
      }
      let bytes = packed[packedBytes..<(packedBytes + count)]
      parts.append(.compressed(at: at, bytes: UnsafeRawBufferPointer(rebasing: bytes)))
      packedBytes += count
    }
    return parts
  }

  /// Compressed bytes of this chunk so far.
  private var packedBytes = 0

  /// A new chunk begins.
  func begin() { packedBytes = 0 }

  /// What of the buffer has to be written over a base: units that differ from it, by whose
  /// pieces the base is read.
  func differing(from pieces: [DiskReader.Piece], count: Int) throws(ImageError) -> [Chunk.Part] {
    let under = other ?? .allocate(byteCount: buffer.count, alignment: 4096)
    other = under
    let end = rounded(count)
    try Self.fill(under, pieces, to: end)
    var parts: [Chunk.Part] = []
    guard let mine = buffer.baseAddress, let theirs = under.baseAddress else { return [] }
    for at in stride(from: 0, to: end, by: unit)
    where memcmp(mine + at, theirs + at, unit) != 0 {
      if isZero(UnsafeRawBufferPointer(rebasing: buffer[at..<(at + unit)])) {
        parts.append(.zero(at: at, count: unit))
      } else {
        parts += data(from: at, to: at + unit)
      }
    }
    return parts
  }
}
