// A disk that the kernel serves: an open image, the node of a device of the target
// `userspace`, and the worker between them, on one loop.
//
// Invariants:
// - There is nothing to end in order: the kernel keeps what is not answered and what is not
//   committed, so a signal may end this process at any instant.
// - Guest data comes here only where the kernel has no way to it (see KernelTarget+Bytes), and
//   nothing here waits for a medium on the loop's thread.

internal import DMU
import Glibc
import ImageFormats
import Posix
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
  private var spaceTimer: EventLoop.Timer?
  /// How often a disk without space looks for some, in milliseconds.
  private static let lookForSpace: Int64 = 3000

  /// Shakes hands with the module over an open node and takes up what it has uncommitted.
  /// Throws when the image is not the one of the device.
  init(
    _ node: consuming Node, _ image: OpenImage, _ plan: KernelPlan, name: String,
    loop: EventLoop, log: Log
  ) throws(WorkerError) {
    let format = image.format
    let pool = try system { () throws(IOError) in try ThreadPool(loop: loop) }
    let target: KernelTarget
    do throws(IOError) {
      target = try KernelTarget(node, plan.devices, offload: { pool.run($0, then: $1) })
    } catch {
      pool.shutdown()
      throw WorkerError(error)
    }
    guard target.sectors * 512 == format.size, target.blockSize == format.blockSize else {
      pool.shutdown()
      throw WorkerError(
        "size", "device \(name) and its store differ in size or blocks: load another table")
    }
    self.pool = pool
    self.image = image
    self.target = target
    self.loop = loop
    self.log = log
    worker = Worker(
      target: target, format: format, store: image.store, log: log,
      offload: { pool.run($0, then: $1) })
    do throws(WorkerError) {
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
    let worker = worker
    loop.addStage(.answer) { worker.pump() }
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
    watchSpace()
    let now = worker.condition.worse(Condition(target.health))
    guard now != condition else { return }
    condition = now
    log(
      condition.state == .ready ? .info : .error, "the disk's state has changed",
      ["state": condition.state.rawValue, "error": condition.reason])
    conditionChanged(condition)
  }

  /// A disk that wants space looks for some from time to time; any other sleeps.
  private func watchSpace() {
    guard case .noSpace = target.health else {
      if let spaceTimer { loop.cancel(spaceTimer) }
      spaceTimer = nil
      return
    }
    guard spaceTimer == nil else { return }
    spaceTimer = loop.addTimer(after: Self.lookForSpace, every: Self.lookForSpace) {
      [target] in target.lookForSpace()
    }
  }

  /// What there is to tell of the disk now. Requests are the kernel's, and counted there.
  func report() -> DiskReport {
    var report = DiskReport(image)
    report.byNode = true
    report.attached = target.failure == nil
    report.state = condition.state
    report.error = condition.reason
    report.faults = worker.faults
    do throws(IOError) {
      report.memory = try Hardening.residentMemory()
    } catch { log(.warning, "cannot tell the memory in use", ["error": "\(error)"]) }
    return report
  }

  /// Does something that may wait for this very disk on another thread, serving meanwhile.
  func elsewhere(
    _ work: @escaping @Sendable () throws(WorkerError) -> Void
  ) throws(WorkerError) {
    let outcome = Outcome()
    var ended = false
    pool.run(
      {
        do throws(WorkerError) { try work() } catch { outcome.keep(error) }
        return nil
      },
      then: { _ in ended = true })
    while !ended { try turn() }
    if let error = outcome.error { throw error }
  }

  /// Ends the threads. Nothing may be asked after it.
  func shutdown() {
    if let spaceTimer { loop.cancel(spaceTimer) }
    spaceTimer = nil
    if let registration { loop.remove(registration) }
    registration = nil
    pool.shutdown()
  }

  /// Tells the whole mapping, so that a read of what has a place never asks. What the device
  /// knows better (a former worker's answers) it refuses, and goes on as it was.
  private func prime(_ format: any ImageFormat) throws(WorkerError) {
    let blockSize = UInt64(format.blockSize)
    let blocks = (format.size + blockSize - 1) / blockSize
    var block: UInt64 = 0
    while block < blocks {
      let extent: Extent
      do throws(ImageError) {
        extent = try format.findMerged(block, limit: blocks - block)
      } catch { throw WorkerError(error) }
      do throws(AnswerRefusal) {
        try target.answer(.prime(extent))
      } catch .overlap {
        log(.debug, "blocks are being placed already", ["block": String(block)])
      } catch {
        throw WorkerError("protocol", "the device refuses the mapping: \(error)")
      }
      block = extent.blocks.end
    }
  }
}

/// What went wrong on another thread: written there before the pool hands its job back, read
/// by the loop's thread after that.
private final class Outcome: @unchecked Sendable {
  private(set) var error: WorkerError?

  func keep(_ error: WorkerError) { self.error = error }
}
