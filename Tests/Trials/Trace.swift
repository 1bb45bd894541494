// SPDX-License-Identifier: Apache-2.0
// Random traces: what a guest asks follows from a seed alone, and so does what the disk holds
// after it. When and in which order a worker answers, dies, takes mappings back and moves
// blocks is by another seed. Every read is compared with a naive model, and so is the whole
// disk at the end: two engines that pass the same trace hold the same bytes.

import DiskModel
import Target
import TestSupport

/// What a guest asks, and what it has to find.
package struct Trace: Sendable {
  private struct Step {
    var request: DriverRequest
    /// For a read: what it finds.
    var found: [UInt64] = []
  }

  /// The seed it follows from, with the disk's sectors and block size.
  package let seed: UInt64
  private var steps: [Step] = []
  private var disk: [UInt64]

  /// A trace for a disk of so many sectors.
  package init(seed: UInt64, sectors: Int, blockSize: UInt32) {
    self.seed = seed
    var random = SplitMix64(seed: seed)
    disk = (0..<sectors).map { UInt64(1000 + $0) }
    let perBlock = Int(blockSize) / 512
    for number in 0..<(4 + random.below(9)) {
      let first = random.below(sectors)
      let most = min(sectors - first, random.chance(30) ? 3 * perBlock : perBlock)
      add(number, first..<(first + 1 + random.below(most)), perBlock, &random)
    }
    steps.append(Step(request: .flush))
    steps.append(Step(request: .read(0, sectors * 512), found: disk))
  }

  private mutating func add(
    _ number: Int, _ range: Range<Int>, _ perBlock: Int, _ random: inout SplitMix64
  ) {
    let offset = UInt64(range.lowerBound * 512)
    let bytes = range.count * 512
    switch random.below(16) {
    case 0..<5:
      steps.append(Step(request: .read(offset, bytes), found: Array(disk[range])))
    case 5..<11:
      let stamp = seed << 8 | UInt64(number + 1)
      steps.append(
        Step(request: .write(offset, Stamp.sectors(range.count, stamp), fua: random.chance(10))))
      set(range, stamp)
    case 11, 12:
      steps.append(Step(request: .zero(offset, bytes)))
      set(range, 0)
    case 13:
      steps.append(Step(request: .discard(offset, bytes)))
      for block in range.lowerBound / perBlock...(range.upperBound - 1) / perBlock {
        let sectors = block * perBlock..<min((block + 1) * perBlock, disk.count)
        let isWhole = sectors.clamped(to: range) == sectors
        if isWhole && TraceWorker.zeroes(UInt64(block)) { set(sectors, 0) }
      }
    default: steps.append(Step(request: .flush))
    }
  }

  private mutating func set(_ range: Range<Int>, _ stamp: UInt64) {
    for sector in range { disk[sector] = stamp }
  }

  /// What may be counted of a run.
  package struct Tally: Sendable {
    /// Workers that died.
    package var deaths = 0
    /// Suspends.
    package var suspends = 0
    /// Blocks of a layer that workers were told of.
    package var touched = 0
    /// Requests, invalidations not counted.
    package var requests = 0
    /// Nothing yet.
    package init() {}
  }

  /// Runs it on a disk that was just made or renewed, and leaves it with nothing under way.
  /// Throws what was found broken. `layered`: its blocks have one place each, and the engine takes
  /// layers.
  package func run(
    on driver: any EngineDriver, layered: Bool = false, tally: inout Tally
  ) throws {
    var run = try TraceRun(driver, layered: layered, seed: seed)
    do {
      for (number, step) in steps.enumerated() {
        // The last two wait for all that came before them.
        if number >= steps.count - 2 || run.mayOvertake(step.request) { try run.finish() }
        run.submit(step.request, step.found)
        try run.wander(driver)
      }
      try run.finish()
      tally.deaths += run.deaths
      tally.suspends += run.suspends
      tally.touched += run.medium.told
      tally.requests += steps.count
    } catch {
      throw TrialBroken(
        "trace \(seed), \(run.deaths) deaths, \(run.suspends) suspends: \(error)\n\(self)")
    }
  }
}

extension Trace: CustomStringConvertible {
  /// A line a request.
  package var description: String {
    steps.map { "  " + Self.line($0.request) }.joined(separator: "\n")
  }

  fileprivate static func line(_ request: DriverRequest) -> String {
    switch request {
    case .read(let offset, let count): "read \(offset / 512) \(count / 512)"
    case .write(let offset, let bytes, let fua):
      "write \(offset / 512) \(bytes.count / 512)\(fua ? " forced" : "")"
    case .zero(let offset, let count): "zero \(offset / 512) \(count / 512)"
    case .discard(let offset, let count): "discard \(offset / 512) \(count / 512)"
    case .flush: "flush"
    }
  }
}

/// A trace under way.
private struct TraceRun {
  private let driver: any EngineDriver
  let medium: TraceMedium
  private let lateness: Int
  private var worker: TraceWorker
  private var random: SplitMix64
  private struct Open {
    var number: Int
    var isRead: Bool
    var found: [UInt64]
    /// The blocks of a write, a read, a discard.
    var blocks: ClosedRange<UInt64>
    var isForced: Bool
  }
  private var open: [Open] = []
  private(set) var deaths = 0
  private(set) var suspends = 0
  private let deadly: Bool

  init(_ driver: any EngineDriver, layered: Bool, seed: UInt64) throws {
    self.driver = driver
    medium = TraceMedium(isLayered: layered)
    random = SplitMix64(seed: ~seed)
    lateness = [0, 40, 80][random.below(3)]
    deadly = random.chance(40)
    worker = try TraceWorker(driver, medium, lateness: lateness, seed: random.next())
  }

  /// The blocks that a request touches; nil for a flush.
  private func blocks(of request: DriverRequest) -> ClosedRange<UInt64>? {
    let size = UInt64(driver.engine.blockSize)
    let (offset, count): (UInt64, Int)
    switch request {
    case .read(let from, let bytes), .zero(let from, let bytes), .discard(let from, let bytes):
      (offset, count) = (from, bytes)
    case .write(let from, let bytes, _): (offset, count) = (from, bytes.count)
    case .flush: return nil
    }
    return offset / size...(offset + UInt64(count) - 1) / size
  }

  /// Whether a request would find what a forced write has not written yet.
  func mayOvertake(_ request: DriverRequest) -> Bool {
    guard driver.isOvertaken, let blocks = blocks(of: request) else { return false }
    return open.contains { $0.isForced && $0.blocks.overlaps(blocks) }
  }

  mutating func submit(_ request: DriverRequest, _ found: [UInt64]) {
    var isForced = false
    if case .write(_, _, fua: true) = request { isForced = true }
    var isRead = false
    if case .read = request { isRead = true }
    let number = driver.submit(request)
    tell("request \(number): \(Trace.line(request))")
    open.append(
      Open(
        number: number, isRead: isRead, found: found, blocks: blocks(of: request) ?? 0...0,
        isForced: isForced))
  }

  private mutating func replaceWorker() throws {
    deaths += 1
    tell("a death")
    try driver.replaceWorker()
    worker = try TraceWorker(driver, medium, lateness: lateness, seed: random.next())
  }

  /// Whether requests of several blocks are under way: of those the kernel's core does not keep
  /// the order over a suspend.
  private var isEntangled: Bool { open.contains { $0.blocks.count > 1 } && open.count > 1 }

  private mutating func pump() throws -> Bool {
    do {
      return try worker.pump()
    } catch is TraceDeath {
      try replaceWorker()
      return true
    }
  }

  /// Something happens between two requests, or nothing.
  mutating func wander(_ driver: any EngineDriver) throws {
    for _ in 0..<random.below(4) {
      switch random.below(100) {
      case 0..<55: _ = try pump()
      case 55..<85:
        driver.giveWay()
        _ = driver.progress(patience: 0)
      case 85..<95: try worker.invalidateSomething()
      case 95..<98 where deadly: try replaceWorker()
      case 98 where deadly && !isEntangled:
        suspends += 1
        tell("a suspend")
        try driver.suspend()
        // What was given back comes again from a thread of the kernel's, and what is asked anew
        // may overtake it.
        try finish()
      default: break
      }
    }
    try check()
  }

  private mutating func check() throws {
    var left: [Open] = []
    for request in open {
      guard let code = driver.result(request.number) else {
        left.append(request)
        continue
      }
      tell("request \(request.number) ends")
      try expect(code == 0, "request \(request.number) failed with \(code)")
      guard request.isRead else { continue }
      let bytes = driver.bytes(request.number)
      for (index, wanted) in request.found.enumerated() {
        let found = bytes.withUnsafeBytes { Stamp.read($0, at: index * 512) }
        try expect(
          found == wanted,
          "request \(request.number), sector \(index): \(String(describing: found)), not \(wanted)")
      }
    }
    open = left
  }

  /// Everything ends.
  mutating func finish() throws {
    var idle = 0
    while !open.isEmpty {
      let pumped = try pump()
      let moved = driver.progress(patience: pumped || !worker.isIdle ? 0 : 100)
      try check()
      idle = pumped || moved ? 0 : idle + 1
      try expect(idle < 300, "request \(open[0].number) does not end")
    }
  }
}
