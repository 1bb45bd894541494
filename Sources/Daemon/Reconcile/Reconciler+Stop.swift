// SPDX-License-Identifier: Apache-2.0
// The way of a disk from being served to nothing.

internal import BlockIO
internal import Logging
import Synchronization
internal import SystemIO
internal import WorkerLink

/// Files of a disk that goes, until a thread of their own has closed them.
private final class HeldFiles: Sendable {
  private let images: Mutex<[OpenImage]>
  private let log: Mutex<FileStore?>

  init(_ images: [OpenImage], _ log: FileStore?) {
    self.images = Mutex(images)
    self.log = Mutex(log)
  }

  /// Gives the locks up first: a process that a worker has left may keep a descriptor. Why that
  /// failed, if so.
  func close() -> IOError? {
    defer { log.withLock { $0 = nil } }
    return images.withLock { images in
      defer { images = [] }
      var failure: IOError?
      for image in images {
        do throws(IOError) { try image.unlock() } catch { failure = error }
      }
      return failure
    }
  }
}

extension Reconciler {
  /// Takes everything down that is held: the device first, so that nothing comes in any
  /// more, then the worker, which flushes and commits, then the log. Every wait has a limit. What
  /// cannot be taken down yet stays, is told with its reason, and is tried again.
  func stop(_ disk: Disk) async {
    if case .stopping = disk.phase {} else { enter(disk, .stopping(nil)) }
    await publish(disk)
    disk.timer?.cancel()
    disk.activity = nil
    if let stuck = await takeDown(disk) { return keepStopping(disk, stuck) }
    release(disk)
    disk.spec = nil
    disk.orphaned = false
    disk.activity = nil
    dissolve(disk)
    enter(disk, .idle)
    log(for: disk).info("the disk is gone")
  }

  /// Why it cannot be taken down yet; nil: nothing is held any more.
  private func takeDown(_ disk: Disk) async -> DiskFailure? {
    if let failure = disk.lingers { return failure }
    if disk.held != nil, let failure = await letGo(disk) { return failure }
    if let stuck = await detach(disk) { return stuck }
    disk.device = nil
    if let stuck = await removeLink(disk) { return stuck }
    if let stuck = await stopWorker(disk) { return stuck }
    if let stuck = await endLog(disk) { return stuck }
    disk.entry = nil
    if let stuck = await closeFiles(disk) { return stuck }
    return await cleanUp(disk)
  }

  /// Closes everything that the disk has open, on another thread: the last close of a block device
  /// waits for what is under way on it. Why that has not ended yet, if so.
  func closeFiles(_ disk: Disk) async -> DiskFailure? {
    let ended: Ended
    if let before = disk.closing {
      ended = before
    } else {
      ended = Ended()
      disk.closing = ended
      var images = [disk.store, disk.base].compactMap { $0 } + Array(disk.files.values)
      images += disk.backings.map(\.image)
      let held = HeldFiles(images, disk.pending)
      images = []
      (disk.store, disk.base, disk.files, disk.backings) = (nil, nil, [:], [])
      disk.pending = nil
      let (host, log, remains) = (host, log(for: disk), remains(of: disk))
      scheduler.start {
        let failure = await host.flushing.run { () -> IOError? in
          do throws(IOError) { try host.processes.end(remains, log) } catch {
            _ = held.close()
            return error
          }
          return held.close()
        }
        if let failure {
          log.error("its files may be in use still", metadata: ["error": "\(failure)"])
        }
        ended.set()
      }
    }
    guard await ended.wait(configuration.stopTimeout, scheduler) else {
      return DiskFailure(
        .device,
        "its base or another of its files cannot be closed: a device or file system hangs; the disk"
          + " goes when that answers")
    }
    disk.closing = nil
    return nil
  }

  /// How long to wait before something is tried again that has failed so often before.
  static func patience(_ attempts: Int) -> Duration {
    let waits: [Duration] = [.seconds(1), .seconds(2), .seconds(5), .seconds(10), .seconds(30)]
    return waits[min(attempts, waits.count - 1)]
  }

  /// Goes on being `stopping`, with the reason, and tries again later and later.
  func keepStopping(_ disk: Disk, _ failure: DiskFailure) {
    let wait = Reconciler.patience(disk.stuckCount)
    var isNews = true
    if case .stopping(let before?) = disk.phase { isNews = before.failure != failure }
    if isNews || disk.stuckCount == 0 {
      log(for: disk).error("the disk cannot go yet", metadata: ["reason": "\(failure)"])
    }
    disk.stuckCount += 1
    let retry = scheduler.now + wait
    enter(disk, .stopping(DiskPhase.Stuck(failure, retry: retry)))
    wake(disk, after: wait)
  }

  /// Tries at once what a disk that cannot go waits to try.
  func hurry(_ disk: Disk) {
    if case .stopping(var stuck?) = disk.phase {
      stuck.retry = scheduler.now
      disk.phase = .stopping(stuck)
    }
    mark(disk.id)
  }

  /// Ends the device, if there is one. Why that is not possible yet, if so: then it stays.
  func detach(_ disk: Disk) async -> DiskFailure? {
    guard let device = disk.device else { return nil }
    guard device.kind == .nbd else { return await withdraw(disk, device) }
    let (attacher, log) = (attacher, log(for: disk))
    for attempt in 1...3 {
      do throws(IOError) {
        try await offload.run { () throws(IOError) in try attacher.detach(device) }
        return nil
      } catch {
        log.error(
          "cannot detach the device",
          metadata: ["device": "\(device.path)", "error": "\(error)", "attempt": "\(attempt)"])
        guard attempt < 3 else { return .device(error) }
      }
    }
    return nil
  }

  /// Asks the worker to end, then makes it. Why it lives on, if it does.
  func stopWorker(_ disk: Disk) async -> DiskFailure? {
    guard let worker = disk.worker else { return nil }
    let log = log(for: disk)
    do throws(WorkerSilence) {
      try worker.channel.send(.stop)
      if await worker.waitForEnd(configuration.stopTimeout) {
        if let how = worker.ended, how != "exit status 0", !how.hasPrefix("unknown") {
          log.error("the worker did not end well", metadata: ["how": "\(how)"])
        }
        return nil
      }
      log.error("the worker does not end and is killed")
    } catch {
      // One whose device is gone ends by itself.
      if await worker.waitForEnd(.seconds(1)) { return nil }
      log.warning("the worker cannot be asked to end", metadata: ["reason": "\(error.words)"])
    }
    return await killWorker(disk, worker)
  }

  /// Kills a worker and waits for its end. Why it lives on, if it does: it has the store's lock
  /// as long.
  func killWorker(_ disk: Disk, _ worker: Worker) async -> DiskFailure? {
    do throws(IOError) {
      if try await worker.kill() { return nil }
      return .worker(
        "the worker (process \(worker.process.pid)) cannot be killed: it waits for a device or file"
          + " system that hangs; the disk goes when that answers")
    } catch {
      guard worker.ended == nil else { return nil }
      return .worker("the worker (process \(worker.process.pid)) cannot be killed: \(error)")
    }
  }

  /// Sleeps; a task that is cancelled only hurries, and lets others on.
  func pause(_ time: Duration) async {
    do { try await scheduler.sleep(for: time) } catch { await Task.yield() }
  }
}
