// SPDX-License-Identifier: Apache-2.0
// A small synchronous engine, for driving a format without a target: one request at a time,
// save that writes may be placed and left without their data, and that a commit plan may be
// held back while others write.

import BlockIO
import DiskFormats
import DiskModel
import TestSupport

/// The order in which a commit is done.
enum CommitOrder {
  /// As the contract says.
  case right
  /// The store is not flushed before the plan runs.
  case bitmapBeforeData
  /// The plan takes in placements whose data has not been written.
  case laterMarksToo
}

/// Serves whole-sector reads and writes from a format, a store and a base.
final class MiniEngine {
  let format: any ImageFormat
  let store: any ByteStore
  let base: any ByteStore
  let order: CommitOrder
  private var lastMark: Mark = 0
  /// A placement whose data has not been written yet.
  private var unwritten: (placement: Placement, sector: Int, bytes: [UInt8])?

  var sectors: Int { Int(format.size / 512) }
  private var blockSectors: Int { Int(format.blockSize) / 512 }

  init(
    _ format: any ImageFormat, store: any ByteStore, base: any ByteStore,
    order: CommitOrder = .right
  ) {
    self.format = format
    self.store = store
    self.base = base
    self.order = order
  }

  private func block(_ sector: Int) -> UInt64 { UInt64(sector / blockSectors) }

  /// Reads sectors of the disk.
  func read(_ sector: Int, count: Int) throws -> [UInt8] {
    var bytes: [UInt8] = []
    var sector = sector
    let end = sector + count
    while sector < end {
      let limit = block(end - 1) - block(sector) + 1
      let extent = try format.find(block(sector), limit: limit)
      try check(extent, covers: block(sector), limit: limit)
      let piece = min(end, Int(extent.blocks.end) * blockSectors) - sector
      bytes += try read(extent, sector: sector, count: piece)
      sector += piece
    }
    return bytes
  }

  private func check(_ extent: Extent, covers block: UInt64, limit: UInt64) throws {
    guard extent.blocks.first == block, extent.blocks.count > 0, extent.blocks.count <= limit
    else { throw ImageError(.corrupt, "an answer for \(block)+\(limit): \(extent)") }
  }

  private func read(_ extent: Extent, sector: Int, count: Int) throws -> [UInt8] {
    let ahead = sector - Int(extent.blocks.first) * blockSectors
    switch extent.place.advanced(by: UInt64(ahead)) {
    case .zero: return [UInt8](repeating: 0, count: count * 512)
    case .device(let device, let sector):
      return try (device == 0 ? store : base).read(at: sector * 512, count: count * 512)
    }
  }

  /// Writes sectors of the disk: as much as one placement takes, and so on.
  func write(_ sector: Int, _ bytes: [UInt8]) throws {
    try finish()
    var done = 0
    while done < bytes.count / 512 {
      let (placement, count) = try place(sector + done, bytes.count / 512 - done)
      try fill(placement, sector + done, [UInt8](bytes[(done * 512)..<((done + count) * 512)]))
      done += count
    }
  }

  /// Begins a write of at most one placement, whose data is written by the next write or
  /// flush. Returns how many sectors it takes.
  func beginWrite(_ sector: Int, _ bytes: [UInt8]) throws -> Int {
    try finish()
    let (placement, count) = try place(sector, bytes.count / 512)
    unwritten = (placement, sector, [UInt8](bytes[..<(count * 512)]))
    return count
  }

  /// Ends what `beginWrite` began.
  func finish() throws {
    guard let (placement, sector, bytes) = unwritten else { return }
    unwritten = nil
    try fill(placement, sector, bytes)
  }

  /// A place for the first of some sectors; how many of them it takes.
  private func place(_ sector: Int, _ count: Int) throws -> (Placement, Int) {
    let first = block(sector)
    let end = sector + count
    // The disk's last block is whole when the write reaches the disk's end.
    let wholeEnd = end == sectors ? block(end - 1) + 1 : UInt64(end / blockSectors)
    let isWhole = sector % blockSectors == 0 && wholeEnd > first
    let range = BlockRange(first, isWhole ? wholeEnd - first : 1)
    let found = try format.find(first, limit: range.count)
    try check(found, covers: first, limit: range.count)
    let placement =
      found.writable ? Placement(found) : try format.place(range, whole: isWhole)
    try check(placement.extent, covers: first, limit: range.count)
    let reach = Int(placement.extent.blocks.end) * blockSectors
    lastMark = max(lastMark, placement.extent.mark)
    return (placement, min(end, reach) - sector)
  }

  /// Prepares a placement and writes the data; for a new place, all in one go.
  private func fill(_ placement: Placement, _ sector: Int, _ bytes: [UInt8]) throws {
    guard case .device(0, let place) = placement.extent.place else {
      throw ImageError(.corrupt, "a place for writing that is none: \(placement)")
    }
    let ahead = sector - Int(placement.extent.blocks.first) * blockSectors
    switch placement.preparation {
    case .none: break
    case .zero:
      let count = placement.extent.blocks.count * UInt64(format.blockSize)
      try store.write([UInt8](repeating: 0, count: Int(count)), at: place * 512)
    case .copy(.device(1, let from)):
      let count = Int(placement.extent.blocks.count) * Int(format.blockSize)
      try store.write(try base.read(at: from * 512, count: count), at: place * 512)
    case .copy(let from): throw ImageError(.corrupt, "a copy from \(from)")
    }
    try store.write(bytes, at: (place + UInt64(ahead)) * 512)
  }

  /// Discards or zeroes sectors; parts of blocks are ignored or written.
  func discard(_ sector: Int, count: Int, zeroing: Bool) throws {
    try finish()
    let end = sector + count
    let firstWhole = (sector + blockSectors - 1) / blockSectors
    let lastWhole = end == sectors ? Int(block(end - 1)) + 1 : end / blockSectors
    guard firstWhole < lastWhole else {
      if zeroing { try write(sector, [UInt8](repeating: 0, count: count * 512)) }
      return
    }
    if zeroing {
      try write(sector, [UInt8](repeating: 0, count: (firstWhole * blockSectors - sector) * 512))
    }
    var block = UInt64(firstWhole)
    while block < UInt64(lastWhole) {
      let range = BlockRange(block, UInt64(lastWhole) - block)
      switch try format.discard(range, zeroing: zeroing) {
      case .nothing(let blocks):
        block += blocks
      case .zero(let extent):
        try check(extent, covers: block, limit: range.count)
        guard case .device(0, let place) = extent.place else {
          throw ImageError(.corrupt, "zeroing at no place: \(extent)")
        }
        let bytes = extent.blocks.count * UInt64(format.blockSize)
        try store.zero(at: place * 512, count: bytes)
        lastMark = max(lastMark, extent.mark)
        block += extent.blocks.count
      }
    }
    let tail = min(end, lastWhole * blockSectors)
    if zeroing, tail < end {
      try write(tail, [UInt8](repeating: 0, count: (end - tail) * 512))
    }
  }

  /// A flush; `meanwhile` runs between the making of the plan and its writing.
  func flush(meanwhile: () throws -> Void = {}) throws {
    var upTo = lastMark
    if order == .laterMarksToo {
      upTo = .max
    } else {
      // Whatever has a mark that counts has its data.
      try finish()
    }
    if order != .bitmapBeforeData { try store.flush() }
    let plan = try format.commitPlan(upTo: upTo)
    try meanwhile()
    try plan.carry(to: store)
    format.committed(upTo: upTo)
    if order == .bitmapBeforeData { try store.flush() }
  }
}
