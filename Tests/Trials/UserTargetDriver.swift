// SPDX-License-Identifier: Apache-2.0
// The engine in user space over simulated devices, moved by hand.

package import BlockIO
package import DiskModel
package import Fakes
import Glibc
package import Synchronization
package import SystemIO
package import Target
import TestSupport

/// A store that counts its flushes.
package final class CountingStore: ByteStore {
  let inner: SimulatedDisk
  /// How often it was flushed.
  package let flushes = Atomic<Int>(0)
  /// As it was made.
  package let isWritable: Bool

  /// Counts for a simulated disk.
  package init(_ inner: SimulatedDisk, writable: Bool) {
    self.inner = inner
    isWritable = writable
  }

  /// What errors call it.
  package var name: String { inner.name }
  /// Bytes.
  package var size: UInt64 { inner.size }
  /// That of the disk.
  package func identity() throws(IOError) -> StoreIdentity { inner.identity() }
  /// All.
  package func allocatedBytes() throws(IOError) -> UInt64 { inner.allocatedBytes() }
  /// Reads.
  package func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    try inner.read(buffer, at: offset)
  }
  /// Writes.
  package func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    try inner.write(buffer, at: offset)
  }
  /// Zeroes.
  package func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    try inner.zero(at: offset, count: count)
  }
  /// Never longer.
  package func resize(to size: UInt64) throws(IOError) { try inner.resize(to: size) }
  /// Flushes, and counts.
  package func flush() throws(IOError) {
    flushes.add(1, ordering: .relaxed)
    try inner.flush()
  }
}

/// The engine in user space over simulated devices.
package final class UserTargetDriver: EngineDriver, RequestOwner {
  /// The engine of the moment.
  package private(set) var target: UserTarget
  /// What moves its I/O.
  package private(set) var executor: SimulatedExecutor
  /// The device that first writes go to.
  package let store: CountingStore
  private let base: CountingStore
  private let sectors: Int
  private let blockSize: UInt32
  private let readOnly: Bool
  private let limits: TargetLimits
  private let manners: SimulatedExecutor.Manners
  private var random: SplitMix64
  private let memory: Int32?
  private var requests: [TargetRequest] = []
  private var results: [Int32?] = []
  private var buffers: [UnsafeMutableRawBufferPointer] = []
  /// Done before the worker died, and done again by its successor: nobody is told twice.
  private var again: Set<Int> = []
  /// Whether a successor had to do any: of those nobody waits for the end.
  private var hasRepeated = false
  private var isHeld = false
  private var owner: Int32 = -1
  /// Every completion, to notice one that comes twice.
  package private(set) var completions: [Int] = []

  /// `sectors` of the disk; the base has as many unless told otherwise. `memory`: a file for
  /// the pending log, which `replaceWorker` needs; it stays the caller's.
  package init(
    sectors: Int = 64, blockSize: UInt32 = 4096, baseSectors: Int? = nil, atOnce: Int = 0,
    readOnly: Bool = false, limits: TargetLimits = TargetLimits(), seed: UInt64 = 1,
    memory: Int32? = nil
  ) throws {
    let block = Int(blockSize) / 512
    store = CountingStore(
      SimulatedDisk("store", size: (2 * sectors + 64 + 4 * block) * 512), writable: true)
    let count = baseSectors ?? sectors
    let stamps = (0..<count).flatMap { Stamp.sectors(1, UInt64(1000 + $0)) }
    base = CountingStore(SimulatedDisk("base", contents: stamps), writable: false)
    var manners = SimulatedExecutor.Manners()
    manners.atOnce = atOnce
    self.manners = manners
    self.sectors = sectors
    self.blockSize = blockSize
    self.readOnly = readOnly
    self.limits = limits
    self.memory = memory
    random = SplitMix64(seed: seed)
    executor = SimulatedExecutor(devices: [store, base], seed: random.next(), manners: manners)
    let size = UInt64(sectors) * 512
    let log = try Self.log(memory, size, blockSize)
    target = try UserTarget(
      size: size, blockSize: blockSize, executor: executor, log: log, readOnly: readOnly,
      limits: limits)
    owner = target.enroll(self)
  }

  private static func log(_ memory: Int32?, _ size: UInt64, _ blockSize: UInt32) throws
    -> PendingLog
  {
    guard let memory else { return try PendingLog(anonymousFor: size, blockSize: blockSize) }
    return try PendingLog(mapping: memory, size: size, blockSize: blockSize)
  }

  deinit {
    for buffer in buffers { buffer.deallocate() }
  }

  /// The engine of the moment.
  package var engine: any TargetEngine { target }
  /// Of one block by another, never.
  package var isOvertaken: Bool { false }
  /// Of the store.
  package var flushes: Int? { store.flushes.load(ordering: .relaxed) }

  /// Makes a request.
  package func submit(_ request: DriverRequest) -> Int {
    let number = results.count
    results.append(nil)
    var buffer = UnsafeMutableRawBufferPointer(start: nil, count: 0)
    var wanted: TargetRequest
    switch request {
    case .read(let offset, let count):
      buffer = .allocate(byteCount: count, alignment: 4096)
      wanted = TargetRequest(.read, offset: offset, count: UInt64(count))
    case .write(let offset, let bytes, let fua):
      buffer = .allocate(byteCount: bytes.count, alignment: 4096)
      buffer.copyBytes(from: bytes)
      wanted = TargetRequest(.write, offset: offset, count: UInt64(bytes.count))
      wanted.isForced = fua
    case .zero(let offset, let count):
      wanted = TargetRequest(.zero, offset: offset, count: UInt64(count))
    case .discard(let offset, let count):
      wanted = TargetRequest(.discard, offset: offset, count: UInt64(count))
    case .flush: wanted = TargetRequest(.flush)
    }
    buffers.append(buffer)
    wanted.buffer = buffer.baseAddress
    wanted.tag = UInt64(number)
    requests.append(wanted)
    hand(wanted)
    return number
  }

  private func hand(_ wanted: TargetRequest) {
    if let code = target.submit(wanted, owner: owner) { completed(tag: wanted.tag, code: code) }
  }

  /// Notes a completion.
  package func completed(tag: UInt64, code: Int32) {
    let number = Int(tag)
    guard again.remove(number) == nil else { return }
    precondition(results[number] == nil, "request \(tag) completed twice")
    results[number] = code
    completions.append(number)
  }

  /// Its errno.
  package func result(_ request: Int) -> Int32? { results[request] }
  /// Its bytes.
  package func bytes(_ request: Int) -> [UInt8] { Array(buffers[request]) }
  /// Runs the executor dry, unless it is held.
  package func settle() { if !isHeld { while executor.step() {} } }
  /// The engine's.
  package func nextFault() -> Fault? { target.nextFault() }
  /// There are none.
  package func giveWay() {}
  /// One step of the executor.
  package func progress(patience: Int32) -> Bool { !isHeld && executor.step() }
  /// Holds the executor.
  package func holdIO() { isHeld = true }
  /// Lets it go, and dry.
  package func release() {
    isHeld = false
    settle()
  }
  /// All, or none.
  package func failIO(_ fails: Bool) { executor.manners.failing = fails ? 100 : 0 }
  /// All, or none.
  package func failFlushes(_ fail: Bool) -> Bool {
    executor.manners.failingFlush = fail ? 100 : 0
    return true
  }
  /// The engine's own state.
  package var isDegraded: Bool {
    if case .degraded = target.health { true } else { false }
  }
  /// The engine's own way.
  package func clearFailure() { target.clearFailure() }
  /// Of the simulated disk.
  package func contents(_ device: UInt16) -> [UInt8] {
    device == 0 ? store.inner.contents() : base.inner.contents()
  }

  /// The successor starts from the pending log. Its client makes again what was not
  /// acknowledged, and what it had made after that, since it cannot know how far that is.
  package func replaceWorker() throws {
    guard memory != nil else { preconditionFailure("no memory file was given") }
    executor.kill { work in if random.chance(50) { _ = work() } }
    executor = SimulatedExecutor(devices: [store, base], seed: random.next(), manners: manners)
    let size = UInt64(sectors) * 512
    target = try UserTarget(
      size: size, blockSize: blockSize, executor: executor,
      log: Self.log(memory, size, blockSize), readOnly: readOnly, limits: limits)
    owner = target.enroll(self)
    let lost = [results.firstIndex { $0 == nil }, again.min()].compactMap { $0 }
    guard let first = lost.min() else { return }
    for number in first..<results.count {
      guard results[number] != nil else { continue }
      if requests[number].operation != .read { again.insert(number) }
    }
    let repeated = again
    hasRepeated = hasRepeated || !repeated.isEmpty
    for number in first..<requests.count
    where results[number] == nil || repeated.contains(number) { hand(requests[number]) }
  }

  /// There is no such thing.
  package func suspend() {}

  /// Through the simulated disk.
  package func moveStore(from: UInt64, to: UInt64, sectors: Int) {
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: sectors * 512, alignment: 8)
    defer { buffer.deallocate() }
    do throws(IOError) {
      try store.inner.read(buffer, at: from * 512)
      try store.inner.write(UnsafeRawBufferPointer(buffer), at: to * 512)
      Stamp.fill(buffer, 0xdead)
      try store.inner.write(UnsafeRawBufferPointer(buffer), at: from * 512)
    } catch {
      preconditionFailure("\(error)")
    }
  }

  /// An engine anew over the same devices.
  package func renew() throws {
    guard hasRepeated || target.outstanding == 0 && target.uncommitted().isEmpty else {
      fatalError("renewed with something under way")
    }
    hasRepeated = false
    again = []
    for buffer in buffers { buffer.deallocate() }
    buffers = []
    requests = []
    results = []
    completions = []
    if let memory { guard ftruncate(memory, 0) == 0 else { throw IOError.last("empty", "log") } }
    try replaceWorker()
  }
}
