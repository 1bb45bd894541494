// Compressed clusters as a byte store. A cluster whose compressed bytes begin at byte o of the
// image is found at o << clusterBits: the address says all, so that reads need no table and
// may come from any thread.

import CZlib
import CZstd
import Glibc
import Posix
import Synchronization

/// Reads compressed clusters of one image.
final class Qcow2Decompressor: ByteStore {
  /// So many clusters are kept, the most recent first.
  private static let kept = 4

  let name: String
  let size: UInt64 = 1 << 62
  let isWritable = false
  private let store: any ByteStore
  private let clusterBits: UInt64
  private let compression: Qcow2Compression
  private let recent = Mutex<[(offset: UInt64, bytes: [UInt8])]>([])

  init(_ store: any ByteStore, clusterBits: UInt32, compression: Qcow2Compression) {
    self.store = store
    self.clusterBits = UInt64(clusterBits)
    self.compression = compression
    name = store.name
  }

  /// Nothing that anybody could know again.
  func identity() -> StoreIdentity { StoreIdentity(size: size, modified: 0) }
  /// None of its own.
  func allocatedBytes() -> UInt64 { 0 }

  /// Reads from within one cluster or several; throws EIO for what cannot be decompressed.
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    // A cluster's successor at address + size is another address altogether: no read crosses.
    let start = Int(offset % (1 << clusterBits))
    guard start + buffer.count <= 1 << clusterBits else {
      throw IOError(EINVAL, "read across compressed clusters", name)
    }
    let bytes = try cluster(at: offset >> clusterBits)
    bytes.withUnsafeBytes {
      buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: $0[start..<(start + buffer.count)]))
    }
  }

  private func cluster(at offset: UInt64) throws(IOError) -> [UInt8] {
    if let kept = recent.withLock({ $0.first { $0.offset == offset }?.bytes }) { return kept }
    let size = 1 << Int(clusterBits)
    // Compressed data is shorter than the cluster unless somebody wrote it without need.
    var bytes = Decompression.cluster(
      try store.read(at: offset, count: size), size, compression)
    if bytes == nil {
      bytes = Decompression.cluster(
        try store.read(at: offset, count: 2 * size), size, compression)
    }
    guard let bytes else {
      throw IOError(EIO, "decompress the cluster at byte \(offset) of", name)
    }
    recent.withLock { recent in
      recent.insert((offset, bytes), at: 0)
      if recent.count > Self.kept { recent.removeLast() }
    }
    return bytes
  }

  /// Throws EBADF.
  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    throw IOError(EBADF, "write", name)
  }
  /// Throws EBADF.
  func zero(at offset: UInt64, count: UInt64) throws(IOError) { throw IOError(EBADF, "zero", name) }
  /// Throws EBADF.
  func resize(to size: UInt64) throws(IOError) { throw IOError(EBADF, "resize", name) }
  /// There is nothing to flush.
  func flush() {}
}

/// Doors to zlib and zstd.
enum Decompression {
  /// `size` bytes out of the beginning of `input`; nil when it does not hold them.
  static func cluster(
    _ input: [UInt8], _ size: Int, _ compression: Qcow2Compression
  ) -> [UInt8]? {
    switch compression {
    case .zlib: inflate(input, size)
    case .zstd: zstd(input, size)
    }
  }

  /// Raw deflate.
  static func inflate(_ input: [UInt8], _ size: Int) -> [UInt8]? {
    var output = [UInt8](repeating: 0, count: size)
    var stream = z_stream()
    let length = Int32(MemoryLayout<z_stream>.size)
    guard inflateInit2_(&stream, -15, zlibVersion(), length) == Z_OK else { return nil }
    defer { inflateEnd(&stream) }
    let left = input.withUnsafeBufferPointer { input in
      output.withUnsafeMutableBufferPointer { output in
        // zlib only reads through next_in.
        stream.next_in = UnsafeMutablePointer(mutating: input.baseAddress)
        stream.avail_in = UInt32(input.count)
        stream.next_out = output.baseAddress
        stream.avail_out = UInt32(output.count)
        let status = CZlib.inflate(&stream, Z_FINISH)
        let isGood = status == Z_STREAM_END || status == Z_BUF_ERROR || status == Z_OK
        return isGood ? stream.avail_out : .max
      }
    }
    return left == 0 ? output : nil
  }

  private static func zstd(_ input: [UInt8], _ size: Int) -> [UInt8]? {
    guard let context = ZSTD_createDCtx() else { return nil }
    defer { ZSTD_freeDCtx(context) }
    var output = [UInt8](repeating: 0, count: size)
    let isFull = input.withUnsafeBytes { input in
      output.withUnsafeMutableBytes { output in
        var from = ZSTD_inBuffer(src: input.baseAddress, size: input.count, pos: 0)
        var to = ZSTD_outBuffer(dst: output.baseAddress, size: output.count, pos: 0)
        while to.pos < to.size {
          let before = (from.pos, to.pos)
          let status = ZSTD_decompressStream(context, &to, &from)
          guard ZSTD_isError(status) == 0, (from.pos, to.pos) != before else { return false }
          if status == 0, to.pos < to.size { return false }
        }
        return true
      }
    }
    return isFull ? output : nil
  }
}
