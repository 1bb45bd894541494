// SPDX-License-Identifier: Apache-2.0
// An image's metadata without the loop's waiting for a medium.
//
// What a format is asked on the loop's thread it has to answer from memory. While it is asked, a read
// that is not in the page cache, and whatever changes a file, is not done but noted as wanted, and
// fails; so does everything that follows. The format ends the question with an error, and is as if it
// had not been asked, as with any failure of a store. What was wanted is then done on a thread, and the
// format is asked again: it finds done what it wanted, and comes further, or to an end.
//
// Invariants:
// - Between two attempts of a question the format is asked nothing else, and makes no commit plan.
// - What was done counts for one question, and for as long as no commit plan ends: what was read before
//   that may be older than the tables are.
// - A format decides alike when it is asked again, or has written into space that nothing refers to.

import BlockIO
import DiskFormats
import DiskModel
import Glibc
import Synchronization
import SystemIO

/// Notes what a question to a format has to wait for. The stores of the image are behind it.
package final class MetadataGate: Sendable {
  /// What is not done on the loop's thread.
  fileprivate enum Operation: Hashable, Sendable {
    case read(offset: UInt64, count: Int)
    case write(offset: UInt64, bytes: [UInt8])
    case zero(offset: UInt64, count: UInt64)
    case resize(UInt64)
    case reserve(offset: UInt64, count: UInt64)
  }

  private struct Key: Hashable, Sendable {
    let store: ObjectIdentifier
    let operation: Operation
  }

  /// Bytes of a store around a read, which was for less.
  private struct Window: Sendable {
    let store: ObjectIdentifier
    let offset: UInt64
    let bytes: [UInt8]

    /// Where a read's bytes lie in it, if it has all of them.
    func range(_ store: ObjectIdentifier, _ offset: UInt64, _ count: Int) -> Range<Int>? {
      guard store == self.store, offset >= self.offset,
        offset - self.offset <= UInt64(bytes.count),
        UInt64(count) <= UInt64(bytes.count) - (offset - self.offset)
      else { return nil }
      let start = Int(offset - self.offset)
      return start..<start + count
    }
  }

  private struct State: Sendable {
    var wanted: (store: any ByteStore, operation: Operation)?
    /// Reads that were for more than a window, or failed, and changes; with an errno, or nil.
    var done: [Key: IOError?] = [:]
    var windows: [Window] = []
    /// Rises when what was done counts no longer.
    var generation: UInt64 = 0
  }

  /// Reads take so many bytes with them: tables lie together.
  private static let window: UInt64 = 64 << 10

  private let state = Mutex(State())
  /// The thread on which a format is being asked, 0 for none.
  private let asking = Atomic<UInt>(0)

  /// A gate with nothing behind it.
  package init() {}

  private static var thread: UInt { UInt(pthread_self()) }

  /// Whether the calling thread may not wait.
  fileprivate var isClosed: Bool {
    let thread = asking.load(ordering: .relaxed)
    return thread != 0 && thread == Self.thread
  }

  /// Asks a format. nil: something is wanted first, see `fetch`; the format has changed nothing.
  /// Throws what the format throws otherwise.
  func ask<Answer>(_ question: () throws(ImageError) -> Answer) throws(ImageError) -> Answer? {
    asking.store(Self.thread, ordering: .relaxed)
    defer { asking.store(0, ordering: .relaxed) }
    do throws(ImageError) {
      let answer = try question()
      // An answer that did without: what was wanted was not needed for it.
      forget()
      return answer
    } catch {
      if state.withLock({ $0.wanted != nil }) { return nil }
      forget()
      throw error
    }
  }

  /// What was done counts no longer: a question is answered, or a commit plan has ended.
  func forget() {
    state.withLock { state in
      state.generation += 1
      state.wanted = nil
      guard !state.done.isEmpty || !state.windows.isEmpty else { return }
      state.done = [:]
      state.windows = []
    }
  }

  /// Does what is wanted. Blocks; on any thread but the one that asks.
  func fetch() {
    let (wanted, generation) = state.withLock { ($0.wanted, $0.generation) }
    guard let (store, operation) = wanted else { return }
    var window: Window?
    var failure: IOError?
    do throws(IOError) { window = try Self.carryOut(operation, on: store) } catch {
      failure = error
    }
    state.withLock { state in
      state.wanted = nil
      guard state.generation == generation else { return }
      let id = ObjectIdentifier(store)
      if case .read = operation {} else { state.windows.removeAll { $0.store == id } }
      if let window {
        state.windows.append(window)
      } else {
        state.done.updateValue(failure, forKey: Key(store: id, operation: operation))
      }
    }
  }

  private static func carryOut(
    _ operation: Operation, on store: any ByteStore
  ) throws(IOError) -> Window? {
    switch operation {
    case .read(let offset, let count):
      let id = ObjectIdentifier(store)
      let start = offset - offset % window
      if offset % window + UInt64(count) <= window {
        // Whoever reads more than was wanted does not fail for it.
        do throws(IOError) {
          let bytes = try store.read(at: start, count: Int(window))
          return Window(store: id, offset: start, bytes: bytes)
        } catch {}
      }
      return Window(store: id, offset: offset, bytes: try store.read(at: offset, count: count))
    case .write(let offset, let bytes): try store.write(bytes, at: offset)
    case .zero(let offset, let count): try store.zero(at: offset, count: count)
    case .resize(let size): try store.resize(to: size)
    case .reserve(let offset, let count): try store.reserve(at: offset, count: count)
    }
    return nil
  }

  // MARK: On the thread that asks

  fileprivate func read(
    _ store: any ByteStore, _ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64
  ) throws(IOError) {
    let id = ObjectIdentifier(store)
    let bytes = state.withLock { state -> [UInt8]? in
      for window in state.windows {
        guard let range = window.range(id, offset, buffer.count) else { continue }
        return [UInt8](window.bytes[range])
      }
      return nil
    }
    if let bytes { return buffer.copyBytes(from: bytes) }
    if store.file?.readAtOnce(buffer, at: offset) == true { return }
    try perform(.read(offset: offset, count: buffer.count), on: store)
  }

  /// Throws what the operation threw, or that it is wanted.
  fileprivate func perform(_ operation: Operation, on store: any ByteStore) throws(IOError) {
    let key = Key(store: ObjectIdentifier(store), operation: operation)
    let done = state.withLock { state -> IOError?? in
      if let done = state.done[key] { return done }
      if state.wanted == nil { state.wanted = (store, operation) }
      return nil
    }
    guard let done else { throw IOError(EAGAIN, "wait for", store.name) }
    if let failure = done { throw failure }
  }
}

/// A store of an image behind a gate. Safe from any thread; only one that asks a format may not wait.
final class GatedStore: ByteStore {
  let underlying: any ByteStore
  private let gate: MetadataGate

  init(_ store: any ByteStore, _ gate: MetadataGate) {
    underlying = store
    self.gate = gate
  }

  var name: String { underlying.name }
  var size: UInt64 { underlying.size }
  var isWritable: Bool { underlying.isWritable }
  var isFixedSize: Bool { underlying.isFixedSize }
  func identity() throws(IOError) -> StoreIdentity { try underlying.identity() }
  func allocatedBytes() throws(IOError) -> UInt64 { try underlying.allocatedBytes() }
  func flush() throws(IOError) { try underlying.flush() }
  func flushAll() throws(IOError) { try underlying.flushAll() }
  func nextData(from offset: UInt64) throws(IOError) -> Range<UInt64>? {
    try underlying.nextData(from: offset)
  }

  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    guard gate.isClosed else { return try underlying.read(buffer, at: offset) }
    try gate.read(underlying, buffer, at: offset)
  }

  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    guard gate.isClosed else { return try underlying.write(buffer, at: offset) }
    try gate.perform(.write(offset: offset, bytes: [UInt8](buffer)), on: underlying)
  }

  func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    guard gate.isClosed else { return try underlying.zero(at: offset, count: count) }
    try gate.perform(.zero(offset: offset, count: count), on: underlying)
  }

  func reserve(at offset: UInt64, count: UInt64) throws(IOError) {
    guard gate.isClosed else { return try underlying.reserve(at: offset, count: count) }
    try gate.perform(.reserve(offset: offset, count: count), on: underlying)
  }

  func resize(to size: UInt64) throws(IOError) {
    guard gate.isClosed else { return try underlying.resize(to: size) }
    // A device changes nothing, and a file that is as long already need not.
    guard !isFixedSize else { return try underlying.resize(to: size) }
    try gate.perform(.resize(size), on: underlying)
  }
}
