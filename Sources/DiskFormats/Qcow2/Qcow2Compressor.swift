// SPDX-License-Identifier: Apache-2.0
// Compressing clusters, a compressor a thread: what it needs is made once and used for every
// cluster.
// Source: the qcow2 specification, section "Compressed Clusters Descriptor".

import CZlib
import CZstd
import Glibc

/// Compresses clusters one after the other. Used from one thread.
package final class Qcow2Compressor {
  private let clusterSize: Int
  private let compression: Qcow2Compression
  private let stream: UnsafeMutablePointer<z_stream>
  private let context: OpaquePointer?

  /// Throws `io` (ENOMEM) when there is no memory.
  package init(clusterSize: Int, compression: Qcow2Compression) throws(ImageError) {
    self.clusterSize = clusterSize
    self.compression = compression
    stream = .allocate(capacity: 1)
    stream.initialize(to: z_stream())
    context = compression == .zstd ? ZSTD_createCCtx() : nil
    let isReady: Bool
    switch compression {
    case .zstd: isReady = context != nil
    case .zlib:
      // A window of 4 KiB: whoever reads has no larger one.
      isReady =
        deflateInit2_(
          stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY, zlibVersion(),
          Int32(MemoryLayout<z_stream>.size)) == Z_OK
    }
    guard isReady else { throw ImageError(.io, "there is no memory to compress with") }
  }

  deinit {
    // Of a stream that was never begun zlib says so, and does nothing.
    deflateEnd(stream)
    stream.deallocate()
    ZSTD_freeCCtx(context)
  }

  /// Compresses one cluster into `output`, which has room for one; returns how many bytes it
  /// took, nil when the cluster gets no shorter.
  package func compress(
    _ input: UnsafeRawBufferPointer, into output: UnsafeMutableRawBufferPointer
  ) -> Int? {
    let most = clusterSize - 1
    switch compression {
    case .zstd:
      let count = ZSTD_compress2(context, output.baseAddress, most, input.baseAddress, input.count)
      return ZSTD_isError(count) == 0 ? count : nil
    case .zlib:
      guard deflateReset(stream) == Z_OK else { return nil }
      // zlib only reads through next_in.
      let bytes = UnsafeMutableRawPointer(mutating: input.baseAddress)
      stream.pointee.next_in = bytes?.assumingMemoryBound(to: UInt8.self)
      stream.pointee.avail_in = UInt32(input.count)
      stream.pointee.next_out = output.baseAddress?.assumingMemoryBound(to: UInt8.self)
      stream.pointee.avail_out = UInt32(most)
      guard deflate(stream, Z_FINISH) == Z_STREAM_END else { return nil }
      return most - Int(stream.pointee.avail_out)
    }
  }
}
