// SPDX-License-Identifier: Apache-2.0
// A disk that the kernel serves: an open image, the node of a device of the target
// `userspace`, and the worker between them, on one loop.
//
// Invariants:
// - There is nothing to end in order: the kernel keeps what is not answered and what is not
//   committed, so a signal may end this process at any instant.
// - Guest data comes here only where the kernel has no way to it (see KernelTarget+Bytes), and
//   nothing here waits for a medium on the loop's thread.

import BlockIO
import DiskFormats
import DiskModel
internal import DMU
import Glibc
import SystemIO
import Target
import WorkerLink

/// The worker's side of a device. Used from the loop's thread.
final class NodeDisk {
  /// Called when the disk's condition changes.
  var conditionChanged: (Condition) -> Void = { _ in }

  let pool: ThreadPool
  let image: OpenImage
  private var condition = Condition.ready
  private let loop: EventLoop
  private let target: KernelTarget
  private let worker: Worker
  private let log: Log
  private var registration: EventLoop.Registration?
  private let policy: DiskPolicy
  /// Where it stands that a flush of the worker's own is under way; its records are the module's.
  private let pending: PendingLog?
  private var ticks: EventLoop.Timer?
  private var toldAt: Int64 = 0

  /// Shakes hands with the module over an open node and takes up what it has uncommitted.
  /// Throws when the image is not the one of the device.
  init(
    _ node: consuming Node, _ image: OpenImage, _ plan: KernelPlan, name: String,
    pending raw: Int32? = nil, policy: DiskPolicy = DiskPolicy(), loop: EventLoop, log: Log
  ) throws(WorkerError) {
    let format = image.format
    try system { () throws(IOError) in try plan.separate() }
    let pending = try Self.pending(raw, format)
    self.pending = pending
    self.policy = policy
    let pool = try system { () throws(IOError) in try ThreadPool(loop: loop) }
    let target: KernelTarget
    do throws(IOError) {
      target = try KernelTarget(
        node, plan.devices, layer: format.layered?.layer, offload: { pool.run($0, then: $1) })
    } catch {
      pool.shutdown()
      throw WorkerError(error)
    }
    guard target.sectors * 512 == format.size, target.blockSize == format.blockSize else {
      pool.shutdown()
      throw WorkerError(
        .size, "device \(name) and its store differ in size or blocks: load another table")
    }
    self.pool = pool
    self.image = image
    self.target = target
    self.loop = loop
    self.log = log
    worker = Worker(
      target: target, format: format, store: image.store, log: log,
      offload: { work, then in
        pending?.beginFlush()
        pool.run(work) { error in
          pending?.endFlush(error?.flushCode ?? 0)
          then(error)
        }
      }, gate: image.gate, fetch: { pool.run($0, then: $1) }, trace: nil)
    worker.space = policy.space
    target.space = policy.space
    if let pending, pending.flushFailed != 0 { worker.flushFailed = true }
    do throws(WorkerError) {
      // The device has held its files all the time.
      do throws(ImageError) { try worker.restore() } catch { throw WorkerError(error) }
      try prime(format)
      worker.grant()
      registration = try system { () throws(IOError) in
        try loop.add(target.descriptor, for: .readable) { _ in }
      }
    } catch {
      pool.shutdown()
      throw error
    }
    // What a turn finds out at its beginning may want ticks while it waits.
    loop.addStage(.answer) { [unowned self] in
      let any = worker.pump()
      watch()
      return any
    }
  }

  private static func pending(
    _ raw: Int32?, _ format: any ImageFormat
  ) throws(WorkerError) -> PendingLog? {
    guard let raw else { return nil }
    do throws(PendingLogError) {
      return try PendingLog(mapping: raw, size: format.size, blockSize: format.blockSize)
    } catch { throw WorkerError(error) }
  }

  /// As `Disk.judgeFlush`.
  func judgeFlush(isFlushed: Bool = false) {
    guard let pending, pending.isSuspect else { return }
    let code = isFlushed ? 0 : policy.judgeFlush()
    pending.judge(code)
    guard !isFlushed else { return }
    log(
      code == 0 ? .info : .error, "the last worker died in a flush",
      ["outcome": code == 0 ? "nothing is lost" : String(cString: strerror(code))])
    // The module asks again, and then has it stand.
    if pending.flushFailed != 0 { worker.flushFailed = true }
  }

  /// An admin has acted: errors are forgotten. That the module lets flushes succeed again is
  /// for the message `clear_error`.
  func clear() {
    let policy = policy
    pool.run(
      { _ = policy.judgeFlush() }, then: { _ in })
    pending?.clearFlushFailure()
    worker.flushFailed = false
    target.clearFailure()
    worker.clear()
  }

  /// Whether the device is gone. Throws when the node has failed otherwise.
  func isGone() throws(WorkerError) -> Bool {
    guard let failure = target.failure else { return false }
    guard failure.code == ENODEV else { throw WorkerError(failure) }
    return true
  }

  /// One turn of the loop.
  func turn(timeout: Int32 = -1) throws(WorkerError) {
    try system { () throws(IOError) in try loop.turn(timeout: timeout) }
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
      condition.state == .ready ? .info : .error, "the disk's state has changed",
      ["state": condition.state.rawValue, "error": condition.reason])
    conditionChanged(condition)
  }

  private var conditionNow: Condition {
    guard let failed = pending?.flushFailed, failed != 0 else {
      return worker.condition.worse(Condition(target.health))
    }
    return Condition(.degraded(failed, DiskTrouble.flushReason))
  }

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

  /// What there is to tell of the disk now. Requests are the kernel's, and counted there.
  func report() -> DiskReport {
    var report = DiskReport(image)
    report.byNode = true
    report.attached = target.failure == nil
    let now = conditionNow
    report.state = now.state
    report.error = now.reason
    report.faults = worker.faults
    do throws(IOError) {
      report.memory = try Hardening.residentMemory()
    } catch { log(.warning, "cannot tell the memory in use", ["error": "\(error)"]) }
    return report
  }

  /// Ends the threads. Nothing may be asked after it.
  func shutdown() {
    if let ticks { loop.cancel(ticks) }
    ticks = nil
    if let registration { loop.remove(registration) }
    registration = nil
    pool.shutdown()
  }

  /// Tells the whole mapping, so that a read of what has a place never asks.
  private func prime(_ format: any ImageFormat) throws(WorkerError) {
    if target.takesLayers, let layered = format.layered, try prime(layered) { return }
    try tell(format) { (block, limit) throws(ImageError) in
      try format.findMerged(block, limit: limit)
    }
  }

  /// Tells a mapping that is a layer: its places, what lies under it, what is there. False: the
  /// device has some of it elsewhere, and was told nothing.
  private func prime(_ layered: any LayeredMapping) throws(WorkerError) -> Bool {
    do throws(AnswerRefusal) {
      try target.layer(layered.layer)
    } catch {
      log(.info, "the mapping is told by extents", ["refusal": "\(error)"])
      return false
    }
    try tell(image.format) { (block, limit) throws(ImageError) in
      try layered.under(block, limit: limit)
    }
    let words = UnsafeMutableBufferPointer<UInt64>.allocate(capacity: 1 << 17)
    defer { words.deallocate() }
    let blocks = layered.layer.blocks.count
    var block: UInt64 = 0
    while block < blocks {
      let count = min(UInt64(words.count) * 64, blocks - block)
      let part = UnsafeMutableBufferPointer(rebasing: words[..<Int((count + 63) / 64)])
      do throws(ImageError) {
        try layered.readPresent(from: block, into: part)
      } catch { throw WorkerError(error) }
      if part.contains(where: { $0 != 0 }) {
        do throws(AnswerRefusal) {
          try target.present(from: block, UnsafeBufferPointer(part))
        } catch {
          throw WorkerError(.offLink, "the device refuses the mapping: \(error)")
        }
      }
      block += count
    }
    return true
  }

  /// Tells all runs of a mapping. What the device knows better (a former worker's answers) it
  /// refuses, and goes on as it was.
  private func tell(
    _ format: any ImageFormat, _ find: (UInt64, UInt64) throws(ImageError) -> Extent
  ) throws(WorkerError) {
    let blockSize = UInt64(format.blockSize)
    let blocks = (format.size + blockSize - 1) / blockSize
    var block: UInt64 = 0
    while block < blocks {
      let extent: Extent
      do throws(ImageError) { extent = try find(block, blocks - block) } catch {
        throw WorkerError(error)
      }
      do throws(AnswerRefusal) {
        try target.answer(.prime(extent))
      } catch .overlap {
        log(.debug, "blocks are being placed already", ["block": String(block)])
      } catch {
        throw WorkerError(.offLink, "the device refuses the mapping: \(error)")
      }
      block = extent.blocks.end
    }
  }
}
