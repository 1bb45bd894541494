// SPDX-License-Identifier: Apache-2.0
// Writing to the disk of an image that nobody serves: what tools do. One request at a time;
// placements are made durable by `commit`, in the order that every format asks for.

package import BlockIO
import DiskModel
import SystemIO

/// Writes to an image. Used from one thread.
package final class ImageWriter {
  /// So many bytes are copied or zeroed at a time where a block is larger.
  private static let piece = 1 << 20
  /// So many bytes may be written before placements are committed, so that what is pending
  /// stays small.
  private static let mostUncommitted: UInt64 = 1 << 30

  private let format: any ImageFormat
  private let store: any ByteStore
  private let devices: [any ByteStore]
  private var lastMark: Mark = 0
  private var uncommitted: UInt64 = 0

  /// `store` is where plans are run; `devices` the format's, by number.
  package init(_ format: any ImageFormat, store: any ByteStore, devices: [any ByteStore]) {
    self.format = format
    self.store = store
    self.devices = devices
  }

  /// Writes bytes to the disk, within its length.
  ///
  /// - Throws: what the format throws, `io`.
  package func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64) throws(ImageError) {
    let blockSize = UInt64(format.blockSize)
    var done = 0
    while done < bytes.count {
      let position = offset + UInt64(done)
      let left = UInt64(bytes.count - done)
      let first = position / blockSize
      let ahead = position % blockSize
      let end = position + left
      // The last block is covered when the write reaches the end of the disk.
      let endBlock = end >= format.size ? (end - 1) / blockSize + 1 : end / blockSize
      let isWhole = ahead == 0 && endBlock > first
      let range = BlockRange(first, isWhole ? endBlock - first : 1)
      var extent = try format.find(first, limit: range.count)
      if !extent.writable {
        let placement = try format.place(range, whole: isWhole)
        extent = placement.extent
        try prepare(placement)
      }
      // What has a place already may have it in any file; new ones are in the first.
      guard case .device(let number, let sector) = extent.place, extent.mark == 0 || number == 0
      else { throw ImageError(.corrupt, "\(store.name): a place for a write that is none") }
      let device = devices[Int(number)]
      note(extent)
      let count = Int(min(left, extent.blocks.count * blockSize - ahead))
      let piece = UnsafeRawBufferPointer(rebasing: bytes[done..<(done + count)])
      try io { () throws(IOError) in try device.write(piece, at: sector * 512 + ahead) }
      done += count
      uncommitted += UInt64(count)
    }
    if uncommitted > Self.mostUncommitted { try commit() }
  }

  private func note(_ extent: Extent) { lastMark = max(lastMark, extent.mark) }

  private func prepare(_ placement: Placement) throws(ImageError) {
    guard case .device(0, let sector) = placement.extent.place else { return }
    let count = placement.extent.blocks.count * UInt64(format.blockSize)
    switch placement.preparation {
    case .none, .copy(from: .zero):
      guard placement.preparation != .none else { return }
      try io { () throws(IOError) in try devices[0].zero(at: sector * 512, count: count) }
    case .zero: try io { () throws(IOError) in try devices[0].zero(at: sector * 512, count: count) }
    case .copy(from: .device(let device, let from)):
      var done: UInt64 = 0
      while done < count {
        let length = min(UInt64(Self.piece), count - done)
        try io { () throws(IOError) in
          try devices[0].write(
            try devices[Int(device)].read(at: from * 512 + done, count: Int(length)),
            at: sector * 512 + done)
        }
        done += length
      }
    }
  }

  /// Makes a range of the disk read as zeroes, within its length.
  ///
  /// - Throws: what the format throws, `io`.
  package func zero(at offset: UInt64, count: UInt64) throws(ImageError) {
    let blockSize = UInt64(format.blockSize)
    var position = offset
    let end = offset + count
    while position < end {
      let ahead = position % blockSize
      let first = position / blockSize
      let endBlock = end >= format.size ? (end - 1) / blockSize + 1 : end / blockSize
      guard ahead == 0, endBlock > first else {
        let length = min(end - position, blockSize - ahead)
        try zeroPart(at: position, count: length)
        position += length
        continue
      }
      switch try format.discard(BlockRange(first, endBlock - first), zeroing: true) {
      case .nothing(let blocks): position += blocks * blockSize
      case .zero(let extent):
        guard case .device(let number, let sector) = extent.place, extent.mark == 0 || number == 0
        else { throw ImageError(.corrupt, "\(store.name): zeroing at no place") }
        let device = devices[Int(number)]
        try io { () throws(IOError) in
          try device.zero(at: sector * 512, count: extent.blocks.count * blockSize)
        }
        note(extent)
        position += extent.blocks.count * blockSize
      }
    }
  }

  private func zeroPart(at offset: UInt64, count: UInt64) throws(ImageError) {
    let extent = try format.find(offset / UInt64(format.blockSize), limit: 1)
    guard extent.place != .zero else { return }
    let zeroes = [UInt8](repeating: 0, count: Int(min(count, UInt64(Self.piece))))
    var failure: ImageError?
    zeroes.withUnsafeBytes { bytes in
      do throws(ImageError) {
        var done: UInt64 = 0
        while done < count {
          let length = Int(min(UInt64(bytes.count), count - done))
          try write(UnsafeRawBufferPointer(rebasing: bytes[..<length]), at: offset + done)
          done += UInt64(length)
        }
      } catch { failure = error }
    }
    if let failure { throw failure }
  }

  /// Makes everything written so far durable.
  ///
  /// - Throws: what the format throws, `io`.
  package func commit() throws(ImageError) {
    try io { () throws(IOError) in
      for device in devices where device.isWritable { try device.flush() }
      if devices[0] !== store { try store.flush() }
    }
    let plan = try format.commitPlan(upTo: lastMark)
    try plan.carryOut(on: store)
    format.committed(upTo: lastMark)
    uncommitted = 0
  }
}
