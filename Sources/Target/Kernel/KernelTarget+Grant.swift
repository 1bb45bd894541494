// SPDX-License-Identifier: Apache-2.0
// What the module is told beforehand: where first writes may go, and of blocks that have one place.

package import DiskModel
import DMU
import Glibc
import SystemIO

extension KernelTarget {
  /// See `TargetEngine`. The blocks' place has to be one run of one device of the kernel's.
  package func grant(_ grant: Grant?) throws(AnswerRefusal) {
    let said: DMU.Answer
    let blocks = grant?.blocks ?? BlockRange(0, 0)
    if let grant {
      let (place, count) = devices.translate(grant.place, blocks: blocks.count)
      guard takesGrants, let place, count == blocks.count else { throw .badBlocks(blocks) }
      let extent = Extent(blocks, place, writable: true)
      guard canCover(extent) else { throw .badBlocks(blocks) }
      try cover(extent, .prime(extent))
      said = .grant(
        block: blocks.first, count: count, at: Self.place(place), budget: Self.budget)
    } else {
      said = .revoke
    }
    try say(said, of: blocks)
  }

  /// See `TargetEngine`. The places have to be one run of one device of the kernel's.
  package func pool(_ pool: Pool) throws(AnswerRefusal) {
    let perBlock = UInt64(blockSize) / 512
    let (length, isTooFar) = pool.stride.multipliedReportingOverflow(by: UInt64(pool.count))
    guard takesGrants, pool.count > 0, pool.stride >= perBlock, !isTooFar, length < 1 << 54 else {
      throw .badBlocks(pool.blocks)
    }
    let blocks = (length - pool.stride) / perBlock + 1
    let (place, count) = devices.translate(pool.place, blocks: blocks)
    guard let place, count == blocks else { throw .badBlocks(pool.blocks) }
    // As if they were blocks of the disk, which may have fewer.
    let extent = Extent(BlockRange(0, blocks), place, writable: true)
    guard canCover(extent, bytes: blocks * UInt64(blockSize)) else { throw .badBlocks(pool.blocks) }
    try cover(extent, bytes: blocks * UInt64(blockSize), .prime(extent))
    try say(
      .pool(
        block: pool.blocks.first, count: pool.blocks.count, at: Self.place(place),
        stride: pool.stride, places: pool.count), of: pool.blocks)
  }

  /// See `TargetEngine`. The blocks' place has to be one run of one device of the kernel's.
  package func layer(_ layer: Layer) throws(AnswerRefusal) {
    let (place, count) = devices.translate(layer.place, blocks: layer.blocks.count)
    guard takesLayers, layer == self.layer, layer.blocks.first == 0, let place,
      count == layer.blocks.count
    else { throw .badBlocks(layer.blocks) }
    let extent = Extent(layer.blocks, place, writable: true)
    guard canCover(extent) else { throw .badBlocks(layer.blocks) }
    try cover(extent, .prime(extent))
    try say(.layer(count: count, at: Self.place(place)), of: layer.blocks)
  }

  /// See `TargetEngine`.
  package func present(
    from block: UInt64, _ words: UnsafeBufferPointer<UInt64>
  ) throws(AnswerRefusal) {
    guard let layer, let base = words.baseAddress, block < layer.blocks.count else {
      throw .badBlocks(BlockRange(block))
    }
    var done: UInt64 = 0
    let count = min(UInt64(words.count) * 64, layer.blocks.count - block)
    while done < count {
      let part = min(count - done, DMU.Answer.mostBits)
      let words = UnsafeBufferPointer(start: base + Int(done / 64), count: Int((part + 63) / 64))
      try say(.bits(block: block + done, count: part, words), of: BlockRange(block + done, part))
      done += part
    }
  }

  /// Says something that no question was asked for.
  private func say(_ said: DMU.Answer, of blocks: BlockRange) throws(AnswerRefusal) {
    let code: Int32
    do throws(IOError) {
      code = try tell(said)
    } catch {
      failure = error
      throw .badBlocks(blocks)
    }
    guard code == 0 else { throw code == EEXIST ? .overlap(blocks) : .badBlocks(blocks) }
  }

  /// So many placements are not told at most; half of them are worth a message.
  private static let budget: UInt32 = 8192
}
