// SPDX-License-Identifier: Apache-2.0
// The engine in the kernel: a device of the module over two memory disks, its node, and
// requests that reach it in the order in which they are made.
//
// Layout: /dev/ram0 and /dev/ram1, each under a linear device of its own (which can be held
// or replaced by one that fails), under NAME. The first disk is the store.
//
// Invariants:
// - A request is given to the kernel by io_submit, which hands it to the module before it
//   returns; while a discard is under way nothing else is made. So the order of the numbers
//   is the order of arrival.
// - A call costs far more in the lab than what is done between two: what has ended is looked for
//   in shared memory, and the node is read only when something can have happened since.
// - What the kernel refuses that ought not to be refused ends the process: a trial has no
//   way to go on.

import BlockIO
import CTrials
package import DiskModel
import DMU
import Glibc
import LinuxBlock
import SystemIO
import Target
import TestSupport

/// The module in the kernel that runs, as the suites drive it. Needs root, and the lab.
package final class KernelTargetDriver: EngineDriver {
  private let name: String
  private let sectors: Int
  private let block: Int
  private let paths: [String]
  private let hasCache: Bool
  private let device: MappedDevice
  private let layers: [MappedDevice]
  /// Descriptors: the disk's, and those of the devices below.
  private let disk: Int32
  private let direct: [Int32]
  private var target: KernelTarget?
  private let event: Int32
  /// The devices below, as the engine knows them; nil when closed.
  private var known: KernelDevices?
  private let discards: OpaquePointer
  private var queue: UInt64 = 0
  /// Whether the node may have messages that were not looked for.
  private var hasNews = true
  private var results: [Int32?] = []
  private var expected: [Int] = []
  private var buffers: [UnsafeMutableRawBufferPointer] = []
  /// Requests that wait for a discard, or for what was there before a suspend.
  private var held: [(Int, DriverRequest)] = []
  /// Whether there was a suspend since all had ended.
  private var isResumed = false
  /// The discard under way.
  private var discard: Int?

  /// Makes the devices. `paths`: the store, of `2 * sectors + 64` sectors and four blocks at
  /// least, and the base. `hasCache`: they are devices to which the kernel sends flushes.
  package init(
    name: String = "trial", sectors: Int, blockSize: UInt32,
    paths: [String] = ["/dev/ram0", "/dev/ram1"], hasCache: Bool = false
  ) throws {
    self.hasCache = hasCache
    self.name = name
    self.sectors = sectors
    self.paths = paths
    block = Int(blockSize) / 512
    event = dmu_trial_event()
    guard event >= 0, dmu_aio_open(64, &queue) == 0 else { throw IOError.last("make", "a queue") }
    direct = try paths.map { path throws(IOError) in try Self.open(path) }
    let sizes = [2 * sectors + 64 + 4 * block, sectors]
    try Self.fill(direct[1], sectors)
    layers = [MappedDevice("\(name)-store"), MappedDevice("\(name)-base")]
    for (index, layer) in layers.enumerated() {
      _ = try layer.create()
      try layer.load(Table(parsing: "0 \(sizes[index]) linear \(paths[index]) 0"))
      try layer.resume()
    }
    device = MappedDevice(name)
    _ = try device.create()
    try device.load(
      Table(
        parsing: "0 \(sectors) userspace \(name) \(block) 2 \(layers[0].path) ro:\(layers[1].path)")
    )
    try device.resume()
    disk = try Self.open(device.path)
    guard let discards = dmu_discards_open(disk, event) else {
      throw IOError.last("make", "a thread")
    }
    self.discards = discards
    let stores = [
      try FileStore(path: layers[0].path, writable: true),
      try FileStore(path: layers[1].path, writable: false),
    ]
    known = KernelDevices(
      stores.enumerated().map { ($1, .whole(UInt16($0))) },
      known: stores.map { KernelDevices.Known($0, isDirect: true) }, blockSize: blockSize)
    try start()
  }

  private static func open(_ path: String) throws(IOError) -> Int32 {
    let raw = dmu_trial_open(path)
    guard raw >= 0 else { throw IOError.last("open", path) }
    return raw
  }

  private func start() throws(IOError) {
    guard let known else { fatalError("closed") }
    // The kernel knows both: there is nothing to read elsewhere.
    let blocks = UInt64((sectors + block - 1) / block)
    let layer = Layer(BlockRange(0, blocks), .device(0, sector: UInt64(block)))
    target = try KernelTarget(Node(name: name), known, layer: layer, offload: { $1($0()) })
    hasNews = true
  }

  /// The base's stamps.
  private static func fill(_ base: Int32, _ sectors: Int) throws(IOError) {
    let bytes = UnsafeMutableRawBufferPointer.allocate(
      byteCount: sectors * 512, alignment: 4096)
    defer { bytes.deallocate() }
    for sector in 0..<sectors {
      let place = UnsafeMutableRawBufferPointer(
        rebasing: bytes[(sector * 512)..<(sector * 512 + 512)])
      Stamp.fill(place, UInt64(1000 + sector))
    }
    guard pwrite(base, bytes.baseAddress, bytes.count, 0) == bytes.count else {
      throw IOError.last("fill", "the base")
    }
  }

  /// After a failure: lets what is under way fail, so that the process can end.
  package func abandon() {
    do throws(DeviceMapperError) {
      for layer in layers { try layer.resume() }
      try device.resume()
      held = []
      // What fails may let others ask.
      for _ in 0..<100 where reap() || results.contains(where: { $0 == nil }) {
        _ = try device.message("fail_faults")
        usleep(20_000)
      }
    } catch {
      print("# \(error)")
    }
  }

  /// Takes everything away. Nothing may be under way.
  package func close() throws {
    target = nil
    known = nil
    for buffer in buffers { buffer.deallocate() }
    buffers = []
    dmu_discards_close(discards)
    _ = dmu_aio_close(queue)
    for descriptor in [event, disk] + direct { _ = Glibc.close(descriptor) }
    try device.remove(patient: true)
    for layer in layers { try layer.remove(patient: true) }
  }

  /// The engine of the moment.
  package var engine: any TargetEngine {
    guard let target else { fatalError("closed") }
    return target
  }
  /// On devices with a cache.
  package var isOvertaken: Bool { hasCache }
  /// Nobody counts them.
  package var flushes: Int? { nil }

  /// Makes a request, or keeps it until a discard has ended.
  package func submit(_ request: DriverRequest) -> Int {
    let number = results.count
    results.append(nil)
    var size = 0
    switch request {
    case .read(_, let count): size = count
    case .write(_, let bytes, _): size = bytes.count
    case .zero, .discard, .flush: break
    }
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: max(size, 1), alignment: 4096)
    if case .write(_, let bytes, _) = request { buffer.copyBytes(from: bytes) }
    buffers.append(buffer)
    expected.append(size)
    if discard == nil && held.isEmpty {
      hand(number, request)
    } else {
      held.append((number, request))
    }
    return number
  }

  private func hand(_ number: Int, _ request: DriverRequest) {
    let buffer = buffers[number].baseAddress
    func give(_ operation: Int32, _ offset: UInt64, forced: Bool = false) {
      let code = dmu_aio_submit(
        queue, disk, operation, forced ? 1 : 0, buffer, UInt64(expected[number]),
        Int64(offset), UInt64(number), event)
      insist(code == 0, "request \(number) was not taken: errno \(errno)")
    }
    func give(_ offset: UInt64, _ count: Int, zeroing: Bool) {
      dmu_discard_begin(discards, zeroing ? 1 : 0, offset, UInt64(count))
      discard = number
    }
    hasNews = true
    switch request {
    case .read(let offset, _): give(Int32(DMU_TRIAL_READ), offset)
    case .write(let offset, _, let fua): give(Int32(DMU_TRIAL_WRITE), offset, forced: fua)
    case .flush: give(Int32(DMU_TRIAL_FLUSH), 0)
    case .zero(let offset, let count): give(offset, count, zeroing: true)
    case .discard(let offset, let count): give(offset, count, zeroing: false)
    }
  }

  /// Takes what has ended; whether that was anything.
  private func reap() -> Bool {
    var tags = [UInt64](repeating: 0, count: 32)
    var found = [Int64](repeating: 0, count: 32)
    let count = dmu_aio_reap(queue, &tags, &found, 32)
    insist(count >= 0, "io_getevents: errno \(errno)")
    for index in 0..<Int(count) {
      let number = Int(tags[index])
      insist(results[number] == nil, "request \(number) completed twice")
      results[number] =
        found[index] == Int64(expected[number]) ? 0 : found[index] < 0 ? Int32(-found[index]) : EIO
    }
    var isMoved = count > 0
    if let number = discard {
      let code = dmu_discard_end(discards)
      if code >= 0 {
        discard = nil
        results[number] = code
        isMoved = true
      }
    }
    while discard == nil, !held.isEmpty, !isOvertakable {
      let (number, request) = held.removeFirst()
      hand(number, request)
      isMoved = true
    }
    if isMoved { hasNews = true }
    return isMoved
  }

  /// Whether something that a suspend gave back may still be on its way from a thread of the
  /// kernel's, so that what is handed now would overtake it.
  private var isOvertakable: Bool {
    guard isResumed else { return false }
    isResumed = results.count(where: { $0 == nil }) > held.count
    return isResumed
  }

  /// Its errno.
  package func result(_ request: Int) -> Int32? { results[request] }
  /// Its bytes.
  package func bytes(_ request: Int) -> [UInt8] { Array(buffers[request][..<expected[request]]) }

  /// The engine's, when there may be one.
  package func nextFault() -> Fault? {
    guard hasNews else { return nil }
    let fault = engine.nextFault()
    hasNews = fault != nil
    return fault
  }

  /// To the kernel's own threads.
  package func giveWay() {
    sched_yield()
    hasNews = true
  }

  /// Waits for an end or for a fault.
  package func progress(patience: Int32) -> Bool {
    if reap() { return true }
    guard patience > 0, let target else { return false }
    var wait = [
      pollfd(fd: event, events: Int16(POLLIN), revents: 0),
      pollfd(fd: target.descriptor, events: Int16(POLLIN), revents: 0),
    ]
    guard poll(&wait, 2, patience) > 0 else { return false }
    var told: UInt64 = 0
    hasNews = true
    if wait[0].revents != 0 { _ = read(event, &told, 8) }
    return reap() || wait[1].revents != 0
  }

  /// Waits until nothing has happened for a while.
  package func settle() {
    var quiet = 0
    while quiet < 10 {
      quiet = reap() ? 0 : quiet + 1
      usleep(3000)
    }
  }

  private func layer(_ change: (MappedDevice) throws -> Void) {
    do {
      for layer in layers { try change(layer) }
    } catch {
      fatalError("\(error)")
    }
  }

  /// Suspends the devices below.
  package func holdIO() { layer { try $0.suspend(flush: false, freeze: false) } }
  /// Resumes them.
  package func release() {
    layer { try $0.resume() }
    settle()
  }

  /// Another table below.
  private func replaceLayer(_ index: Int, _ target: String) {
    let size = [2 * sectors + 64 + 4 * block, sectors][index]
    layer { layer in
      guard layer.name == layers[index].name else { return }
      try layer.load(Table(parsing: "0 \(size) \(target)"))
      try layer.suspend(flush: false, freeze: false)
      try layer.resume()
    }
  }

  /// Another table below.
  package func failIO(_ fails: Bool) {
    for index in layers.indices {
      replaceLayer(index, fails ? "error" : "linear \(paths[index]) 0")
    }
  }
  /// By a store whose writes and flushes all fail. A memory disk has no cache, and the kernel sends
  /// it no flush that could fail.
  package func failFlushes(_ fail: Bool) -> Bool {
    guard hasCache else { return false }
    replaceLayer(0, fail ? "flakey \(paths[0]) 0 0 1 1 error_writes" : "linear \(paths[0]) 0")
    return true
  }
  /// The worker's side of it.
  package var isDegraded: Bool {
    if case .degraded? = target?.health { true } else { false }
  }
  /// By a message to the device.
  package func clearFailure() {
    do throws(DeviceMapperError) {
      _ = try device.message("clear_error")
    } catch {
      fatalError("\(error)")
    }
  }

  /// Past the page cache.
  package func contents(_ device: UInt16) -> [UInt8] {
    let count = (device == 0 ? 2 * sectors + 64 : sectors) * 512
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: count, alignment: 4096)
    defer { buffer.deallocate() }
    let got = pread(direct[Int(device)], buffer.baseAddress, count, 0)
    insist(got == count, "read of device \(device): errno \(errno)")
    return Array(buffer)
  }

  /// Closes the node and opens it again.
  package func replaceWorker() throws {
    target = nil
    try start()
  }

  /// The questions go back to the core of device-mapper and come again.
  package func suspend() throws {
    try device.suspend(flush: false, freeze: false)
    isResumed = true
    try device.resume()
  }

  /// Straight on the memory disk.
  package func moveStore(from: UInt64, to: UInt64, sectors: Int) {
    let buffer = UnsafeMutableRawBufferPointer.allocate(
      byteCount: sectors * 512, alignment: 4096)
    defer { buffer.deallocate() }
    let store = direct[0]
    func move(_ call: Int, _ sector: UInt64) {
      insist(call == buffer.count, "sector \(sector) of the store: errno \(errno)")
    }
    move(pread(store, buffer.baseAddress, buffer.count, off_t(from * 512)), from)
    move(pwrite(store, buffer.baseAddress, buffer.count, off_t(to * 512)), to)
    Stamp.fill(buffer, 0xdead)
    move(pwrite(store, buffer.baseAddress, buffer.count, off_t(from * 512)), from)
  }

  /// Another worker, whose marks start anew, invalidates everything.
  package func renew() throws {
    insist(
      discard == nil && held.isEmpty && results.allSatisfy { $0 != nil },
      "renewed with something under way")
    for buffer in buffers { buffer.deallocate() }
    buffers = []
    results = []
    expected = []
    try replaceWorker()
    let all = BlockRange(0, UInt64((sectors + block - 1) / block))
    try engine.answer(.invalidate(all))
    hasNews = true
    for _ in 0..<1000 {
      while let fault = nextFault() {
        if fault == .invalidateDone(all) { return }
      }
      _ = progress(patience: 20)
    }
    throw TrialBroken("an invalidation of everything does not end")
  }
}

/// Ends the process with a word about it, in a release too.
private func insist(_ holds: Bool, _ what: @autoclosure () -> String) {
  guard !holds else { return }
  fatalError(what())
}
