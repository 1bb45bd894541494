// SPDX-License-Identifier: Apache-2.0
// The threads of a conversion, and what each does with a chunk.

import BlockIO
import DiskFormats
import Glibc
import Synchronization
import SystemIO

/// One conversion. What several threads share is guarded by `cursor` or `turnstile`.
final class ConvertJob: @unchecked Sendable {
  // `state`, the readers and the chain are used under `cursor` only; `target` only between
  // entering and leaving the turnstile. Everything else does not change.
  private static let chunk = 1 << 20

  private struct State {
    var next: UInt64 = 0
    var number = 0
    var failure: ImageError?
  }

  /// A chunk that was taken: its number, and where its data lies.
  private struct Taken {
    var number = 0
    var start: UInt64 = 0
    var count = 0
    /// A run of zeroes that the target is told of, instead of data.
    var zeroes: UInt64 = 0
    var pieces: [DiskReader.Piece] = []
    var base: [DiskReader.Piece] = []

    /// Bytes of the source that have to be read for it.
    var data: UInt64 { pieces.reduce(0) { $0 + UInt64($1.count) } }
  }

  private let request: ImageTool.ConvertRequest
  private let reader: DiskReader
  /// What shows where nothing is written to the target.
  private let base: DiskReader?
  /// From this image of the source down it has what the base has.
  private let shared: Int
  private let target: any ConvertTarget
  private let turnstile = Turnstile()
  private let cursor = Mutex(())
  private var state = State()
  private let size: UInt64
  private let chunk: Int
  private let compression: Qcow2Compression?

  init(
    _ request: ImageTool.ConvertRequest, _ chain: Layers,
    base: (kind: ImageKind, file: any ByteStore, disk: any ByteStore)?, _ target: any ConvertTarget
  ) throws(ImageError) {
    self.request = request
    self.target = target
    size = chain.size
    chunk = max(Self.chunk, target.unit)
    compression = request.compress ? target.compression : nil
    var under: DiskReader?
    var shared = Int.max
    if let base {
      for (depth, layer) in chain.layers.enumerated() where depth > 0 {
        // What both have below is the same without a look.
        if try Dscow.same(layer.store, base.file) { shared = depth }
      }
      let file = base.file
      under = DiskReader(
        try Chain(
          file, kind: base.kind, among: request.source.formats,
          resolve: ImageSource.resolver(untrusted: request.source.untrusted)
        ).layers())
    }
    reader = DiskReader(chain)
    self.shared = shared
    self.base = under
  }

  /// Does all of it. Throws the first error.
  func run() throws(ImageError) {
    if request.progress.isOn { request.progress.expect(try measure()) }
    let threads = max(1, request.threads ?? Crew.usual)
    Crew.run(threads) { _ in self.work() }
    if let failure = state.failure { throw failure }
  }

  /// How many bytes of the source will be read.
  private func measure() throws(ImageError) -> UInt64 {
    var bytes: UInt64 = 0
    while let taken = try take() { bytes += taken.data }
    cursor.withLock { _ in state = State() }
    return bytes
  }

  private func fail(_ error: ImageError) {
    cursor.withLock { _ in
      if state.failure == nil { state.failure = error }
    }
    turnstile.close()
  }

  private func work() {
    do throws(ImageError) {
      let worker = try ChunkWorker(chunk: chunk, unit: target.unit, compression: compression)
      while let taken = try take() {
        try finish(taken, worker)
        request.progress.advance(taken.data)
      }
    } catch { fail(error) }
  }

  // MARK: Taking

  private func take() throws(ImageError) -> Taken? {
    let result = cursor.withLock { _ -> Result<Taken?, ImageError> in
      guard state.failure == nil else { return .success(nil) }
      do throws(ImageError) { return .success(try takeNext()) } catch { return .failure(error) }
    }
    return try result.get()
  }

  private func takeNext() throws(ImageError) -> Taken? {
    var taken = Taken()
    let isSparse = request.sparse > 0
    if base == nil, isSparse {
      let data = try reader.nextData(from: state.next, to: size)
      let start = data / UInt64(chunk) * UInt64(chunk)
      let skipped = data == size ? size : max(start, state.next)
      if skipped > state.next, target.wantsZeroes {
        taken.zeroes = skipped - state.next
        return number(&taken, skipped)
      }
      state.next = skipped
    } else if let base {
      try skipAlike(base)
    }
    guard state.next < size else { return nil }
    let end = min(size, (state.next / UInt64(chunk) + 1) * UInt64(chunk))
    try reader.pieces(from: state.next, to: end, into: &taken.pieces)
    try base?.pieces(
      from: state.next, to: min(end, base?.size ?? 0), into: &taken.base)
    return number(&taken, end)
  }

  private func number(_ taken: inout Taken, _ end: UInt64) -> Taken {
    taken.start = state.next
    taken.count = taken.zeroes > 0 ? 0 : Int(end - state.next)
    taken.number = state.number
    state.number += 1
    state.next = end
    return taken
  }

  /// Skips whole chunks in which source and base are both without data, or the base is what the
  /// source has there too.
  private func skipAlike(_ base: DiskReader) throws(ImageError) {
    while state.next < size {
      let end = min(size, state.next + UInt64(chunk))
      var offset = state.next
      while offset < end {
        let own = try reader.chain.run(at: offset, limit: end - offset, above: shared)
        if own.depth == nil, own.reached == shared {
          offset += own.count
          continue
        }
        let (kind, count) = try reader.run(at: offset, limit: own.count)
        if case .data = kind { return }
        let until = min(offset + count, base.size)
        if offset < until, try base.nextData(from: offset, to: until) < until { return }
        offset += count
      }
      state.next = end
    }
  }

  // MARK: Doing

  private func finish(_ taken: Taken, _ worker: ChunkWorker) throws(ImageError) {
    var chunk = Chunk(start: taken.start, bytes: UnsafeRawBufferPointer(worker.buffer), parts: [])
    worker.begin()
    if taken.zeroes == 0 {
      if base != nil {
        try worker.read(taken.pieces, count: taken.count)
        chunk.parts = try worker.differing(from: taken.base, count: taken.count)
      } else {
        try worker.read(taken.pieces, count: taken.count)
        chunk.parts = worker.parts(
          taken.pieces, count: taken.count, sparse: request.sparse, zeroes: target.wantsZeroes)
      }
    }
    guard turnstile.enter(taken.number) else { return }
    let writes: [ChunkWrite]
    if taken.zeroes > 0 {
      try target.zero(at: taken.start, count: taken.zeroes)
      writes = []
    } else {
      writes = try target.place(chunk)
    }
    turnstile.leave()
    try toolIO { () throws(IOError) in
      for write in writes { try write.store.write(write.bytes, at: write.offset) }
    }
  }
}
