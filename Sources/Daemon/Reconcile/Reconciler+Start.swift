// The way of a disk from nothing to being served, and back to nothing when a step fails.

internal import Logging
internal import Posix
internal import WorkerLink

/// Why a start does not go on.
private enum StartStop: Error {
  case failed(DiskFailure)
  /// The store's holder is on its way out.
  case heldBack(DiskID)
}

extension Reconciler {
  /// Opens, locks, starts a worker, attaches. Ends in `serving`, `waiting` or `failed`.
  func start(_ disk: Disk, _ wanted: WantedDisk) async {
    enter(disk, .starting)
    await publish(disk)
    disk.params = wanted.params
    disk.readOnly = wanted.readOnly
    do throws(StartStop) {
      let spec = try reading(wanted.params)
      disk.spec = spec
      try await open(disk, spec)
      do throws(DiskFailure) {
        let transport = try FormatOptions(spec).transport ?? configuration.transport
        let byNode = try await wantsNode(transport)
        try await prepareDirectory(disk)
        try await launch(disk, create: disk.needsFormat, byNode: byNode)
        if byNode, disk.report?.byNode == true {
          try await attachMapped(disk)
        } else {
          if byNode { try fallBack(disk, transport) }
          try await attach(disk)
        }
        try await save(disk)
      } catch { throw .failed(error) }
      disk.madeStore = false
      disk.needsFormat = false
      enter(disk, .serving(DiskPhase.Trouble(disk.report)))
      // The worker may have ended while its device was being attached.
      if let worker = disk.worker, worker.ended != nil { died(disk, "it ended at once") }
    } catch {
      await undo(disk)
      switch error {
      case .heldBack(let holder): enter(disk, .waiting(holder: holder))
      case .failed(let failure): enter(disk, .failed(failure, attached: false))
      }
    }
  }

  private func reading(_ params: String) throws(StartStop) -> Spec {
    let spec: Spec
    do { spec = try Spec(params) } catch { throw .failed(.malformed(error)) }
    do { _ = try FormatOptions(spec) } catch { throw .failed(error) }
    return spec
  }

  private func open(_ disk: Disk, _ spec: Spec) async throws(StartStop) {
    let readOnly = disk.readOnly
    // A lock of nobody we know may be the last breath of a process that is just ending.
    for attempt in 0... {
      let outcome: OpenOutcome
      do throws(DiskFailure) {
        outcome = try await offload.run { () throws(DiskFailure) in
          try Images.open(spec, readOnly: readOnly)
        }
      } catch { throw .failed(error) }
      switch outcome {
      case .opened(let store, let base, let state):
        disk.store = store
        disk.base = base
        disk.madeStore = state == .made
        disk.needsFormat = state != .used
        return
      case .locked(let role, let identity):
        if let failure = try refusal(disk, spec, role, identity, last: attempt >= 10) {
          throw .failed(failure)
        }
        do { try await Task.sleep(for: .milliseconds(100)) } catch { throw .failed(.gone) }
      }
    }
  }

  /// Why a locked image cannot be had; nil: try again.
  private func refusal(
    _ disk: Disk, _ spec: Spec, _ role: SpecError.Role, _ identity: FileIdentity, last: Bool
  ) throws(StartStop) -> DiskFailure? {
    let path = role == .store ? spec.store : spec.base ?? ""
    let others = table.values.filter { $0 !== disk }
    if let holder = others.first(where: { $0.store?.identity == identity }) {
      if holder.isLeaving { throw .heldBack(holder.id) }
      return role == .base ? .sameStoreTwice(path) : .inUse(path, by: holder.id, vdev: holder.vdev)
    }
    if let holder = others.first(where: { $0.uses(identity) }) {
      return .storeIsBase(path, of: holder.id, vdev: holder.vdev)
    }
    return last ? .inUseElsewhere(role, path) : nil
  }

  private func prepareDirectory(_ disk: Disk) async throws(DiskFailure) {
    let directory = DiskDirectory(configuration, disk.id)
    disk.pending = try await offload.run { () throws(DiskFailure) in
      do throws(IOError) {
        try directory.make()
        return try directory.openPending(new: true)
      } catch { throw DiskFailure(error) }
    }
  }

  /// The image is none that the kernel can serve.
  private func fallBack(_ disk: Disk, _ transport: Transport) throws(DiskFailure) {
    let why = disk.report?.hindrance ?? "does not say why"
    guard transport != .dm else { throw .notMappable(disk.spec?.store ?? "", why) }
    disk.hindrance = why
    log(for: disk).notice("serving by nbd", metadata: ["reason": "\(why)"])
  }

  /// Makes the device and gives its two ends to the worker and to the kernel.
  private func attach(_ disk: Disk) async throws(DiskFailure) {
    guard let worker = disk.worker, let report = disk.report else { return }
    let wish = DeviceWish(
      size: report.size, flags: report.flags, requestTimeout: configuration.requestTimeout,
      deadConnectionTimeout: configuration.deadConnectionTimeout, identifier: disk.identifier)
    let (channel, attacher) = (worker.channel, attacher)
    disk.device = try await offload.run { () throws(DiskFailure) in
      let ends = try Reconciler.socketPair()
      try Reconciler.hand(ends.first.raw, to: channel)
      do throws(IOError) { return try attacher.attach(wish, socket: ends.second.raw) } catch {
        throw DiskFailure.device(error)
      }
    }
  }

  static func socketPair() throws(DiskFailure) -> SocketPair {
    do { return try UnixSocket.pair(.stream) } catch { throw DiskFailure(error) }
  }

  static func hand(_ socket: Int32, to channel: WorkerChannel) throws(DiskFailure) {
    do { try channel.send(.attach, lending: [.nbd: socket]) } catch {
      throw .worker("the worker cannot be given a socket: \(error.words)")
    }
  }

  /// Writes the state file.
  func save(_ disk: Disk) async throws(DiskFailure) {
    disk.since = Reconciler.unixTime
    guard let record = disk.record else { return }
    let directory = DiskDirectory(configuration, disk.id)
    try await offload.run { () throws(DiskFailure) in
      do throws(IOError) { try directory.save(record) } catch { throw DiskFailure(error) }
    }
  }

  /// Lets go of everything that a failed start has taken.
  private func undo(_ disk: Disk) async {
    let log = log(for: disk)
    if let worker = disk.worker {
      worker.channel.close()
      do throws(IOError) {
        if try await !worker.kill() { log.error("the worker cannot be killed") }
      } catch { log.error("cannot kill the worker", metadata: ["error": "\(error)"]) }
    }
    _ = await detach(disk)
    let directory = DiskDirectory(configuration, disk.id)
    let unfinished = disk.madeStore ? disk.spec?.store : nil
    do throws(IOError) {
      try await offload.run { () throws(IOError) in
        try directory.remove()
        if let unfinished { try Images.remove(unfinished) }
      }
    } catch { log.error("cannot clean up", metadata: ["error": "\(error)"]) }
    release(disk)
  }

  /// Drops the descriptors; the locks go with the last of them.
  func release(_ disk: Disk) {
    disk.worker = nil
    disk.generation += 1
    disk.report = nil
    disk.store = nil
    disk.base = nil
    disk.allowed = []
    disk.files = [:]
    disk.backings = []
    disk.hindrance = nil
    disk.pending = nil
    disk.madeStore = false
    disk.needsFormat = false
    disk.socketLost = false
    wakeThoseWaiting(for: disk.id)
  }
}
