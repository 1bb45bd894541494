// What the conformance suite asks of an engine's surroundings. `UserTargetDriver` drives the
// engine in user space over simulated devices; another one can drive the kernel's.

import Glibc
import Posix
import Synchronization
import Target
import TestSupport

/// A disk of an engine under test, over a store (device 0) and a base (device 1) that the
/// test can look into. The base holds stamp 1000 + n in sector n.
protocol EngineDriver: AnyObject {
  var engine: any TargetEngine { get }
  /// Makes a request, numbered in the order of making, and does not wait.
  func submit(_ request: DriverRequest) -> Int
  /// The errno of a request, 0 for success; nil while it is under way.
  func result(_ request: Int) -> Int32?
  /// What a read that has completed has brought.
  func bytes(_ request: Int) -> [UInt8]
  /// Lets everything happen that can happen without an answer.
  func settle()
  /// Lets no backing operation end until `release`.
  func holdIO()
  func release()
  /// The next backing operations fail with EIO.
  func failIO(_ fails: Bool)
  /// The contents of a backing device.
  func contents(_ device: UInt16) -> [UInt8]
  /// How often each device has been flushed.
  var flushes: Int { get }
}

/// A request as a test makes it, in bytes.
enum DriverRequest {
  case read(UInt64, Int)
  case write(UInt64, [UInt8], fua: Bool = false)
  case zero(UInt64, Int)
  case discard(UInt64, Int)
  case flush
}

/// A store that counts its flushes.
final class CountingStore: ByteStore {
  let inner: SimulatedDisk
  let flushes = Atomic<Int>(0)
  let isWritable: Bool

  init(_ inner: SimulatedDisk, writable: Bool) {
    self.inner = inner
    isWritable = writable
  }

  var name: String { inner.name }
  var size: UInt64 { inner.size }
  func identity() throws(IOError) -> StoreIdentity { inner.identity() }
  func allocatedBytes() throws(IOError) -> UInt64 { inner.allocatedBytes() }
  func read(_ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(IOError) {
    try inner.read(buffer, at: offset)
  }
  func write(_ buffer: UnsafeRawBufferPointer, at offset: UInt64) throws(IOError) {
    try inner.write(buffer, at: offset)
  }
  func zero(at offset: UInt64, count: UInt64) throws(IOError) {
    try inner.zero(at: offset, count: count)
  }
  func resize(to size: UInt64) throws(IOError) { try inner.resize(to: size) }
  func flush() throws(IOError) {
    flushes.add(1, ordering: .relaxed)
    try inner.flush()
  }
}

/// The engine in user space over simulated devices.
final class UserTargetDriver: EngineDriver, RequestOwner {
  let target: UserTarget
  let executor: SimulatedExecutor
  let store: CountingStore
  let base: CountingStore
  private var results: [Int32?] = []
  private var buffers: [UnsafeMutableRawBufferPointer] = []
  private var isHeld = false
  private var owner: Int32 = -1
  /// Every completion, to notice one that comes twice.
  private(set) var completions: [Int] = []

  /// `sectors` of the disk; the base has as many unless told otherwise.
  init(
    sectors: Int = 64, blockSize: UInt32 = 4096, baseSectors: Int? = nil, atOnce: Int = 0,
    readOnly: Bool = false, limits: TargetLimits = TargetLimits(), seed: UInt64 = 1
  ) throws {
    store = CountingStore(SimulatedDisk("store", size: (sectors + 64) * 512), writable: true)
    let count = baseSectors ?? sectors
    let stamps = (0..<count).flatMap { Stamp.sectors(1, UInt64(1000 + $0)) }
    base = CountingStore(SimulatedDisk("base", contents: stamps), writable: false)
    var manners = SimulatedExecutor.Manners()
    manners.atOnce = atOnce
    executor = SimulatedExecutor(devices: [store, base], seed: seed, manners: manners)
    let size = UInt64(sectors) * 512
    target = try UserTarget(
      size: size, blockSize: blockSize, executor: executor,
      log: PendingLog(anonymousFor: size, blockSize: blockSize), readOnly: readOnly,
      limits: limits)
    owner = target.enroll(self)
  }

  deinit {
    for buffer in buffers { buffer.deallocate() }
  }

  var engine: any TargetEngine { target }
  var flushes: Int { store.flushes.load(ordering: .relaxed) }

  func submit(_ request: DriverRequest) -> Int {
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
    if let code = target.submit(wanted, owner: owner) {
      completed(tag: UInt64(number), code: code)
    }
    return number
  }

  func completed(tag: UInt64, code: Int32) {
    precondition(results[Int(tag)] == nil, "request \(tag) completed twice")
    results[Int(tag)] = code
    completions.append(Int(tag))
  }

  func result(_ request: Int) -> Int32? { results[request] }
  func bytes(_ request: Int) -> [UInt8] { Array(buffers[request]) }
  func settle() { if !isHeld { while executor.step() {} } }
  func holdIO() { isHeld = true }
  func release() {
    isHeld = false
    settle()
  }
  func failIO(_ fails: Bool) { executor.manners.failing = fails ? 100 : 0 }
  func contents(_ device: UInt16) -> [UInt8] {
    device == 0 ? store.inner.contents() : base.inner.contents()
  }
}
