// SPDX-License-Identifier: Apache-2.0
// dmu-img compare: whether two disks hold the same.

package import DiskFormats
import Glibc
import Synchronization
package import SystemIO

extension ImageTool {
  /// Compares two disks and says how they differ. Returns whether they are the same. The longer
  /// one has to be zeroes past the end of the other; with `strict` they have to be of one
  /// length, and agree on what is there.
  package static func compare(
    _ one: ImageSource, _ other: ImageSource, strict: Bool, quiet: Bool, progress: Progress,
    to output: Output
  ) throws(ImageError) -> Bool {
    let (first, second) = (try one.layers(), try other.layers())
    func say(_ words: String) { if !quiet { output.put(words + "\n") } }
    if strict, first.size != second.size {
      say("Strict mode: Image size mismatch!")
      return false
    }
    if strict, let offset = try differingPresence(first, second) {
      say("Strict mode: Offset \(offset) block status mismatch!")
      return false
    }
    let job = CompareJob(first, second, progress)
    let difference = try job.run()
    progress.finish()
    if let difference {
      say("Content mismatch at offset \(difference)!")
      return false
    }
    if first.size != second.size { say("Warning: Image size mismatch!") }
    say("Images are identical.")
    return true
  }

  /// The first byte of which only one of two disks says anything.
  private static func differingPresence(
    _ one: Layers, _ other: Layers
  ) throws(ImageError) -> UInt64? {
    var offset: UInt64 = 0
    while offset < one.size {
      let mine = try one.run(at: offset, limit: one.size - offset)
      let theirs = try other.run(at: offset, limit: mine.count)
      guard (mine.depth == nil) == (theirs.depth == nil) else { return offset }
      offset += min(mine.count, theirs.count)
    }
    return nil
  }
}

/// One comparison. `state` and the readers are used under `lock` only.
private final class CompareJob: @unchecked Sendable {
  private static let chunk = 512 << 10

  private struct State {
    var next: UInt64 = 0
    var failure: ImageError?
    var difference: UInt64?
  }

  private let one: DiskReader
  private let other: DiskReader
  private let size: UInt64
  private let progress: Progress
  private let lock = Mutex(())
  private var state = State()

  init(_ one: Layers, _ other: Layers, _ progress: Progress) {
    self.one = DiskReader(one)
    self.other = DiskReader(other)
    size = max(one.size, other.size)
    self.progress = progress
  }

  /// The first byte that differs; nil when none does.
  func run() throws(ImageError) -> UInt64? {
    if progress.isOn { progress.expect(try measure()) }
    Crew.run(Crew.usual) { _ in self.work() }
    if let failure = state.failure { throw failure }
    return state.difference
  }

  /// How many bytes of the two will be read.
  private func measure() throws(ImageError) -> UInt64 {
    var pieces: (one: [DiskReader.Piece], other: [DiskReader.Piece]) = ([], [])
    var bytes: UInt64 = 0
    while try take(&pieces) != nil { bytes += Self.data(pieces) }
    lock.withLock { _ in state = State() }
    return bytes
  }

  private static func data(
    _ pieces: (one: [DiskReader.Piece], other: [DiskReader.Piece])
  ) -> UInt64 {
    (pieces.one + pieces.other).reduce(0) { $0 + UInt64($1.count) }
  }

  private func work() {
    do throws(ImageError) {
      let (mine, theirs) = (
        try ChunkWorker(chunk: Self.chunk, unit: 512, compression: nil),
        try ChunkWorker(chunk: Self.chunk, unit: 512, compression: nil)
      )
      var pieces: (one: [DiskReader.Piece], other: [DiskReader.Piece]) = ([], [])
      while let (start, count) = try take(&pieces) {
        try mine.read(pieces.one, count: count)
        try theirs.read(pieces.other, count: count)
        guard let a = mine.buffer.baseAddress, let b = theirs.buffer.baseAddress else { return }
        if memcmp(a, b, count) != 0 {
          // The sector, as QEMU's comparison has it, is too coarse: the byte.
          let index = (0..<count).first { mine.buffer[$0] != theirs.buffer[$0] } ?? 0
          note(start + UInt64(index))
          return
        }
        progress.advance(Self.data(pieces))
      }
    } catch {
      lock.withLock { _ in if state.failure == nil { state.failure = error } }
    }
  }

  private func note(_ offset: UInt64) {
    lock.withLock { _ in state.difference = min(offset, state.difference ?? .max) }
  }

  /// The next chunk of which something has to be read.
  private func take(
    _ pieces: inout (one: [DiskReader.Piece], other: [DiskReader.Piece])
  ) throws(ImageError) -> (start: UInt64, count: Int)? {
    var taken: (one: [DiskReader.Piece], other: [DiskReader.Piece]) = ([], [])
    let result = lock.withLock { _ -> Result<(start: UInt64, count: Int)?, ImageError> in
      do throws(ImageError) {
        return .success(try takeNext(&taken))
      } catch { return .failure(error) }
    }
    pieces = taken
    return try result.get()
  }

  private func takeNext(
    _ pieces: inout (one: [DiskReader.Piece], other: [DiskReader.Piece])
  ) throws(ImageError) -> (start: UInt64, count: Int)? {
    guard state.failure == nil, state.difference == nil else { return nil }
    let first = try one.nextData(from: min(state.next, one.size), to: one.size)
    let second = try other.nextData(from: min(state.next, other.size), to: other.size)
    var next = size
    if first < one.size { next = min(next, first) }
    if second < other.size { next = min(next, second) }
    guard next < size else { return nil }
    let start = max(state.next, next / UInt64(Self.chunk) * UInt64(Self.chunk))
    let end = min(size, start + UInt64(Self.chunk))
    state.next = end
    try one.pieces(from: start, to: min(end, max(start, one.size)), into: &pieces.one)
    try other.pieces(from: start, to: min(end, max(start, other.size)), into: &pieces.other)
    // What both have at one place is the same.
    if pieces.one.count == 1, pieces.other.count == 1,
      pieces.one[0].store === pieces.other[0].store, pieces.one[0].place == pieces.other[0].place
    {
      pieces = ([], [])
    }
    return (start, Int(end - start))
  }
}
