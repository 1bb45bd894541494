// SPDX-License-Identifier: Apache-2.0
// Random traces against a naive model: requests of every kind, completions and answers in
// any order, errors, invalidations, and workers that are killed at any step. A read must
// bring exactly what the requests before it have left; what was acknowledged survives every
// kill of the worker, flushed or not.

import Fakes
import Glibc
import SystemIO
import TargetTrials
import Testing
import TestSupport

@testable import Target

/// What each sector may hold, in the order of requests.
private struct TraceModel {
  struct Entry {
    let request: Int
    let stamp: UInt64
    /// It may or may not have happened: a discard, or a request that failed or was lost.
    var isWeak: Bool
  }
  var sectors: [[Entry]]

  init(_ count: Int) {
    sectors = (0..<count).map { [Entry(request: -1, stamp: UInt64(1000 + $0), isWeak: false)] }
  }

  mutating func note(_ request: Int, _ range: Range<Int>, _ stamp: UInt64, isWeak: Bool) {
    for sector in range {
      sectors[sector].append(Entry(request: request, stamp: stamp, isWeak: isWeak))
    }
  }

  mutating func weaken(_ request: Int, _ range: Range<Int>) {
    for sector in range {
      for index in sectors[sector].indices where sectors[sector][index].request == request {
        sectors[sector][index].isWeak = true
      }
    }
  }

  /// What a read that came as number `request` may find.
  func candidates(_ sector: Int, before request: Int) -> Set<UInt64> {
    var found: Set<UInt64> = []
    for entry in sectors[sector].reversed() where entry.request < request {
      found.insert(entry.stamp)
      if !entry.isWeak { break }
    }
    return found
  }
}

/// An empty file that nobody else has, as the daemon would make it.
func memoryFile() throws -> Int32 {
  var path = Array("/tmp/dmu-pending-XXXXXX".utf8CString)
  let raw = mkstemp(&path)
  guard raw >= 0, unlink(path) == 0 else { throw IOError.last("make a temporary file") }
  return raw
}

private final class Trace: RequestOwner {
  struct Request {
    let operation: TargetRequest.Operation
    let sectors: Range<Int>
    let stamp: UInt64
    let buffer: UnsafeMutableRawBufferPointer
    var isForced = false
    var isDone = false
  }

  let sectorCount: Int
  let blockSize: UInt32
  let store: SimulatedDisk
  let base: SimulatedDisk
  let medium = ShiftMedium()
  let memory: Int32
  var random: SplitMix64
  var executor: SimulatedExecutor
  var target: UserTarget
  var worker: ShiftWorker
  var owner: Int32 = -1
  var model: TraceModel
  var requests: [Request] = []
  var trouble: [String] = []
  let manners: SimulatedExecutor.Manners
  var limits = TargetLimits()
  private let lateness: Int

  init(seed: UInt64) throws {
    random = SplitMix64(seed: seed)
    blockSize = [512, 1024, 4096][random.below(3)]
    // Some disks end within a block.
    sectorCount = 8 * (4 + random.below(12)) + random.below(8)
    let perBlock = Int(blockSize) / 512
    store = SimulatedDisk("store", size: (sectorCount + 4 * perBlock) * 512)
    base = SimulatedDisk(
      "base", contents: (0..<sectorCount).flatMap { Stamp.sectors(1, UInt64(1000 + $0)) })
    memory = try memoryFile()
    var manners = SimulatedExecutor.Manners()
    manners.atOnce = [0, 30, 90][random.below(3)]
    manners.failing = random.chance(30) ? 5 : 0
    self.manners = manners
    lateness = [0, 50, 90][random.below(3)]
    limits.extents = [4, 64, 32768][random.below(3)]
    limits.scratch = 0
    limits.piece = [512, 1024, 1 << 20][random.below(3)]
    model = TraceModel(sectorCount)
    (executor, target, worker) = try Trace.assemble(
      store, base, medium, memory, sectorCount, blockSize, manners, limits, lateness, &random)
    owner = target.enroll(self)
  }

  deinit {
    for request in requests { request.buffer.deallocate() }
    close(memory)
  }

  private static func assemble(
    _ store: SimulatedDisk, _ base: SimulatedDisk, _ medium: ShiftMedium, _ memory: Int32,
    _ sectors: Int, _ blockSize: UInt32, _ manners: SimulatedExecutor.Manners,
    _ limits: TargetLimits, _ lateness: Int, _ random: inout SplitMix64
  ) throws -> (SimulatedExecutor, UserTarget, ShiftWorker) {
    let executor = SimulatedExecutor(
      devices: [
        CountingStore(store, writable: true), CountingStore(base, writable: false),
      ], seed: random.next(), manners: manners)
    let size = UInt64(sectors * 512)
    let target = try UserTarget(
      size: size, blockSize: blockSize, executor: executor,
      log: PendingLog(mapping: memory, size: size, blockSize: blockSize), limits: limits)
    let worker = ShiftWorker(
      target: target, medium: medium, lateness: lateness, seed: random.next())
    return (executor, target, worker)
  }

  func completed(tag: UInt64, code: Int32) {
    let number = Int(tag)
    let request = requests[number]
    guard !request.isDone else {
      trouble.append("request \(number) completed twice")
      return
    }
    requests[number].isDone = true
    guard code == 0 else {
      // A placement that failed may have been half of what was asked.
      model.weaken(number, request.sectors)
      if manners.failing == 0 { trouble.append("request \(number) failed with \(code)") }
      return
    }
    guard request.operation == .read else { return }
    let bytes = UnsafeRawBufferPointer(request.buffer)
    for (index, sector) in request.sectors.enumerated() {
      let found = Stamp.read(bytes, at: index * 512)
      let wanted = model.candidates(sector, before: number)
      if found.map({ !wanted.contains($0) }) ?? true {
        trouble.append(
          "request \(number): sector \(sector) holds \(String(describing: found)), not \(wanted)")
      }
    }
  }

  func submitRandom() {
    let first = random.below(sectorCount)
    let longest = random.chance(20) ? sectorCount - first : min(12, sectorCount - first)
    let sectors = first..<(first + 1 + random.below(longest))
    let operations: [TargetRequest.Operation] = [
      .read, .read, .read, .write, .write, .write, .write, .zero, .discard, .flush,
    ]
    submit(
      operations[random.below(operations.count)], sectors, UInt64(1_000_000 + requests.count),
      isForced: random.chance(5))
  }

  func submit(
    _ operation: TargetRequest.Operation, _ sectors: Range<Int>, _ stamp: UInt64, isForced: Bool
  ) {
    let number = requests.count
    let buffer = UnsafeMutableRawBufferPointer.allocate(
      byteCount: sectors.count * 512, alignment: 512)
    var wanted = TargetRequest(
      operation, offset: UInt64(sectors.lowerBound * 512), count: UInt64(sectors.count * 512),
      buffer: buffer.baseAddress, tag: UInt64(number))
    switch operation {
    case .write:
      Stamp.fill(buffer, stamp)
      model.note(number, sectors, stamp, isWeak: false)
      wanted.isForced = isForced
    case .zero: model.note(number, sectors, 0, isWeak: false)
    case .discard: model.note(number, sectors, 0, isWeak: true)
    default: Stamp.fill(buffer, 77)
    }
    requests.append(
      Request(
        operation: operation, sectors: sectors, stamp: stamp, buffer: buffer,
        isForced: isForced))
    if let code = target.submit(wanted, owner: owner) { completed(tag: wanted.tag, code: code) }
  }

  /// Lets everything end.
  func settle() throws {
    var idle = 0
    while idle < 200 {
      let moved = executor.step()
      let answered = try worker.pump()
      idle = moved || answered ? 0 : idle + 1
    }
  }

  /// The worker is killed; its successor starts from the memory file, and the client sends
  /// again whatever was not acknowledged.
  func kill() throws {
    executor.kill { work in if random.chance(50) { _ = work() } }
    let lost = requests.indices.filter { !requests[$0].isDone }
    for number in lost {
      requests[number].isDone = true
      model.weaken(number, requests[number].sectors)
    }
    (executor, target, worker) = try Trace.assemble(
      store, base, medium, memory, sectorCount, blockSize, manners, limits, lateness, &random)
    owner = target.enroll(self)
    for number in lost where requests[number].operation != .read {
      let request = requests[number]
      submit(request.operation, request.sectors, request.stamp, isForced: request.isForced)
    }
  }

  func run(steps: Int, kills: Bool) throws {
    for _ in 0..<steps {
      switch random.below(100) {
      case 0..<40 where target.outstanding < 24: submitRandom()
      case 40..<70: _ = executor.step()
      case 70..<95: _ = try worker.pump()
      case 95..<98: worker.invalidateSomething()
      case 99 where kills && random.chance(40): try kill()
      default: break
      }
      guard trouble.isEmpty else { return }
    }
    executor.manners.failing = 0
    try settle()
    for sector in stride(from: 0, to: sectorCount, by: 8) {
      submit(.read, sector..<min(sector + 8, sectorCount), 0, isForced: false)
    }
    submit(.flush, 0..<1, 0, isForced: false)
    try settle()
    for number in requests.indices where !requests[number].isDone {
      trouble.append("request \(number) \(requests[number].operation) never completed")
    }
    if target.outstanding != 0 { trouble.append("\(target.outstanding) outstanding at the end") }
    if target.holdCount != 0 { trouble.append("holds at the end") }
    if target.reserved != 0 { trouble.append("\(target.reserved) reserved at the end") }
    if !target.uncommitted().isEmpty { trouble.append("uncommitted after a flush") }
    if !worker.invalidating.isEmpty { trouble.append("an invalidation never ended") }
  }
}

@Suite struct TraceTests {
  /// A read was served from a place beyond what it had asked for, before the data was there.
  static let known: [UInt64] = [636_325_554_291_061]

  /// DMU_SEED replays from one seed on; DMU_DEPTH=N does N times as many.
  static let seeds: [UInt64] = {
    if Depth.firstSeed > 0 { return Depth.seeds(800) }
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    let start = UInt64(time.tv_nsec) << 20
    return known + Depth.seeds(800, offset: start)
  }()

  @Test func anyOrderOfEverything() throws {
    for seed in Self.seeds {
      let trace = try Trace(seed: seed)
      try trace.run(steps: 300, kills: seed % 2 == 0)
      for problem in trace.trouble.prefix(3) { Issue.record("DMU_SEED=\(seed): \(problem)") }
      guard trace.trouble.isEmpty else { return }
    }
  }
}
