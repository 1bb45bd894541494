// SPDX-License-Identifier: Apache-2.0
// One row of the reconciler's table: everything that is held for a disk. Not Sendable on
// purpose: only the reconciler, an actor, touches it.
//
// A vbd that has joined the disk of another one (Reconciler+Join) has a row of its own, which holds
// nothing but what xenstore and the block script say of it; `host` is the row of the disk. The disk's
// own vbd may go before it does (`isOutlived`).

internal import BlockIO
internal import SystemIO
internal import WorkerLink

/// A disk that the daemon knows.
final class Disk {
  let id: DiskID
  /// Where it stands.
  var phase = DiskPhase.idle
  /// What the last look at xenstore found.
  var sight: Sight?
  /// The disk's name in the guest; nil for a named disk.
  var vdev: String?
  /// Params as they stood when the disk was taken up.
  var params = ""
  /// The same, understood.
  var spec: Spec?
  /// Whether the guest may only read.
  var readOnly = false

  var store: OpenImage?
  /// The open store with which a worker has compared the pending log, or begun one. Not owned:
  /// the lock goes with the store.
  weak var compared: FileStore?
  var base: OpenImage?
  /// What hooks have attached for it, or are to.
  var sources: Set<Source> = []
  /// Which files the disk was started with.
  var identities = DiskIdentities()
  /// What the images named and was allowed, in the order of asking, and those of them that
  /// are open.
  var allowed: [AllowedFile] = []
  var files: [AllowedFile: OpenImage] = [:]
  /// A worker has served the disk with the files that are allowed: its images name no others.
  var isComplete = false
  /// Why the kernel cannot serve the disk by itself although it might have; nil when it does.
  var hindrance: String?
  /// What a device of the device-mapper stands on, by the worker's word.
  var backings: [DiskBacking] = []
  var pending: FileStore?
  /// The store's log in the registry; nil for a disk that is read only.
  var entry: PendingEntry?
  /// Whether the log held something when this disk took the store up.
  var tookOver = false
  /// The store, as long as this attempt has made it and not yet served it.
  var newStore: NewFile?
  /// What the block script said: whether the domain boots, so that a store may be made. nil: it
  /// has not asked yet. Of a named disk: whether the admin wishes a store to be made.
  var boots: Bool?

  var worker: Worker?
  /// The user that its workers run as; nil: none has run yet.
  var user: UInt32?
  /// The worker that was there last; it may have left processes.
  var former: FormerWorker?
  /// Why the daemon has ended its worker, or let its link go; nil when it did not.
  var verdict: String?
  /// Of the worker, among all of them, so that late news of an earlier one is told apart.
  var generation = 0
  /// What the worker said last.
  var report: DiskReport?
  var device: DeviceNode?
  /// The kernel and the worker have lost their socket, the worker lives.
  var socketLost = false
  /// How often in a row a new socket did not help.
  var socketRetries = 0
  var backOff: BackOff
  /// How often a worker took the place of another since the daemon started.
  var restarts = 0

  /// What it does at the moment while it starts, for status.
  var activity: String?
  /// How often in a row it could not be taken down.
  var stuckCount = 0
  /// The flush of the device before it goes, while it is under way.
  var flush: DeviceFlush?
  /// The closing of its files, while that is under way.
  var closing: Ended?
  /// An admin has given up what the kernel's device holds.
  var discards = false
  /// The domain's name as far as it was asked.
  var domainName: String?
  /// The directory of a disk that is none of the table's: one that only recovers a log.
  var directoryPath: String?
  /// Its worker has not answered and is being killed.
  var isBeingReplaced = false
  /// A worker of an earlier daemon, or one that does not answer, that could not be killed yet. It has the store's lock.
  var lingering: (any HostProcess)?
  /// The worker's link when it is not in the directory: it was found, not started.
  var linkPath: String?

  /// Hooks were told that it is attached, or an earlier daemon's.
  var wasAttached = false
  /// The failure that they were told of last.
  var toldFailure: String?
  /// Unix time of the last change of state.
  var since: Int64
  /// The record does not have that time yet.
  var isUnsaved = false
  /// The toolstack has said that it is done with the disk.
  var released = false
  /// xenstored lost its memory; the disk is kept until it says something of it again.
  var orphaned = false

  /// Something may have changed since the last look.
  var due = false
  /// A task is taking steps for this disk.
  var busy = false
  var timer: Task<Void, Never>?
  var waiters: [UInt64: CheckedContinuation<Result<DeviceNode, DiskFailure>, Never>] = [:]
  /// Waiters from this number on have come after the last look at xenstore.
  var firstUnseen: UInt64 = 0
  /// What was written to xenstore last.
  var published: DiskNodes?

  /// The disk that this vbd has joined, or is joining.
  weak var host: Disk?
  /// Vbds that have joined this disk or are joining it, the earliest first.
  var joined: [Disk] = []
  /// This vbd has joined its host: what was under way before is over, and the record may tell of it.
  var hasJoined = false
  /// The vbd for which this disk was started has gone; others use the disk.
  var isOutlived = false
  /// The vbds' domains, a stub domain's target in its place; as far as they were asked.
  var rootDomain: Int?
  /// Requests are held: two domains run from this disk. The sentence.
  var held: DiskFailure?
  /// xenstore has said that its vbd has the device.
  var wasGiven = false
  /// Whether its domains run is being found out.
  var isBeingJudged = false
  /// The record is being written.
  var isSaving = false

  init(_ id: DiskID, configuration: Configuration, now: Int64) {
    self.id = id
    vdev = id.vbd?.vdev
    backOff = BackOff(limit: configuration.restartLimit, window: configuration.restartWindow)
    since = now
  }

  /// What is wanted of it, by whomever, as far as is known.
  var wanted: WantedDisk? {
    let others = joined.compactMap(\.ownWanted)
    guard !others.isEmpty else { return ownWanted }
    let going = (ownWanted?.going ?? true) && others.allSatisfy(\.going)
    return WantedDisk(params: params, readOnly: readOnly, going: going)
  }

  /// The disk that serves it: its host, once it has joined one.
  var served: Disk {
    if case .joined = phase, let host { return host }
    return self
  }

  /// What is wanted of it by its own vbd or name.
  var ownWanted: WantedDisk? {
    guard !released, !isOutlived else { return nil }
    if orphaned { return WantedDisk(params: params, readOnly: readOnly, going: false) }
    guard let wanted = sight?.wanted else { return nil }
    // Taken away and attached anew as something else between two looks: first the one goes.
    if holdsSomething, wanted.params != params || wanted.readOnly != readOnly { return nil }
    return wanted
  }

  /// Whether there is a worker or a device, its own or its host's.
  var holdsSomething: Bool { worker != nil || device != nil || host != nil }

  /// The vbds that use the disk, in the order of their coming; their rows.
  var users: [Disk] {
    (id.vbd == nil || isOutlived ? [] : [self]) + joined.filter(\.hasJoined)
  }

  /// Whether it is about to let go of its store.
  var isLeaving: Bool {
    if case .stopping = phase { return true }
    return wanted?.going ?? true
  }

  /// The reason that goes with its state, if there is one.
  var reason: String? {
    if let error = phase.error { return error }
    switch phase {
    case .idle, .starting, .restarting: return activity
    default: return nil
    }
  }

  /// A disk of the daemon's own domain that nobody has connected, though the toolstack has long
  /// given up waiting for that: a bootloader's, for example, without a driver for it.
  func isAbandoned(_ sight: Sight, now: Int64) -> Bool {
    // libxl waits for ten seconds.
    guard sight.isOwn, joined.isEmpty, case .serving = phase else { return false }
    return sight.isUnconnected && now - since >= 12
  }

  /// Whether a backend has the device, perhaps, and was never connected to a frontend.
  var isUnconnected: Bool { sight?.isUnconnected ?? false }

  /// The name by which its device is known again.
  var identifier: String { KernelAttacher.mark + "\(id)" }

  /// Whether the kernel has the disk's files and their locks, whatever became of a worker.
  var isHeldByKernel: Bool { device?.kind == .dm }

  /// The path of the base that is used, if any.
  var basePath: String? {
    spec?.base ?? allowed.first { $0.need.role == "base" }?.path
  }

  /// The store that is its own, open or not: a device may stand on it while no worker is there and an
  /// earlier daemon's descriptors are gone.
  var ownStore: FileIdentity? { store?.identity ?? identities.store }

  /// Whether a file or device is its own as something else than its store.
  func uses(_ identity: FileIdentity) -> Bool {
    (base?.identity ?? identities.base) == identity
      || files.values.contains { $0.identity == identity }
      || allowed.contains { $0.identity == identity }
  }

  /// Takes over what an earlier daemon has written down.
  func recall(_ record: DiskRecord, _ registry: PendingRegistry) {
    params = record.params
    spec = Reconciler.spec(record.params)
    readOnly = record.readOnly
    vdev = record.vdev
    allowed = record.files
    identities = record.identities
    isComplete = record.isComplete
    since = record.since
    entry = record.pending.map { PendingEntry(registry, $0) }
  }

  /// What has to be remembered; nil before there is a worker.
  var record: DiskRecord? {
    let process = worker.map { FormerWorker(pid: $0.process.pid, startTime: $0.process.startTime) }
    guard let process = process ?? (device == nil ? nil : former) else { return nil }
    var record = DiskRecord(
      params: params, readOnly: readOnly, vdev: vdev, files: allowed,
      worker: process.pid, workerStart: process.startTime, device: device,
      since: since, pending: entry?.key, link: linkPath)
    if isOutlived || joined.contains(where: \.hasJoined) {
      record.users = users.compactMap(\.id.vbd)
    }
    record.isHeld = held != nil
    record.identities = identities
    record.isComplete = isComplete
    return record
  }

  /// The files that its worker may write.
  var writtenFiles: [FileIdentity] {
    guard !readOnly else { return [] }
    return [store?.identity ?? identities.store].compactMap { $0 }
      + allowed.filter(\.need.writable).compactMap(\.identity)
  }

  /// Where its link and its record are.
  func directory(_ configuration: Configuration) -> DiskDirectory {
    directoryPath.map { DiskDirectory(path: $0) } ?? DiskDirectory(configuration, id)
  }

  /// What is remembered with the store's log.
  /// `now`: Unix time.
  func pendingInfo(why: String? = nil, now: Int64) -> PendingInfo {
    PendingInfo(
      store: spec?.store ?? "", params: params, disk: id, vdev: vdev, domainName: domainName,
      files: allowed, device: device?.kind == .dm ? device?.path : nil, why: why,
      since: now)
  }

  /// Why nothing can be done with the store yet: its former worker cannot be killed.
  var lingers: DiskFailure? {
    guard let process = lingering, !process.hasEnded else { return nil }
    return .worker(
      "its former worker (process \(process.pid)) cannot be killed: it waits for a device or file"
        + " system that hangs; the disk goes on when that answers")
  }

  /// For sentences: who uses the disk.
  var holders: [Holder] {
    let all = users.map { Holder(id: $0.id, vdev: $0.vdev) }
    return all.isEmpty ? [Holder(id: id, vdev: vdev)] : all
  }
}
