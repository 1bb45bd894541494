// SPDX-License-Identifier: Apache-2.0
// Workers: starting one, hearing its news, replacing it when it dies.

import BlockIO
import Glibc
internal import Logging
internal import SystemIO
internal import WorkerLink

extension Reconciler {
  /// Starts a worker with the disk's descriptors and waits until its image is open.
  /// `byNode`: it is to wait for its device's node, if it can.
  func launch(_ disk: Disk, create: Bool, byNode: Bool) async throws(DiskFailure) {
    guard let spec = disk.spec, let store = disk.store, let pending = disk.pending else { return }
    let options = try FormatOptions(spec)
    let worker = try await startProcess(disk)
    // Before the worker gets the store and its lock: should this daemon die now, the next
    // one knows whom to end.
    try await save(disk)
    var order = StartOrder(disk: "\(disk.id)", format: spec.format)
    order.create = create
    order.blockSize = options.blockSize
    order.storePath = spec.store
    order.basePath = spec.base
    order.baseFormat = options.baseFormat
    order.depth = configuration.chainDepth
    order.readOnly = disk.readOnly
    order.force = options.force
    order.byNode = byNode
    // The same open file, and so the same lock, as when the log was compared with it.
    order.isHeld = disk.compared === store.file
    order.failsWhenFull = configuration.onFull == .fail
    order.fullTimeout = UInt32(configuration.fullTimeout.components.seconds)
    order.quietTime = UInt32(configuration.quietTime.components.seconds)
    var asked: [AllowedFile] = []
    var lent: [LinkRole: Int32] = [.store: store.file.raw, .pending: pending.raw]
    lent[.base] = disk.base?.file.raw
    lent[.witness] = store.witness?.raw
    var next = WorkerOrder.start(order)
    while true {
      let reply: WorkerReply
      do {
        reply = try await worker.channel.ask(
          next, lending: lent, within: configuration.readyTimeout, Reconciler.answersStart)
      } catch { throw await silence(worker, error) }
      switch reply.report {
      case .ready(let report):
        disk.report = report
        disk.isComplete = true
        disk.compared = store.file
        disk.backings = try disk.backings(report.parts, asked: asked)
        return
      case .needFile(let need):
        next = .file
        do throws(DiskFailure) {
          let (file, image) = try await find(need, disk, spec, store)
          asked.append(file)
          lent = [.file: image.file.raw]
          lent[.witness] = image.witness?.raw
        } catch { try refuse(worker, error) }
      case .failed(let code, let message):
        throw DiskFailure(worker: code, message, disk)
      case .refused(let order, let message):
        throw .worker("the worker refused '\(order)': \(message): is cowd of this version?")
      default: throw .worker("the worker's answer makes no sense: is cowd of this version?")
      }
    }
  }

  private static let answersStart: WorkerChannel.Matcher = { report in
    switch report {
    case .ready, .needFile, .failed: true
    case .refused(let order, _): order == "start" || order == "file"
    default: false
    }
  }

  /// Tells the worker and the admin. The worker ends either way, told or not.
  private func refuse(_ worker: Worker, _ refusal: DiskFailure) throws(DiskFailure) {
    do { try worker.channel.send(.refuseFile(reason: refusal.sentence)) } catch { throw refusal }
    throw refusal
  }

  /// Opens a file that an image names, if that is allowed or was so when the disk started.
  private func find(
    _ need: FileNeed, _ disk: Disk, _ spec: Spec, _ store: OpenImage
  ) async throws(DiskFailure) -> (AllowedFile, OpenImage) {
    let policy = NamingPolicy(configuration, file: configurationPath)
    let before = disk.allowed.first { $0.need == need }
    if let before, let image = disk.files[before] { return (before, image) }
    let (isHeld, registry) = (disk.isHeldByKernel, configuration.registry)
    let others = Array(table.values) + recovering.values
    let own = disk.entry?.key
    if before == nil {
      try policy.check(need, after: disk.allowed, isComplete: disk.isComplete, of: spec)
    }
    let (file, image) = try await offload.run {
      () throws(DiskFailure) -> (AllowedFile, OpenImage) in
      var file = try policy.resolve(need, of: spec, unless: before)
      let image = try Images.open(file, of: store, isHeld: isHeld)
      file.identity = image.identity
      if before == nil { try registry.refuse(image, own: own) }
      return (file, image)
    }
    let isClash = others.contains { other in
      guard other !== disk else { return false }
      if other.ownStore == image.identity { return need.writable || !other.readOnly }
      return need.writable && other.uses(image.identity)
    }
    guard !isClash else { throw .fileInUse(need.role, file.path) }
    if let before, let index = disk.allowed.firstIndex(of: before) {
      disk.allowed[index] = file
    } else {
      disk.allowed.append(file)
    }
    disk.files[file] = image
    return (file, image)
  }

  private func startProcess(_ disk: Disk) async throws(DiskFailure) -> Worker {
    let directory = disk.directory(configuration)
    let (remains, log) = (remains(of: disk), log(for: disk))
    disk.linkPath = nil
    disk.verdict = nil
    let (host, configuration, id) = (host, configuration, disk.id)
    let live = liveWorkers
    let user = try users.take(disk, configuration.workerUsers)
    let (process, link) = try await offload.run { () throws(DiskFailure) in
      do throws(IOError) {
        try host.processes.end(remains, log)
        try DescriptorReserve.check()
        // It is there, unless somebody has wiped the run directory.
        try directory.make()
        try directory.removeLink()
        let listener = try UnixSocket.listen(at: directory.link, kind: .packets)
        let process = try live.start { () throws(IOError) in
          try host.launcher.launch(
            disk: id, listener: listener.raw, user: user, configuration: configuration)
        }
        do throws(IOError) {
          return (process, try host.processes.link(at: directory.link))
        } catch {
          try process.send(SIGKILL)
          // Collected, or it would stay as a zombie.
          live.remove(process.pid)
          _ = try process.wait(milliseconds: 5000)
          throw error
        }
      } catch { throw DiskFailure.start(error) }
    }
    let worker = follow(disk, process, link)
    log.debug("worker started", metadata: ["worker": "\(process.pid)"])
    return worker
  }

  /// Takes a process as the disk's worker.
  func follow(_ disk: Disk, _ process: any HostProcess, _ link: LinkConnection) -> Worker {
    disk.generation = nextGeneration()
    let (id, generation) = (disk.id, disk.generation)
    let channel = WorkerChannel(link, host: host)
    let live = liveWorkers
    live.insert(process.pid)
    let worker = Worker(
      process: process, channel: channel, host: host, live: live
    ) { [weak self, scheduler] how in
      channel.closeAfterLastWords()
      scheduler.start { [weak self] in await self?.ended(id, generation, how) }
    }
    disk.worker = worker
    disk.former = FormerWorker(pid: process.pid, startTime: process.startTime)
    scheduler.start { [weak self] in
      for await news in channel.news { await self?.hear(id, generation, news) }
    }
    watchHearts()
    return worker
  }

  /// What a worker of a disk may have left when it has ended.
  func remains(of disk: Disk) -> WorkerRemains {
    let workers = (Array(table.values) + recovering.values).compactMap(\.worker)
    return WorkerRemains(
      worker: disk.former, link: disk.linkPath ?? disk.directory(configuration).link,
      files: disk.writtenFiles, users: configuration.workerUsers,
      others: Set(workers.filter { $0.ended == nil }.map(\.process.pid)), live: liveWorkers)
  }

  /// What it means that a worker did not answer.
  func silence(_ worker: Worker, _ why: WorkerSilence) async -> DiskFailure {
    switch why {
    case .overdue:
      return .timeout(
        "the worker was not ready", configuration.readyTimeout,
        remedy: "look at its log, or raise worker.ready-timeout")
    case .closed(let reason):
      // The link ends a moment before the process does.
      _ = await worker.waitForEnd(.seconds(1))
      let how = worker.ended.map { "it ended with \($0)" } ?? reason
      return .worker("the worker was lost while it started (\(how)): look at its log")
    }
  }

  // MARK: - News

  private func current(_ id: DiskID, _ generation: Int) -> Disk? {
    guard !ending, let disk = table[id], disk.generation == generation else { return nil }
    return disk
  }

  /// A worker has ended.
  func ended(_ id: DiskID, _ generation: Int, _ how: String) {
    guard let disk = current(id, generation), case .serving = disk.phase else { return }
    died(disk, disk.verdict ?? "it ended with \(how)")
  }

  /// A worker says something unasked.
  func hear(_ id: DiskID, _ generation: Int, _ news: WorkerNews) async {
    guard let disk = current(id, generation) else { return }
    switch news {
    case .event(let state, let error):
      guard case .serving = disk.phase else { return }
      disk.report?.state = state
      disk.report?.error = error
      enter(disk, .serving(DiskPhase.Trouble(state, error)))
      await publish(disk)
    case .detached:
      // Also while a start is not yet through: it is seen to when it is.
      if case .stopping = disk.phase { return }
      disk.socketLost = true
      mark(id)
    case .complaint(let text):
      log(for: disk).warning("the worker complains", metadata: ["complaint": "\(text)"])
    case .closed(let reason):
      guard case .serving = disk.phase, let worker = disk.worker, worker.ended == nil,
        await !worker.waitForEnd(.seconds(1)), current(id, generation) != nil
      else { return }
      // A worker that cannot be spoken to is replaced: that is always safe.
      await replace(worker, of: disk, reason)
    }
  }

  /// What happened to a worker before its disk was serving was not acted upon.
  func checkWorker(_ disk: Disk) async {
    guard let worker = disk.worker else { return }
    if worker.ended != nil { return died(disk, disk.verdict ?? "it ended at once") }
    if let reason = worker.channel.closed { await replace(worker, of: disk, reason) }
  }

  /// Kills a worker that serves; its end has it replaced. False when it has not ended yet.
  @discardableResult
  func replace(_ worker: Worker, of disk: Disk, _ reason: String) async -> Bool {
    disk.verdict = reason
    log(for: disk).error("the worker is ended and replaced", metadata: ["reason": "\(reason)"])
    do throws(IOError) { return try await worker.kill() } catch {
      log(for: disk).error("cannot kill the worker", metadata: ["error": "\(error)"])
      return false
    }
  }

  // MARK: - Heartbeat

  /// Sees to it that every worker is asked from now on.
  private func watchHearts() {
    guard !isWatchingHearts else { return }
    isWatchingHearts = true
    scheduler.start { [weak self, scheduler] in
      while let pause = await self?.beat() {
        do { try await scheduler.sleep(for: pause) } catch { return }
      }
    }
  }

  /// Asks every worker that serves or that a device needs in order to go, and replaces those that
  /// have not answered three times.
  /// Answers when to ask again; nil: never.
  private func beat() -> Duration? {
    guard !ending else { return nil }
    let pause = configuration.heartbeat
    // A reload may change it.
    guard pause != .zero else { return .seconds(10) }
    for disk in table.values {
      guard disk.phase.needsWorker, !disk.busy, let worker = disk.worker, worker.ended == nil,
        worker.channel.ping() >= 3
      else { continue }
      let id = disk.id
      scheduler.start { await self.replaceSilent(id, worker, pause * 3) }
    }
    return pause
  }

  /// Replaces a worker that does not answer.
  private func replaceSilent(_ id: DiskID, _ worker: Worker, _ silence: Duration) async {
    guard let disk = table[id], disk.worker === worker, !disk.isBeingReplaced else { return }
    disk.isBeingReplaced = true
    defer { disk.isBeingReplaced = false }
    let generation = disk.generation
    let why = "it has not answered for \(silence.components.seconds) seconds"
    let isKilled = await replace(worker, of: disk, why)
    guard !isKilled, let disk = current(id, generation) else { return }
    // It waits in the kernel, and has the store until that answers.
    disk.lingering = worker.process
    // One that is on its way out tells of it and waits.
    if case .serving = disk.phase { died(disk, why) }
  }

  // MARK: - Replacing

  /// The worker is gone: another one, later and later, or no more.
  func died(_ disk: Disk, _ why: String, hasFailed: Bool = false) {
    disk.worker?.channel.close()
    disk.worker = nil
    disk.generation = nextGeneration()
    disk.socketLost = false
    let now = scheduler.now
    if let delay = disk.backOff.next(at: now) {
      log(for: disk).error(
        "the worker died and is replaced", metadata: ["reason": "\(why)", "in": "\(delay)"])
      enter(disk, .restarting(at: now + delay, why: why, hasFailed: hasFailed))
    } else {
      let failure = DiskFailure.worker(
        "the worker died \(disk.backOff.limit + 1) times within"
          + " \(disk.backOff.window.components.seconds) seconds, at last because \(why):"
          + " see to it, then run 'dmu-xen reload'")
      enter(disk, .failed(failure, attached: true))
    }
    mark(disk.id)
  }

  /// Starts a new worker for a device that is there.
  func restart(_ disk: Disk) async {
    if let failure = disk.lingers {
      return enter(disk, .restarting(at: scheduler.now + .seconds(2), why: failure.sentence))
    }
    if let held = disk.held, disk.device?.kind == .nbd {
      return enter(
        disk,
        .restarting(at: scheduler.now + .seconds(1), why: held.sentence, hasFailed: true))
    }
    do throws(DiskFailure) {
      try await reopen(disk)
      let byNode = disk.device?.kind == .dm
      try await launch(disk, create: false, byNode: byNode)
      if byNode { try await handNodeAgain(disk) } else { try await replaceSocketOnce(disk) }
      try await save(disk)
      disk.restarts += 1
      enter(disk, .serving(DiskPhase.Trouble(disk.report)))
      await checkWorker(disk)
    } catch {
      if let worker = disk.worker, let stuck = await killWorker(disk, worker) {
        // It has the store until that answers.
        disk.lingering = worker.process
        log(for: disk).error("a worker lives on", metadata: ["reason": "\(stuck)"])
      }
      died(disk, error.sentence, hasFailed: true)
    }
  }

  /// Opens what an earlier daemon and its worker took with them; the files that the images
  /// name follow when the next worker asks for them.
  func reopen(_ disk: Disk) async throws(DiskFailure) {
    try await resolveSources(disk)
    guard let spec = disk.spec, disk.store == nil || disk.pending == nil else { return }
    let (readOnly, isHeld) = (disk.readOnly, disk.isHeldByKernel)
    if disk.store == nil {
      let outcome = try await offload.run { () throws(DiskFailure) in
        try Images.open(spec, readOnly: readOnly, isHeld: isHeld)
      }
      switch outcome {
      case .opened(let store, let base, _):
        try disk.identities.check(store, base, spec)
        (disk.store, disk.base) = (store, base)
        // Not known of an earlier daemon's disk.
        (disk.identities.store, disk.identities.base) = (store.identity, base?.identity)
      case .missing: throw .storeNotMade(spec, "its disk was in use")
      case .locked(let role, let identity):
        let processes = host.processes
        let programs = await offload.run { processes.programs(using: identity) }
        throw .inUseElsewhere(role, role == .store ? spec.store : spec.base ?? "", programs)
      }
    }
    let was = disk.entry
    try await prepareLog(disk)
    guard was == nil || was == disk.entry else {
      // Another file has the store's name by now.
      (disk.store, disk.pending, disk.entry) = (nil, nil, was)
      throw .pendingOfAnother(spec.store, "its disk was served from that")
    }
  }

  /// Makes a new socket between the kernel and the worker.
  func replaceSocketOnce(_ disk: Disk) async throws(DiskFailure) {
    guard let worker = disk.worker, let device = disk.device else { return }
    let (channel, attacher, identifier) = (worker.channel, attacher, disk.identifier)
    disk.socketLost = false
    try await offload.run { () throws(DiskFailure) in
      let ends = try Reconciler.socketPair()
      try Reconciler.hand(ends.first.raw, to: channel)
      do throws(IOError) {
        try attacher.reattach(device, socket: ends.second.raw, identifier: identifier)
      } catch { throw DiskFailure.device(error) }
    }
  }

  /// The same for a worker that lives. The kernel may drop the new socket without a word
  /// when it has not noticed the old one's death; the worker then reports it lost again, and
  /// after a pause the next one is tried.
  func replaceSocket(_ disk: Disk) async {
    let waits = BackOff.delays
    disk.socketRetries = min(disk.socketRetries + 1, waits.count - 1)
    do throws(DiskFailure) {
      do { try await scheduler.sleep(for: waits[disk.socketRetries - 1]) } catch { return }
      try await replaceSocketOnce(disk)
      log(for: disk).notice("the device got a new socket")
      let retries = disk.socketRetries
      let id = disk.id
      scheduler.after(.seconds(5)) { [weak self] in await self?.socketHeld(id, retries) }
    } catch {
      disk.socketLost = true
      log(for: disk).error("cannot replace the socket", metadata: ["error": "\(error)"])
      wake(disk, after: .seconds(1))
    }
  }

  private func socketHeld(_ id: DiskID, _ retries: Int) {
    guard let disk = table[id], disk.socketRetries == retries else { return }
    disk.socketRetries = 0
  }
}

extension DiskPhase.Trouble {
  /// What a worker reports; nil when all is well.
  init?(_ state: DiskState, _ error: String) {
    switch state {
    case .ready: return nil
    case .degraded: self.init(state: .degraded, error: ForeignText.shown(error, limit: 1000))
    case .noSpace: self.init(state: .noSpace, error: ForeignText.shown(error, limit: 1000))
    }
  }

  /// The same from a report.
  init?(_ report: DiskReport?) {
    guard let report else { return nil }
    self.init(report.state, report.error)
  }
}

extension DiskFailure {
  /// What a worker failed with, as a sentence for the admin.
  init(worker fault: WorkerFault, _ message: String, _ disk: Disk) {
    let store = disk.spec?.store ?? ""
    switch fault {
    case .baseChanged:
      self = .baseChanged(message, disk.spec.flatMap { KnownFormat.named($0.format) })
    case .baseMissing: self = .baseUnnamed(store: store)
    case .unknownFormat: self = .formatUnknown(disk.spec?.format ?? "")
    case .pendingStale: self = .pendingStale(store)
    case .pendingDamaged: self = .pendingDamaged(store, message)
    default:
      let named = ["store \(store): ", "\(store): "].first { message.hasPrefix($0) } ?? ""
      self.init(.image, "store \(store) cannot be used: \(message.dropFirst(named.count))")
    }
  }

  /// A worker that could not be started.
  static func start(_ error: IOError) -> DiskFailure {
    DiskFailure(
      .worker,
      "the worker cannot be started: \(error.description): install cowd beside dmu-xend,"
        + " or set worker.program")
  }
}
