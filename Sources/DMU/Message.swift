// SPDX-License-Identifier: Apache-2.0
// What the kernel says on /dev/dmu/NAME, as values. The layout is in dmu.h and nowhere else.

internal import DMUProtocol

/// One message of the device-mapper target `userspace`. Blocks are of the device's size,
/// sectors of 512 bytes. Source: dmu.h; docs/dm-userspace.md.
public enum Message: Sendable, Equatable {
  /// Nothing serves a request for the blocks. `whole`: the write covers them entirely. `of`: the
  /// first request that waits.
  case fault(id: UInt64, block: UInt64, count: UInt64, write: Bool, whole: Bool, of: Request)
  /// Every placement up to the mark may be made durable; a flush is held for it.
  case flush(id: UInt64, mark: UInt64)
  /// Whole blocks are discarded, or, when `zeroing`, have to read as zeroes.
  case discard(id: UInt64, block: UInt64, count: UInt64, zeroing: Bool)
  /// The placement that asked to be told of is copied and written.
  case syncDone(block: UInt64, mark: UInt64)
  /// The placement came to nothing, for the reason of this errno.
  case mapError(block: UInt64, mark: UInt64, code: Int32)
  /// No request can reach the old place of the blocks.
  case invalidateDone(block: UInt64, count: UInt64)
  /// What the device is.
  case version(Geometry)
  /// A counter, by its number in dmu.h.
  case statistic(number: UInt64, value: UInt64)
  /// An uncommitted placement, as part of a dump.
  case uncommitted(Uncommitted)
  /// The end of a dump: marks have to be greater than this one.
  case dumpDone(mark: UInt64)
  /// A placement that was made because it was granted. Comes before every question that was
  /// raised after it.
  case placed(Uncommitted)
  /// Of 64 blocks of a layer those whose bits are set have become present, uncommitted under the mark;
  /// perhaps told before. Only after `Answer.layer` or `Answer.knowsLayers`.
  case present(block: UInt64, bits: UInt64, mark: UInt64)
  /// A flush has failed with this errno, and every one will; 0: they may be tried again.
  case flushFailed(code: Int32)
  /// Writes have failed on their devices, the last with this errno, and wait. `Answer.fail` ends
  /// all of them, `Answer.retry` sends all again. Only after `Answer.holdFailed`.
  case writesFailed(id: UInt64, code: Int32)
  /// A request failed on a backing device with this errno.
  case deviceError(device: UInt16, write: Bool, code: Int32)
  /// A type that this version does not know.
  case unknown(type: UInt32)

  /// What a request wants, in sectors from the start of the device.
  public struct Request: Sendable, Equatable {
    /// The first.
    public var sector: UInt64
    /// How many.
    public var count: UInt32

    /// A request from its parts.
    public init(sector: UInt64, count: UInt32) {
      self.sector = sector
      self.count = count
    }
  }

  /// The shape of a device.
  public struct Geometry: Sendable, Equatable {
    /// The version of the protocol.
    public var version: UInt16
    /// Sectors of a block.
    public var blockSectors: UInt32
    /// Length in sectors.
    public var sectors: UInt64
    /// How many backing devices there are.
    public var devices: UInt16
    /// Whether `Answer.grant` is known.
    public var takesGrants: Bool
    /// Whether `Answer.layer` is known.
    public var takesLayers: Bool
    /// Whether `Answer.pool` is known, and the module gives marks: see `Node.answer(marking:)`.
    public var takesPools: Bool
  }

  /// A placement that is not committed.
  public struct Uncommitted: Sendable, Equatable {
    /// The first block.
    public var block: UInt64
    /// How many blocks.
    public var count: UInt64
    /// The backing device; `Answer.zeroDevice` for none.
    public var device: UInt16
    /// The sector of the first block there.
    public var sector: UInt64
    /// Whether writes may go there.
    public var writable: Bool
    /// Its mark.
    public var mark: UInt64

    init(_ raw: dmu_message) {
      (block, count) = (raw.block, raw.count)
      (device, sector) = (raw.device, raw.sector)
      writable = raw.flags & UInt32(DMU_WRITE) != 0
      mark = raw.mark
    }
  }

  init(_ raw: dmu_message) {
    let (id, block, count, mark) = (raw.id, raw.block, raw.count, raw.mark)
    func has(_ flag: Int32) -> Bool { raw.flags & UInt32(flag) != 0 }
    switch dmu_message_type(rawValue: raw.type) {
    case DMU_FAULT:
      self = .fault(
        id: id, block: block, count: count, write: has(DMU_WRITE), whole: has(DMU_WHOLE),
        of: Request(sector: raw.sector, count: raw.block_sectors))
    case DMU_FLUSH: self = .flush(id: id, mark: mark)
    case DMU_DISCARD:
      self = .discard(id: id, block: block, count: count, zeroing: has(DMU_ZEROING))
    case DMU_SYNC_DONE: self = .syncDone(block: block, mark: mark)
    case DMU_MAP_ERROR: self = .mapError(block: block, mark: mark, code: raw.code)
    case DMU_INVALIDATE_DONE: self = .invalidateDone(block: block, count: count)
    case DMU_VERSION_IS:
      self = .version(
        Geometry(
          version: raw.version, blockSectors: raw.block_sectors, sectors: count,
          devices: raw.device, takesGrants: has(DMU_TAKES_GRANTS),
          takesLayers: has(DMU_TAKES_LAYERS), takesPools: has(DMU_TAKES_POOLS)))
    case DMU_STATS_ARE: self = .statistic(number: id, value: mark)
    case DMU_UNCOMMITTED_IS: self = .uncommitted(Uncommitted(raw))
    case DMU_PLACED: self = .placed(Uncommitted(raw))
    case DMU_PRESENT: self = .present(block: block, bits: raw.sector, mark: mark)
    case DMU_FLUSH_FAILED: self = .flushFailed(code: raw.code)
    case DMU_DUMP_DONE: self = .dumpDone(mark: mark)
    case DMU_WRITES_FAILED: self = .writesFailed(id: id, code: raw.code)
    case DMU_DEVICE_ERROR:
      self = .deviceError(device: raw.device, write: has(DMU_WRITE), code: raw.code)
    default: self = .unknown(type: raw.type)
    }
  }
}
