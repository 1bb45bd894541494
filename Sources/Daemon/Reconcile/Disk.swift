// One row of the reconciler's table: everything that is held for a disk. Not Sendable on
// purpose: only the reconciler, an actor, touches it.

internal import Posix
internal import WorkerLink

/// A disk that the daemon knows.
final class Disk {
  let id: DiskID
  /// Where it stands.
  var phase = DiskPhase.idle
  /// What the last look at xenstore found.
  var sight: Sight?
  /// The disk's name in the guest.
  var vdev: String
  /// Params as they stood when the disk was taken up.
  var params = ""
  /// The same, understood.
  var spec: Spec?
  /// Whether the guest may only read.
  var readOnly = false

  var store: OpenImage?
  var base: OpenImage?
  /// What the images named and was allowed, in the order of asking, and those of them that
  /// are open.
  var allowed: [NamedFile] = []
  var files: [NamedFile: OpenImage] = [:]
  /// Why the kernel cannot serve the disk by itself although it might have; nil when it does.
  var hindrance: String?
  /// What a device of the device-mapper stands on, by the worker's word.
  var backings: [DiskBacking] = []
  var pending: FileStore?
  /// Whether this attempt made the store, which then goes again if the attempt fails.
  var madeStore = false
  /// Whether the store has yet to be formatted.
  var needsFormat = false

  var worker: Worker?
  /// Counts the workers, so that late news of an earlier one is told apart.
  var generation = 0
  /// What the worker said last.
  var report: DiskReport?
  var device: DeviceNode?
  /// The kernel and the worker have lost their socket, the worker lives.
  var socketLost = false
  /// How often in a row a new socket did not help.
  var socketRetries = 0
  var backOff: BackOff

  /// Unix time of the last change of state.
  var since: Int64
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
  /// What was written to xenstore last.
  var published: DiskNodes?

  init(_ id: DiskID, configuration: Configuration, now: Int64) {
    self.id = id
    vdev = id.vdev
    backOff = BackOff(limit: configuration.restartLimit, window: configuration.restartWindow)
    since = now
  }

  /// What is wanted of it as far as is known.
  var wanted: WantedDisk? {
    guard !released else { return nil }
    if orphaned { return WantedDisk(params: params, readOnly: readOnly, going: false) }
    guard let wanted = sight?.wanted else { return nil }
    // Taken away and attached anew as something else between two looks: first the one goes.
    if holdsSomething, wanted.params != params || wanted.readOnly != readOnly { return nil }
    return wanted
  }

  /// Whether there is a worker or a device.
  var holdsSomething: Bool { worker != nil || device != nil }

  /// Whether it is about to let go of its store.
  var isLeaving: Bool {
    if case .stopping = phase { return true }
    return wanted?.going ?? true
  }

  /// The name by which its device is known again.
  var identifier: String { KernelAttacher.mark + "\(id)" }

  /// Whether the kernel has the disk's files and their locks, whatever became of a worker.
  var isHeldByKernel: Bool { device?.kind == .dm }

  /// The path of the base that is used, if any.
  var basePath: String? {
    spec?.base ?? allowed.first { $0.need.role == "base" }?.path
  }

  /// Whether it has a file or device open as something else than its store.
  func uses(_ identity: FileIdentity) -> Bool {
    base?.identity == identity || files.values.contains { $0.identity == identity }
  }

  /// What has to be remembered; nil before there is a worker.
  var record: DiskRecord? {
    guard let worker else { return nil }
    return DiskRecord(
      params: params, readOnly: readOnly, vdev: vdev, files: allowed,
      worker: worker.process.pid, workerStart: worker.process.startTime, device: device,
      since: since)
  }
}
