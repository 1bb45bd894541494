// SPDX-License-Identifier: Apache-2.0
// Places that a target has for first writes, whichever block they are to, and the marks that it gives.
//
// Nothing of a pool is durable: a place is entered, and counted where the format counts, by the commit
// that has its placement, as one that was asked for. A power cut leaves a longer file. What a pool has
// beside what is placed in it belongs to it until the image is closed. Pools begin small, and each is
// twice as large as the one before it: a disk that is hardly written takes hardly any room.

import BlockIO
import DiskModel
import Glibc
import SystemIO

/// Places of a block each, in a row.
struct PoolRoom {
  /// The byte of device 0 where the first begins.
  var first: UInt64
  /// From one to the next, in bytes.
  var stride: UInt64
  var count: UInt64
}

/// The places of the pools of an image, as far as nothing is in them.
struct PooledPlaces {
  private var places: Set<UInt64> = []
  /// The next pool, while it waits for its space.
  var next: PoolRoom?
  /// How many places it should have, at most.
  private(set) var wanted: UInt64 = 16

  mutating func add(_ room: PoolRoom) {
    for index in 0..<room.count { places.insert(room.first + index * room.stride) }
    wanted = min(wanted * 2, 512)
  }

  /// Whether it was one of them; now it is none.
  mutating func take(_ offset: UInt64) -> Bool { places.remove(offset) != nil }
}

/// An image whose placements may be marked by the target.
protocol MarkedImage: StoredImage {
  /// What is not committed.
  var pending: PendingPlacements { get set }
}

extension MarkedImage {
  /// See `ImageFormat`.
  package func takeMarks() -> Bool {
    pending.isMarkedLater = true
    return true
  }

  /// See `ImageFormat`.
  package func marked(_ provisional: Mark, as mark: Mark) {
    pending.mark(provisional, as: mark)
  }
}

/// An image that finds a place for a block anywhere.
protocol PooledImage: MarkedImage {
  /// The pools that were given.
  var pooled: PooledPlaces { get set }
  /// Device 0, where a pool is to have its space before it is given; nil where it may find none later.
  var poolStore: (any ByteStore)? { get }
  /// Room for a pool of so many places, or less, which is taken; nil where blocks cannot go anywhere.
  /// Throws as `place`.
  func takeRoom(_ wanted: UInt64) throws(ImageError) -> PoolRoom?
  /// A block has got a place of a pool.
  func placed(_ block: UInt64, at offset: UInt64)
}

extension PooledImage {
  var poolStore: (any ByteStore)? { nil }
  func placed(_ block: UInt64, at offset: UInt64) {}

  /// See `ImageFormat`.
  package func pool() throws(ImageError) -> Pool? {
    guard isWritable else { return nil }
    if pooled.next == nil { pooled.next = try takeRoom(pooled.wanted) }
    guard let room = pooled.next else { return nil }
    // Who fails from here on, or has to wait, finds the room again.
    if let poolStore {
      do throws(IOError) {
        try poolStore.reserve(at: room.first, count: room.count * room.stride)
      } catch {
        // There may be space for less when it is asked for again.
        if error.code == ENOSPC { pooled.next?.count = max(room.count / 2, 1) }
        throw ImageError(error)
      }
    }
    pooled.next = nil
    pooled.add(room)
    return Pool(
      BlockRange(0, blockCount), .device(0, sector: room.first / 512), stride: room.stride / 512,
      count: UInt32(room.count))
  }

  /// See `ImageFormat`. Throws `badRequest` for what is in no pool, or placed already.
  package func granted(_ extent: Extent) throws(ImageError) {
    try checkBounds(extent.blocks)
    let block = extent.blocks.first
    guard case .device(0, let sector) = extent.place, extent.writable, extent.blocks.count == 1,
      extent.mark > 0, sector < 1 << 54, pooled.take(sector * 512)
    else {
      throw ImageError(.badRequest, "\(store.name): block \(block) was placed in no pool")
    }
    let run = PendingPlacements.Run(
      blocks: extent.blocks, offset: sector * 512, mark: extent.mark)
    guard pending.insert(run) else {
      throw ImageError(.badRequest, "\(store.name): block \(block) is placed already")
    }
    placed(block, at: sector * 512)
  }
}
