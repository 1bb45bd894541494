// SPDX-License-Identifier: Apache-2.0
// A small synchronous engine over every device of a format, for formats whose blocks live in
// more places than a store and a base. Writes may be placed and left without their data, and
// a commit plan may be held back while others write. It may give the marks, and take places from pools,
// as the module does.

import BlockIO
import DiskFormats
import DiskModel
import SystemIO
import TestSupport

/// Serves whole-sector reads and writes from a format and its devices.
final class DeviceEngine {
  /// Blocks are copied so many bytes at a time.
  private static let piece = 1 << 20

  let format: any ImageFormat
  /// What commit plans are run on.
  let store: any ByteStore
  let devices: [any ByteStore]
  /// False: data and all stages of a plan are written without a flush between them. For tests
  /// that must fail.
  var keepsOrder = true
  private(set) var lastMark: Mark = 0
  /// Placements that are not committed, as a target keeps them.
  private(set) var uncommitted: [Extent] = []
  /// A placement whose data has not been written yet.
  private var unwritten: (placement: Placement, sector: Int, bytes: [UInt8])?
  /// Whether the last placement was made for the last request.
  private var isNew = false
  /// Whether it gives the marks, and where first writes go until that is used up.
  private let givesMarks: Bool
  private var pools: [Pool] = []
  /// Placements in pools, and first writes that could have been one.
  private(set) var pooled = 0
  private var chances = 0

  var sectors: Int { Int(format.size / 512) }
  private var blockSectors: Int { Int(format.blockSize) / 512 }

  /// With `pools` it gives the marks, if the format lets it, and takes pools, if that has any.
  init(
    _ format: any ImageFormat, store: any ByteStore, base: (any ByteStore)? = nil,
    pools: Bool = false
  ) {
    self.format = format
    self.store = store
    givesMarks = pools && format.takeMarks()
    devices = format.devices ?? [store] + (base.map { [$0] } ?? [])
  }

  /// Takes over from an engine that died.
  func takeOver(_ extents: [Extent]) {
    uncommitted = extents
    lastMark = extents.last?.mark ?? 0
  }

  private func block(_ sector: Int) -> UInt64 { UInt64(sector / blockSectors) }

  /// Reads sectors of the disk.
  func read(_ sector: Int, count: Int) throws -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.reserveCapacity(count * 512)
    var sector = sector
    let end = sector + count
    while sector < end {
      let limit = block(end - 1) - block(sector) + 1
      let extent = try format.find(block(sector), limit: limit)
      try check(extent, covers: block(sector), limit: limit)
      let piece = min(end, Int(extent.blocks.end) * blockSectors) - sector
      let ahead = sector - Int(extent.blocks.first) * blockSectors
      bytes += try read(extent.place.advanced(by: UInt64(ahead)), count: piece * 512)
      sector += piece
    }
    return bytes
  }

  private func read(_ place: Place, count: Int) throws -> [UInt8] {
    switch place {
    case .zero: return [UInt8](repeating: 0, count: count)
    case .device(let device, let sector):
      return try devices[Int(device)].read(at: sector * 512, count: count)
    }
  }

  private func check(_ extent: Extent, covers block: UInt64, limit: UInt64) throws {
    guard extent.blocks.first == block, extent.blocks.count > 0, extent.blocks.count <= limit
    else { throw ImageError(.corrupt, "an answer for \(block)+\(limit): \(extent)") }
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

  /// Begins a write of at most one placement, whose data is written by the next request.
  func beginWrite(_ sector: Int, _ bytes: [UInt8]) throws {
    try finish()
    let (placement, count) = try place(sector, bytes.count / 512)
    unwritten = (placement, sector, [UInt8](bytes[..<(count * 512)]))
  }

  /// Ends what `beginWrite` began.
  func finish() throws {
    guard let (placement, sector, bytes) = unwritten else { return }
    unwritten = nil
    try fill(placement, sector, bytes)
  }

  /// What `beginWrite` began comes to nothing, and so does its placement.
  func abandon() {
    guard let (placement, _, _) = unwritten else { return }
    unwritten = nil
    guard isNew else { return }
    format.abandon(placement.extent.mark)
    uncommitted.removeAll { $0.mark == placement.extent.mark }
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
    var placement: Placement
    if found.writable {
      placement = Placement(found)
    } else if let taken = try takePlace(found, isWhole: isWhole) {
      placement = taken
    } else {
      placement = try format.place(range, whole: isWhole)
    }
    try check(placement.extent, covers: first, limit: range.count)
    placement.extent = note(placement.extent)
    let reach = Int(placement.extent.blocks.end) * blockSectors
    return (placement, min(end, reach) - sector)
  }

  /// The next place of a pool for a block, if there is one; of three first writes one asks all the same.
  private func takePlace(_ found: Extent, isWhole: Bool) throws -> Placement? {
    guard givesMarks else { return nil }
    chances += 1
    if pools.isEmpty { try addPool() }
    guard chances % 3 != 0, let pool = pools.first, pool.blocks.contains(found.blocks.first) else {
      return nil
    }
    pools[0].place = pool.place.advanced(by: pool.stride)
    pools[0].count -= 1
    if pools[0].count == 0 { pools.removeFirst() }
    if chances % 5 == 0, pools.count == 1 { try addPool() }
    let extent = Extent(
      BlockRange(found.blocks.first), pool.place, writable: true, mark: lastMark + 1)
    try format.granted(extent)
    pooled += 1
    if isWhole { return Placement(extent) }
    return Placement(extent, found.place == .zero ? .zero : .copy(from: found.place))
  }

  /// Asks for a pool; there may be no room for one.
  private func addPool() throws {
    do throws(ImageError) {
      if let pool = try format.pool() { pools.append(pool) }
    } catch {
      guard error.cause?.code == 28 else { throw error }
    }
  }

  /// Keeps in mind an extent that is not committed, and gives it a mark if that is due.
  @discardableResult func note(_ extent: Extent) -> Extent {
    var extent = extent
    if extent.mark.isProvisional {
      let mark = lastMark + 1
      format.marked(extent.mark, as: mark)
      extent.mark = mark
    }
    isNew = extent.mark > lastMark
    guard isNew else { return extent }
    lastMark = extent.mark
    uncommitted.append(extent)
    return extent
  }

  /// Prepares a placement and writes the data.
  private func fill(_ placement: Placement, _ sector: Int, _ bytes: [UInt8]) throws {
    guard case .device(let number, let place) = placement.extent.place,
      placement.extent.mark == 0 || number == 0
    else { throw ImageError(.corrupt, "a place for writing that is none: \(placement)") }
    let device = devices[Int(number)]
    let ahead = sector - Int(placement.extent.blocks.first) * blockSectors
    let count = Int(placement.extent.blocks.count) * Int(format.blockSize)
    // In pieces, since a block may have 256 MiB.
    for start in stride(from: 0, to: count, by: Self.piece) {
      let length = min(Self.piece, count - start)
      let at = place * 512 + UInt64(start)
      switch placement.preparation {
      case .none: break
      case .zero: try device.write([UInt8](repeating: 0, count: length), at: at)
      case .copy(let from):
        let bytes = try read(from.advanced(by: UInt64(start / 512)), count: length)
        try device.write(bytes, at: at)
      }
    }
    try device.write(bytes, at: (place + UInt64(ahead)) * 512)
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
        guard case .device(let number, let place) = extent.place else {
          throw ImageError(.corrupt, "zeroing at no place: \(extent)")
        }
        let bytes = extent.blocks.count * UInt64(format.blockSize)
        try devices[Int(number)].zero(at: place * 512, count: bytes)
        note(extent)
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
    try finish()
    let upTo = lastMark
    if keepsOrder { try flushDevices() }
    let plan = try format.commitPlan(upTo: upTo)
    try meanwhile()
    let stages = keepsOrder ? plan.stages : [plan.stages.flatMap { $0 }]
    try CommitPlan(upTo: upTo, stages: stages, target: plan.target).carry(to: store)
    format.committed(upTo: upTo)
    uncommitted.removeAll { $0.mark <= upTo }
  }

  private func flushDevices() throws {
    for device in devices where device.isWritable { try device.flush() }
    if devices[0] !== store { try store.flush() }
  }
}

extension CommitPlan {
  /// `run`, whose failure is what the system said.
  func carry(to store: any ByteStore) throws(IOError) {
    do throws(CommitFailure) { try run(on: store) } catch { throw error.error }
  }
}
