// SPDX-License-Identifier: Apache-2.0
// Writing a stream-optimized VMDK image: grains in the order of the disk, each compressed and
// behind a marker; after the grains of a table the table; at the end the directory, and a copy
// of the header that says where it is. Nothing is written twice, so it may be a pipe's end.

package import BlockIO
import CZlib
import Glibc
import SystemIO

/// Makes a stream-optimized image. Used from one thread; `compressed(_:)` from any.
package final class VmdkStreamWriter {
  /// Bytes of a grain.
  package static let grainBytes = 65536
  private enum Marker: UInt32 {
    case end = 0
    case table = 1
    case directory = 2
    case footer = 3
  }

  private let store: any ByteStore
  private var header: VmdkHeader
  private let grains: UInt64
  /// Sectors written so far.
  private var position: UInt64
  private var table = [UInt32](repeating: 0, count: 512)
  private var directory: [UInt32]
  private var next: UInt64 = 0
  private var isFinished = false

  /// Begins an image of a disk's length in bytes, a multiple of 512.
  ///
  /// - Throws: `badRequest`, or `io` when the store fails.
  package convenience init(
    store: any ByteStore, size: UInt64, options: VmdkOptions
  ) throws(ImageError) {
    var options = options
    options.subformat = .streamOptimized
    try self.init(store: store, descriptor: try options.descriptor(size: size))
  }

  init(store: any ByteStore, descriptor: VmdkDescriptor) throws(ImageError) {
    self.store = store
    header = VmdkHeader(capacity: descriptor.size / 512)
    header.version = 3
    header.flags =
      VmdkHeader.Flag.newlines | VmdkHeader.Flag.compressed | VmdkHeader.Flag.markers
    header.descriptorOffset = 1
    header.descriptorSectors = Vmdk.descriptorSectors
    header.directoryOffset = VmdkHeader.atEnd
    guard header.tables <= VmdkHeader.mostTables else {
      throw ImageError(.badRequest, "\(descriptor.size) bytes are too many for one extent")
    }
    directory = [UInt32](repeating: 0, count: Int(header.tables))
    grains = (header.capacity + header.grain - 1) / header.grain
    position = header.overhead
    var text = descriptor.encoded()
    // A device shows what it held behind the text.
    text.pad(to: Int(Vmdk.descriptorSectors) * 512)
    let room = text
    let start = header.encoded()
    try io { () throws(IOError) in
      try store.resize(to: 0)
      try store.resize(to: 128 * 512)
      try store.write(start, at: 0)
      try store.write(room, at: 512)
    }
  }

  /// A grain's bytes, compressed; nil for one of zeroes, which is left out.
  ///
  /// - Parameter grain: 65536 bytes; the disk's last grain filled up with zeroes.
  package static func compressed(_ grain: [UInt8]) -> [UInt8]? {
    precondition(grain.count == grainBytes, "a grain has 65536 bytes")
    guard grain.contains(where: { $0 != 0 }) else { return nil }
    var output = [UInt8](repeating: 0, count: Int(compressBound(uLong(grain.count))))
    var count = uLong(output.count)
    let status = compress2(&output, &count, grain, uLong(grain.count), Z_DEFAULT_COMPRESSION)
    precondition(status == Z_OK, "compress2 has all the room that it can want")
    return [UInt8](output[..<Int(count)])
  }

  /// Adds a grain by its number. Numbers rise; what is left out is zero.
  ///
  /// - Throws: `badRequest` for a number out of order, `io`.
  package func append(_ number: UInt64, compressed data: [UInt8]) throws(ImageError) {
    guard number >= next, number < grains, !isFinished, !data.isEmpty else {
      throw ImageError(.badRequest, "grain \(number) of \(grains) after grain \(next)")
    }
    try moveTo(table: number / 512)
    next = number + 1
    var bytes = [UInt8](repeating: 0, count: 12)
    bytes.put(number * header.grain, at: 0)
    bytes.put(UInt32(data.count), at: 8)
    bytes += data
    bytes.pad(to: 512)
    table[Int(number % 512)] = try put(bytes)
  }

  /// Writes what ends the image, and flushes.
  ///
  /// - Throws: `io`.
  package func finish() throws(ImageError) {
    guard !isFinished else { return }
    try moveTo(table: header.tables)
    isFinished = true
    var entries = [UInt8](repeating: 0, count: directory.count * 4)
    for (index, entry) in directory.enumerated() { entries.put(entry, at: index * 4) }
    entries.pad(to: 512)
    try put(marker: .directory, sectors: entries.count / 512)
    header.directoryOffset = UInt64(try put(entries))
    try put(marker: .footer, sectors: 1)
    try put(header.encoded())
    try put(marker: .end, sectors: 0)
    let store = store
    // A device goes on behind the end, where nobody would look for a footer.
    let head = store.isFixedSize ? header.encoded() : []
    try io { () throws(IOError) in
      if !head.isEmpty {
        try store.flush()
        try store.write(head, at: 0)
      }
    }
    try io { () throws(IOError) in try store.flush() }
  }

  /// Ends the table that grains were added to if it is not this one.
  private func moveTo(table index: UInt64) throws(ImageError) {
    guard next > 0, (next - 1) / 512 != index, table.contains(where: { $0 != 0 }) else { return }
    var entries = [UInt8](repeating: 0, count: 2048)
    for (index, entry) in table.enumerated() { entries.put(entry, at: index * 4) }
    try put(marker: .table, sectors: 4)
    directory[Int((next - 1) / 512)] = try put(entries)
    table = [UInt32](repeating: 0, count: 512)
  }

  private func put(marker: Marker, sectors: Int) throws(ImageError) {
    var bytes = [UInt8](repeating: 0, count: 512)
    bytes.put(UInt64(sectors), at: 0)
    bytes.put(marker.rawValue, at: 12)
    try put(bytes)
  }

  /// Writes sectors; returns where they are.
  @discardableResult
  private func put(_ bytes: [UInt8]) throws(ImageError) -> UInt32 {
    let start = position
    guard start + UInt64(bytes.count / 512) < VmdkHeader.mostSectors else {
      throw ImageError(
        .io, "\(store.name): a stream-optimized image has 2 TiB at most",
        cause: IOError(EFBIG, "write", store.name))
    }
    let store = store
    try io { () throws(IOError) in try store.write(bytes, at: start * 512) }
    position += UInt64(bytes.count / 512)
    return UInt32(start)
  }
}
