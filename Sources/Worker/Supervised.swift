// A worker that the daemon started: it opens nothing, is handed what it needs over the link,
// and goes on serving while no daemon is there.
//
//   waiting --start--> [needs a base --base-->] serving --stop--> stopping

import Glibc
import ImageFormats
import Posix
import WorkerLink

/// How a supervised worker shall be.
public struct SupervisedOptions: Sendable {
  /// The user and group that it becomes, when it is root.
  public var uid: UInt32 = 65534
  /// The group.
  public var gid: UInt32 = 65534
  /// What it logs.
  public var level = Log.Level.info
  /// The listening socket of the link, handed over.
  public var listener: Int32 = 3

  /// The defaults.
  public init() {}
}

/// The life of a supervised worker.
public final class Supervised {
  private enum Phase {
    case waiting
    case needsBase(StartOrder, FileStore, LinkDescriptors)
    case serving(Disk)
    case ended(Int32)
  }

  private let loop: EventLoop
  private let server: LinkServer
  private let version: String
  private var log: Log
  private var phase = Phase.waiting
  private var order: StartOrder?
  private var pending: Descriptor?
  private var stopping = false

  /// Runs a worker to its end. Answers its exit status: 0 after an order or a signal to stop,
  /// with everything durable; 1 when the disk could not be served or committed.
  public static func run(_ options: SupervisedOptions, version: String) -> Int32 {
    let log = Log(level: options.level, journal: true)
    do throws(IOError) {
      let signals = try SignalSource([SIGTERM, SIGINT])
      let owner = geteuid()
      harden(options, log)
      let loop = try EventLoop()
      let listener = Descriptor(owning: options.listener)
      let server = try LinkServer(listener, owner: owner, loop: loop, log: log)
      let worker = Supervised(loop, server, version, log)
      return try worker.live(signals)
    } catch {
      log(.error, "the worker has failed", ["error": "\(error)"])
      return 1
    }
  }

  private static func harden(_ options: SupervisedOptions, _ log: Log) {
    func attempt(_ what: String, _ step: () throws(IOError) -> Void) {
      do throws(IOError) {
        try step()
      } catch { log(.warning, "cannot \(what), going on without", ["error": "\(error)"]) }
    }
    attempt("lock memory") { () throws(IOError) in try Hardening.lockMemory() }
    attempt("become an I/O flusher") { () throws(IOError) in try Hardening.becomeFlusher() }
    attempt("drop privileges") { () throws(IOError) in
      try Hardening.dropPrivileges(uid: options.uid, gid: options.gid)
    }
  }

  private init(_ loop: EventLoop, _ server: LinkServer, _ version: String, _ log: Log) {
    self.loop = loop
    self.server = server
    self.version = version
    self.log = log
    server.received = { [unowned self] order, descriptors in follow(order, descriptors) }
    server.connected = { [unowned self] in
      // A daemon that did not start this worker does not know what it waits for.
      if case .needsBase(_, let store, _) = phase { askForBase(store) }
    }
  }

  private func live(_ signals: SignalSource) throws(IOError) -> Int32 {
    try loop.addStop(signals, log) { [unowned self] in stopping = true }
    while !stopping {
      if case .ended(let status) = phase { return status }
      if case .serving(let disk) = phase { try disk.turn() } else { try loop.turn() }
    }
    guard case .serving(let disk) = phase else { return 0 }
    log(.info, "stopping")
    let code = try disk.finish()
    guard code == 0 else {
      fail(WorkerError("io", "the last flush failed: \(String(cString: strerror(code)))"))
      return 1
    }
    log(.info, "everything is durable, ending")
    return 0
  }

  private func follow(_ order: WorkerOrder, _ descriptors: LinkDescriptors) {
    guard !stopping || order == .status else {
      return server.refuse(order.message.verb, "the worker is stopping")
    }
    switch (order, phase) {
    case (.start(let start), .waiting): begin(start, descriptors)
    case (.base, .needsBase(let start, let store, let first)):
      guard let base = descriptors.take(.base) else {
        return server.refuse("base", "'base' came without a descriptor")
      }
      open(start, store, base: base, first)
    case (.refuseBase(let reason), .needsBase): fail(WorkerError("base-refused", reason))
    case (.attach, .serving(let disk)):
      guard let socket = descriptors.take(.nbd) else {
        return server.refuse("attach", "'attach' came without a descriptor")
      }
      disk.attach(socket)
    case (.status, .serving(let disk)): server.send(.status(report(disk)))
    case (.descriptors, .serving(let disk)): returnDescriptors(disk)
    case (.stop, _): stopping = true
    default:
      server.refuse(order.message.verb, "'\(order.message.verb)' makes no sense now")
    }
  }

  private func begin(_ start: StartOrder, _ descriptors: LinkDescriptors) {
    log.disk = start.disk
    order = start
    do throws(WorkerError) {
      let name = try FormatName(named: start.format)
      guard let given = descriptors.take(.store) else {
        throw WorkerError("protocol", "'start' came without a store")
      }
      let store = try Self.fileStore(given, start.storePath ?? "store")
      if let base = descriptors.take(.base) {
        return open(start, store, base: base, descriptors)
      }
      let path = try start.create ? nil : basePath(name, store)
      guard path == nil else {
        phase = .needsBase(start, store, descriptors)
        return askForBase(store)
      }
      open(start, store, base: nil, descriptors)
    } catch { fail(error) }
  }

  private static func fileStore(
    _ descriptor: consuming Descriptor, _ name: String
  ) throws(WorkerError) -> FileStore {
    do throws(IOError) {
      return try FileStore(descriptor, name: name)
    } catch { throw WorkerError(error) }
  }

  private func basePath(_ name: FormatName, _ store: FileStore) throws(WorkerError) -> String? {
    try imaging { () throws(ImageError) in try name.basePath(of: store) }
  }

  private func askForBase(_ store: FileStore) {
    do throws(WorkerError) {
      guard let format = order?.format,
        let path = try basePath(FormatName(named: format), store)
      else { return }
      server.send(.needBase(path: path))
    } catch { fail(error) }
  }

  private func open(
    _ start: StartOrder, _ store: FileStore, base: consuming Descriptor?,
    _ descriptors: LinkDescriptors
  ) {
    do throws(WorkerError) {
      let name = try FormatName(named: start.format)
      var request = ImageRequest()
      request.create = start.create
      request.blockSize = start.blockSize
      request.basePath = start.basePath
      request.readOnly = start.readOnly
      request.force = start.force
      var baseStore: FileStore?
      if let base {
        var path = start.basePath
        if path == nil, !start.create { path = try basePath(name, store) }
        baseStore = try Self.fileStore(base, path ?? "base")
      }
      let image = try OpenImage(name, store: store, base: baseStore, request)
      pending = descriptors.take(.pending)
      let raw = pending?.raw
      let disk = try Disk(image, pending: raw, loop: loop, log: log)
      serve(disk, descriptors)
    } catch { fail(error) }
  }

  private func serve(_ disk: Disk, _ descriptors: LinkDescriptors) {
    disk.conditionChanged = { [unowned self] condition in
      server.send(.event(condition.state, error: condition.reason))
    }
    disk.detached = { [unowned self] _ in server.send(.detached) }
    phase = .serving(disk)
    if let socket = descriptors.take(.nbd) { disk.attach(socket) }
    let report = report(disk)
    log(.info, "ready", ["format": report.format, "size": "\(report.size)"])
    server.send(.ready(report))
  }

  private func returnDescriptors(_ disk: Disk) {
    var lent: [LinkRole: Int32] = [:]
    lent[.store] = (disk.image.store as? FileStore)?.raw
    lent[.base] = (disk.image.base as? FileStore)?.raw
    lent[.pending] = pending?.raw
    server.send(.descriptors, lending: lent)
  }

  private func report(_ disk: Disk) -> DiskReport {
    disk.report(disk: order?.disk ?? "", version: version)
  }

  private func fail(_ error: WorkerError) {
    log(.error, "cannot serve the disk", ["code": error.code, "error": error.message])
    server.send(.failed(code: error.code, message: error.message))
    phase = .ended(1)
  }
}
