// SPDX-License-Identifier: Apache-2.0
// dmu-img bench: so many requests to an image, so many at a time.

import BlockIO
package import DiskFormats
import Glibc
import Synchronization
package import SystemIO

extension ImageTool {
  /// What `bench` is asked for.
  package struct BenchRequest: Sendable {
    /// The image.
    package var source: ImageSource
    /// How many requests.
    package var count: UInt64 = 75000
    /// How many at a time.
    package var depth = 64
    /// Bytes of a request.
    package var size: UInt64 = 4096
    /// From the start of one to that of the next.
    package var step: UInt64 = 4096
    /// Where the first begins.
    package var offset: UInt64 = 0
    /// The byte that is written.
    package var pattern: UInt8 = 0
    /// After so many writes everything is made durable; 0: never.
    package var flushInterval: UInt64 = 0
    /// Whether to write.
    package var isWriting = false

    /// A request for an image.
    package init(_ source: ImageSource) { self.source = source }
  }

  /// Times requests, and says how long they took.
  package static func bench(
    _ request: BenchRequest, json: Bool, quiet: Bool, to output: Output
  ) throws(ImageError) {
    guard request.size > 0, request.size <= 1 << 30, request.depth > 0, request.depth <= 1024
    else {
      throw ImageError(.badRequest, "a request has 1 byte to 1 GiB, and 1 to 1024 run at a time")
    }
    let job = try BenchJob(request)
    if !quiet, !json {
      output.put(
        "Sending \(request.count) \(request.isWriting ? "write" : "read") requests, "
          + "\(request.size) bytes each, \(request.depth) in parallel (starting at offset "
          + "\(request.offset), step size \(request.step))\n")
    }
    let start = seconds()
    try job.run()
    let time = seconds() - start
    let perSecond = time > 0 ? Double(request.count) / time : 0
    if json {
      output.put(
        JSON.object([
          ("requests", .number(request.count)), ("request-size", .number(request.size)),
          ("depth", .number(UInt64(request.depth))), ("writes", .bool(request.isWriting)),
          ("nanoseconds", .number(UInt64(time * 1e9))),
          ("requests-per-second", .number(UInt64(perSecond))),
        ]).indented + "\n")
    } else if !quiet {
      output.put(
        "Run completed in \(Words.fixed(time, places: 3)) seconds "
          + "(\(Words.fixed(perSecond, places: 0)) requests a second, "
          + "\(Words.size(UInt64(perSecond * Double(request.size)))) a second).\n")
    }
  }

  private static func seconds() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
  }
}

/// One run. What it asks of images, and `failure`, under `lock` only; the rest does not change.
private final class BenchJob: @unchecked Sendable {
  private let request: ImageTool.BenchRequest
  private let reader: DiskReader?
  private let writer: ImageWriter?
  private let opened: (any ImageFormat)?
  private let size: UInt64
  private let next = Atomic<UInt64>(0)
  private let lock = Mutex(())
  private var failure: ImageError?

  init(_ request: ImageTool.BenchRequest) throws(ImageError) {
    self.request = request
    guard request.isWriting else {
      let chain = try request.source.layers()
      reader = DiskReader(chain)
      (writer, opened) = (nil, nil)
      size = chain.size
      try Self.check(request, size)
      return
    }
    let store = try request.source.open(writable: true)
    let image = try Chain(
      store, kind: try request.source.kind(), baseKind: try request.source.baseKind(),
      among: request.source.formats,
      resolve: ImageSource.resolver(
        writing: [store.name], untrusted: request.source.untrusted)
    ).disk(writable: true)
    opened = image
    writer = ImageWriter(image, store: store, devices: image.devices ?? [store])
    reader = nil
    size = image.size
    try Self.check(request, size)
  }

  private static func check(
    _ request: ImageTool.BenchRequest, _ size: UInt64
  ) throws(ImageError) {
    guard request.size <= size else {
      throw ImageError(
        .badRequest, "requests of \(request.size) bytes to a disk of \(size) bytes")
    }
  }

  func run() throws(ImageError) {
    Crew.run(request.depth) { _ in self.work() }
    if let failure { throw failure }
    try writer?.commit()
  }

  private func work() {
    do throws(ImageError) {
      let buffer = UnsafeMutableRawBufferPointer.allocate(
        byteCount: Int(request.size), alignment: 4096)
      defer { buffer.deallocate() }
      buffer.initializeMemory(as: UInt8.self, repeating: request.pattern)
      // Whole requests fit the disk so many times; then it begins anew.
      let places = max(1, (size - request.size) / max(1, request.step) + 1)
      while true {
        let number = next.add(1, ordering: .relaxed).oldValue
        guard number < request.count, failure == nil else { return }
        let at = (request.offset + number % places * request.step) % (size - request.size + 1)
        if let writer {
          try write(UnsafeRawBufferPointer(buffer), at: at, number, writer)
        } else if let reader {
          try read(buffer, at: at, reader)
        }
      }
    } catch {
      lock.withLock { _ in if failure == nil { failure = error } }
    }
  }

  private func read(
    _ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, _ reader: DiskReader
  ) throws(ImageError) {
    var pieces: [DiskReader.Piece] = []
    let error = lock.withLock { _ -> ImageError? in
      do throws(ImageError) {
        try reader.pieces(from: offset, to: offset + request.size, into: &pieces)
        return nil
      } catch { return error }
    }
    if let error { throw error }
    for piece in pieces { try toolIO { () throws(IOError) in try piece.read(into: buffer) } }
  }

  private func write(
    _ bytes: UnsafeRawBufferPointer, at offset: UInt64, _ number: UInt64, _ writer: ImageWriter
  ) throws(ImageError) {
    let error = lock.withLock { _ -> ImageError? in
      do throws(ImageError) {
        try writer.write(bytes, at: offset)
        if request.flushInterval > 0, (number + 1) % request.flushInterval == 0 {
          try writer.commit()
        }
        return nil
      } catch { return error }
    }
    if let error { throw error }
  }
}
