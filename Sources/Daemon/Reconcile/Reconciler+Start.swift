// SPDX-License-Identifier: Apache-2.0
// The way of a disk from nothing to being served, and back to nothing when a step fails.

import BlockIO
import Glibc
internal import Logging
internal import SystemIO
internal import WorkerLink
internal import XenStore

/// Why a start does not go on.
enum StartStop: Error {
  case failed(DiskFailure)
  /// The store's holder is on its way out.
  case heldBack(DiskID)
  /// There is no store, and the block script has not said whether one may be made.
  case asking
  /// It was taken away while it waited.
  case unwanted
  /// It uses the disk of another vbd.
  case joined(DiskID)
}

extension Reconciler {
  /// Opens, locks, starts a worker, attaches. Ends in `serving`, `joined`, `waiting`, `asking` or
  /// `failed`, or in `stopping` when something of it cannot be taken back yet.
  func start(_ disk: Disk, _ wanted: WantedDisk) async {
    enter(disk, .starting)
    await publish(disk)
    disk.params = wanted.params
    disk.readOnly = wanted.readOnly
    await learnName(of: disk)
    forgetFailures(like: disk)
    do throws(StartStop) {
      var spec = try reading(wanted.params)
      disk.spec = spec
      if !spec.sources.isEmpty {
        do throws(DiskFailure) { spec = try await attachSources(disk, spec) } catch {
          throw .failed(error)
        }
        disk.spec = spec
        guard await isStillWanted(disk) else { throw .unwanted }
      }
      try await open(disk, spec)
      do throws(DiskFailure) { try await serve(disk, spec) } catch { throw .failed(error) }
      disk.newStore = nil
      disk.activity = nil
      enter(disk, .serving(DiskPhase.Trouble(disk.report)))
      // The worker may have ended while its device was being attached.
      await checkWorker(disk)
    } catch {
      var failure: DiskFailure?
      if case .failed(let why) = error { failure = why }
      disk.activity = nil
      // It has opened nothing, and what hooks have attached is its host's.
      if case .joined(let host) = error {
        disk.sources = []
        enter(disk, .joined(host))
        return watchSharers()
      }
      if let stuck = await undo(disk, failure) {
        if let failure { refuseWaiters(disk, failure) }
        return keepStopping(disk, stuck)
      }
      switch error {
      case .heldBack(let holder): enter(disk, .waiting(holder: holder))
      case .asking:
        // The script may have come while everything was being let go of.
        enter(disk, disk.boots == nil ? .asking(store: disk.spec?.store ?? "") : .idle)
      case .unwanted, .joined: enter(disk, .idle)
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

  /// From an open store to a device.
  private func serve(_ disk: Disk, _ spec: Spec) async throws(DiskFailure) {
    let transport = try FormatOptions(spec).transport ?? configuration.transport
    let byNode = try await wantsNode(transport)
    try await prepareLog(disk)
    if byNode, disk.tookOver {
      // The kernel has no use for a log: what it holds is committed first.
      disk.activity = "committing what the store's pending log holds"
      if let failure = await commitLog(disk) { throw failure }
      try await prepareLog(disk)
    }
    disk.activity = "the worker opens the image"
    try await launch(disk, create: disk.newStore != nil, byNode: byNode)
    try await publishStore(disk)
    disk.activity = "making the device"
    try await prepareLink(disk)
    if byNode, disk.report?.byNode == true {
      try await attachMapped(disk)
    } else {
      if byNode { try fallBack(disk, transport) }
      try await attach(disk)
    }
    // The link comes last: who finds a disk by it finds a disk that the next daemon knows.
    try await save(disk)
    try await describeLog(disk)
    try await makeLink(disk)
  }

  private func open(_ disk: Disk, _ spec: Spec) async throws(StartStop) {
    let (readOnly, registry) = (disk.readOnly, configuration.registry)
    var create = false
    var attempt = 0
    disk.activity = "opening the store and its base"
    // A lock of nobody we know may be the last breath of a process that is just ending.
    while true {
      let outcome: OpenOutcome
      do throws(DiskFailure) {
        outcome = try await offload.run { [create] () throws(DiskFailure) in
          let outcome = try Images.open(spec, readOnly: readOnly, create: create)
          if case .opened(_, let base?, _) = outcome { try registry.refuse(base) }
          return outcome
        }
      } catch { throw .failed(error) }
      switch outcome {
      case .opened(let store, let base, let new):
        if readOnly, try await recoverFirst(store) { continue }
        // What the table says of a store counts, whatever became of its locks.
        if let clash = clash(disk, store, base) {
          if let failure = try await refusal(disk, spec, clash.0, clash.1, last: true) {
            throw .failed(failure)
          }
          continue
        }
        disk.store = store
        disk.base = base
        disk.identities = DiskIdentities(store: store.identity, base: base?.identity)
        disk.newStore = new
        return
      case .missing:
        try await mayCreate(disk, spec)
        create = true
      case .locked(let role, let identity):
        guard !recovering.values.contains(where: { $0.ownStore == identity }) else {
          disk.activity = "the store's pending log is being committed"
          await pause(.milliseconds(100))
          guard await isStillWanted(disk) else { throw .unwanted }
          continue
        }
        attempt += 1
        if let failure = try await refusal(disk, spec, role, identity, last: attempt > 10) {
          throw .failed(failure)
        }
        disk.activity = "waiting for another program to let go of the \(role.rawValue)"
        do { try await scheduler.sleep(for: .milliseconds(100)) } catch { throw .failed(.gone) }
        guard await isStillWanted(disk) else { throw .unwanted }
      }
    }
  }

  /// Whether a disk of the table has one of these files in a way that does not go with this.
  private func clash(
    _ disk: Disk, _ store: OpenImage, _ base: OpenImage?
  ) -> (SpecError.Role, FileIdentity)? {
    let others = Array(table.values) + recovering.values
    for other in others where other !== disk {
      let isShared = disk.readOnly && other.readOnly
      if other.ownStore == store.identity, !isShared { return (.store, store.identity) }
      if !disk.readOnly, other.uses(store.identity) { return (.store, store.identity) }
      if let base, !other.readOnly, other.ownStore == base.identity {
        return (.base, base.identity)
      }
    }
    return nil
  }

  /// Whether a store may be made; throws when not.
  private func mayCreate(_ disk: Disk, _ spec: Spec) async throws(StartStop) {
    guard spec.base != nil else { throw .failed(.storeMissing(spec.store)) }
    guard KnownFormat.named(spec.format)?.blockSizes != nil else {
      throw .failed(.storeUnmade(spec.store, spec.format))
    }
    guard !disk.readOnly else {
      throw .failed(.storeNotMade(spec, "none is made for a disk that is read only"))
    }
    let wish: Bool?
    do { wish = try FormatOptions(spec).create } catch { throw .failed(error) }
    guard disk.id.vbd != nil else { return try await mayCreate(disk, spec, named: wish) }
    let directories = configuration.createIn
    let (isThere, isPlace) = await offload.run {
      (Images.hasFolder(spec.store), Images.isBelow(spec.store, directories))
    }
    guard isThere else { throw .failed(.storeDirectoryMissing(spec.store)) }
    guard wish ?? isPlace else {
      throw .failed(
        .storeNotMade(
          spec,
          wish == false
            ? "its spec forbids to create one"
            : "it is created only below store.create-in of \(configurationPath) or with"
              + " '?create=yes' in its spec"))
    }
    guard let boots = disk.boots else { throw .asking }
    guard boots else {
      throw .failed(
        .storeNotMade(
          spec,
          "it is created only for a domain that xl boots, which is not known of this one (it may be"
            + " restored or migrated)"))
    }
  }

  /// The same for a named disk, for which the admin says whether a store may be made; it may lie
  /// anywhere. `wish`: what the spec says.
  private func mayCreate(_ disk: Disk, _ spec: Spec, named wish: Bool?) async throws(StartStop) {
    guard await offload.run({ Images.hasFolder(spec.store) }) else {
      throw .failed(.storeDirectoryMissing(spec.store))
    }
    guard disk.boots == true, wish != false else {
      throw .failed(
        .storeNotMade(
          spec,
          wish == false
            ? "its spec forbids to create one"
            : "for a named disk it is created only with 'dmu-xen attach --create'"))
    }
  }

  /// Commits what a log holds before a disk only reads the store. Whether it did so, and the
  /// store has to be opened anew.
  private func recoverFirst(_ store: OpenImage) async throws(StartStop) -> Bool {
    let registry = configuration.registry
    do throws(DiskFailure) {
      let found = try await offload.run { () throws(DiskFailure) -> PendingEntry? in
        do throws(IOError) {
          let entry = try PendingEntry(registry, of: store)
          return try entry.summary().isNeeded ? entry : nil
        } catch { throw DiskFailure(error) }
      }
      guard let found else { return false }
      guard !claimedLogs.contains(found.key) else {
        // Somebody sees to it, or tries to, for which this has the store locked.
        try await offload.run { () throws(DiskFailure) in
          do throws(IOError) { try store.unlock() } catch { throw DiskFailure(error) }
        }
        await pause(.milliseconds(100))
        return true
      }
      // Its lock would be in the way; the caller's goes with this very function's argument.
      try await offload.run { () throws(DiskFailure) in
        do throws(IOError) { try store.unlock() } catch { throw DiskFailure(error) }
      }
      _ = try await recover(found)
      return true
    } catch { throw .failed(error) }
  }

  /// Whether xenstore still wants a disk whose start has waited: a store that becomes free is for
  /// somebody else if not.
  func isStillWanted(_ disk: Disk) async -> Bool {
    do throws(XenStoreError) {
      if let sight = try await look(disk.id) { disk.sight = sight }
    } catch {
      log(for: disk).warning("cannot look at the disk", metadata: ["error": "\(error)"])
    }
    return disk.wanted != nil
  }

  /// Why a locked image cannot be had; nil: try again.
  private func refusal(
    _ disk: Disk, _ spec: Spec, _ role: SpecError.Role, _ identity: FileIdentity, last: Bool
  ) async throws(StartStop) -> DiskFailure? {
    let path = role == .store ? spec.store : spec.base ?? ""
    let holders = table.values.filter { $0 !== disk && $0.ownStore == identity }
    for holder in holders {
      await lookAgain(holder)
      guard table[holder.id] === holder, holder.ownStore == identity else { return nil }
      guard holder.isLeaving else { continue }
      hurry(holder)
      throw .heldBack(holder.id)
    }
    if role == .store, let holder = holders.first, holders.count == 1 {
      switch await join(disk, holder) {
      case .joined: throw .joined(holder.id)
      case .refused(let failure): return failure
      case .again: return nil
      case .unwanted: throw .unwanted
      case .stranger: break
      }
    }
    if !holders.isEmpty {
      let names = holders.flatMap(\.holders).sorted { $0.id < $1.id }
      return role == .base ? .sameStoreTwice(path, names) : .inUse(path, by: names)
    }
    let users = table.values.filter { $0 !== disk && $0.uses(identity) }
    if !users.isEmpty {
      return .storeIsBase(path, of: users.flatMap(\.holders).sorted { $0.id < $1.id })
    }
    guard last else { return nil }
    let processes = host.processes
    let programs = await offload.run { processes.programs(using: identity) }
    return .inUseElsewhere(role, path, programs)
  }

  /// What the table says of a holder may be old: xenstore is asked before somebody is refused.
  private func lookAgain(_ holder: Disk) async {
    guard !holder.isLeaving else { return }
    do throws(XenStoreError) {
      guard let sight = try await look(holder.id) else { return }
      holder.sight = sight
      if holder.isAbandoned(sight, now: scheduler.unixTime) {
        log(for: holder).warning(
          "the disk of this domain itself was never connected and lets go of its store")
        holder.released = true
      }
      for user in holder.joined {
        if let sight = try await look(user.id) { user.sight = sight }
        if user.ownWanted == nil { mark(user.id) }
      }
      if holder.isLeaving { mark(holder.id) }
    } catch {
      log(for: holder).warning("cannot look at the disk", metadata: ["error": "\(error)"])
    }
  }

  /// Gives a new store its name: its worker has made it an image.
  private func publishStore(_ disk: Disk) async throws(DiskFailure) {
    guard let new = disk.newStore else { return }
    try await offload.run { () throws(DiskFailure) in
      do throws(IOError) { try new.publish() } catch {
        if error.code == EEXIST {
          throw DiskFailure(.io, "store \(new.path) was made by another: attach the disk again")
        }
        throw DiskFailure(error)
      }
    }
    log(for: disk).notice("made the store", metadata: ["store": "\(new.path)"])
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

  /// Writes the state file, after whoever is writing it.
  func save(_ disk: Disk) async throws(DiskFailure) {
    while disk.isSaving { await pause(.milliseconds(5)) }
    disk.isSaving = true
    defer { disk.isSaving = false }
    guard let record = disk.record else { return }
    let directory = disk.directory(configuration)
    try await offload.run { () throws(DiskFailure) in
      do throws(IOError) { try directory.save(record) } catch { throw DiskFailure(error) }
    }
  }

  /// Lets go of everything that a failed start has taken. What cannot be let go of yet, if
  /// anything: then it is still held.
  private func undo(_ disk: Disk, _ failure: DiskFailure?) async -> DiskFailure? {
    if let worker = disk.worker {
      worker.channel.close()
      if let stuck = await killWorker(disk, worker) { return stuck }
    }
    // Nobody was told of the device, so that nobody has written to it.
    disk.discards = true
    if let stuck = await detach(disk) { return stuck }
    disk.device = nil
    if let stuck = await removeLink(disk) { return stuck }
    // A log that holds something outlives the attempt, whoever has written it.
    await keepLog(disk, why: failure?.sentence ?? "the disk waits for its store")
    disk.entry = nil
    if let stuck = await closeFiles(disk) { return stuck }
    if let stuck = await cleanUp(disk) { return stuck }
    release(disk)
    return nil
  }

  /// Removes the disk's directory, and a store that was made for it and never served. Why that is
  /// not possible yet, if so.
  func cleanUp(_ disk: Disk) async -> DiskFailure? {
    let (directory, unfinished) = (disk.directory(configuration), disk.newStore)
    do throws(IOError) {
      try await offload.run { () throws(IOError) in
        try directory.remove()
        if let unfinished { try Images.remove(unfinished) }
      }
      return nil
    } catch {
      return DiskFailure(.io, "\(error.description): see to it; the disk goes when that is done")
    }
  }

  /// Drops the descriptors; the locks go with the last of them.
  func release(_ disk: Disk) {
    disk.worker = nil
    disk.generation = nextGeneration()
    disk.report = nil
    disk.store = nil
    disk.base = nil
    disk.allowed = []
    disk.isComplete = false
    disk.files = [:]
    disk.backings = []
    disk.hindrance = nil
    disk.pending = nil
    disk.identities = DiskIdentities()
    disk.former = nil
    disk.verdict = nil
    disk.entry = nil
    disk.tookOver = false
    disk.newStore = nil
    disk.socketLost = false
    disk.flush = nil
    disk.discards = false
    disk.stuckCount = 0
    disk.linkPath = nil
    disk.lingering = nil
    disk.held = nil
    disk.wasGiven = false
    releaseSources(disk)
    wakeThoseWaiting(for: disk.id)
  }
}
