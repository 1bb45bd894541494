// SPDX-License-Identifier: Apache-2.0
// What the control socket asks of the reconciler.

import BlockIO
import Glibc
internal import LinuxBlock
internal import Logging
internal import SystemIO
internal import WorkerLink
internal import XenStore

extension Reconciler {
  /// A block script's `add`: takes the disk up and waits until it is served or has failed.
  /// `boots`: the script knows that the domain boots, so that a store may be made for it.
  func attach(_ id: DiskID, boots: Bool) async -> Result<DeviceNode, DiskFailure> {
    guard takesWaiters else { return .failure(.ending) }
    let limit = configuration.attachTimeout
    if let vbd = id.vbd, let disk = table[self.id(of: vbd)], disk.released, !disk.joined.isEmpty {
      // The toolstack was done with that one.
      await outlive(disk)
    }
    let id = id.vbd.map { self.id(of: $0) } ?? id
    if table[id] == nil {
      table[id] = Disk(id, configuration: configuration, now: scheduler.unixTime)
    }
    if let disk = table[id] {
      disk.released = false
      disk.boots = boots
      if case .asking = disk.phase { enter(disk, .idle) }
      // Taken up at its first event it may have failed before the script came to ask.
      if case .failed(_, attached: false) = disk.phase { enter(disk, .idle) }
    }
    mark(id)
    guard let disk = table[id] else { return .failure(.ending) }
    let number = nextWaiter
    nextWaiter += 1
    let clock = scheduler.after(limit) { [weak self] in await self?.overdue(id, number, limit) }
    defer { clock.cancel() }
    return await withCheckedContinuation { continuation in
      disk.waiters[number] = continuation
      if !disk.due, !disk.busy { settle(disk) }
    }
  }

  private func overdue(_ id: DiskID, _ number: UInt64, _ limit: Duration) {
    guard let disk = table[id], let waiter = disk.waiters.removeValue(forKey: number) else {
      return
    }
    let why = disk.reason.map { " (\($0))" } ?? ""
    waiter.resume(
      returning: .failure(
        .timeout(
          "the disk is still \(disk.phase.publicState.rawValue)\(why) and was not ready", limit,
          remedy: "look at dmu-xend's log and attach the disk again")))
  }

  /// A block script's `remove`: the toolstack is done with the disk, whatever xenstore says.
  func detach(_ id: DiskID) {
    let id = id.vbd.map { self.id(of: $0) } ?? id
    guard let disk = table[id] else { return }
    disk.released = true
    disk.boots = nil
    mark(id)
  }

  /// Reads the configuration anew; an error leaves the running one in force. Failed disks
  /// are tried again.
  func reload() async throws(ConfigurationError) {
    let path = configurationPath
    var new = try await offload.run { () throws(ConfigurationError) in
      try Configuration.load(path)
    }
    if new.runDirectory != configuration.runDirectory {
      log.warning("run-directory changes when dmu-xend is started again")
      new.runDirectory = configuration.runDirectory
    }
    if new.metricsListen != configuration.metricsListen {
      log.warning("metrics.listen changes when dmu-xend is started again")
      new.metricsListen = configuration.metricsListen
    }
    configuration = new
    LogLevel.current = new.logLevel
    log.notice("configuration reloaded", metadata: ["file": "\(path)"])
    for disk in table.values {
      disk.backOff.limit = new.restartLimit
      disk.backOff.window = new.restartWindow
      // One that has a worker has failed on its way out, and is tried again in time.
      guard case .failed(_, let attached) = disk.phase, disk.worker == nil else { continue }
      disk.backOff.reset()
      // The admin has read why it failed: its images may name other files now.
      disk.isComplete = false
      enter(disk, attached ? .restarting(at: scheduler.now) : .idle)
      mark(disk.id)
    }
    for disk in table.values {
      if case .stopping(_?) = disk.phase { hurry(disk) }
    }
    scheduler.start { await self.recoverAll() }
  }

  /// What is known of the disks of a domain, by number or name, or of all, of attaches that
  /// failed, and of logs that hold writes for a store without a disk. Workers are asked for their
  /// counters now, and only now.
  func status(
    domain: String?, isDetailed: Bool = false
  ) async throws(DiskFailure) -> [DiskStatus] {
    var answers: [DiskStatus] = []
    await withTaskGroup(of: DiskStatus?.self) { group in
      for id in table.keys { group.addTask { await self.status(of: id, isDetailed: isDetailed) } }
      for await answer in group {
        if let answer { answers.append(answer) }
      }
    }
    answers += inactiveDisks().filter { disk in !answers.contains { $0.name == disk.name } }
    answers += failures.filter { failure in !answers.contains { $0.isSameDisk(as: failure) } }
    answers += try await keptLogs().map { DiskStatus($0) }
    return answers.filter { answer in domain.map { answer.isMeant(by: $0) } ?? true }
      .sorted { ($0.id, $0.since) < ($1.id, $1.since) }
  }

  func status(of id: DiskID, isDetailed: Bool = false) async -> DiskStatus? {
    if let disk = table[id]?.served, disk.phase.isServing, let worker = disk.worker {
      await refresh(disk, worker)
    }
    if let row = table[id] { await learnName(of: row) }
    guard let row = table[id],
      row.wanted != nil || row.spec != nil || adopting.contains(id),
      // Those who use it stand for it.
      !row.isOutlived || row.users.isEmpty
    else { return nil }
    let disk = row.served
    var status = DiskStatus(
      id, vdev: row.vdev, state: disk.phase.publicState, since: disk.since,
      readOnly: disk.readOnly, restarts: disk.backOff.recent(at: scheduler.now))
    status.domainName = row.domainName
    let users = disk.users
    if users.count > 1 { status.users = users.compactMap(\.id.vbd?.description) }
    if disk !== row || row.id.vbd.map({ .vbd($0) != row.id }) ?? false {
      status.identity = "\(disk.id)"
    }
    if let name = id.name {
      status.owner = wishes[name]?.owner?.description
      status.link = disk.device.map { _ in host.links.path(name) }
    }
    status.format = disk.spec?.format
    status.store = disk.spec?.storeName
    status.base = disk.spec?.baseName ?? disk.basePath ?? disk.report?.basePath
    status.sources = attachedPaths(disk)
    status.files = disk.allowed.isEmpty ? nil : disk.allowed.map(\.path)
    status.device = disk.device?.path
    status.transport = disk.device?.kind
    status.kernelDevice = disk.device?.kernelPath
    if let why = disk.hindrance { status.note = "served by nbd, since its image \(why)" }
    status.error = disk.reason
    var activity = DiskActivity()
    activity.restarts = UInt64(disk.restarts)
    status.worker = disk.worker?.process.pid
    if let report = disk.report {
      status.size = report.size
      status.allocated = report.allocated
      status.blockSize = report.blockSize
      status.uncommitted = report.uncommitted
      status.reads = report.reads
      status.writes = report.writes
      status.flushes = report.flushes
      status.faults = report.faults
      status.memory = report.memory
      if let times = report.times { activity.take(times) }
    }
    if let device = disk.device, device.kind == .dm {
      await count(&status, &activity, disk.id, id.vbd, device)
    }
    if isDetailed { status.activity = activity }
    return status
  }

  /// What only the kernel sees of a device that it serves.
  private func count(
    _ status: inout DiskStatus, _ activity: inout DiskActivity, _ id: DiskID, _ user: VBD?,
    _ device: DeviceNode
  ) async {
    let mapper = mapper
    do throws(DeviceMapperError) {
      let counters = try await mapping.run { () throws(DeviceMapperError) in
        try mapper.counters(id, device)
      }
      status.reads = counters.reads
      status.writes = counters.writes
      // blkback counts the guest's; the module those only that its worker was asked about.
      status.flushes = user.flatMap { BlkbackCounters.flushes($0) } ?? counters.flushes
      status.uncommitted = counters.uncommitted
      activity.take(counters)
    } catch {
      log.warning("no counters", metadata: ["disk": "\(id)", "error": "\(error)"])
    }
  }

  private func refresh(_ disk: Disk, _ worker: Worker) async {
    do throws(WorkerSilence) {
      try await ask(.status, disk, worker)
    } catch {
      log(for: disk).warning("no status from the worker", metadata: ["reason": "\(error.words)"])
    }
  }

  /// Asks a worker for something that it answers with its status.
  private func ask(
    _ order: WorkerOrder, _ disk: Disk, _ worker: Worker
  ) async throws(WorkerSilence) {
    let verb = order.message.verb
    let reply = try await worker.channel.ask(order, within: .seconds(2)) { report in
      switch report {
      case .status: true
      case .refused(let order, _): order == verb
      default: false
      }
    }
    guard case .status(let report) = reply.report else {
      throw .closed("it refuses '\(verb)': is cowd of this version?")
    }
    guard disk.worker === worker else { return }
    disk.report = report
    if case .serving = disk.phase { enter(disk, .serving(DiskPhase.Trouble(report))) }
  }

  /// An admin has acted on what failed: flushes may succeed again, and counted errors are
  /// forgotten. Answers the disks that this was done for. Throws the first failure.
  func clear(_ target: String) async throws(DiskFailure) -> [DiskStatus] {
    var done: [DiskStatus] = []
    var cleared: Set<DiskID> = []
    for row in Array(table.values) {
      guard let before = await status(of: row.id), before.isMeant(by: target) else { continue }
      let disk = row.served
      guard cleared.insert(disk.id).inserted else { continue }
      guard let worker = disk.worker, worker.ended == nil else {
        throw .worker(
          "disk \(disk.id) has no worker, which alone can clear its errors: run 'dmu-xen reload',"
            + " then try again")
      }
      if disk.device?.kind == .dm {
        let (mapper, id) = (mapper, disk.id)
        do throws(DeviceMapperError) {
          try await mapping.run { () throws(DeviceMapperError) in try mapper.clear(id) }
        } catch { throw .mapper(error) }
      }
      do throws(WorkerSilence) { try await ask(.clear, disk, worker) } catch {
        throw .worker("the worker of disk \(disk.id) did not clear its errors: \(error.words)")
      }
      log(for: disk).notice("errors were cleared by order")
      if case .stopping(_?) = disk.phase { hurry(disk) }
      await publish(disk)
      if let after = await status(of: row.id) { done.append(after) }
    }
    return done
  }

  /// Answers everybody who waits for a disk, and from now on everybody who comes, that this
  /// daemon is about to end.
  func refuseAllWaiters() {
    takesWaiters = false
    for disk in table.values { refuseWaiters(disk, .ending) }
  }

  /// The end of the daemon: workers and devices stay as they are, for the next one.
  func end() async {
    refuseAllWaiters()
    ending = true
    // Whoever is in the middle of a step may finish it, within reason: what is not finished
    // is ended and begun anew by the next daemon.
    for _ in 0..<300 where table.values.contains(where: \.busy) {
      do { try await scheduler.sleep(for: .milliseconds(10)) } catch { break }
    }
    await announce("stopped")
    for disk in table.values {
      disk.timer?.cancel()
      disk.worker?.channel.close()
    }
  }
}

extension DiskPhase {
  /// Whether a worker that does not answer is in the way.
  var needsWorker: Bool {
    switch self {
    case .serving, .stopping(_?): true
    default: false
    }
  }

  /// Whether a worker serves, whatever the trouble.
  var isServing: Bool {
    if case .serving = self { return true }
    return false
  }
}

extension DiskStatus {
  /// A log without a disk.
  init(_ kept: KeptLog) {
    self.init(
      kept.info?.disk ?? DiskID(domain: 0, device: 0), vdev: kept.info.map(\.vdev) ?? "-",
      state: .pending, since: kept.info?.since ?? 0)
    let spec = kept.info.flatMap { Reconciler.spec($0.params) }
    domainName = kept.info?.domainName
    format = spec?.format
    store = kept.store
    base = spec?.baseName
    uncommitted = kept.summary.uncommitted
    error = kept.sentence
  }
}

/// What blkback counts of a guest's requests.
enum BlkbackCounters {
  /// Flush requests; nil when the disk has no blkback here.
  static func flushes(_ vbd: VBD) -> UInt64? {
    let path = "/sys/bus/xen-backend/devices/vbd-\(vbd)/statistics/f_req"
    do throws(IOError) { return UInt64(try TextFile.read(path).trimmingNewline) } catch {
      return nil
    }
  }
}

extension DiskFailure {
  static let ending = DiskFailure(
    .daemon, "dmu-xend is being stopped: start it again and attach the disk again")
}
