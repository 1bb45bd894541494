// SPDX-License-Identifier: Apache-2.0
// Pending logs: from the start of a disk to the moment when nothing in them is needed any more,
// which may be long after the disk.
//
//  1. A disk that takes a store up opens the store's log, under the store's lock. What an
//     earlier disk left in it is the new worker's to go on from.
//  2. A worker that ends well has committed everything; the log is empty and is removed.
//  3. After any other end a worker without a device is started and stopped again: it takes the
//     log up and commits it.
//  4. If that fails, too, the log is kept, with the reason. The next disk on the store goes on
//     from it, or `dmu-xen recover` does 3 again.
//
// A crash between any two of these leaves the log as it is.

internal import BlockIO
import Glibc
internal import Logging
internal import SystemIO
internal import WorkerLink

extension PendingRegistry {
  /// Throws when a file may not be used, since a disk's writes to it are still in a log other than
  /// this one. Blocks.
  func refuse(_ image: OpenImage, own: String? = nil) throws(DiskFailure) {
    let reason: String?
    do throws(IOError) { reason = try hindrance(image.file, own: own) } catch {
      throw DiskFailure(error)
    }
    if let reason { throw DiskFailure(.pending, reason) }
  }
}

extension Reconciler {
  // MARK: - A disk's log

  /// Opens the log of the disk's store. A disk that is read only gets memory of its own, which
  /// cannot grow.
  func prepareLog(_ disk: Disk) async throws(DiskFailure) {
    guard let store = disk.store, let spec = disk.spec else { return }
    let (directory, registry) = (disk.directory(configuration), configuration.registry)
    guard !disk.readOnly else {
      disk.pending = try await blocking { () throws(IOError) in
        try directory.make()
        return try Reconciler.emptyLog()
      }
      return
    }
    let entry = try await blocking { () throws(IOError) in try PendingEntry(registry, of: store) }
    let former = disk.entry
    await take(entry, disk)
    let (pending, summary, info): (FileStore, PendingSummary, PendingInfo?)
    do throws(DiskFailure) {
      (pending, disk.identities.log, summary, info) = try await offload.run {
        () throws(DiskFailure) -> (FileStore, FileIdentity, PendingSummary, PendingInfo?) in
        try Reconciler.refuseOthers(entry, spec)
        do throws(IOError) {
          try directory.make()
          let pending = try entry.open()
          let identity = try FileIdentity(pending.raw, name: pending.name)
          return (pending, identity, try PendingSummary(pending), try entry.info())
        } catch { throw DiskFailure(error) }
      }
    } catch {
      disk.entry = former
      throw error
    }
    disk.pending = pending
    disk.tookOver = summary.isNeeded
    guard summary.isNeeded else { return try await describeLog(disk) }
    if let info, let other = Reconciler.spec(info.params)?.format, other != spec.format {
      throw .pendingOfFormat(spec.store, other, summary.words)
    }
    log(for: disk).notice(
      "goes on from the store's pending log",
      metadata: ["log": "\(entry.path)", "holds": "\(summary.words)"])
  }

  /// The log of a disk that writes nothing.
  static func emptyLog() throws(IOError) -> FileStore {
    try FileStore(
      Descriptor(sealedMemory: PendingSummary.firstSize, name: "dmu-pending"),
      name: "the pending log")
  }

  /// Ends every worker whose log has grown beyond what a log may have, and makes the log as short
  /// again: it shares the run directory with everybody else's.
  func checkLogs() async {
    let disks = (Array(table.values) + recovering.values).filter {
      $0.worker != nil && $0.worker?.ended == nil && $0.pending != nil && !$0.readOnly
    }
    let (workers, logs) = (disks.map(\.worker), disks.compactMap(\.pending))
    // All at once: it is done every second.
    let sizes = await offload.run {
      logs.map { log -> Result<UInt64, IOError> in
        Result { () throws(IOError) in max(log.size, try log.allocatedBytes()) }
      }
    }
    for (index, disk) in disks.enumerated() {
      switch sizes[index] {
      case .failure(let error):
        self.log(for: disk).error("cannot check the log", metadata: ["error": "\(error)"])
      // The last page may be one of a larger kind.
      case .success(let size) where size > PendingSummary.largestSize + 2 << 20:
        guard let worker = workers[index], disk.worker === worker else { continue }
        await end(worker, of: disk, logs[index], size)
      case .success: continue
      }
    }
    do throws(DiskFailure) {
      try await blocking { () throws(IOError) in try RunReserve.refill() }
      isRunFull = false
    } catch { noteReserve(error) }
  }

  /// Ends a worker whose log is too long, and cuts the log.
  private func end(_ worker: Worker, of disk: Disk, _ log: FileStore, _ size: UInt64) async {
    let limit = PendingSummary.largestSize
    await replace(
      worker, of: disk,
      "its pending log has grown to \(ByteCount.short(size)) bytes, and none has more than"
        + " \(ByteCount.short(limit))")
    do throws(IOError) {
      try await offload.run { () throws(IOError) in
        if log.size > limit { try log.resize(to: limit) }
      }
    } catch {
      self.log(for: disk).error("cannot cut the log", metadata: ["error": "\(error)"])
    }
  }

  /// Says once that the run directory is full.
  private func noteReserve(_ failure: DiskFailure) {
    guard !isRunFull else { return }
    isRunFull = true
    log.error(
      "the run directory has no space",
      metadata: ["directory": "\(configuration.runDirectory)", "reason": "\(failure)"])
  }

  /// Makes a log the disk's: from now on nobody else begins to see to it, and who has begun is
  /// waited for. Whoever that is does not get the store, which the disk has locked.
  private func take(_ entry: PendingEntry, _ disk: Disk) async {
    disk.entry = entry
    while claimedLogs.contains(entry.key) { await pause(.milliseconds(20)) }
  }

  /// Throws when a log that holds something belongs to another file of this store's name.
  private static func refuseOthers(
    _ own: PendingEntry, _ spec: Spec
  ) throws(DiskFailure) {
    do throws(IOError) {
      for other in try PendingEntry.all(own.registry) where other != own {
        guard let info = try other.info() else { continue }
        guard info.store == spec.store || Images.real(info.store) == Images.real(spec.store),
          Images.real(spec.store) != nil
        else { continue }
        let summary = try other.summary()
        if summary.isNeeded { throw IOError(ESTALE, summary.words, info.store) }
      }
    } catch {
      if error.code == ESTALE { throw .pendingOfAnother(spec.store, error.operation) }
      throw DiskFailure(error)
    }
  }

  /// Writes whose the log is.
  func describeLog(_ disk: Disk) async throws(DiskFailure) {
    guard let entry = disk.entry else { return }
    var info = disk.pendingInfo(now: scheduler.unixTime)
    let written = disk.files.filter { $0.key.need.writable }.map(\.value)
    do throws(IOError) {
      for image in written { info.others.append(try PendingRegistry.key(of: image.file)) }
    } catch { throw DiskFailure(error) }
    info.others.sort()
    try await blocking { [info] () throws(IOError) in try entry.save(info) }
  }

  /// Commits what a disk's log holds, by a worker without a device, and removes the log. The
  /// reason when that fails: then the log stays as it is.
  func commitLog(_ disk: Disk) async -> DiskFailure? {
    guard let entry = disk.entry else { return nil }
    do throws(DiskFailure) {
      disk.worker?.channel.close()
      disk.worker = nil
      try await reopen(disk)
      try await launch(disk, create: false, byNode: false)
    } catch {
      if let worker = disk.worker, let stuck = await killWorker(disk, worker) { return stuck }
      return error
    }
    let worker = disk.worker
    if let stuck = await stopWorker(disk) { return stuck }
    let summary: PendingSummary
    do throws(DiskFailure) {
      summary = try await blocking { () throws(IOError) in try entry.summary() }
      if !summary.isNeeded {
        try await blocking { () throws(IOError) in try entry.remove() }
        disk.pending = nil
        return nil
      }
    } catch { return error }
    let how = worker?.ended ?? "no known status"
    return .worker(
      "the worker that should commit it ended with \(how), and it still holds \(summary.words)")
  }

  /// The end of a disk's log: it goes when nothing in it is needed; else its content is committed
  /// or it is kept. Something else than nil: a worker of it cannot be ended.
  func endLog(_ disk: Disk) async -> DiskFailure? {
    guard let entry = disk.entry else { return nil }
    let log = log(for: disk)
    do throws(DiskFailure) {
      let summary = try await blocking { () throws(IOError) in
        let summary = try entry.summary()
        if !summary.isNeeded { try entry.remove() }
        return summary
      }
      guard summary.isNeeded else { return nil }
      log.warning(
        "the worker has left writes that are not in the store; another one commits them",
        metadata: ["log": "\(entry.path)", "holds": "\(summary.words)"])
      guard let failure = await commitLog(disk) else {
        log.notice("the store is complete", metadata: ["store": "\(disk.spec?.store ?? "")"])
        return nil
      }
      if disk.worker.map({ $0.ended == nil }) ?? false { return failure }
      await keepLog(disk, why: failure.sentence)
      return nil
    } catch {
      log.error("the pending log cannot be read and is kept", metadata: ["error": "\(error)"])
      return nil
    }
  }

  /// Leaves a log to whoever takes the store up next, or removes it when it holds nothing.
  func keepLog(_ disk: Disk, why: String) async {
    guard let entry = disk.entry else { return }
    let info = disk.pendingInfo(why: why, now: scheduler.unixTime)
    do throws(DiskFailure) {
      let summary = try await blocking { () throws(IOError) in
        let summary = try entry.summary()
        guard summary.isNeeded else {
          try entry.remove()
          return summary
        }
        // The former disk's text stays when this one has not even served the store.
        var kept = try entry.info() ?? info
        if Reconciler.spec(kept.params)?.format == Reconciler.spec(info.params)?.format {
          kept.files += info.files.filter { !kept.files.contains($0) }
        }
        kept.why = why
        kept.since = info.since
        kept.device = nil
        try entry.save(kept)
        return summary
      }
      guard summary.isNeeded else { return }
      log(for: disk).error(
        "the store has writes that are not in it yet: dmu-xen recover",
        metadata: [
          "store": "\(disk.spec?.store ?? "")", "log": "\(entry.path)",
          "holds": "\(summary.words)", "reason": "\(why)",
        ])
    } catch {
      log(for: disk).error("the pending log is kept", metadata: ["error": "\(error)"])
    }
  }

  // MARK: - Logs without a disk

  /// Has a log that no disk uses to itself while `body` runs. Throws when it is in use.
  func claiming<Value>(
    _ entry: PendingEntry, _ body: () async throws(DiskFailure) -> Value
  ) async throws(DiskFailure) -> Value {
    guard !claimedLogs.contains(entry.key), !isUsed(entry) else {
      throw DiskFailure(.inUse, "the log \(entry.path) is in use: its disk sees to it")
    }
    claimedLogs.insert(entry.key)
    defer { claimedLogs.remove(entry.key) }
    return try await body()
  }

  /// Commits a log that no disk uses. Answers what it held. Throws when it cannot be committed,
  /// or is in use.
  func recover(_ entry: PendingEntry) async throws(DiskFailure) -> PendingSummary {
    let (summary, former) = try await claiming(entry) { () async throws(DiskFailure) in
      try await recoverClaimed(entry)
    }
    await announce("running")
    if let former { wakeThoseWaiting(for: former) }
    return summary
  }

  /// The same for a log that is claimed; answers whose it was, too, if it held something.
  private func recoverClaimed(
    _ entry: PendingEntry
  ) async throws(DiskFailure) -> (PendingSummary, DiskID?) {
    let (summary, info) = try await blocking { () throws(IOError) in
      let summary = try entry.summary()
      if !summary.isNeeded { try entry.remove() }
      return (summary, try entry.info())
    }
    guard summary.isNeeded else { return (summary, nil) }
    guard var info, let spec = Reconciler.spec(info.params) else {
      throw DiskFailure(
        .pending,
        "nobody knows whose the pending log \(entry.path) is: attach the disk whose store it is, or"
          + " give it up with 'dmu-xen discard-pending \(entry.key)'")
    }
    let disk = Disk(info.disk, configuration: configuration, now: scheduler.unixTime)
    disk.directoryPath = configuration.recoveryDirectory + "/" + entry.key
    disk.params = info.params
    disk.spec = spec
    disk.vdev = info.vdev
    disk.allowed = info.files
    recovering[entry.key] = disk
    let failure = await recover(disk, entry, spec)
    if let stuck = await closeFiles(disk) {
      log(for: disk).error("cannot close its files yet", metadata: ["reason": "\(stuck)"])
    }
    release(disk)
    recovering[entry.key] = nil
    let directory = disk.directory(configuration)
    try await blocking { () throws(IOError) in try directory.remove() }
    guard let failure else {
      log(for: disk).notice(
        "the store is complete", metadata: ["store": "\(spec.store)", "held": "\(summary.words)"])
      return (summary, disk.id)
    }
    // Somebody who has the store sees to the log himself.
    guard failure.code != .inUse else { throw failure }
    info.why = failure.sentence
    try await blocking { [info] () throws(IOError) in try entry.save(info) }
    log(for: disk).error(
      "the store's pending log cannot be committed",
      metadata: ["store": "\(spec.store)", "reason": "\(failure.sentence)"])
    throw failure
  }

  private func recover(_ disk: Disk, _ entry: PendingEntry, _ given: Spec) async -> DiskFailure? {
    let directory = disk.directory(configuration)
    do throws(DiskFailure) {
      let spec = try await attachSources(disk, given)
      disk.spec = spec
      let outcome = try await offload.run { () throws(DiskFailure) in
        try Images.open(spec, readOnly: false)
      }
      guard case .opened(let store, let base, _) = outcome else {
        if case .missing = outcome { return .storeMissing(spec.store) }
        return .inUseElsewhere(.store, spec.store, [])
      }
      disk.store = store
      disk.base = base
      disk.pending = try await blocking { () throws(IOError) -> FileStore? in
        guard try PendingRegistry.key(of: store.file) == entry.key else { return nil }
        try directory.make()
        return try entry.open()
      }
      guard disk.pending != nil else { return .pendingOfAnother(spec.store, "see its info") }
      disk.entry = entry
    } catch { return error }
    guard let failure = await commitLog(disk) else { return nil }
    return failure
  }

  /// Whether a disk of the table has the log.
  func isUsed(_ entry: PendingEntry) -> Bool {
    table.values.contains { $0.entry == entry }
  }

  /// The logs that hold something and that no disk uses.
  func keptLogs() async throws(DiskFailure) -> [KeptLog] {
    let registry = configuration.registry
    let used = Set(table.values.compactMap(\.entry))
    let all = try await blocking { () throws(IOError) in
      try PendingEntry.all(registry).filter { !used.contains($0) }.map { entry throws(IOError) in
        KeptLog(entry: entry, info: try entry.info(), summary: try entry.summary())
      }
    }
    return all.filter { $0.summary.isNeeded && !isUsed($0.entry) }
  }

  /// Tries once to commit every log that an earlier daemon has left; those that hold nothing go.
  func recoverAll() async {
    hasRecovered = true
    defer { scheduler.start { await self.detachUnused() } }
    let registry = configuration.registry
    do throws(DiskFailure) {
      let entries = try await blocking { () throws(IOError) in try PendingEntry.all(registry) }
      for entry in entries where !isUsed(entry) && !claimedLogs.contains(entry.key) {
        do throws(DiskFailure) { _ = try await recover(entry) } catch {
          log.error(
            "a pending log is kept", metadata: ["log": "\(entry.path)", "reason": "\(error)"])
        }
      }
    } catch { log.error("cannot look for pending logs", metadata: ["error": "\(error)"]) }
    await announce("running")
  }

  /// Runs system calls elsewhere; their failure is the disk's.
  func blocking<Value: Sendable>(
    _ work: @escaping @Sendable () throws(IOError) -> Value
  ) async throws(DiskFailure) -> Value {
    try await offload.run { () throws(DiskFailure) in
      do throws(IOError) { return try work() } catch { throw DiskFailure(error) }
    }
  }
}
