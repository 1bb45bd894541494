// SPDX-License-Identifier: Apache-2.0
// Compressed clusters of qcow and qcow2 images, and the doors to zlib and zstd. A cluster whose
// compressed bytes begin at byte o of the image is found at o << clusterBits.

import BlockIO
import CZlib
import CZstd
import Glibc
import SystemIO

extension CompressedStore {
  /// The compressed clusters of an image.
  convenience init(_ store: any ByteStore, clusterBits: UInt32, compression: Qcow2Compression) {
    let size = 1 << Int(clusterBits)
    self.init(name: store.name, unit: UInt64(size), stride: UInt64(size)) {
      offset throws(IOError) in
      // Compressed data is shorter than the cluster unless somebody wrote it without need.
      for length in [size, 2 * size] {
        let bytes = try store.read(at: offset, count: length)
        if let cluster = Decompression.cluster(bytes, size, compression) { return cluster }
      }
      throw IOError(EIO, "decompress the cluster at byte \(offset) of", store.name)
    }
  }
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

  /// Deflate: raw, or wrapped as zlib does it. `short` is a length that will do as well, when
  /// the input ends there: the rest is zeroes.
  static func inflate(
    _ input: [UInt8], _ size: Int, wrapped: Bool = false, short: Int? = nil
  ) -> [UInt8]? {
    var output = [UInt8](repeating: 0, count: size)
    var stream = z_stream()
    let length = Int32(MemoryLayout<z_stream>.size)
    guard inflateInit2_(&stream, wrapped ? 15 : -15, zlibVersion(), length) == Z_OK else {
      return nil
    }
    defer { inflateEnd(&stream) }
    let (left, isEnd) = input.withUnsafeBufferPointer { input in
      output.withUnsafeMutableBufferPointer { output in
        // zlib only reads through next_in.
        stream.next_in = UnsafeMutablePointer(mutating: input.baseAddress)
        stream.avail_in = UInt32(input.count)
        stream.next_out = output.baseAddress
        stream.avail_out = UInt32(output.count)
        let status = CZlib.inflate(&stream, Z_FINISH)
        let isGood = status == Z_STREAM_END || status == Z_BUF_ERROR || status == Z_OK
        return (isGood ? stream.avail_out : .max, status == Z_STREAM_END)
      }
    }
    return left == 0 || (isEnd && short == size - Int(left)) ? output : nil
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
