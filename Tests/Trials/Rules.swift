// SPDX-License-Identifier: Apache-2.0
// The rules of docs/target.md, one by one, as functions over any engine: `swift test` runs
// them against UserTarget, the kernel lab against the module.
//
// The disk has 8 blocks of 8 sectors; the store keeps block b at sector 8 + 8 b. A fault may be
// for fewer blocks than its request still wants: the engines differ there, and may.

import DiskModel
import Glibc
import Target
import TestSupport

/// The rules, on a fresh disk of an engine. Each function throws what it found broken.
package struct Rules {
  /// Sectors of the disk that they want.
  package static let sectors = 64
  /// Bytes of its blocks.
  package static let blockSize: UInt32 = 4096
  /// Every rule, by the name that both suites print.
  package static let all: [(name: String, check: @Sendable (Rules) throws -> Void)] =
    mappingRules + flushRules + grantRules

  let driver: any EngineDriver

  /// Rules for a disk that was just made or renewed.
  package init(_ driver: any EngineDriver) { self.driver = driver }

  var engine: any TargetEngine { driver.engine }

  func place(_ block: UInt64, _ count: UInt64 = 1, mark: Mark = 0, writable: Bool = true) -> Extent
  {
    Extent(
      BlockRange(block, count), .device(0, sector: 8 * block + 8), writable: writable, mark: mark)
  }
  func base(_ block: UInt64, _ count: UInt64 = 1) -> Extent {
    Extent(BlockRange(block, count), .device(1, sector: 8 * block), writable: false)
  }
  func write(_ sector: Int, _ count: Int, _ stamp: UInt64, fua: Bool = false) -> Int {
    driver.submit(.write(UInt64(sector * 512), Stamp.sectors(count, stamp), fua: fua))
  }
  func read(_ sector: Int, _ count: Int) -> Int {
    driver.submit(.read(UInt64(sector * 512), count * 512))
  }
  func stamps(_ request: Int) -> [UInt64?] {
    let bytes = driver.bytes(request)
    return stride(from: 0, to: bytes.count, by: 512).map { at in
      bytes.withUnsafeBytes { Stamp.read($0, at: at) }
    }
  }

  func next() -> Fault? {
    driver.settle()
    return engine.nextFault()
  }

  // What is expected next; each throws what came instead.

  func nothing(line: Int = #line) throws {
    let fault = next()
    try expect(fault == nil, "unexpected: \(String(describing: fault))", line: line)
  }
  func readFault(_ block: UInt64, line: Int = #line) throws -> FaultID {
    let fault = next()
    guard case .read(let id, let blocks) = fault, blocks.first == block else {
      throw TrialBroken("line \(line): no read of \(block): \(String(describing: fault))")
    }
    return id
  }
  func writeFault(_ block: UInt64, whole: Bool, line: Int = #line) throws -> (FaultID, UInt64) {
    let fault = next()
    guard case .write(let id, let blocks, whole) = fault, blocks.first == block else {
      throw TrialBroken("line \(line): no write of \(block): \(String(describing: fault))")
    }
    return (id, blocks.count)
  }
  func flushFault(upTo mark: Mark, line: Int = #line) throws -> FaultID {
    let fault = next()
    guard case .flush(let id, upTo: mark) = fault else {
      throw TrialBroken("line \(line): no flush up to \(mark): \(String(describing: fault))")
    }
    return id
  }
  func discardFault(_ block: UInt64, zeroing: Bool, line: Int = #line) throws -> (FaultID, UInt64) {
    let fault = next()
    guard case .discard(let id, let blocks, zeroing) = fault, blocks.first == block else {
      throw TrialBroken("line \(line): no discard of \(block): \(String(describing: fault))")
    }
    return (id, blocks.count)
  }
  func ended(_ requests: Int..., with code: Int32 = 0, line: Int = #line) throws {
    driver.settle()
    for request in requests {
      let result = driver.result(request)
      try expect(
        result == code, "request \(request): \(String(describing: result)), not \(code)",
        line: line)
    }
  }
  func waits(_ requests: Int..., line: Int = #line) throws {
    driver.settle()
    for request in requests {
      try expect(driver.result(request) == nil, "request \(request) has ended", line: line)
    }
  }
  func holds(_ request: Int, _ wanted: [UInt64], line: Int = #line) throws {
    try ended(request, line: line)
    let found = stamps(request)
    try expect(found == wanted.map(Optional.init), "read \(found), not \(wanted)", line: line)
  }
  func refused(_ answer: Answer, _ wanted: AnswerRefusal, line: Int = #line) throws {
    do throws(AnswerRefusal) {
      try engine.answer(answer)
    } catch {
      try expect(error == wanted, "refused as \(error), not \(wanted)", line: line)
      return
    }
    throw TrialBroken("line \(line): \(answer) was taken")
  }
  /// The store's flushes since, where they are counted.
  func flushed(_ times: Int, since before: Int?, line: Int = #line) throws {
    guard let before, let now = driver.flushes else { return }
    try expect(now == before + times, "\(now - before) flushes, not \(times)", line: line)
  }
  func zeroes(_ count: Int) -> [UInt64] { [UInt64](repeating: 0, count: count) }
  func sevens(_ count: Int) -> [UInt64] { [UInt64](repeating: 7, count: count) }
  func old(_ sectors: Range<Int>) -> [UInt64] { sectors.map { UInt64(1000 + $0) } }
}
