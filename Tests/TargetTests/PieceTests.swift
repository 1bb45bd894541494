// SPDX-License-Identifier: Apache-2.0
// Blocks that are put together in several pieces: nothing of it is seen before all is there, and
// the memory does not grow with the block.

import BlockIO
import DiskModel
import Fakes
import Glibc
import TargetTrials
import Testing
import TestSupport

@testable import Target

/// 8 blocks of 8 sectors, copied two sectors at a time; block b at sector 8 + 8 b of the store.
@Suite struct PieceTests {
  let driver: UserTargetDriver

  init() throws {
    var limits = TargetLimits()
    limits.piece = 1024
    driver = try UserTargetDriver(limits: limits)
    try driver.engine.answer(
      .prime(Extent(BlockRange(0, 8), .device(1, sector: 0), writable: false)))
  }

  private func place(_ block: UInt64, mark: Mark) -> Extent {
    Extent(BlockRange(block), .device(0, sector: 8 * block + 8), writable: true, mark: mark)
  }

  private func stamps(_ bytes: [UInt8]) -> [UInt64?] {
    stride(from: 0, to: bytes.count, by: 512).map { at in
      bytes.withUnsafeBytes { Stamp.read($0, at: at) }
    }
  }

  private func read(_ sector: Int, _ count: Int) -> Int {
    driver.submit(.read(UInt64(sector * 512), count * 512))
  }

  private func begin(
    _ request: DriverRequest, mark: Mark, _ preparation: Preparation
  ) throws -> Int {
    let number = driver.submit(request)
    guard case .write(let id, BlockRange(1, 1), whole: false)? = driver.engine.nextFault() else {
      Issue.record("no fault")
      return number
    }
    try driver.engine.answer(.map(id, Placement(place(1, mark: mark), preparation)))
    return number
  }

  private let old: [UInt64?] = (1008..<1016).map { $0 }

  /// After each step what has not been asked to change reads as before, and nothing is recorded
  /// before the last piece.
  @Test func nothingIsSeenBeforeAllIsThere() throws {
    let from = Preparation.copy(from: .device(1, sector: 8))
    let request = try begin(.write(11 * 512, Stamp.sectors(2, 7)), mark: 1, from)
    // Four pieces, each read and written.
    for step in 1...8 {
      #expect(driver.result(request) == nil && driver.target.uncommitted().isEmpty, "\(step)")
      #expect(driver.executor.waiting == 1)
      #expect(driver.executor.step())
    }
    #expect(driver.result(request) == 0)
    #expect(driver.target.uncommitted() == [place(1, mark: 1)])
    let all = read(8, 8)
    driver.settle()
    var expected = old
    expected[3] = 7
    expected[4] = 7
    #expect(stamps(driver.bytes(all)) == expected)
    let store = stamps(driver.contents(0))
    #expect(Array(store[16..<24]) == expected)
    #expect(store[..<16].allSatisfy { $0 == 0 } && store[24...].allSatisfy { $0 == 0 })
  }

  /// An error in any piece: the block is what it was, and the next write places it anew.
  @Test(arguments: 0..<8) func anErrorHalfWayChangesNothing(_ step: Int) throws {
    let from = Preparation.copy(from: .device(1, sector: 8))
    let request = try begin(.write(11 * 512, Stamp.sectors(2, 7)), mark: 1, from)
    for _ in 0..<step { #expect(driver.executor.step()) }
    driver.failIO(true)
    driver.settle()
    driver.failIO(false)
    #expect(driver.result(request) == EIO)
    #expect(driver.engine.nextFault() == .mapError(block: 1, mark: 1, code: EIO))
    #expect(driver.target.uncommitted().isEmpty)
    let before = read(8, 8)
    driver.settle()
    #expect(stamps(driver.bytes(before)) == old)
    let again = try begin(.write(8 * 512, Stamp.sectors(1, 9)), mark: 2, from)
    let after = read(8, 8)
    driver.settle()
    #expect(driver.result(again) == 0)
    #expect(stamps(driver.bytes(after)) == [9] + old[1...])
  }

  /// Where there is nothing to copy, what the write leaves out is zeroed, whatever was there.
  @Test(arguments: [(8, 1), (11, 2), (13, 3), (9, 6)]) func gapsAreZeroed(
    _ sector: Int, _ count: Int
  ) throws {
    try driver.store.write([UInt8](repeating: 0xEE, count: 4096), at: 16 * 512)
    let write = DriverRequest.write(UInt64(sector * 512), Stamp.sectors(count, 7))
    let request = try begin(write, mark: 1, .zero)
    let all = read(8, 8)
    driver.settle()
    #expect(driver.result(request) == 0)
    let expected: [UInt64?] = (8..<16).map { sector..<(sector + count) ~= $0 ? 7 : 0 }
    #expect(stamps(driver.bytes(all)) == expected)
  }

  /// A place that was there already is copied to itself; an invalidation then waits for the last
  /// piece, and what the copy was for is not remembered.
  @Test func invalidationWaitsForTheLastPiece() throws {
    let from = Preparation.copy(from: .device(1, sector: 8))
    let request = try begin(.write(11 * 512, Stamp.sectors(2, 7)), mark: 0, from)
    for _ in 0..<3 { #expect(driver.executor.step()) }
    try driver.engine.answer(.invalidate(BlockRange(1)))
    for _ in 3..<8 {
      #expect(driver.engine.nextFault() == nil)
      #expect(driver.executor.step())
    }
    #expect(driver.result(request) == 0)
    #expect(driver.engine.nextFault() == .invalidateDone(BlockRange(1)))
    _ = read(8, 1)
    guard case .read(_, BlockRange(1, 1))? = driver.engine.nextFault() else {
      Issue.record("what was invalidated is remembered")
      return
    }
  }

  /// The largest block of any format, and as many requests at once as there are blocks.
  @Test func memoryDoesNotGrowWithTheBlock() throws {
    let size: UInt64 = 8 << 30
    let blockSize: UInt32 = 256 << 20
    let base = MemoryStore("base", bytes: Stamp.sectors(5000, 3))
    base.isWritable = false
    let executor = SimulatedExecutor(devices: [MemoryStore("store", size: size), base], seed: 1)
    let target = try UserTarget(
      size: size, blockSize: blockSize, executor: executor,
      log: PendingLog(anonymousFor: size, blockSize: blockSize))
    let owner = Replies()
    let number = target.enroll(owner)
    var bytes = Stamp.sectors(1, 7)
    bytes.withUnsafeMutableBytes { buffer in
      for block in 0..<UInt64(32) {
        let request = TargetRequest(
          .write, offset: block * UInt64(blockSize) + 65536, count: 512,
          buffer: buffer.baseAddress, tag: block)
        #expect(target.submit(request, owner: number) == nil)
      }
      var mark: Mark = 0
      while let fault = target.nextFault() {
        guard case .write(let id, let blocks, _) = fault else { continue }
        mark += 1
        let extent = Extent(
          BlockRange(blocks.first), .device(0, sector: blocks.first << 19), writable: true,
          mark: mark)
        do throws(AnswerRefusal) {
          try target.answer(.map(id, Placement(extent, .copy(from: .device(1, sector: 0)))))
        } catch { Issue.record("refused: \(error)") }
      }
      while executor.step() {}
    }
    #expect(owner.codes == [Int32](repeating: 0, count: 32))
    #expect(target.scratchBytes <= 2 << 20)
  }

  private final class Replies: RequestOwner {
    var codes: [Int32] = []
    func completed(tag: UInt64, code: Int32) { codes.append(code) }
  }
}
