// SPDX-License-Identifier: Apache-2.0
// The memory file is right after any store, and is never trusted.

import BlockIO
import DiskModel
import Glibc
import Testing
import TestSupport

@testable import Target

@Suite struct PendingLogTests {
  static let size: UInt64 = 1 << 40
  static let blockSize: UInt32 = 65536

  static func open(_ raw: Int32) throws -> PendingLog {
    try PendingLog(mapping: raw, size: size, blockSize: blockSize)
  }

  @Test("The daemon knows how long a log is, new and at most")
  func lengths() {
    let record = PendingLog.recordSize
    #expect(
      PendingSummary.firstSize == UInt64(PendingLog.start + PendingLog.initialCapacity * record))
    #expect(
      PendingSummary.largestSize == UInt64(PendingLog.start + PendingLog.maximumCapacity * record))
  }

  static func bytes(_ raw: Int32) -> [UInt8] {
    var status = stat()
    fstat(raw, &status)
    var bytes = [UInt8](repeating: 0, count: Int(status.st_size))
    let count = pread(raw, &bytes, bytes.count, 0)
    precondition(count == bytes.count)
    return bytes
  }

  /// A new file with these contents, opened as a log.
  static func reopened(_ bytes: [UInt8]) throws -> (extents: [Extent], failed: Int32) {
    let raw = try memoryFile()
    defer { close(raw) }
    precondition(pwrite(raw, bytes, bytes.count, 0) == bytes.count)
    let log = try open(raw)
    return (log.extents(), log.flushFailed)
  }

  static func extent(_ random: inout SplitMix64, _ mark: Mark) -> Extent {
    let first = random.next() % 1000
    let place: Place = random.chance(10) ? .zero : .device(0, sector: random.next() % (1 << 40))
    return Extent(BlockRange(first, 1 + random.next() % 9), place, writable: true, mark: mark)
  }

  @Test(arguments: 0..<12 as Range<UInt64>) func killedAtAnyStore(seed: UInt64) throws {
    var random = SplitMix64(seed: seed)
    let raw = try memoryFile()
    defer { close(raw) }
    let log = try Self.open(raw)
    // What is in the log before the operation under way, and what will be after it.
    var held: [Extent] = []
    var next: [Extent] = []
    var mark: Mark = 0
    var snapshots = 0
    log.onStore = {
      guard random.chance(snapshots < 150 ? 60 : 2) else { return }
      snapshots += 1
      var bytes = Self.bytes(raw)
      let words = bytes.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: 32, as: UInt64.self) }
      // What lies after the newest record may be half written.
      let torn = PendingLog.start + Int(words >> 32) * PendingLog.recordSize
      for at in torn..<min(torn + PendingLog.recordSize, bytes.count) where random.chance(50) {
        bytes[at] = UInt8(truncatingIfNeeded: random.next())
      }
      do {
        let found = try Self.reopened(bytes).extents
        #expect(found == held || found == next, "seed \(seed)")
      } catch {
        Issue.record("seed \(seed): \(error)")
      }
    }
    for _ in 0..<(seed == 0 ? 5000 : 600) {
      if random.chance(seed == 0 ? 99 : 70), log.makeRoom(for: 1) {
        // Placements are recorded in the order in which their data is written.
        mark += 1
        var new = Self.extent(&random, mark)
        if random.chance(20), mark > 5, !held.contains(where: { $0.mark == mark - 3 }) {
          new.mark = mark
        }
        next = (held + [new]).sorted { $0.mark < $1.mark }
        log.append(new)
      } else if let last = held.last {
        let upTo = held.first!.mark + random.next() % (last.mark - held.first!.mark + 1)
        next = held.filter { $0.mark > upTo }
        log.drop(upTo: upTo)
      }
      held = next
    }
    #expect(try Self.open(raw).extents() == held)
    #expect(snapshots > 20)
  }

  @Test func recordsOutOfOrderAreDroppedByMark() throws {
    let raw = try memoryFile()
    defer { close(raw) }
    let log = try Self.open(raw)
    var random = SplitMix64(seed: 1)
    for mark: Mark in [1, 5, 2, 7, 3] { log.append(Self.extent(&random, mark)) }
    log.drop(upTo: 3)
    #expect(log.extents().map(\.mark) == [5, 7])
    #expect(try Self.open(raw).extents().map(\.mark) == [5, 7])
    log.drop(upTo: 7)
    #expect(log.count == 0)
    // The next worker counts its marks from the start again.
    let next = try Self.open(raw)
    #expect(next.committed == 0)
    next.append(Self.extent(&random, 1))
    #expect(try Self.open(raw).extents().map(\.mark) == [1])
  }

  @Test func fillsUpAndWraps() throws {
    let raw = try memoryFile()
    defer { close(raw) }
    let log = try Self.open(raw)
    var random = SplitMix64(seed: 2)
    var mark: Mark = 0
    while log.makeRoom(for: 1) {
      mark += 1
      log.append(Self.extent(&random, mark))
    }
    #expect(log.capacity == PendingLog.maximumCapacity)
    #expect(log.count == PendingLog.maximumCapacity - 1)
    log.drop(upTo: 1000)
    for _ in 0..<1000 {
      #expect(log.makeRoom(for: 1))
      mark += 1
      log.append(Self.extent(&random, mark))
    }
    #expect(!log.makeRoom(for: 1))
    let again = try Self.open(raw)
    #expect(again.extents().first?.mark == 1001 && again.extents().last?.mark == mark)
  }

  @Test func flushFailureIsRemembered() throws {
    let raw = try memoryFile()
    defer { close(raw) }
    let log = try Self.open(raw)
    log.failFlush(EIO)
    log.failFlush(ENOSPC)
    #expect(try Self.open(raw).flushFailed == EIO)
    log.clearFlushFailure()
    #expect(try Self.open(raw).flushFailed == 0)
  }

  @Test func damageIsNoticed() throws {
    let raw = try memoryFile()
    defer { close(raw) }
    let log = try Self.open(raw)
    var random = SplitMix64(seed: 3)
    for mark: Mark in 1...20 { log.append(Self.extent(&random, mark)) }
    log.drop(upTo: 5)
    let good = Self.bytes(raw)
    let held = log.extents()
    var refused = 0
    for at in Array(0..<64) + Array(4096..<(4096 + 20 * 40)) {
      for bit in [0, 7] {
        var bad = good
        bad[at] ^= 1 << UInt8(bit)
        do throws(PendingLogError) {
          let raw = try PendingLogTests.file(bad)
          defer { close(raw) }
          let found = try PendingLog(
            mapping: raw, size: Self.size, blockSize: Self.blockSize
          ).extents()
          // A header's word may say less or more of the same records, never other ones.
          #expect(found.allSatisfy { held.contains($0) || $0.mark <= 5 }, "byte \(at)")
        } catch {
          refused += 1
        }
      }
    }
    #expect(refused > 1000)
    for length in [1, 63, 64, 4095, 4096, 5000] {
      #expect(throws: PendingLogError.self) { try Self.reopened(Array(good[..<length])) }
    }
    #expect(throws: PendingLogError.self) {
      try PendingLog(mapping: raw, size: Self.size + 512, blockSize: Self.blockSize)
    }
    #expect(throws: PendingLogError.self) {
      try PendingLog(mapping: raw, size: Self.size, blockSize: 4096)
    }
  }

  private static func file(_ bytes: [UInt8]) throws(PendingLogError) -> Int32 {
    // Whatever fails here ends the test.
    guard let raw = try? memoryFile(), pwrite(raw, bytes, bytes.count, 0) == bytes.count else {
      preconditionFailure("no temporary file")
    }
    return raw
  }
}
