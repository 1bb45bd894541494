// SPDX-License-Identifier: Apache-2.0
// Disks whose device is the device-mapper's: making the device, giving its node to a worker,
// and taking it down.
//
// The order of a start: the worker opens the image, the device is made and is suspended, the
// worker gets the node and tells the whole mapping, and only then the device is resumed. The
// kernel keeps device, mapping and questions when a worker dies: another one gets the node, and
// nothing is done to the device.

import BlockIO
import Glibc
internal import LinuxBlock
internal import Logging
import Synchronization
internal import SystemIO
internal import WorkerLink

/// A file or device that a disk stands on, and how its worker wishes it to be used.
struct DiskBacking: Sendable {
  let image: OpenImage
  let part: DiskPart

  var lent: ServedDevice.Backing {
    ServedDevice.Backing(
      descriptor: image.file.raw, name: image.file.name, readOnly: !part.isWritable,
      isDirect: part.isDirect, growth: part.growth)
  }
}

extension Reconciler {
  /// Whether a new disk shall be served by its node. Throws when that is wished and cannot be.
  func wantsNode(_ transport: Transport) async throws(DiskFailure) -> Bool {
    guard transport != .nbd else { return false }
    let mapper = mapper
    let isThere: Bool
    do throws(DeviceMapperError) {
      isThere = try await mapping.run { () throws(DeviceMapperError) in try mapper.isAvailable() }
    } catch {
      guard transport == .auto else { throw .mapper(error) }
      log.warning("going on without the device-mapper", metadata: ["error": "\(error)"])
      return false
    }
    guard isThere || transport == .auto else { throw .noTarget }
    return isThere
  }

  /// Makes the device, gives its node to the worker and brings it into use.
  func attachMapped(_ disk: Disk) async throws(DiskFailure) {
    guard let report = disk.report else { return }
    let (mapper, id, backings) = (mapper, disk.id, disk.backings)
    let wish = MappedWish(
      disk: id, size: report.size, blockSize: report.blockSize, backings: backings.map(\.lent),
      readOnly: disk.readOnly)
    disk.device = try await mapped { () throws(DeviceMapperError) in
      defer { withExtendedLifetime(backings) {} }
      return try mapper.make(wish)
    }
    try await handNode(disk)
    let isProbed = id.name.flatMap { wishes[$0]?.isProbed } ?? false
    try await mapped { () throws(DeviceMapperError) in try mapper.start(id, probed: isProbed) }
  }

  /// Gives the node of a device that is there to a new worker.
  func handNodeAgain(_ disk: Disk) async throws(DiskFailure) {
    guard let report = disk.report else { return }
    guard report.byNode else {
      throw .worker(
        "the worker cannot serve the disk's device (\(report.hindrance ?? "it does not say why")):"
          + " is cowd of this version?")
    }
    let (mapper, id, backings) = (mapper, disk.id, disk.backings)
    let state = try await mapped { () throws(DeviceMapperError) in
      defer { withExtendedLifetime(backings) {} }
      return try mapper.state(id, over: backings.map(\.lent))
    }
    switch state {
    case .ours: try await handNode(disk)
    case .foreign(let why):
      throw DiskFailure(.device, "\(why): detach the disk and attach it again")
    case .absent, .unfinished:
      throw DiskFailure(
        .device,
        "\(disk.device?.path ?? "the device") is gone: detach the disk and attach it again")
    }
  }

  /// Gives the node to the worker and waits until it has told the whole mapping.
  private func handNode(_ disk: Disk) async throws(DiskFailure) {
    guard let worker = disk.worker else { return }
    let (mapper, id, scheduler) = (mapper, disk.id, scheduler)
    let node = try await offload.run { () throws(DiskFailure) in
      // The last worker's descriptor goes a moment after its process, or is still on its way.
      var attempts = 100
      while true {
        do throws(IOError) { return PassedDescriptor(try mapper.openNode(id)) } catch {
          guard error.code == EBUSY, attempts > 0 else { throw DiskFailure.node(error) }
          attempts -= 1
          scheduler.block(for: .milliseconds(50))
        }
      }
    }
    guard let raw = node.raw else { return }
    let reply: WorkerReply
    do throws(WorkerSilence) {
      reply = try await worker.channel.ask(
        .attach, lending: [.node: raw], within: configuration.readyTimeout
      ) { report in
        switch report {
        case .attached, .failed: true
        case .refused(let order, _): order == "attach"
        default: false
        }
      }
    } catch { throw await silence(worker, error) }
    switch reply.report {
    case .attached: return
    case .failed(let code, let message): throw DiskFailure(worker: code, message, disk)
    default: throw .worker("the worker refused its device's node: is cowd of this version?")
    }
  }

  /// Takes a device down: writes out and commits what it holds, by a worker, and removes it. Why
  /// that is not possible yet, if so: then the device is there, and what it holds with it.
  ///
  /// The order: nobody may have it open (who has it may still write), then it is flushed, for
  /// which a worker is needed, then it is removed. The kernel has placements that are in no
  /// image before the flush: without it a device is only removed by order of the admin. Requests
  /// are failed only when no worker lives, who could still be answering them.
  func withdraw(_ disk: Disk, _ device: DeviceNode) async -> DiskFailure? {
    let (mapper, id) = (mapper, disk.id)
    let isFinished: Bool
    do throws(DeviceMapperError) {
      isFinished = try await mapping.run { () throws(DeviceMapperError) in
        try mapper.isAttached(id, device)
      }
    } catch { return .mapper(error) }
    for _ in 0..<10 where isFinished {
      if let failure = await write(disk, device) { return failure }
      do throws(DeviceMapperError) {
        try await remove(id)
        return nil
      } catch {
        guard error.code == EBUSY else { return .mapper(error) }
        do throws(DeviceMapperError) {
          if disk.isUnconnected, try await retire(disk, device) { return nil }
        } catch { return .mapper(error) }
        await pause(.milliseconds(500))
      }
    }
    guard !isFinished else { return .stillOpen(device) }
    // Nobody has ever brought it into use, or it is gone.
    do throws(DeviceMapperError) {
      try await remove(id)
      return nil
    } catch { return error.code == EBUSY ? .stillOpen(device) : .mapper(error) }
  }

  /// Takes the files from a device that a backend has open to which no frontend ever connected:
  /// so nobody can have anything under way on it, and the store is free for others.
  private func retire(
    _ disk: Disk, _ device: DeviceNode
  ) async throws(DeviceMapperError) -> Bool {
    let (mapper, id, losing) = (mapper, disk.id, disk.discards || disk.readOnly)
    guard
      try await mapping.run({ () throws(DeviceMapperError) in
        try mapper.retire(id, device, losing: losing)
      })
    else { return false }
    log(for: disk).notice(
      "the device has no files any more and goes with the last close",
      metadata: ["device": "\(device.path)"])
    return true
  }

  private func remove(_ id: DiskID) async throws(DeviceMapperError) {
    let mapper = mapper
    try await mapping.run { () throws(DeviceMapperError) in
      try mapper.remove(id, deferred: false)
    }
    await sweepLoopMarks()
  }

  /// Makes sure that a device holds nothing that is not in its image.
  private func write(_ disk: Disk, _ device: DeviceNode) async -> DiskFailure? {
    if disk.discards || disk.readOnly {
      if disk.discards, let worker = disk.worker, worker.ended == nil,
        let stuck = await killWorker(disk, worker)
      {
        return stuck
      }
      if disk.worker.map({ $0.ended != nil }) ?? true { await failFaults(disk) }
      return nil
    }
    do throws(DiskFailure) { try await haveWorker(disk) } catch {
      if let worker = disk.worker, let stuck = await killWorker(disk, worker) { return stuck }
      return .uncommitted(device, "no worker can be started for it: \(error.sentence)", disk)
    }
    let isFree = await isFree(disk, device)
    guard isFree || disk.isUnconnected else { return .stillOpen(device) }
    if let failure = await flush(device, disk) { return failure }
    do throws(DeviceMapperError) {
      let (mapper, id) = (mapper, disk.id)
      let counters = try await mapping.run { () throws(DeviceMapperError) in
        try mapper.counters(id, device)
      }
      guard counters.uncommitted == 0 else {
        return .uncommitted(
          device, "\(counters.uncommitted) placements were made after its last flush", disk)
      }
      return nil
    } catch { return .mapper(error) }
  }

  /// Sees to it that a worker serves the device.
  private func haveWorker(_ disk: Disk) async throws(DiskFailure) {
    if let worker = disk.worker, worker.ended == nil { return }
    disk.worker?.channel.close()
    disk.worker = nil
    try await reopen(disk)
    try await launch(disk, create: false, byNode: true)
    try await handNodeAgain(disk)
  }

  /// Waits a while until nobody has the device open.
  private func isFree(_ disk: Disk, _ device: DeviceNode) async -> Bool {
    let (mapper, id) = (mapper, disk.id)
    for attempt in 0..<10 {
      do throws(DeviceMapperError) {
        let users = try await mapping.run { () throws(DeviceMapperError) in
          try mapper.users(id)
        }
        if users == 0 { return true }
      } catch {
        log(for: disk).warning("cannot examine the device", metadata: ["error": "\(error)"])
      }
      if attempt < 9 { await pause(.milliseconds(500)) }
    }
    return false
  }

  /// Flushes a device that is about to go. One flush at a time, which goes on when this gives up
  /// waiting: its end hurries the next attempt.
  private func flush(_ device: DeviceNode, _ disk: Disk) async -> DiskFailure? {
    let flush: DeviceFlush
    if let before = disk.flush {
      flush = before
    } else {
      flush = DeviceFlush()
      disk.flush = flush
      let (mapper, flushing, id) = (mapper, host.flushing, disk.id)
      scheduler.start { [weak self] in
        let result = await flushing.run { () -> IOError? in
          do throws(IOError) {
            try mapper.flush(device)
            return nil
          } catch { return error }
        }
        flush.end(result)
        await self?.flushed(id)
      }
    }
    guard await flush.ended.wait(configuration.stopTimeout, scheduler) else {
      return DiskFailure(
        .device,
        "the device \(device.path) is not written out: it waits for a device or file system below it"
          + " that hangs, or for space; the disk goes when that answers")
    }
    disk.flush = nil
    guard let error = flush.error else { return nil }
    return .uncommitted(device, "its flush failed: \(error.description)", disk)
  }

  private func flushed(_ id: DiskID) {
    guard !ending, let disk = table[id], case .stopping(_?) = disk.phase else { return }
    hurry(disk)
  }

  private func failFaults(_ disk: Disk) async {
    let (mapper, id) = (mapper, disk.id)
    do throws(DeviceMapperError) {
      try await mapping.run { () throws(DeviceMapperError) in try mapper.failFaults(id) }
    } catch {
      log(for: disk).warning("cannot fail what waits", metadata: ["error": "\(error)"])
    }
  }

  /// Does something with the device-mapper; its failure is the disk's.
  private func mapped<Value: Sendable>(
    _ work: @escaping @Sendable () throws(DeviceMapperError) -> Value
  ) async throws(DiskFailure) -> Value {
    do throws(DeviceMapperError) { return try await mapping.run(work) } catch {
      throw .mapper(error)
    }
  }
}

/// A flush of a device that is under way.
final class DeviceFlush: Sendable {
  let ended = Ended()
  private let result = Mutex<IOError?>(nil)

  /// Why it failed, once it has ended.
  var error: IOError? { result.withLock { $0 } }

  func end(_ error: IOError?) {
    result.withLock { $0 = error }
    ended.set()
  }
}

extension Disk {
  /// What the disk's device stands on, by the worker's report. `asked` are the files that the
  /// worker asked for, in that order. It may write what it was lent for writing.
  func backings(
    _ parts: [DiskPart], asked: [AllowedFile]
  ) throws(DiskFailure) -> [DiskBacking] {
    try parts.map { part throws(DiskFailure) in
      var found: OpenImage?
      var mayWrite = !readOnly
      switch part.role {
      case .store: found = store
      case .base: (found, mayWrite) = (base, false)
      case .file(let index):
        guard asked.indices.contains(index) else { break }
        found = files[asked[index]]
        mayWrite = mayWrite && asked[index].need.writable
      }
      guard let found, mayWrite || !part.isWritable else {
        throw .worker("the worker wishes for what it was not given: is cowd of this version?")
      }
      return DiskBacking(image: found, part: part)
    }
  }
}

extension DiskFailure {
  static func mapper(_ error: DeviceMapperError) -> DiskFailure {
    let remedy =
      switch error.code {
      case EPERM, EACCES: "dmu-xend has to run as root"
      case EBUSY: "look who has it open (fuser), and end that program"
      default: "look at the kernel's log (dmesg), or use transport nbd"
      }
    return DiskFailure(.device, "\(error): \(remedy)")
  }

  static func node(_ error: IOError) -> DiskFailure {
    let remedy =
      error.code == EBUSY
      ? "end the process that has it open" : "look at the kernel's log (dmesg)"
    return DiskFailure(.device, "\(error.description): \(remedy)")
  }

  static func stillOpen(_ device: DeviceNode) -> DiskFailure {
    DiskFailure(
      .device,
      "the device \(device.path) is still open: a request waits for a device or file system below"
        + " it that hangs, or a program of this host uses it (fuser \(device.path)); the disk goes"
        + " with the last close")
  }

  /// A device that may not be removed.
  static func uncommitted(_ device: DeviceNode, _ why: String, _ disk: Disk) -> DiskFailure {
    let store = disk.spec?.store ?? "its store"
    return DiskFailure(
      .device,
      "the device \(device.path) may hold writes that are not in store \(store), and \(why): see to"
        + " that (after a flush that failed: 'dmu-xen clear \(disk.id.target)'), or give them up with"
        + " 'dmu-xen discard-pending \(store)'")
  }

  static let noTarget = DiskFailure(
    .device,
    "the kernel has no device-mapper target 'userspace', version 1: install its module,"
      + " dm-userspace (dkms install dm-userspace/\(Version.text); modprobe dm-userspace), or use transport"
      + " auto or nbd")

  static func notMappable(_ store: String, _ why: String) -> DiskFailure {
    DiskFailure(
      .device,
      "store \(store) cannot be served by the device-mapper (it \(why)): use transport auto or nbd")
  }
}
