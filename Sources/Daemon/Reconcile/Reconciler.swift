// SPDX-License-Identifier: Apache-2.0
// The table of disks and the loop over it: an event marks a disk, and for a marked disk
// one task reads what is wanted, looks at what is, and takes the next step, until the
// disk is where it should be. Events may be lost, repeated or late.
//
// Invariants:
// - At most one task takes steps for a disk at any time; another disk never waits for it.
// - Whatever blocks is done on Offload's threads, never on the actor.
// - A disk is only taken down after a look at xenstore that succeeded.

import Glibc
internal import Logging
internal import XenStore

/// Owns every disk.
package actor Reconciler {
  /// So many workers are started at the same time; the others wait their turn.
  static let startsAtOnce = 8
  /// A start that takes longer waits for something, and gives its turn to another.
  static let turnTime = Duration.seconds(5)
  /// So long a new daemon waits for the disks of the one before it.
  static let adoptionTime = Duration.seconds(15)

  var configuration: Configuration
  let configurationPath: String
  let host: Host
  let manager: ServiceManager?
  let log: Logger
  var table: [DiskID: Disk] = [:]
  /// What is wanted of named disks.
  var wishes: [DiskName: NamedWish] = [:]
  /// Those that the next daemon finds in writing.
  var writtenWishes: Set<DiskName> = []
  /// Names that something is done with just now.
  var changingNames: Set<DiskName> = []
  /// The users that workers run as.
  var users = WorkerUsers()
  let liveWorkers = LiveWorkers()
  /// What commits the log of a store that no disk uses, by the log's key.
  var recovering: [String: Disk] = [:]
  /// Keys of the logs that are committed, removed or given up just now: no disk takes one up
  /// meanwhile.
  var claimedLogs: Set<String> = []
  /// What hooks have attached; see Reconciler+Sources.
  var sources = HeldSources()
  /// What hooks are to be told; see Reconciler+Events.
  var events = EventQueues()
  /// Attaches that failed and whose disks have gone; see Reconciler+Failures.
  var failures: [DiskStatus] = []
  /// While disks are taken over: the workers that an earlier daemon has noted. A store may have
  /// gone from one disk to another just before it ended.
  var formerWorkers: Set<Int32> = []
  /// It was said that the run directory is full, and is so still.
  var isRunFull = false
  var nextWaiter: UInt64 = 1
  var ending = false
  var takesWaiters = true
  var isWatchingHearts = false
  /// The last worker's number, of all workers: a disk of a name and a recovery under that name have
  /// workers of their own.
  private var generation = 0
  /// Domains that share a disk are looked at.
  var isWatchingSharers = false
  /// When metrics were asked for last, or this daemon started; nil: the kernel measures nothing.
  var measuredAt: ContinuousClock.Instant?
  /// Disks of an earlier daemon that are being taken over.
  var adopting: Set<DiskID> = []
  /// The logs that an earlier daemon has left were seen to.
  var hasRecovered = false
  private var nextTurn: UInt64 = 0
  /// Turns that are taken and not given on yet.
  private var turns: Set<UInt64> = []
  private var freeStarts = Reconciler.startsAtOnce
  private var startQueue: [CheckedContinuation<Void, Never>] = []
  private var announced: [Int]?
  private var isAnnouncing = false

  init(
    configuration: Configuration, configurationPath: String, host: Host,
    manager: ServiceManager?, log: Logger
  ) {
    self.configuration = configuration
    self.configurationPath = configurationPath
    self.host = host
    self.manager = manager
    self.log = log
    measuredAt = host.scheduler.now
  }

  // For short: the parts of the host that are asked most.
  nonisolated var scheduler: any Scheduling { host.scheduler }
  nonisolated var view: any StoreView { host.view }
  nonisolated var attacher: any DeviceAttacher { host.attacher }
  nonisolated var mapper: any DeviceMapping { host.mapper }
  nonisolated var offload: any Offloading { host.offload }
  nonisolated var mapping: any Offloading { host.mapping }

  /// The log with a disk's name in every line.
  func log(for disk: Disk) -> Logger {
    var log = log
    log[metadataKey: "disk"] = "\(disk.id)"
    return log
  }

  /// Returns when the actor has time for it: whether it has is what the service manager watches.
  func answer() {}

  // MARK: - Marks

  /// Something may have changed for this disk.
  func mark(_ id: DiskID) {
    guard !ending else { return }
    let disk =
      table[id] ?? Disk(id, configuration: configuration, now: scheduler.unixTime)
    table[id] = disk
    disk.due = true
    guard !disk.busy else { return }
    disk.busy = true
    scheduler.start { await self.drive(id) }
  }

  /// A number that no worker has had.
  func nextGeneration() -> Int {
    generation += 1
    return generation
  }

  /// The same of a vbd: of its disk, or of what it waits to become.
  func mark(_ vbd: VBD) { mark(id(of: vbd)) }

  /// Names the disk of a vbd, or the one that it would get. A disk that an earlier vbd of these numbers
  /// has left to others is none of its.
  func id(of vbd: VBD) -> DiskID {
    if let disk = table[.vbd(vbd)], !disk.isOutlived { return disk.id }
    let lives = table.values.filter { $0.id.vbd == vbd }
    if let disk = lives.first(where: { !$0.isOutlived }) { return disk.id }
    let taken = Set(lives.map(\.id))
    var (id, life) = (DiskID.vbd(vbd), 0)
    while taken.contains(id) {
      life += 1
      id = .again(vbd, life)
    }
    return id
  }

  /// Looks at everything at once and marks the disks for which something has changed.
  func lookAtEverything() async throws(XenStoreError) {
    lookAtNames()
    detachUnused()
    var known: [VBD: Sight?] = [:]
    for (id, disk) in table {
      if let vbd = id.vbd, !disk.isOutlived { known.updateValue(disk.sight, forKey: vbd) }
    }
    guard let sights = try await view.lookAll(and: known) else {
      if await !storeForgotUs() { return }
      return try await lookAtEverything()
    }
    for (vbd, sight) in sights { compare(id(of: vbd), sight) }
    for disk in table.values where disk.isOutlived && !disk.isSettled { mark(disk.id) }
    if isWatchingSharers { await checkSharers() }
  }

  /// The same for named disks, of which xenstore does not know.
  func lookAtNames() {
    let wanted = wishes.filter { $0.value.isActive }.keys
    for name in Set(table.keys.compactMap(\.name)).union(wanted) {
      compare(.named(name), sight(of: name))
    }
  }

  private func compare(_ id: DiskID, _ sight: Sight) {
    guard let disk = table[id] else { return mark(id) }
    if disk.sight != sight || !disk.isSettled { mark(id) }
  }

  /// xenstored has a new, empty store, or has never heard of us. Its silence about a disk says
  /// nothing: disks in use are kept until it speaks of them again, or a script's `remove` does.
  /// False when even that could not be told to xenstored.
  func storeForgotUs() async -> Bool {
    let kept = table.values.filter { $0.id.vbd != nil && $0.holdsSomething && !$0.isOutlived }
    for disk in kept { disk.orphaned = true }
    for disk in table.values { disk.published = nil }
    if announced != nil, !kept.isEmpty {
      log.error(
        "xenstored has lost its store: disks in use are kept",
        metadata: ["disks": "\(kept.count)"])
    }
    announced = nil
    await announce("running", anew: true)
    return announced != nil
  }

  // MARK: - The loop of one disk

  private func drive(_ id: DiskID) async {
    guard let disk = table[id] else { return }
    while disk.due, !ending {
      disk.due = false
      let waiter = nextWaiter
      do throws(XenStoreError) {
        guard let sight = try await lookAll(of: disk) else {
          disk.due = await storeForgotUs()
          if !disk.due { wake(disk, after: .seconds(1)) }
          continue
        }
        disk.sight = sight
        disk.firstUnseen = waiter
        if sight.exists { disk.orphaned = false }
        if hasLeft(disk) { await outlive(disk) }
        if disk.sight?.device != nil { disk.wasGiven = true }
        if let vdev = sight.vdev { disk.vdev = vdev }
        // The entry was made anew, or somebody has written in our nodes.
        if sight.told != disk.published?.state.rawValue { disk.published = nil }
        if case .failed(_, attached: false) = disk.phase, let wanted = sight.wanted,
          wanted.params != disk.params
        {
          enter(disk, .idle)
        }
      } catch {
        log(for: disk).warning("cannot look at the disk", metadata: ["error": "\(error)"])
        wake(disk, after: .seconds(1))
        break
      }
      guard !ending else { break }
      // No script comes that could say whether the domain boots.
      if isAlone(disk), disk.boots == nil { disk.boots = false }
      await takeStep(disk)
      await publish(disk)
      await actAsScript(for: disk)
    }
    disk.busy = false
    settle(disk)
  }

  /// Looks at a disk and at those of its users that nobody has looked at since they were taken over:
  /// it goes when nobody wants it. Nil: the store has forgotten us.
  private func lookAll(of disk: Disk) async throws(XenStoreError) -> Sight? {
    guard let sight = try await look(disk.id) else { return nil }
    for user in disk.joined where user.sight == nil {
      guard let sight = try await look(user.id) else { return nil }
      user.sight = sight
    }
    return sight
  }

  private func takeStep(_ disk: Disk) async {
    let now = scheduler.now
    let step = disk.phase.step(
      wanted: disk.wanted, holderGone: holderIsGone(disk.phase), now: now)
    switch step {
    case .none:
      if case .serving = disk.phase, disk.socketLost { await replaceSocket(disk) }
      if case .joined = disk.phase, hasLostHost(disk) { await leave(disk) }
    case .start:
      guard let wanted = disk.wanted else { return }
      let waits = freeStarts == 0
      if waits { disk.activity = "waiting until other disks have started" }
      await inTurn {
        if waits, await !self.isStillWanted(disk) { return }
        await self.start(disk, wanted)
      }
      disk.due = true
    case .restart:
      await inTurn { await self.restart(disk) }
      disk.due = true
    case .wait(let until): wake(disk, after: until - now)
    case .stop:
      await stop(disk)
      disk.due = true
    case .leave: await leave(disk)
    case .forget: forget(disk)
    }
  }

  private func holderIsGone(_ phase: DiskPhase) -> Bool {
    guard case .waiting(let holder) = phase else { return false }
    guard let other = table[holder], other.ownStore != nil else { return true }
    // One that has come back to life is not waited for: starting says that it is in use.
    return !other.isLeaving
  }

  /// Marks the disk later.
  func wake(_ disk: Disk, after delay: Duration) {
    disk.timer?.cancel()
    let id = disk.id
    disk.timer = scheduler.after(delay) { [weak self] in await self?.mark(id) }
  }

  /// Runs one of the starts when it is its turn.
  private func inTurn(_ body: () async -> Void) async {
    if freeStarts == 0 {
      await withCheckedContinuation { startQueue.append($0) }
    } else {
      freeStarts -= 1
    }
    nextTurn += 1
    let turn = nextTurn
    turns.insert(turn)
    let clock = scheduler.after(Reconciler.turnTime) { [weak self] in await self?.giveOn(turn) }
    await body()
    clock.cancel()
    giveOn(turn)
  }

  /// The next start may begin; once for each turn.
  private func giveOn(_ turn: UInt64) {
    guard turns.remove(turn) != nil else { return }
    if startQueue.isEmpty {
      freeStarts += 1
    } else {
      startQueue.removeFirst().resume()
    }
  }

  private func forget(_ disk: Disk) {
    // What the toolstack has let go of stays known until its entry goes, or it would be
    // taken up again at the next look.
    let lingers = disk.released && disk.sight?.wanted != nil
    guard !disk.due, !lingers else { return }
    disk.timer?.cancel()
    table[disk.id] = nil
    rememberFailure(of: disk)
    refuseWaiters(disk, .unwanted(disk.id))
    dissolve(disk)
    wakeThoseWaiting(for: disk.id)
  }

  /// Marks the disks that wait for this one's store.
  func wakeThoseWaiting(for id: DiskID) {
    for other in table.values {
      if case .waiting(let holder) = other.phase, holder == id { mark(other.id) }
    }
  }

  // MARK: - Telling

  /// Goes over to another phase.
  func enter(_ disk: Disk, _ phase: DiskPhase) {
    let (former, before) = (disk.phase, disk.phase.publicState)
    disk.phase = phase
    tellChange(disk, from: former, to: phase)
    if case .idle = phase { return }
    if before != phase.publicState {
      disk.since = scheduler.unixTime
      disk.isUnsaved = true
      var facts: Logger.Metadata = ["state": "\(phase.publicState.rawValue)"]
      if let error = phase.error { facts["error"] = "\(error)" }
      if let device = disk.device { facts["device"] = "\(device.path)" }
      if let worker = disk.worker { facts["worker"] = "\(worker.process.pid)" }
      let level: Logger.Level =
        [.failed, .degraded, .noSpace].contains(phase.publicState) ? .error : .info
      log(for: disk).log(level: level, "the disk is \(phase.publicState.rawValue)", metadata: facts)
    }
    settle(disk)
  }

  /// Answers those who wait for a disk that has come to rest. Who came after the last look at
  /// xenstore may wait for another disk of the same number: the next look tells.
  func settle(_ disk: Disk) {
    guard !disk.waiters.isEmpty else { return }
    let answer: Result<DeviceNode, DiskFailure>
    switch disk.phase {
    case .serving:
      guard let device = disk.device, disk.ownWanted != nil else { return }
      answer = .success(device)
    case .joined:
      guard let device = disk.host?.device, disk.ownWanted != nil else { return }
      answer = .success(device)
    case .failed(let failure, _): answer = .failure(failure)
    default: return
    }
    for (number, waiter) in disk.waiters where number < disk.firstUnseen {
      disk.waiters[number] = nil
      waiter.resume(returning: answer)
    }
  }

  func refuseWaiters(_ disk: Disk, _ failure: DiskFailure) {
    for waiter in disk.waiters.values { waiter.resume(returning: .failure(failure)) }
    disk.waiters = [:]
  }

  /// Writes the nodes of a disk's vbds if they are not what they should be.
  func publish(_ disk: Disk) async {
    guard table[disk.id] === disk else { return }
    await publishNodes(of: disk)
    for user in disk.joined {
      if case .joined = user.phase { await publishNodes(of: user) }
    }
    await saveState(disk)
    await announce("running")
  }

  private func publishNodes(of disk: Disk) async {
    do throws(XenStoreError) {
      if case .idle = disk.phase {
        if disk.published != nil, let vbd = disk.id.vbd { try await view.withdraw(vbd) }
        disk.published = nil
      } else if disk.sight?.exists == true, let vbd = disk.id.vbd {
        let served = disk.served
        let nodes = DiskNodes(
          state: served.phase.publicState, format: served.spec?.format ?? "",
          device: served.device?.path ?? "",
          worker: served.worker.map { String($0.process.pid) } ?? "",
          error: served.reason ?? "", since: String(served.since))
        if disk.published != nodes {
          let written = try await view.publish(vbd, nodes)
          disk.published = written ? nodes : nil
          disk.sight?.told = written ? nodes.state.rawValue : nil
        }
      }
    } catch {
      log(for: disk).warning("cannot tell of the disk", metadata: ["error": "\(error)"])
    }
  }

  /// Keeps the time of the last change of state for the next daemon.
  private func saveState(_ disk: Disk) async {
    guard disk.isUnsaved, case .serving = disk.phase else { return }
    disk.isUnsaved = false
    do throws(DiskFailure) { try await save(disk) } catch {
      log(for: disk).warning("cannot keep the disk's state", metadata: ["error": "\(error)"])
    }
  }

  /// Writes the daemon's own nodes if the number of disks or of pending logs has changed.
  func announce(_ state: String, anew: Bool = false) async {
    // One after the other: what was counted last is what stands there.
    while isAnnouncing { await pause(.milliseconds(10)) }
    isAnnouncing = true
    var isForgotten = false
    var pending = announced?.last ?? 0
    do throws(DiskFailure) { pending = try await keptLogs().count } catch {
      log.warning("cannot count the pending logs", metadata: ["error": "\(error)"])
    }
    let counts = [table.values.count { $0.spec != nil && $0.host == nil }, pending]
    if announced?.first != counts[0] { manager?.status(disks: counts[0]) }
    if announced != counts || state != "running" {
      do throws(XenStoreError) {
        isForgotten = try await !view.publishSelf(
          state: state, disks: counts[0], pending: counts[1], anew: anew)
        if !isForgotten { announced = counts }
      } catch {
        announced = nil
        log.warning("cannot tell of the daemon", metadata: ["error": "\(error)"])
      }
    }
    isAnnouncing = false
    if isForgotten, state == "running" { _ = await storeForgotUs() }
  }
}

extension Disk {
  /// Whether nothing is to be done until something happens.
  fileprivate var isSettled: Bool {
    switch phase {
    case .serving: !socketLost
    case .failed, .asking, .joined: true
    case .idle, .waiting, .starting, .restarting, .stopping: false
    }
  }
}
