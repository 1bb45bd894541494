// SPDX-License-Identifier: Apache-2.0
// The byte-store protocol: all that an image format ever sees of the world. It has real
// (FileStore), in-memory, failing and simulated implementations.

/// What tells one file or device from another, as far as it can be known without its path.
package import SystemIO
package struct StoreIdentity: Sendable, Equatable {
  /// Length in bytes.
  package var size: UInt64
  /// Last modification in nanoseconds since 1970; 0 where that means nothing (a device).
  package var modified: UInt64

  /// An identity from its parts.
  package init(size: UInt64, modified: UInt64) {
    self.size = size
    self.modified = modified
  }
}

/// A range of bytes that can be read, written and flushed: a file, a device, or a
/// stand-in of either. Calls may come from any thread, several at once.
package protocol ByteStore: AnyObject, Sendable {
  /// What errors call it: a path where there is one, else a role ("store", "base").
  var name: String { get }

  /// The store that does the work: itself, or that to which it passes calls on.
  var underlying: any ByteStore { get }

  /// Length in bytes, now.
  var size: UInt64 { get }

  /// Whether `write`, `zero` and `resize` are allowed; otherwise they throw EBADF.
  var isWritable: Bool { get }

  /// Whether its length is not its own to choose: a device. It ends where it ends, whatever of
  /// it is in use, and `resize` changes nothing.
  var isFixedSize: Bool { get }

  /// The file or block device that this store is, for what only those can do.
  var file: FileStore? { get }

  /// Where the bytes lie in other stores, if the store can say that.
  var mapped: (any MappedStore)? { get }

  /// The stores of which this one is made, one behind the other.
  var joined: (any JoinedStore)? { get }

  /// For the disk of an image as a store: the store that holds the image.
  var image: (any ByteStore)? { get }

  /// Whether what is read is made at that moment (decompressed, put together), so that it lies
  /// nowhere as it is.
  var isMade: Bool { get }

  /// Identity, to notice a base that has changed.
  func identity() throws(IOError) -> StoreIdentity

  /// Bytes that take up space on the medium, if the store can tell.
  func allocatedBytes() throws(IOError) -> UInt64

  /// Fills the buffer from `offset` in bytes. What lies past the end reads as zeroes.
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError)

  /// Writes the whole buffer at `offset` in bytes, growing the store when need be. Not
  /// durable before `flush`.
  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError)

  /// Makes a range read as zeroes, giving its space back where the medium can.
  func zero(at offset: UInt64, count: UInt64) throws(IOError)

  /// Sets the length in bytes. What is new reads as zeroes.
  func resize(to size: UInt64) throws(IOError)

  /// Gives a range within the length its space now, where the medium can; what it reads as stays.
  /// Throws ENOSPC where there is none.
  func reserve(at offset: UInt64, count: UInt64) throws(IOError)

  /// Returns when everything written before the call is durable.
  func flush() throws(IOError)

  /// As `flush`, and what `identity` says is durable, too.
  func flushAll() throws(IOError)

  /// The next range of bytes at or after an offset that is not known to be a hole, nil when
  /// there is none.
  func nextData(from offset: UInt64) throws(IOError) -> Range<UInt64>?
}

/// A store whose bytes lie in other stores.
package protocol MappedStore: ByteStore {
  /// Those, by number.
  var devices: [any ByteStore] { get }

  /// Where a byte, at a multiple of 512, lives: the device and its byte, or nil for zeroes; and
  /// for how many bytes that goes on, `count` at most.
  func resolve(
    at offset: UInt64, count: UInt64
  ) throws(IOError) -> (device: Int?, offset: UInt64, count: UInt64)
}

/// Several stores as one, each beginning at a multiple of a power of two.
package protocol JoinedStore: ByteStore {
  /// The stores.
  var parts: [any ByteStore] { get }
  /// Store i begins at byte i << bits.
  static var bits: UInt64 { get }

  /// The part that holds a byte, and where in it. Throws EINVAL for one past all of them.
  func place(_ offset: UInt64) throws(IOError) -> (store: any ByteStore, offset: UInt64)
}

extension ByteStore {
  /// Its space is given when it is written to.
  package func reserve(at offset: UInt64, count: UInt64) throws(IOError) {}

  /// Itself.
  package var underlying: any ByteStore { self }

  /// It is none.
  package var file: FileStore? { nil }
  /// It cannot.
  package var mapped: (any MappedStore)? { nil }
  /// It is one.
  package var joined: (any JoinedStore)? { nil }
  /// It is no disk of an image.
  package var image: (any ByteStore)? { nil }
  /// It lies there.
  package var isMade: Bool { false }

  /// A file, which is as long as it is made.
  package var isFixedSize: Bool { false }

  /// A store without a time of its own.
  package func flushAll() throws(IOError) { try flush() }

  /// A store that knows no holes: everything up to its end is data.
  package func nextData(from offset: UInt64) throws(IOError) -> Range<UInt64>? {
    let end = size
    return offset < end ? offset..<end : nil
  }

  /// Reads `count` bytes into a new array. For metadata, not for the path of I/O.
  package func read(at offset: UInt64, count: Int) throws(IOError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var failure: IOError?
    bytes.withUnsafeMutableBytes { buffer in
      do throws(IOError) { try read(buffer, at: offset) } catch { failure = error }
    }
    if let failure { throw failure }
    return bytes
  }

  /// Writes an array. For metadata, not for the path of I/O.
  package func write(_ bytes: [UInt8], at offset: UInt64) throws(IOError) {
    var failure: IOError?
    bytes.withUnsafeBytes { buffer in
      do throws(IOError) { try write(buffer, at: offset) } catch { failure = error }
    }
    if let failure { throw failure }
  }
}
