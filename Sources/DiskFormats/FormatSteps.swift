// SPDX-License-Identifier: Apache-2.0
// What the mappings of formats have in common: the bounds of a disk, runs that continue each
// other, first writes and discards, and what a change of a disk's length has to hide.

import BlockIO
import DiskModel
import SystemIO

/// An image in a store of its own: every format that is built in.
protocol StoredImage: ImageFormat {
  /// The file or device.
  var store: any ByteStore { get }
  /// Whether placements may be asked for.
  var isWritable: Bool { get }
}

extension StoredImage {
  /// Throws `badRequest` for an image that is open for reading.
  func checkWritable() throws(ImageError) {
    guard isWritable else {
      throw ImageError(.badRequest, "\(store.name) is open for reading only")
    }
  }
}

/// An image that answers run by run, and whose blocks keep the place that they have got.
protocol RunImage: StoredImage {
  /// A run that has so many blocks goes on no further.
  static var blocksPerFind: UInt64 { get }
  /// The longest run from a block on, up to a limit, that is mapped alike within one table.
  func run(_ block: UInt64, _ limit: UInt64) throws(ImageError) -> Extent
  /// Places the beginning of a run that has no place of its own, under a new mark.
  func assign(_ range: BlockRange) throws(ImageError) -> Extent
}

extension RunImage {
  /// Where a block lives for reading; see `ImageFormat`.
  package func find(_ block: UInt64, limit: UInt64) throws(ImageError) -> Extent {
    try merged(
      block, limit: limit, while: { found, _ in found.blocks.count < Self.blocksPerFind }, run)
  }

  /// A place for a first write; see `ImageFormat`. The answer does not cross a table.
  package func place(_ range: BlockRange, whole: Bool) throws(ImageError) -> Placement {
    try checkWritable()
    try checkBounds(range)
    return try placement(of: try run(range.first, range.count), whole: whole, assign)
  }

  /// A discard; see `ImageFormat`. What is here is zeroed and keeps its place.
  package func discard(
    _ range: BlockRange, zeroing: Bool
  ) throws(ImageError) -> DiscardAnswer {
    try checkWritable()
    try checkBounds(range)
    return try discardAnswer(of: try run(range.first, range.count), zeroing: zeroing, assign)
  }
}

extension ByteStore {
  /// Writes zeroes, which take up space where `zero` may leave a hole.
  func fill(from start: UInt64, to end: UInt64) throws(IOError) {
    let zeroes = [UInt8](repeating: 0, count: 1 << 20)
    var offset = start
    while offset < end {
      let count = Int(min(UInt64(zeroes.count), end - offset))
      try write([UInt8](zeroes[..<count]), at: offset)
      offset += UInt64(count)
    }
  }
}

extension ImageFormat {
  /// Blocks of the disk, the last of them perhaps in part.
  var blockCount: UInt64 {
    // Every question begins with it, and a division takes longer than a shift.
    let isPart = size & (UInt64(blockSize) - 1) != 0
    return size >> UInt64(blockSize.trailingZeroBitCount) + (isPart ? 1 : 0)
  }

  /// Throws `badRequest` for blocks that the disk does not have.
  func checkBounds(_ range: BlockRange) throws(ImageError) {
    let blocks = blockCount
    guard range.count > 0, range.first < blocks, range.count <= blocks - range.first else {
      throw ImageError(
        .badRequest, "blocks \(range.first)+\(range.count) of a disk of \(blocks) blocks")
    }
  }

  /// Runs from a block on, as long as they continue each other and `goesOn` has it of what was
  /// found in so many runs, up to `limit` blocks.
  func merged(
    _ block: UInt64, limit: UInt64, while goesOn: (_ found: Extent, _ runs: Int) -> Bool,
    _ run: (UInt64, UInt64) throws(ImageError) -> Extent
  ) throws(ImageError) -> Extent {
    try checkBounds(BlockRange(block, 1))
    let end = block + min(max(limit, 1), blockCount - block)
    var extent = try run(block, end - block)
    var runs = 1
    while extent.blocks.end < end, goesOn(extent, runs) {
      let next = try run(extent.blocks.end, end - extent.blocks.end)
      let sectors = extent.blocks.count * UInt64(blockSize) / 512
      guard next.mark == extent.mark, next.writable == extent.writable,
        next.place == extent.place.advanced(by: sectors)
      else { break }
      extent.blocks.count += next.blocks.count
      runs += 1
    }
    return extent
  }

  /// The answer to a first write to blocks that were found so.
  func placement(
    of found: Extent, whole: Bool, _ assign: (BlockRange) throws(ImageError) -> Extent
  ) throws(ImageError) -> Placement {
    guard !found.writable else { return Placement(found) }
    let extent = try assign(found.blocks)
    guard !whole else { return Placement(extent) }
    switch found.place {
    case .zero: return Placement(extent, .zero)
    case .device: return Placement(extent, .copy(from: found.place))
    }
  }

  /// The answer to a discard of blocks that were found so: what is here is zeroed and keeps
  /// its place.
  func discardAnswer(
    of found: Extent, zeroing: Bool, _ assign: (BlockRange) throws(ImageError) -> Extent
  ) throws(ImageError) -> DiscardAnswer {
    if found.writable { return .zero(found) }
    guard zeroing, found.place != .zero else { return .nothing(blocks: found.blocks.count) }
    return .zero(try assign(found.blocks))
  }

  /// What of a run that is being committed lies past the disk's end, as writes that zero it:
  /// a program that makes the disk longer shows it. `offset` is the byte where the run begins.
  func tail(of blocks: BlockRange, at offset: UInt64) -> [CommitPlan.Write] {
    let used = size % UInt64(blockSize)
    guard used > 0, blocks.contains(blockCount - 1) else { return [] }
    let last = offset + (blockCount - 1 - blocks.first) * UInt64(blockSize)
    return [CommitPlan.Write(offset: last + used, zeroes: UInt64(blockSize) - used)]
  }

  // MARK: Lengths

  private func device(_ number: UInt16) throws(ImageError) -> any ByteStore {
    guard let devices, Int(number) < devices.count else {
      throw ImageError(.badRequest, "there is no device \(number)")
    }
    return devices[Int(number)]
  }

  /// Zeroes the bytes of the last block that lie past the end, if they are the disk's own.
  func zeroTail(from end: UInt64) throws(ImageError) {
    let tail = end % UInt64(blockSize)
    guard tail > 0 else { return }
    let extent = try find(end / UInt64(blockSize), limit: 1)
    guard extent.writable, case .device(let number, let sector) = extent.place else { return }
    let device = try device(number)
    let count = UInt64(blockSize) - tail
    try io { () throws(IOError) in
      try device.zero(at: sector * 512 + tail, count: count)
      try device.flush()
    }
  }

  /// Makes what lies past a former end read as zeroes, durably, and commits that to the store.
  func hide(from old: UInt64, on store: any ByteStore) throws(ImageError) {
    let blockSize = UInt64(blockSize)
    var block = old / blockSize
    var lastMark: Mark = 0
    // Also what had its place, which needs no commit: a longer disk shows it.
    var zeroed: Set<UInt16> = [0]
    var isChanged = false
    if old % blockSize != 0 {
      let found = try find(block, limit: 1)
      if found.place != .zero, !found.writable {
        let bytes = try contents(of: found.place, count: Int(old % blockSize))
        let placement = try place(BlockRange(block), whole: true)
        try put(bytes, in: placement.extent)
        isChanged = true
        lastMark = max(lastMark, placement.extent.mark)
      }
      block += 1
    }
    while block < blockCount {
      switch try discard(BlockRange(block, blockCount - block), zeroing: true) {
      case .nothing(let count): block += count
      case .zero(let extent):
        try put([], in: extent)
        isChanged = true
        if case .device(let number, _) = extent.place { zeroed.insert(number) }
        lastMark = max(lastMark, extent.mark)
        block += extent.blocks.count
      }
    }
    guard isChanged else { return }
    for number in zeroed {
      let data = try device(number)
      try io { () throws(IOError) in try data.flush() }
    }
    guard lastMark > 0 else { return }
    let plan = try commitPlan(upTo: lastMark)
    try plan.carryOut(on: store)
    committed(upTo: lastMark)
  }

  /// Zeroes an extent and puts bytes at its beginning.
  private func put(_ bytes: [UInt8], in extent: Extent) throws(ImageError) {
    guard case .device(let number, let sector) = extent.place else { return }
    let device = try device(number)
    let count = extent.blocks.count * UInt64(blockSize)
    try io { () throws(IOError) in
      try device.zero(at: sector * 512, count: count)
      if !bytes.isEmpty { try device.write(bytes, at: sector * 512) }
    }
  }

  private func contents(of place: Place, count: Int) throws(ImageError) -> [UInt8] {
    switch place {
    case .zero: return [UInt8](repeating: 0, count: count)
    case .device(let number, let sector):
      let device = try device(number)
      return try io { () throws(IOError) in try device.read(at: sector * 512, count: count) }
    }
  }
}
