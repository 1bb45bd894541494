// SPDX-License-Identifier: Apache-2.0
// The rules of docs/target.md, one by one, and the lab's random traces, against UserTarget. The
// kernel lab runs the same functions against the module.

import DiskModel
import Fakes
import Glibc
import SystemIO
import Target
import TargetTrials
import Testing
import TestSupport

@Suite struct ConformanceTests {
  @Test(arguments: Rules.all.map(\.name)) func rule(_ name: String) throws {
    let memory = try memoryFile()
    defer { close(memory) }
    let driver = try UserTargetDriver(
      sectors: Rules.sectors, blockSize: Rules.blockSize, memory: memory)
    for rule in Rules.all where rule.name == name { try rule.check(Rules(driver)) }
  }

  /// A flush waits for a placement with a lower mark than that of one which is written.
  @Test func flushWaitsForWhatIsLate() throws {
    let driver = try UserTargetDriver()
    let target = driver.target
    func place(_ block: UInt64, mark: Mark) -> Placement {
      Placement(
        Extent(
          BlockRange(block), .device(0, sector: 8 * block + 8), writable: true, mark: mark),
        .copy(from: .device(1, sector: 8 * block)))
    }
    let requests = [0, 8].map {
      driver.submit(.write(UInt64($0 * 512), Stamp.sectors(1, 7)))
    }
    guard case .write(let first, _, _) = target.nextFault(),
      case .write(let second, _, _) = target.nextFault()
    else {
      Issue.record("faults")
      return
    }
    driver.holdIO()
    try target.answer(.map(first, place(0, mark: 1)))
    driver.executor.manners.atOnce = 100
    try target.answer(.map(second, place(1, mark: 2)))
    #expect(driver.result(requests[0]) == nil && driver.result(requests[1]) == 0)
    let flush = driver.submit(.flush)
    #expect(target.nextFault() == nil)
    // The store's flush is not even begun.
    #expect(driver.executor.waiting == 1)
    driver.release()
    guard case .flush(let id, upTo: 2) = target.nextFault() else {
      Issue.record("flush")
      return
    }
    #expect(target.uncommitted().map(\.mark) == [1, 2])
    try target.answer(.flushDone(id))
    #expect(driver.result(flush) == 0)
  }

  /// DMU_SEED replays from one seed on; DMU_DEPTH=N does N times as many.
  @Test func traces() throws {
    let seed =
      Depth.firstSeed > 0 ? Depth.firstSeed : UInt64.random(in: 1..<(1 << 40))
    let memory = try memoryFile()
    defer { close(memory) }
    print("traces from DMU_SEED=\(seed) on")
    var tally = Trace.Tally()
    for (sectors, blockSize) in [(96, UInt32(4096)), (93, 4096), (12, 512), (47, 2048)] {
      let driver = try UserTargetDriver(
        sectors: sectors, blockSize: blockSize, atOnce: 30, memory: memory)
      for seed in (0..<UInt64(Depth.times(500))).lazy.map({ seed &+ $0 }) {
        let trace = Trace(seed: seed, sectors: sectors, blockSize: blockSize)
        try trace.run(on: driver, tally: &tally)
        try driver.renew()
      }
      guard ftruncate(memory, 0) == 0 else { throw IOError.last("empty", "the log") }
    }
    print("\(tally.requests) requests, \(tally.deaths) workers died")
  }
}
