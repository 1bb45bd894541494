// SPDX-License-Identifier: Apache-2.0
// What a disk may hold: a naive model of a copy-on-write disk, sector by sector, with what
// was written as numbers ("stamps"). It knows nothing of blocks or of formats.
//
// A sector has a history of writes in the order in which they began. One that was
// acknowledged before a flush began, and that flush confirmed, is durable: what came before
// it can no longer be found. What came after it may be, or not, until the next flush.

/// The sectors of a disk and what each may hold.
package struct NaiveDisk: Sendable {
  /// Names a write that has begun.
  package typealias Write = Int

  private struct Entry {
    var stamp: UInt64
    /// The write that put it there; -1 for what stood there first.
    var write: Write
    /// It may have been done or not: a discard, or a write that was broken off.
    var isWeak: Bool
  }

  private let base: @Sendable (Int) -> UInt64
  /// The histories of sectors that were ever written.
  private var sectors: [Int: [Entry]] = [:]
  /// When each write was acknowledged, by the clock of events; nil while it is under way.
  private var acknowledged: [Int?] = []
  private var clock = 0

  /// How many sectors there are.
  package let count: Int

  /// A disk that nobody has written to; `base` says what each sector reads as.
  package init(sectors count: Int, base: @escaping @Sendable (Int) -> UInt64) {
    self.count = count
    self.base = base
  }

  private func history(_ sector: Int) -> [Entry] {
    sectors[sector] ?? [Entry(stamp: base(sector), write: -1, isWeak: false)]
  }

  /// A write of one stamp to a range of sectors begins.
  package mutating func begin(_ range: Range<Int>, stamp: UInt64) -> Write {
    begin(range, stamp, isWeak: false)
  }

  /// A discard of a range of sectors begins.
  package mutating func beginDiscard(_ range: Range<Int>) -> Write {
    begin(range, 0, isWeak: true)
  }

  private mutating func begin(_ range: Range<Int>, _ stamp: UInt64, isWeak: Bool) -> Write {
    let write = acknowledged.count
    acknowledged.append(nil)
    for sector in range {
      let entry = Entry(stamp: stamp, write: write, isWeak: isWeak)
      sectors[sector] = history(sector) + [entry]
    }
    return write
  }

  /// A write is acknowledged.
  package mutating func end(_ write: Write) {
    clock += 1
    acknowledged[write] = clock
  }

  /// A flush begins: returns what `flushed` wants.
  package mutating func beginFlush() -> Int {
    clock += 1
    return clock
  }

  /// A flush that began at that time is acknowledged.
  package mutating func flushed(_ start: Int) {
    for (sector, history) in sectors {
      guard let last = lastKnown(history, by: start), last > 0 else { continue }
      sectors[sector] = Array(history[last...])
    }
  }

  /// A write of these sectors that was acknowledged is durable: what came before it cannot be
  /// found any more.
  package mutating func forced(_ write: Write, _ range: Range<Int>) {
    for sector in range {
      guard let history = sectors[sector],
        let index = history.lastIndex(where: { $0.write == write && !$0.isWeak })
      else { continue }
      sectors[sector] = Array(history[index...])
    }
  }

  /// What a sector may read as, with the power on, for a read that begins now where requests
  /// are served in the order in which they begin.
  package func latest(sector: Int) -> [UInt64] {
    let history = history(sector)
    let last = history.lastIndex { !$0.isWeak } ?? 0
    return history[last...].map(\.stamp)
  }

  /// Every write that is under way is broken off: it may have been done, in part, or not.
  package mutating func breakOff() {
    for (sector, history) in sectors {
      sectors[sector] = history.map { entry in
        var entry = entry
        if entry.write >= 0, acknowledged[entry.write] == nil { entry.isWeak = true }
        return entry
      }
    }
  }

  /// The last write in a history that was acknowledged by a time and is not weak.
  private func lastKnown(_ history: [Entry], by time: Int) -> Int? {
    history.lastIndex { entry in
      guard !entry.isWeak else { return false }
      return entry.write < 0 || (acknowledged[entry.write] ?? .max) <= time
    }
  }

  /// Whether a sector may hold a stamp after a power cut now.
  package func mayHold(_ stamp: UInt64, sector: Int) -> Bool {
    history(sector).contains { $0.stamp == stamp }
  }

  /// Whether a read of a sector now, with the power on, may return a stamp.
  package func mayRead(_ stamp: UInt64, sector: Int) -> Bool {
    let history = history(sector)
    guard let last = lastKnown(history, by: .max - 1) else { return false }
    return history[last...].contains { $0.stamp == stamp }
  }

  /// What a sector may hold after a power cut now, the oldest first. For messages.
  package func candidates(sector: Int) -> [UInt64] { history(sector).map(\.stamp) }

  /// The power came back and every sector was found to hold a stamp it may hold: from now on
  /// it does. Ends every write that was under way.
  package mutating func settle(_ found: [UInt64]) {
    precondition(found.count == count)
    for sector in sectors.keys {
      sectors[sector] = [Entry(stamp: found[sector], write: -1, isWeak: false)]
    }
  }
}

/// Sectors filled with a stamp, so that a read tells which write it comes from.
package enum Stamp {
  /// Fills whole sectors: stamp 0 is zeroes, any other stands in the first and last words.
  package static func fill(_ buffer: UnsafeMutableRawBufferPointer, _ stamp: UInt64) {
    buffer.initializeMemory(as: UInt8.self, repeating: 0)
    guard stamp != 0 else { return }
    for start in stride(from: 0, to: buffer.count, by: 512) {
      buffer.storeBytes(of: stamp, toByteOffset: start, as: UInt64.self)
      buffer.storeBytes(of: ~stamp, toByteOffset: start + 504, as: UInt64.self)
    }
  }

  /// So many sectors of a stamp.
  package static func sectors(_ count: Int, _ stamp: UInt64) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count * 512)
    bytes.withUnsafeMutableBytes { fill($0, stamp) }
    return bytes
  }

  /// The stamp of the sector at a byte offset; nil when it was never filled by one.
  package static func read(_ bytes: UnsafeRawBufferPointer, at offset: Int) -> UInt64? {
    let first = bytes.loadUnaligned(fromByteOffset: offset, as: UInt64.self)
    let last = bytes.loadUnaligned(fromByteOffset: offset + 504, as: UInt64.self)
    if first == 0 && last == 0 { return 0 }
    return first == ~last ? first : nil
  }
}
