// SPDX-License-Identifier: Apache-2.0
// Taking over what an earlier daemon left running: workers, devices, state files.
//
// A worker is taken over when its process is the very one that was started (id and start
// time), when it answers on its link, and when it gives the descriptors back. In any other
// case it is ended and replaced, which a guest sees as a pause at most.

internal import BlockIO
import Glibc
internal import LinuxBlock
internal import Logging
internal import SystemIO
internal import WorkerLink

extension Reconciler {
  /// Takes over every disk that has a directory, then what else the kernel has of ours, and
  /// commits the logs that nobody uses any more.
  func adopt() async throws(IOError) {
    let configuration = configuration
    try await recallWishes()
    try await recallSources()
    let found = try await offload.run { () throws(IOError) -> [(DiskID, DiskRecord?)] in
      try PendingEntry.prepare(configuration.registry)
      return try DiskDirectory.all(configuration).map { id throws(IOError) in
        (id, try DiskDirectory(configuration, id).load())
      }
    }
    formerWorkers = Set(found.compactMap { $0.1?.worker })
    adopting = Set(found.map(\.0))
    for (id, record) in found {
      let disk = Disk(id, configuration: configuration, now: scheduler.unixTime)
      disk.busy = true
      // Its log and its files are nobody else's.
      if let record { recall(disk, record) }
      table[id] = disk
      scheduler.start { await self.adopt(id) }
    }
    for (id, record) in found {
      guard let record, let disk = table[id] else { continue }
      takeUsers(record.users, disk)
      if record.isHeld { disk.held = .bothRun(disk, []) }
    }
    // A disk whose files are on a file system that hangs, or whose take-over fails, is taken over when
    // that is over; the others do not wait for it.
    let end = scheduler.now + Reconciler.adoptionTime
    while !adopting.isEmpty, scheduler.now < end { await pause(.milliseconds(10)) }
    for id in adopting {
      log.error(
        "a disk is not taken over yet: its files or its device do not answer, or fail",
        metadata: ["disk": "\(id)"])
    }
    await endRecoveries()
    if adopting.isEmpty { formerWorkers = [] }
    await adoptFound()
    if !table.isEmpty { log.notice("took over disks", metadata: ["disks": "\(table.count)"]) }
    // xenstored may be silent for long: it has nothing to say of these.
    lookAtNames()
    await recallFailures()
  }

  /// Ends the workers with which an earlier daemon was committing logs: the logs are as they
  /// were.
  private func endRecoveries() async {
    let folder = configuration.recoveryDirectory
    do throws(IOError) {
      let names = try await offload.run { () throws(IOError) in
        guard mkdir(folder, 0o700) == 0 || errno == EEXIST else {
          throw IOError.last("make", folder)
        }
        return try Folder.names(folder)
      }
      for name in names {
        let directory = DiskDirectory(path: folder + "/" + name)
        let record = try await offload.run { () throws(IOError) in try directory.load() }
        try await end(record, directory)
        try await offload.run { () throws(IOError) in try directory.remove() }
      }
    } catch { log.error("cannot end a recovery", metadata: ["error": "\(error)"]) }
  }

  /// Takes over one disk, as soon as the host lets it: what fails is tried again, later and later. The
  /// disk is known from the beginning, so that meanwhile nobody starts it, ends its device or removes
  /// its log.
  private func adopt(_ id: DiskID) async {
    guard let disk = table[id] else { return }
    var attempt = 0
    var before: IOError?
    while !ending {
      disk.activity = "it is taken over from an earlier daemon"
      do throws(IOError) {
        try await takeOver(disk)
        break
      } catch {
        disk.phase = .failed(DiskFailure(error), attached: true)
        if before != error {
          log(for: disk).error("cannot take the disk over yet", metadata: ["error": "\(error)"])
        }
        before = error
        await pause(Reconciler.patience(attempt))
        attempt += 1
      }
    }
    if !ending { await restoreLink(disk) }
    disk.activity = nil
    adopting.remove(id)
    // One that holds nothing is taken up, if it is wanted, when devices of no disk have gone.
    if case .idle = disk.phase, !disk.due { table[id] = nil }
    adopted(disk)
    wakeThoseWaiting(for: id)
    // A log that it has left is none of those that were seen to at the start.
    if hasRecovered { await recoverAll() }
  }

  /// One attempt. Afterwards the disk is served, has a device and waits for a worker, waits for a
  /// worker to end, or holds nothing.
  private func takeOver(_ disk: Disk) async throws(IOError) {
    let directory = DiskDirectory(configuration, disk.id)
    let log = log(for: disk)
    let record = try await offload.run { () throws(IOError) in try directory.load() }
    guard let record, let device = record.device, Reconciler.spec(record.params) != nil
    else {
      // It was not yet served, or its file was not written to the end.
      try await end(record, directory)
      try await offload.run { () throws(IOError) in try directory.remove() }
      return hold(nothing: disk)
    }
    recall(disk, record)
    guard try await isAttached(disk, device) else {
      log.error("the device has gone", metadata: ["device": "\(device.path)"])
      try await takeOldLog(disk, record, directory)
      if try await linger(disk, record, directory) { return }
      try await offload.run { () throws(IOError) in try directory.remove() }
      return hold(nothing: disk)
    }
    disk.device = device
    guard await !takeOver(disk, record) else { return }
    _ = try await linger(disk, record, directory)
    try await takeOldLog(disk, record, directory)
    disk.phase = .restarting(
      at: scheduler.now, why: "an earlier daemon has left it without one")
    log.error("the worker is gone and is replaced", metadata: ["worker": "\(record.worker)"])
  }

  /// Nothing was left of it.
  private func hold(nothing disk: Disk) {
    dissolve(disk)
    release(disk)
    disk.spec = nil
    disk.phase = .idle
  }

  /// A disk is taken over, or not there. Its worker may have spoken meanwhile: steps are taken only
  /// now, or a disk of which half is known would be taken for one that nobody wants and that holds
  /// nothing.
  func adopted(_ disk: Disk) {
    disk.wasAttached = disk.device != nil
    disk.busy = false
    if !disk.joined.isEmpty || disk.held != nil { watchSharers() }
    // No look at xenstore marks one that its own vbd has left.
    if disk.due || disk.isOutlived, table[disk.id] === disk { mark(disk.id) }
  }

  /// Ends every worker of a disk. Whether one of them cannot be killed yet: then the disk waits
  /// for that, as one that is stopping until something else is said.
  private func linger(
    _ disk: Disk, _ record: DiskRecord, _ directory: DiskDirectory
  ) async throws(IOError) -> Bool {
    do throws(IOError) {
      try await end(record, directory)
      return false
    } catch {
      guard error.code == EBUSY else { throw error }
    }
    let processes = host.processes
    disk.lingering = try await offload.run { () throws(IOError) -> (any HostProcess)? in
      do throws(IOError) {
        return try processes.process(record.worker, startTime: record.workerStart)
      } catch {
        if error.code == ESRCH || error.code == ENOENT { return nil }
        throw error
      }
    }
    guard let failure = disk.lingers else { return false }
    log(for: disk).error("a former worker lives on", metadata: ["reason": "\(failure)"])
    disk.phase = .stopping(DiskPhase.Stuck(failure, retry: scheduler.now))
    return true
  }

  private func isAttached(
    _ disk: Disk, _ device: DeviceNode
  ) async throws(IOError) -> Bool {
    switch device.kind {
    case .nbd:
      let (attacher, identifier) = (attacher, disk.identifier)
      return try await offload.run { () throws(IOError) in
        try attacher.isAttached(device, identifier: identifier)
      }
    case .dm:
      let (mapper, id) = (mapper, disk.id)
      do throws(DeviceMapperError) {
        return try await mapping.run { () throws(DeviceMapperError) in
          try mapper.isAttached(id, device)
        }
      } catch { throw IOError(error.code, error.operation, error.subject) }
    }
  }

  static func spec(_ params: String) -> Spec? {
    do { return try Spec(params) } catch { return nil }
  }

  /// Connects to a worker that runs and asks the descriptors back. False when that fails.
  func takeOver(_ disk: Disk, _ record: DiskRecord) async -> Bool {
    let path = record.link ?? DiskDirectory(configuration, disk.id).link
    let log = log(for: disk)
    do {
      try await resolveSources(disk)
      let processes = host.processes
      let (process, user, link) = try await offload.run { () throws(IOError) in
        let process = try processes.process(record.worker, startTime: record.workerStart)
        return (process, try process.user(), try processes.link(at: path))
      }
      users.note(disk, user)
      disk.linkPath = record.link
      let worker = follow(disk, process, link)
      let patience = Duration.seconds(5)
      let answer = try await worker.channel.ask(.status, within: patience) { report in
        switch report {
        case .status, .failed: true
        case .refused(let order, _): order == "status"
        default: false
        }
      }
      guard case .status(let report) = answer.report else {
        throw WorkerSilence.closed("it is not serving")
      }
      let handed = try await descriptors(0, of: worker)
      guard case .descriptors(let count, _) = handed.report, let spec = disk.spec else {
        throw WorkerSilence.closed("it does not give the descriptors back")
      }
      try await takeImages(handed.descriptors, disk, spec)
      try await takePending(handed.descriptors, disk)
      guard count <= disk.allowed.count else {
        throw WorkerSilence.closed("it has files that it was never given")
      }
      try await takeFiles(count, worker, disk)
      disk.report = report
      guard report.byNode == disk.isHeldByKernel, report.attached || !report.byNode else {
        throw WorkerSilence.closed("it does not serve the device")
      }
      disk.hindrance = report.hindrance
      disk.socketLost = !report.attached
      disk.phase = .serving(DiskPhase.Trouble(report))
      log.info("took the worker over", metadata: ["worker": "\(record.worker)"])
      // It may have ended meanwhile.
      await checkWorker(disk)
      return true
    } catch {
      let reason = (error as? WorkerSilence)?.words ?? "\(error)"
      log.warning("cannot take the worker over", metadata: ["reason": "\(reason)"])
      disk.worker?.channel.close()
      let (device, allowed, identities) = (disk.device, disk.allowed, disk.identities)
      let (entry, sources) = (disk.entry, disk.sources)
      let isComplete = disk.isComplete
      let held = disk.held
      release(disk)
      disk.held = held
      (disk.isComplete, disk.sources) = (isComplete, sources)
      disk.device = device
      disk.allowed = allowed
      disk.identities = identities
      disk.entry = entry
      disk.former = FormerWorker(pid: record.worker, startTime: record.workerStart)
      return false
    }
  }

  /// Takes the store and the base back, and locks them for this daemon.
  private func takeImages(
    _ handed: LinkDescriptors, _ disk: Disk, _ spec: Spec
  ) async throws(IOError) {
    let (readOnly, isHeld, known) = (disk.readOnly, disk.isHeldByKernel, disk.identities)
    let (store, base) = try await offload.run { () throws(IOError) -> (OpenImage, OpenImage?) in
      let store = try WorkerDoor.image(
        .store, handed, of: known.store, path: spec.store, writable: !readOnly, isHeld: isHeld)
      guard let path = spec.base else { return (store, nil) }
      let base = try WorkerDoor.image(
        .base, handed, of: known.base, path: path, writable: false, isHeld: isHeld)
      return (store, base)
    }
    (disk.store, disk.base, disk.compared) = (store, base, store.file)
    (disk.identities.store, disk.identities.base) = (store.identity, base?.identity)
  }

  /// A worker that serves a node has no use for the file, but the next one is given it again. A
  /// disk that is read only has nothing in it.
  private func takePending(_ handed: LinkDescriptors, _ disk: Disk) async throws(IOError) {
    let (isHeld, known) = (disk.isHeldByKernel, disk.identities.log)
    guard !disk.readOnly, let store = disk.store else {
      disk.pending = try Reconciler.emptyLog()
      return
    }
    let entry = try PendingEntry(configuration.registry, of: store)
    let (pending, identity) = try await offload.run {
      () throws(IOError) -> (FileStore, FileIdentity) in
      var pending = try WorkerDoor.log(handed, entry, known)
      if pending == nil {
        guard isHeld else { throw IOError(EPERM, "take back", "the pending log") }
        pending = try entry.open()
      }
      guard let pending else { throw IOError(EPERM, "take back", "the pending log") }
      return (pending, try FileIdentity(pending.raw, name: pending.name))
    }
    (disk.pending, disk.entry, disk.identities.log) = (pending, entry, identity)
  }

  /// The log of a daemon that kept it in the disk's directory, of a worker that has ended.
  private func takeOldLog(
    _ disk: Disk, _ record: DiskRecord, _ directory: DiskDirectory
  ) async throws(IOError) {
    guard !disk.readOnly else { return }
    let registry = configuration.registry
    if let key = record.pending { disk.entry = PendingEntry(registry, key) }
    guard record.pending == nil, let store = disk.spec?.store else { return }
    disk.entry = try await offload.run { () throws(IOError) -> PendingEntry? in
      guard access(directory.pending, F_OK) == 0 else { return nil }
      let entry = PendingEntry(
        registry, try PendingRegistry.key(of: FileStore(path: store, writable: false)))
      try entry.takeOver(directory.pending)
      return entry
    }
  }

  /// Takes back so many files. A function of its own: within its caller, whose moved
  /// descriptors live across the loop, the compiler's pass for their debug information does
  /// not end (Swift 6.3).
  private func takeFiles(_ count: Int, _ worker: Worker, _ disk: Disk) async throws {
    for index in 0..<count {
      try await takeFile(try await descriptors(index + 1, of: worker), disk)
    }
  }

  /// Takes back a file that the disk was allowed.
  private func takeFile(_ handed: WorkerReply, _ disk: Disk) async throws {
    let strange = WorkerSilence.closed("it has a file that it was never given")
    guard case .descriptors(_, let need) = handed.report, let need,
      let index = disk.allowed.firstIndex(where: { $0.need == need })
    else { throw strange }
    var file = disk.allowed[index]
    let (descriptors, isHeld, known) = (handed.descriptors, disk.isHeldByKernel, file)
    let image = try await offload.run { () throws(IOError) in
      try WorkerDoor.image(
        .file, descriptors, of: known.identity, path: known.path, writable: need.writable,
        isHeld: isHeld)
    }
    file.identity = image.identity
    disk.allowed[index] = file
    disk.files[file] = image
  }

  private func descriptors(
    _ index: Int, of worker: Worker
  ) async throws(WorkerSilence) -> WorkerReply {
    try await worker.channel.ask(.descriptors(index: index), within: .seconds(5)) { report in
      switch report {
      case .descriptors, .failed: true
      case .refused(let order, _): order == "descriptors"
      default: false
      }
    }
  }

  /// Ends every worker of a disk that still runs: the one of the record, what it has left, and one
  /// that a daemon started and did not live to write down, which has no store yet.
  func end(_ record: DiskRecord?, _ directory: DiskDirectory) async throws(IOError) {
    if let record { try await end(record) }
    let remains = WorkerRemains(
      worker: record.map { FormerWorker(pid: $0.worker, startTime: $0.workerStart) },
      link: record?.link ?? directory.link, files: record?.writtenFiles ?? [],
      users: configuration.workerUsers,
      others: formerWorkers.subtracting([record?.worker ?? 0])
        .union(table.values.compactMap { $0.worker?.process.pid }), live: liveWorkers)
    let (processes, log) = (host.processes, log)
    try await offload.run { () throws(IOError) in
      try processes.end(remains, log)
      try processes.endListener(at: directory.link)
    }
  }

  private func end(_ record: DiskRecord) async throws(IOError) {
    let host = host
    try await offload.run { () throws(IOError) in
      let process: any HostProcess
      do throws(IOError) {
        process = try host.processes.process(record.worker, startTime: record.workerStart)
      } catch {
        if error.code == ESRCH || error.code == ENOENT { return }
        throw error
      }
      try process.send(SIGKILL)
      for _ in 0..<500 where !process.hasEnded { host.scheduler.block(for: .milliseconds(10)) }
      guard process.hasEnded else { throw IOError(EBUSY, "end", "process \(record.worker)") }
      // A child of ours when the earlier daemon lived in this very process.
      do throws(IOError) { _ = try process.reap() } catch {
        guard error.code == ECHILD else { throw error }
      }
    }
  }
}

extension OpenImage {
  /// Takes over an open descriptor.
  init(_ descriptor: consuming Descriptor, name: String) throws(IOError) {
    let identity = try FileIdentity(descriptor.raw, name: name)
    self.init(file: try FileStore(descriptor, name: name), identity: identity)
  }
}
