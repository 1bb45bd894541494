// SPDX-License-Identifier: Apache-2.0
// What a worker says to /dev/dmu/NAME, as values.

internal import DMUProtocol

/// One answer to the device-mapper target `userspace`. Source: dmu.h.
public struct Answer: Sendable {
  /// The place that is no device: blocks read as zeroes.
  public static let zeroDevice = UInt16(DMU_DEVICE_ZERO)

  /// The most bytes of one `data`.
  public static let mostData = Int(DMU_MAX_DATA)

  /// Where blocks live: a backing device by number, and the sector of the first of them.
  public struct Place: Sendable, Hashable {
    /// The device, or `Answer.zeroDevice`.
    public var device: UInt16
    /// The sector there.
    public var sector: UInt64

    /// A place from its parts.
    public init(device: UInt16, sector: UInt64) {
      self.device = device
      self.sector = sector
    }

    /// Nowhere: zeroes.
    public static let zero = Place(device: Answer.zeroDevice, sector: 0)
  }

  /// What precedes a first write.
  public enum Preparation: Sendable, Hashable {
    /// Nothing.
    case none
    /// What the write does not cover is copied from there.
    case copy(from: Place)
    /// What the write does not cover is zeroed.
    case zero
  }

  var raw: dmu_answer

  private init(_ type: dmu_answer_type, id: UInt64 = 0) {
    raw = dmu_answer()
    raw.type = type.rawValue
    raw.id = id
  }

  /// The blocks are there. `id` 0: nobody asked. A mark other than 0 makes the placement
  /// uncommitted: the next flush is held for it, and it has to be the greatest so far. It is
  /// `isUncommitted` without one if it is given by `Node.answer(marking:)`.
  public static func map(
    id: UInt64, block: UInt64, count: UInt64, at place: Place, writable: Bool,
    preparation: Preparation = .none, mark: UInt64 = 0, isUncommitted: Bool = false,
    temporary: Bool = false, sync: Bool = false
  ) -> Answer {
    var answer = Answer(DMU_MAP, id: id)
    var flags: Int32 = writable ? DMU_WRITABLE : 0
    switch preparation {
    case .none: break
    case .zero: flags |= DMU_ZERO_FIRST
    case .copy(let from):
      flags |= DMU_COPY_FIRST
      answer.raw.from_device = from.device
      answer.raw.from_sector = from.sector
    }
    if mark != 0 || isUncommitted { flags |= DMU_HOLD_FLUSH }
    if temporary { flags |= DMU_TEMPORARY }
    if sync { flags |= DMU_SYNC }
    answer.raw.flags = UInt32(flags)
    answer.raw.block = block
    answer.raw.count = count
    answer.raw.device = place.device
    answer.raw.sector = place.sector
    answer.raw.mark = mark
    return answer
  }

  /// A read: the bytes, not remembered. They begin `offset` bytes into the fault's block, and
  /// have to cover the first request that waits; both lengths are multiples of 512, and there
  /// are at most `mostData` bytes. The memory is read while the answer is given, not after.
  public static func data(
    id: UInt64, _ bytes: UnsafeRawBufferPointer, offset: UInt32
  ) -> Answer {
    var answer = Answer(DMU_DATA, id: id)
    answer.raw.address = UInt64(UInt(bitPattern: bytes.baseAddress))
    answer.raw.length = UInt32(bytes.count)
    answer.raw.offset = offset
    return answer
  }

  /// The same with a mark, where a module gives none.
  public func marked(_ mark: UInt64) -> Answer {
    var answer = self
    answer.raw.mark = mark
    return answer
  }

  /// The first block that it speaks of.
  public var block: UInt64 { raw.block }

  /// The bytes go to a place, and are there when the answer has been taken: part of what is
  /// linked. Length and address are multiples of the device's sector.
  public static func data(_ bytes: UnsafeRawBufferPointer, at place: Place) -> Answer {
    var answer = Answer(DMU_DATA)
    answer.raw.address = UInt64(UInt(bitPattern: bytes.baseAddress))
    answer.raw.length = UInt32(bytes.count)
    answer.raw.device = place.device
    answer.raw.sector = place.sector
    return answer
  }

  /// A read: zeroes, not remembered.
  public static func zero(id: UInt64) -> Answer { Answer(DMU_ZERO, id: id) }

  /// Fails what waits with this errno, greater than 0.
  public static func fail(id: UInt64, code: Int32) -> Answer {
    var answer = Answer(DMU_FAIL, id: id)
    answer.raw.code = code
    return answer
  }

  /// Keeps what waits until `retry`.
  public static func wait(id: UInt64) -> Answer { Answer(DMU_WAIT, id: id) }

  /// Asks again what was told to wait; 0 is all of it.
  public static func retry(id: UInt64 = 0) -> Answer { Answer(DMU_RETRY, id: id) }

  /// A discard: so many blocks from its first need nothing more.
  public static func done(id: UInt64, count: UInt64) -> Answer {
    var answer = Answer(DMU_DONE, id: id)
    answer.raw.count = count
    return answer
  }

  /// Everything up to the flush's mark is durable.
  public static func flushDone(id: UInt64) -> Answer { Answer(DMU_FLUSH_DONE, id: id) }

  /// Forget these blocks; `Message.invalidateDone` says when nothing can reach the old place.
  public static func invalidate(block: UInt64, count: UInt64) -> Answer {
    var answer = Answer(DMU_INVALIDATE)
    answer.raw.block = block
    answer.raw.count = count
    return answer
  }

  /// First writes to these blocks, where they are mapped to be read, go to the place without a
  /// question, and are told as `Message.placed`. At most `budget` of them are untold; the marks
  /// follow the last that was given, so that the next one has to leave that many free. Takes
  /// the place of any grant before it. Source: `Geometry.takesGrants` says whether it is known.
  public static func grant(
    block: UInt64, count: UInt64, at place: Place, budget: UInt32
  ) -> Answer {
    var answer = Answer(DMU_GRANT)
    answer.raw.block = block
    answer.raw.count = count
    answer.raw.device = place.device
    answer.raw.sector = place.sector
    answer.raw.length = budget
    return answer
  }

  /// As `grant`, but the first write goes to the place, the second to that which lies `stride` sectors
  /// behind it, and so on for so many places, whichever of the blocks they are to. A pool that is
  /// given while one for the same blocks has places left follows that; a third is refused with ENOBUFS.
  /// Source: `Geometry.takesPools` says whether it is known.
  public static func pool(
    block: UInt64, count: UInt64, at place: Place, stride: UInt64, places: UInt32
  ) -> Answer {
    var answer = grant(block: block, count: count, at: place, budget: places)
    answer.raw.flags = UInt32(DMU_POOL)
    answer.raw.from_sector = stride
    return answer
  }

  /// Nothing is granted any more: what was placed is told, and no more is.
  public static var revoke: Answer { Answer(DMU_GRANT) }

  /// Each of so many blocks from block 0 on has one place, the first's and the others after it, and
  /// is there or not: see `bits`. It stays for as long as the device; a longer one may follow.
  /// Source: `Geometry.takesLayers` says whether it is known.
  public static func layer(count: UInt64, at place: Place) -> Answer {
    var answer = Answer(DMU_LAYER)
    answer.raw.count = count
    answer.raw.device = place.device
    answer.raw.sector = place.sector
    return answer
  }

  /// Whoever says this takes `Message.present`. An older module refuses it with EINVAL.
  public static var knowsLayers: Answer { Answer(DMU_LAYER) }

  /// The most blocks of one `bits`.
  public static let mostBits = UInt64(DMU_MAX_BITS)

  /// Of the blocks of a layer from `block` on, a multiple of 64, those are there whose bits are set,
  /// the lowest bit being the first's; none past `count`. The memory is read while the answer is given.
  public static func bits(
    block: UInt64, count: UInt64, _ words: UnsafeBufferPointer<UInt64>
  ) -> Answer {
    var answer = Answer(DMU_BITS)
    answer.raw.block = block
    answer.raw.count = count
    answer.raw.address = UInt64(UInt(bitPattern: words.baseAddress))
    return answer
  }

  /// A write that fails on its device waits from now on, even when this worker is gone, and
  /// `Message.writesFailed` asks what becomes of it; or not any more. An older module refuses it with EINVAL.
  public static func holdFailed(_ hold: Bool) -> Answer {
    var answer = Answer(DMU_HOLD_FAILED)
    answer.raw.code = hold ? 1 : 0
    return answer
  }

  /// Say `Message.version`.
  public static var getVersion: Answer { Answer(DMU_GET_VERSION) }
  /// Say `Message.statistic` for each counter.
  public static var statistics: Answer { Answer(DMU_STATS) }
  /// Say every `Message.uncommitted`, then `Message.dumpDone`.
  public static var dump: Answer { Answer(DMU_DUMP) }

  /// The next answer belongs to this one: they happen in order, before the request ends.
  public func linked() -> Answer {
    var answer = self
    answer.raw.flags |= UInt32(DMU_LINKED)
    return answer
  }
}
