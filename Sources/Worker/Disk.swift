// SPDX-License-Identifier: Apache-2.0
// A disk that is served in user space: an open image, the engine, its NBD export and the
// worker between them, on one loop.
//
// Invariants:
// - A new nbd socket is served only after the old one has ended and nothing that came by it
//   is under way: the kernel sends unanswered requests again, and an old copy of a write
//   must not land after the new one and what followed it.
// - After `finish` has answered 0 everything that was acknowledged is durable.

import BlockIO
import DiskFormats
import DiskModel
import Glibc
package import NBDServer
package import SystemIO
import Target
package import WorkerLink

/// A disk, from its opening to its end. Used from the loop's thread.
package final class Disk {
  /// How it is now.
  package private(set) var condition = Condition.ready
  /// Called when that changes.
  package var conditionChanged: (Condition) -> Void = { _ in }
  /// Called when the attached nbd socket has ended and no other waits.
  package var detached: (NBDEnd) -> Void = { _ in }
  /// Whether an nbd socket is attached or waits to be.
  package var isAttached: Bool { session != nil || next != nil }
  /// Length in bytes.
  package var size: UInt64 { image.format.size }

  let image: OpenImage
  let pool: ThreadPool
  let target: UserTarget
  private let loop: EventLoop
  private let export: NBDExport
  private let worker: Worker
  private let log: Log
  private let policy: DiskPolicy
  private var ticks: EventLoop.Timer?
  private var toldAt: Int64 = 0
  private var session: NBDSession?
  private var next: Descriptor?

  private var holder: HoldingExecutor?

  /// Builds the engine over an image and takes up what the pending file holds; without one,
  /// nothing outlives this process but what was flushed. The file's descriptor is lent for
  /// as long as the disk lives.
  init(
    _ image: OpenImage, pending: Int32?, policy: DiskPolicy = DiskPolicy(), loop: EventLoop,
    log: Log, debugging: DiskDebugging? = nil
  ) throws(WorkerError) {
    self.image = image
    self.loop = loop
    self.log = log
    self.policy = policy
    let format = image.format
    // A worker that served the device's node may have had it otherwise.
    for file in (image.devices + [image.store]).compactMap(\.file) where file.bypassesCache {
      try system { () throws(IOError) in _ = try file.bypassCache(false) }
    }
    do throws(IOError) {
      pool = try ThreadPool(loop: loop)
    } catch { throw WorkerError(error) }
    var executor: any IOExecutor = PoolExecutor(pool: pool, devices: image.devices)
    if let holder = try debugging?.holder(executor, loop: loop) {
      self.holder = holder
      executor = holder
    }
    do throws(PendingLogError) {
      let pendingLog =
        if let pending {
          try PendingLog(mapping: pending, size: format.size, blockSize: format.blockSize)
        } else {
          try PendingLog(anonymousFor: format.size, blockSize: format.blockSize)
        }
      target = try UserTarget(
        size: format.size, blockSize: format.blockSize,
        executor: executor, log: pendingLog,
        readOnly: image.readOnly)
    } catch { throw WorkerError(error) }
    target.space = policy.space
    var options = NBDExport.Options()
    options.readOnly = image.readOnly
    export = NBDExport(target: target, loop: loop, options: options)
    let target = target
    let pool = pool
    worker = Worker(
      target: target, format: format, store: image.store, log: log,
      offload: { target.run($0, then: $1) }, gate: image.gate,
      fetch: { pool.run($0, then: $1) }, trace: debugging?.trace)
    worker.space = policy.space
    do throws(ImageError) {
      try worker.restore(verify: policy.verifies)
    } catch { throw WorkerError(error) }
    // What a turn finds out at its beginning may want ticks while it waits.
    loop.addStage(.answer) { [unowned self] in
      let any = worker.pump()
      watch()
      return any
    }
  }

  /// Finds out what became of the flush in which the worker before this one died, if it did.
  /// `isFlushed`: it was no such flush but the opening of this image, which went well. Blocks.
  func judgeFlush(isFlushed: Bool = false) {
    guard target.isSuspect else { return }
    let code = isFlushed ? 0 : policy.judgeFlush()
    if !isFlushed {
      log(
        code == 0 ? .info : .error, "the last worker died in a flush",
        ["outcome": code == 0 ? "nothing is lost" : String(cString: strerror(code))])
    }
    target.judgeFlush(code)
  }

  /// An admin has acted: flushes may succeed again, and errors are forgotten.
  package func clear() {
    // What the witnesses have heard of is history, too.
    let policy = policy
    pool.run(
      { _ = policy.judgeFlush() }, then: { _ in })
    target.clearFailure()
    worker.clear()
  }

  /// Serves NBD with its handshake to whoever connects to a listening socket.
  package func listen(_ socket: consuming Descriptor) throws(IOError) {
    try export.listen(socket)
  }

  /// Serves an nbd socket that is past its handshake, in place of any before it. What is no
  /// such socket ends at once: `detached` is called.
  package func attach(_ socket: consuming Descriptor) {
    next = consume socket
    if let session { export.drop(session) }
    attachNext()
  }

  private func attachNext() {
    // The kernel sends again whatever waits for space.
    if next != nil, target.outstanding > 0 { endWaiting(EIO) }
    guard session == nil, target.outstanding == 0, let socket = next.take() else { return }
    do throws(IOError) {
      session = try export.serve(socket) { [weak self] end in
        guard let self else { return }
        session = nil
        log(.info, "the nbd socket has ended", ["how": "\(end)"])
        if next == nil { detached(end) }
      }
      log(.info, "an nbd socket is attached")
    } catch {
      log(.error, "cannot serve the nbd socket", ["error": "\(error)"])
      detached(.failed(error.code))
    }
  }

  /// One turn of the loop, and what follows from it.
  package func turn(timeout: Int32 = -1) throws(IOError) {
    // Whether the last request of the old socket has ended is seen after a turn only.
    try loop.turn(timeout: next != nil ? 20 : timeout)
    attachNext()
    let now = conditionNow
    guard now != condition else { return }
    // Counts change often; that they do is news once in a second.
    if now.state == condition.state {
      let time = DiskTrouble.now()
      guard time - toldAt >= DiskPolicy.tick else { return }
      toldAt = time
    }
    condition = now
    log(
      now.state == .ready ? .info : .error, "the disk's state has changed",
      ["state": now.state.rawValue, "error": now.reason])
    conditionChanged(now)
  }

  private var conditionNow: Condition { worker.condition.worse(Condition(target.health)) }

  /// A disk in trouble looks from time to time whether it is over; any other sleeps.
  private func watch() {
    guard target.wantsTicks || worker.wantsTicks else {
      if let ticks { loop.cancel(ticks) }
      ticks = nil
      return
    }
    guard ticks == nil else { return }
    ticks = loop.addTimer(after: DiskPolicy.tick, every: DiskPolicy.tick) { [unowned self] in
      target.tick(quiet: policy.quietTime)
      worker.tick(quiet: policy.quietTime)
    }
  }

  private func endWaiting(_ code: Int32) {
    worker.endWaiting(code)
    target.endWaiting(code)
  }

  /// Ends serving, lets what is under way come to its end, flushes and commits. Turns the
  /// loop meanwhile. Answers 0, or the errno of the flush. Nothing may be asked after it.
  package func finish() throws(IOError) -> Int32 {
    next = nil
    export.close()
    holder?.go()
    // Who ends does not wait for space; a pending log keeps what cannot be committed.
    target.space.waits = false
    worker.space.waits = false
    endWaiting(ENOSPC)
    while target.outstanding > 0 { try turn(timeout: 100) }
    var result: Int32?
    target.flush { result = $0 }
    while result == nil { try turn(timeout: 100) }
    pool.shutdown()
    return result ?? 0
  }

  /// What there is to tell of the disk now.
  package func report(disk: String, version: String) -> DiskReport {
    var report = DiskReport(image)
    report.disk = disk
    report.version = version
    let now = conditionNow
    report.state = now.state
    report.error = now.reason
    report.attached = isAttached
    report.uncommitted = UInt64(target.uncommittedCount)
    report.reads = target.counters.reads
    report.writes = target.counters.writes
    report.flushes = target.counters.flushes
    report.faults = worker.faults
    report.times = times
    do throws(IOError) {
      report.memory = try Hardening.residentMemory()
    } catch { log(.warning, "cannot tell the memory in use", ["error": "\(error)"]) }
    return report
  }
}

extension Disk {
  fileprivate var times: ReportedTimes {
    var times = ReportedTimes()
    times.bytesRead = target.counters.bytesRead
    times.bytesWritten = target.counters.bytesWritten
    times.discards = target.counters.discards
    times.reading = export.times.reading
    times.writing = export.times.writing
    times.flushing = export.times.flushing
    times.discarding = export.times.discarding
    times.latencies = export.times.latencies
    times.flushLatencies = export.times.flushes
    return times
  }
}

extension DiskReport {
  /// What an image says of its disk.
  init(_ image: OpenImage) {
    self.init()
    format = image.formatName
    pid = getpid()
    size = image.format.size
    blockSize = image.format.blockSize
    allocated = image.format.allocatedBlocks * UInt64(image.format.blockSize)
    basePath = image.basePath
    flags = NBDExport.transmissionFlags(readOnly: image.readOnly)
    readOnly = image.readOnly
  }
}

extension Condition {
  /// How an engine is.
  init(_ health: DiskHealth) {
    switch health {
    case .ready: self = .ready
    case .noSpace(let code, let isWaiting):
      let what = isWaiting ? "writes wait for space" : "a write has found no space"
      self.init(
        .noSpace,
        "\(what) (\(String(cString: strerror(code)))): make room where the store is")
    case .degraded(let code, let what):
      self.init(.degraded, "\(what) (\(String(cString: strerror(code))))")
    }
  }
}
