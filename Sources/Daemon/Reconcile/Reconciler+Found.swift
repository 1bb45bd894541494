// SPDX-License-Identifier: Apache-2.0
// What the kernel has of ours although no record says so: the run directory was lost or
// changed, or an earlier daemon died between making a device and writing it down.
//
// A device that xenstore wants is taken over, with its worker if that is found. One that is
// open, or may hold writes that are in no image, is left alone and told of. Only the rest is
// ended.

internal import BlockIO
import Glibc
internal import LinuxBlock
internal import Logging
internal import SystemIO
internal import WorkerLink
internal import XenStore

/// A device of ours that belongs to no disk.
struct StrayDevice: Sendable {
  let disk: DiskID
  let node: DeviceNode
  /// Why it is not simply ended; nil: it may be.
  let hindrance: String?
}

extension Reconciler {
  /// Takes over or ends every device of ours that no disk of the table has.
  func adoptFound() async {
    for (id, device) in await foundDevices() {
      do throws(XenStoreError) {
        let sight = try await look(id)
        if let sight, sight.device != device.hexadecimal, table[id] == nil,
          try await adoptShared(id, device)
        {
          continue
        }
        let number = sight?.device
        if let sight, let wanted = sight.wanted, number == nil || number == device.hexadecimal,
          table[id] == nil, let spec = Reconciler.spec(wanted.params)
        {
          await adopt(id, device, sight, wanted, spec)
          continue
        }
        if sight == nil, await !isUnused(id, device) {
          log.warning(
            "leaves a device alone: xenstored has lost its store",
            metadata: ["device": "\(device.path)"])
          continue
        }
      } catch {
        log.error(
          "leaves a device alone: xenstore cannot be asked whether it is wanted",
          metadata: ["device": "\(device.path)", "error": "\(error)"])
        continue
      }
      let stray = await examine(id, device)
      guard let why = stray.hindrance else {
        await end(stray)
        continue
      }
      log.error(
        "leaves a device of no disk alone: dmu-xen doctor",
        metadata: ["device": "\(device.path)", "reason": "\(why)"])
    }
  }

  /// Takes over a disk that only other vbds than its own use by now. False when there are none.
  private func adoptShared(_ id: DiskID, _ device: DeviceNode) async throws(XenStoreError) -> Bool {
    guard id.vbd != nil else { return false }
    for user in try await view.users(of: device.hexadecimal) {
      guard let sight = try await look(.vbd(user)), let wanted = sight.wanted, table[id] == nil,
        let spec = Reconciler.spec(wanted.params)
      else { continue }
      await adopt(id, device, sight, wanted, spec)
      return true
    }
    return false
  }

  /// Devices of ours that no disk of the table has, and none that is being taken over.
  func foundDevices() async -> [(DiskID, DeviceNode)] {
    var found: [(DiskID, DeviceNode)] = []
    let (attacher, mapper) = (attacher, mapper)
    do throws(IOError) {
      for (identifier, node) in try await offload.run({ () throws(IOError) in
        try attacher.devices()
      }) {
        let name = identifier.dropFirst(KernelAttacher.mark.count)
        if let id = DiskID(name) { found.append((id, node)) }
      }
    } catch { log.error("cannot look for devices of nbd", metadata: ["error": "\(error)"]) }
    do throws(DeviceMapperError) {
      let mapped = try await mapping.run { () throws(DeviceMapperError) in try mapper.devices() }
      found += mapped.map { ($0.key, $0.value) }
    } catch {
      log.error("cannot look for devices of the device-mapper", metadata: ["error": "\(error)"])
    }
    let known = Set(table.values.compactMap(\.device))
    return found.filter { !known.contains($0.1) && isStray($0.0, $0.1) }
  }

  /// Whether a device may be of no disk. One that comes or goes just now is its disk's, which has it
  /// not yet or no more; one of the device-mapper is found by the disk's name alone.
  private func isStray(_ id: DiskID, _ device: DeviceNode) -> Bool {
    guard let disk = table[id] else { return true }
    return !disk.busy && disk.device != device && device.kind == .nbd
  }

  /// Whether a device was made and never brought into use.
  private func isUnused(_ id: DiskID, _ device: DeviceNode) async -> Bool {
    guard device.kind == .dm else { return false }
    let mapper = mapper
    do throws(DeviceMapperError) {
      return try await mapping.run { () throws(DeviceMapperError) in
        try !mapper.isAttached(id, device)
      }
    } catch {
      log.warning("cannot examine a device", metadata: ["error": "\(error)"])
      return false
    }
  }

  /// Takes a disk over by what kernel and xenstore say of it.
  private func adopt(
    _ id: DiskID, _ device: DeviceNode, _ sight: Sight, _ wanted: WantedDisk, _ spec: Spec
  ) async {
    let disk = Disk(id, configuration: configuration, now: scheduler.unixTime)
    disk.sight = sight
    disk.params = wanted.params
    disk.spec = spec
    disk.readOnly = wanted.readOnly
    if let vdev = sight.vdev { disk.vdev = vdev }
    disk.device = device
    disk.busy = true
    defer { adopted(disk) }
    table[id] = disk
    await findUsers(disk, device)
    await restoreLink(disk)
    let directory = DiskDirectory(configuration, id)
    let log = log(for: disk)
    log.warning(
      "takes over a disk of which no record is left", metadata: ["device": "\(device.path)"])
    do throws(DiskFailure) {
      try await blocking { () throws(IOError) in try directory.make() }
      try await resolveSources(disk)
      guard let spec = disk.spec, let worker = try await find(disk, spec) else {
        disk.phase = .restarting(at: scheduler.now, why: "no worker of it was found")
        return
      }
      var record = DiskRecord(
        params: disk.params, readOnly: disk.readOnly, vdev: disk.vdev, files: [],
        worker: worker.process.pid, workerStart: worker.process.startTime, device: device,
        since: disk.since)
      record.link = worker.link
      if let old = try await blocking({ () throws(IOError) in try worker.directory.load() }),
        old.worker == record.worker, old.params == record.params
      {
        (disk.allowed, disk.since) = (old.files, old.since)
        (disk.identities, disk.isComplete) = (old.identities, old.isComplete)
      }
      if await takeOver(disk, record) {
        try await save(disk)
        try await describeLog(disk)
      } else {
        try await replace(worker, of: disk)
      }
    } catch {
      disk.phase = .failed(error, attached: true)
      log.error("cannot take the disk over", metadata: ["error": "\(error)"])
    }
  }

  /// Takes up the vbds that use a disk, by their entries.
  private func findUsers(_ disk: Disk, _ device: DeviceNode) async {
    guard let own = disk.id.vbd else { return }
    do throws(XenStoreError) {
      let users = try await view.users(of: device.hexadecimal)
      if users != [own] { takeUsers(users, disk) }
      if disk.isOutlived { disk.sight = .nothing }
    } catch {
      log(for: disk).warning("cannot find who uses the disk", metadata: ["error": "\(error)"])
    }
  }

  /// The worker that serves a disk, if one runs.
  private func find(_ disk: Disk, _ spec: Spec) async throws(DiskFailure) -> (any WorkerAtLarge)? {
    let (id, processes) = (disk.id, host.processes)
    return try await blocking { () throws(IOError) in
      var status = stat()
      guard stat(spec.store, &status) == 0 else { return nil }
      let identity = FileIdentity(status)
      return try processes.workers().first { $0.disk == id && $0.has(identity) }
    }
  }

  /// Ends a worker that cannot be spoken to. What it could not commit is in its log, which has
  /// no name any more and gets one.
  private func replace(_ worker: any WorkerAtLarge, of disk: Disk) async throws(DiskFailure) {
    let (limit, registry) = (configuration.stopTimeout, configuration.registry)
    let (store, readOnly) = (disk.spec?.store ?? "", disk.readOnly)
    let hasEnded = try await blocking { () throws(IOError) in
      let log = try worker.openLog()
      let key = try PendingRegistry.key(of: FileStore(path: store, writable: false))
      guard try worker.end(within: limit) else { return false }
      if let log, !readOnly { try PendingEntry(registry, key).rescue(log) }
      return true
    }
    guard hasEnded else {
      throw .worker(
        "the worker (process \(worker.process.pid)) of an earlier daemon cannot be killed: it waits"
          + " for a device or file system that hangs; run 'dmu-xen reload' when that answers")
    }
    disk.phase = .restarting(at: scheduler.now, why: "the link of its former worker was lost")
  }

  // MARK: - Strays

  /// Ends the workers of a disk that the table does not have. Throws when one lives on.
  private func endWorkers(of id: DiskID) async throws(DiskFailure) {
    let limit = configuration.stopTimeout
    for worker in try await unknownWorkers() where worker.disk == id {
      log.warning(
        "ends a worker of no disk",
        metadata: ["disk": "\(id)", "process": "\(worker.process.pid)"])
      let hasEnded = try await blocking { () throws(IOError) in try worker.end(within: limit) }
      guard hasEnded else {
        throw .worker("its worker, process \(worker.process.pid), cannot be killed: it hangs")
      }
    }
  }

  /// Whether a device of no disk may be ended.
  func examine(_ id: DiskID, _ device: DeviceNode) async -> StrayDevice {
    func stray(_ why: String?) -> StrayDevice {
      StrayDevice(disk: id, node: device, hindrance: why)
    }
    guard device.kind == .dm else {
      let attacher = attacher
      // Nothing says that guests use the device of a vbd that is not wanted; one of a named disk is
      // theirs whatever is known of the name.
      if id.name != nil {
        do throws(XenStoreError) {
          if let user = try await view.users(of: device.hexadecimal).first {
            return stray("\(DiskID.vbd(user).words) has it")
          }
        } catch { return stray("\(error)") }
      }
      do throws(IOError) {
        let isUsed = try await offload.run { () throws(IOError) in try attacher.isInUse(device) }
        return stray(isUsed ? "it is open" : nil)
      } catch { return stray("\(error)") }
    }
    let mapper = mapper
    do throws(DeviceMapperError) {
      let (users, isLive, held) = try await mapping.run { () throws(DeviceMapperError) in
        let isLive = try mapper.isAttached(id, device)
        let held = isLive ? try mapper.counters(id, device).uncommitted : 0
        return (try mapper.users(id), isLive, held)
      }
      if users > 0 { return stray("it is open") }
      if isLive, held > 0 { return stray("it holds \(held) placements that are in no image") }
      return stray(nil)
    } catch { return stray("\(error)") }
  }

  /// Ends a device of no disk, and before it the workers of that device: while one answers, its faults
  /// are not ours to fail.
  func end(_ stray: StrayDevice) async {
    do throws(DiskFailure) { try await endWorkers(of: stray.disk) } catch {
      log.error(
        "leaves a device of no disk alone: dmu-xen doctor",
        metadata: ["device": "\(stray.node.path)", "reason": "\(error)"])
      return
    }
    // All this has taken its time.
    guard isStray(stray.disk, stray.node) else { return }
    log.warning("ends a device of no disk", metadata: ["device": "\(stray.node.path)"])
    let (attacher, mapper, device, id) = (attacher, mapper, stray.node, stray.disk)
    do {
      guard device.kind == .dm else {
        try await offload.run { () throws(IOError) in try attacher.detach(device) }
        return
      }
      try await mapping.run { () throws(DeviceMapperError) in
        try mapper.failFaults(id)
        try mapper.remove(id, deferred: false)
      }
      await sweepLoopMarks()
    } catch {
      log.error(
        "cannot end a device of no disk",
        metadata: ["device": "\(device.path)", "error": "\(error)"])
    }
  }
}
