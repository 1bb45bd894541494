// The way of a disk from being served to nothing.

internal import Logging
internal import Posix
internal import WorkerLink

extension Reconciler {
  /// Takes everything down that is held: the device first, so that nothing comes in any
  /// more, then the worker, which flushes and commits. Every wait has a limit, and at the end
  /// stands SIGKILL: what the guest was told is durable survives that, too.
  func stop(_ disk: Disk) async {
    enter(disk, .stopping)
    await publish(disk)
    disk.timer?.cancel()
    guard await detach(disk) else {
      enter(
        disk,
        .failed(
          .worker("the device cannot be written out: look for a device or file system that hangs"),
          attached: true))
      wake(disk, after: .seconds(10))
      return
    }
    guard await stopWorker(disk) else {
      // It holds the store's lock as long as it lives. Looked at again later.
      enter(
        disk,
        .failed(
          .worker("the worker cannot be killed: look for a device or file system that hangs"),
          attached: true))
      wake(disk, after: .seconds(10))
      return
    }
    let directory = DiskDirectory(configuration, disk.id)
    do throws(IOError) {
      try await offload.run { () throws(IOError) in try directory.remove() }
    } catch {
      log(for: disk).error("cannot clean up", metadata: ["error": "\(error)"])
    }
    release(disk)
    disk.spec = nil
    disk.orphaned = false
    enter(disk, .idle)
    log(for: disk).info("the disk is gone")
  }

  /// Ends the device, if there is one. False when something below it hangs; then it stays.
  func detach(_ disk: Disk) async -> Bool {
    guard let device = disk.device else { return true }
    guard device.kind == .nbd else {
      guard await withdraw(disk, device) else { return false }
      disk.device = nil
      return true
    }
    let attacher = attacher
    for attempt in 1...3 {
      do throws(IOError) {
        try await offload.run { () throws(IOError) in try attacher.detach(device) }
        break
      } catch {
        log(for: disk).error(
          "cannot detach the device",
          metadata: ["device": "\(device.path)", "error": "\(error)", "attempt": "\(attempt)"])
      }
    }
    disk.device = nil
    return true
  }

  /// Asks the worker to end, then makes it. False when it lives on.
  private func stopWorker(_ disk: Disk) async -> Bool {
    guard let worker = disk.worker else { return true }
    let log = log(for: disk)
    do throws(WorkerSilence) {
      try worker.channel.send(.stop)
      if await worker.waitForEnd(configuration.stopTimeout) {
        if let how = worker.ended, how != "exit status 0", !how.hasPrefix("unknown") {
          log.error("the worker did not end well", metadata: ["how": "\(how)"])
        }
        return true
      }
      log.error("the worker does not end and is killed")
    } catch {
      // One whose device is gone ends by itself.
      if await worker.waitForEnd(.seconds(1)) { return true }
      log.warning("the worker cannot be asked to end", metadata: ["reason": "\(error.words)"])
    }
    do throws(IOError) { return try await worker.kill() } catch {
      log.error("cannot kill the worker", metadata: ["error": "\(error)"])
      return worker.ended != nil
    }
  }
}
