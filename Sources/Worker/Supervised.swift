// SPDX-License-Identifier: Apache-2.0
// The life of a worker: it opens nothing, is handed what it needs over the link, and parses and
// serves in its cage. One that the daemon started goes on serving while no daemon is there; one
// that a person started has a keeper, and ends with it.
//
//   waiting --start--> opening [needs a file --file-->] serving --stop--> stopping
//
// A disk that the kernel shall serve is `prepared` in between, until its node comes.
//
// Opening begins anew with every file that comes: up to the last one nothing is written.

import BlockIO
import DiskFormats
import DiskModel
internal import DMU
import Glibc
import LinuxBlock
import SystemIO
import Target
import WorkerLink

/// How a supervised worker shall be.
package struct SupervisedOptions: Sendable {
  /// The user that it becomes, when it is root.
  package var uid: UInt32 = 65534
  /// The group.
  package var gid: UInt32 = 65534
  /// The most files that it is handed.
  package var files: UInt64 = 256
  /// Whether it is caged: not when an admin has switched that off, to debug it.
  package var isCaged = true
  /// What it logs.
  package var level = Log.Level.info
  /// The listening socket of the link, handed over by a daemon.
  package var listener: Int32 = 3
  /// Whether the kernel may write its memory out through this process.
  var servesKernel = true
  /// Whether a person started it.
  var isByHand = false

  /// The defaults.
  package init() {}
}

/// The life of a supervised worker.
package final class Supervised {
  private enum Phase {
    case waiting
    case opening(Opening)
    case serving(Disk)
    case prepared(OpenImage, KernelPlan)
    case byNode(NodeDisk)
    /// The device is gone, and the keeper knows; the loop still has the disk's stage.
    case withdrawn(NodeDisk)
    case ended(Int32)
  }

  /// An image on its way to be opened.
  private struct Opening {
    let order: StartOrder
    let store: FileStore
    /// The base that came with the order.
    let base: FileStore?
    let descriptors: LinkDescriptors
    /// What is waited for.
    var need: FileNeed?
  }

  /// What a person has asked for that no image decides.
  struct Person {
    /// What whoever debugs wants, if anything.
    var debugging: DiskDebugging?
    /// The format, if it is a plugin's: its name and the address of its `dmu_plugin`.
    var plugin: (name: String, entry: UnsafeMutableRawPointer)?
  }

  private let loop: EventLoop
  private let server: LinkServer
  private let version: String
  private let person: Person?
  private var log: Log
  private var phase = Phase.waiting
  private var order: StartOrder?
  private var pending: Descriptor?
  private var base: FileStore?
  /// What was asked for and came, in that order.
  private var files: [(need: FileNeed, store: FileStore)] = []
  /// Why a disk that was to be served by its node is not.
  private var hindrance: String?
  private var stopping = false
  /// Whether the keeper has ended first.
  private var isOrphan = false
  private var witnesses: [FileStore] = []
  /// Whether the pending log said of no flush that it was under way before this image was opened.
  private var isFlushed = false

  /// Runs a worker to its end. Answers its exit status: 0 after an order or a signal to stop,
  /// with everything durable; 1 when the disk could not be served or committed.
  package static func run(_ options: SupervisedOptions, version: String) -> Int32 {
    let log = Log(level: options.level, journal: true)
    do throws(IOError) {
      let signals = try SignalSource([SIGTERM, SIGINT])
      let owner = geteuid()
      try harden(options, log)
      let loop = try EventLoop()
      let listener = Descriptor(owning: options.listener)
      let server = try LinkServer(listener, owner: owner, loop: loop, log: log)
      let worker = Supervised(loop, server, nil, version, log)
      return try worker.live(signals)
    } catch {
      log(.error, "the worker has failed", ["error": "\(error)"])
      return 1
    }
  }

  /// Runs a worker that a person started, whose keeper is at the other end of `link`. Answers as
  /// `run`, and has said what went wrong then. Throws when nothing can be served at all.
  static func run(
    _ options: SupervisedOptions, _ person: Person, _ signals: SignalSource,
    link: consuming Descriptor, _ log: Log
  ) throws(WorkerError) -> Int32 {
    do throws(IOError) { try harden(options, log) } catch {
      throw WorkerError(
        .cage,
        "there is no cage for the worker: \(error): let it make namespaces, or do without a cage "
          + "(--no-sandbox)")
    }
    do throws(IOError) {
      let loop = try EventLoop()
      let server = try LinkServer(connected: link, loop: loop, log: log)
      let worker = Supervised(loop, server, person, Version.text, log)
      return try worker.live(signals)
    } catch { throw WorkerError(error) }
  }

  /// Throws when the privileges cannot be given up: nothing is opened or served with them.
  private static func harden(_ options: SupervisedOptions, _ log: Log) throws(IOError) {
    func attempt(_ what: String, _ step: () throws(IOError) -> Void) {
      do throws(IOError) {
        try step()
      } catch { log(.warning, "cannot \(what), going on without", ["error": "\(error)"]) }
    }
    if options.servesKernel {
      attempt("lock memory") { () throws(IOError) in try Hardening.lockMemory() }
      attempt("become an I/O flusher") { () throws(IOError) in try Hardening.becomeFlusher() }
    }
    if !options.isByHand {
      attempt("be as good as others when memory runs out") { () throws(IOError) in
        try Hardening.resetMemoryScore()
      }
    }
    guard options.isCaged else {
      // A person has said so in the same command.
      log(options.isByHand ? .info : .warning, "not caged: worker.sandbox is off")
      guard geteuid() == 0 else { return }
      return try Hardening.become(uid: options.uid, gid: options.gid)
    }
    try Cage.enter(uid: options.uid, gid: options.gid, files: options.files + spareFiles)
  }

  /// Descriptors beside those of the disk's files: the link, the loop, the pool, sockets.
  private static let spareFiles: UInt64 = 64

  private init(
    _ loop: EventLoop, _ server: LinkServer, _ person: Person?, _ version: String, _ log: Log
  ) {
    self.person = person
    self.loop = loop
    self.server = server
    self.version = version
    self.log = log
    server.received = { [unowned self] order, descriptors in follow(order, descriptors) }
    server.connected = { [unowned self] in
      // A daemon that did not start this worker does not know what it waits for.
      if case .opening(let opening) = phase, let need = opening.need {
        server.send(.needFile(need))
      }
    }
    guard person != nil else { return }
    // What the keeper could not do it has said.
    server.lost = { [unowned self] in
      isOrphan = !stopping
      stopping = true
    }
  }

  private func live(_ signals: SignalSource) throws(IOError) -> Int32 {
    try loop.addStop(signals, log) { [unowned self] in signalled() }
    while !stopping {
      if case .ended(let status) = phase { return status }
      switch phase {
      case .serving(let disk): try disk.turn()
      case .byNode(let disk): turn(disk)
      default: try loop.turn()
      }
    }
    if case .byNode(let disk) = phase {
      // The kernel keeps what is not durable.
      disk.shutdown()
    }
    guard case .serving(let disk) = phase else { return isOrphan ? 1 : 0 }
    log(.info, "stopping")
    let code = try disk.finish()
    guard code == 0 else {
      fail(WorkerError(.io, "the last flush failed: \(String(cString: strerror(code)))"))
      return 1
    }
    log(.info, "everything is durable, ending")
    return isOrphan ? 1 : 0
  }

  /// A disk that a keeper has made to appear is taken away first: the kernel may have to write out
  /// what it holds, through this worker.
  private func signalled() {
    switch phase {
    case .serving, .prepared, .byNode, .withdrawn:
      guard person != nil else { fallthrough }
      server.send(.stopping)
    default: stopping = true
    }
  }

  private func follow(_ order: WorkerOrder, _ descriptors: LinkDescriptors) {
    if order == .ping { return server.send(.alive) }
    guard !stopping || order == .status else {
      return server.refuse(order.message.verb, "the worker is stopping")
    }
    switch (order, phase) {
    case (.start(let start), .waiting): begin(start, descriptors)
    case (.file, .opening(let opening)):
      guard let file = descriptors.take(.file) else {
        return server.refuse("file", "'file' came without a descriptor")
      }
      take(file, descriptors.take(.witness), opening)
    case (.refuseFile(let reason), .opening): fail(WorkerError(.baseRefused, reason))
    case (.attach, .serving(let disk)):
      if let socket = descriptors.take(.nbd) { return disk.attach(socket) }
      guard let listener = descriptors.take(.listener) else {
        return server.refuse("attach", "'attach' came without a descriptor")
      }
      listen(listener, disk)
    case (.attach, .prepared(let image, let plan)):
      guard let node = descriptors.take(.node) else {
        return server.refuse("attach", "'attach' came without a node")
      }
      serve(node, image, plan)
    case (.clear, .serving(let disk)):
      disk.clear()
      server.send(.status(report(disk)))
    case (.clear, .byNode(let disk)):
      disk.clear()
      server.send(.status(named(disk.report())))
    case (.status, .serving(let disk)): server.send(.status(report(disk)))
    case (.status, .byNode(let disk)): server.send(.status(named(disk.report())))
    case (.descriptors(let index), .serving(let disk)): returnDescriptors(disk.image, index)
    case (.descriptors(let index), .byNode(let disk)): returnDescriptors(disk.image, index)
    case (.stop, _): stopping = true
    default:
      server.refuse(order.message.verb, "'\(order.message.verb)' makes no sense now")
    }
  }

  private func listen(_ listener: consuming Descriptor, _ disk: Disk) {
    do throws(IOError) { try disk.listen(listener) } catch { fail(WorkerError(error)) }
  }

  private func begin(_ start: StartOrder, _ descriptors: LinkDescriptors) {
    if person == nil { log.disk = start.disk }
    order = start
    do throws(WorkerError) {
      if person?.plugin == nil { _ = try FormatName(named: start.format) }
      guard let given = descriptors.take(.store) else {
        throw WorkerError(.offLink, "'start' came without a store")
      }
      let store = try Self.fileStore(given, start.storePath ?? "store")
      if let given = descriptors.take(.witness) {
        witnesses.append(try Self.fileStore(given, store.name))
      }
      // Opening an image may flush it. Should this worker die in that, the next one knows.
      if let raw = descriptors.raw(.pending) {
        isFlushed = try system { () throws(IOError) in try PendingLog.suspect(raw) }
      }
      if let given = descriptors.take(.base) {
        base = try Self.fileStore(given, start.basePath ?? "base")
      }
      open(Opening(order: start, store: store, base: base, descriptors: descriptors))
    } catch { fail(error) }
  }

  private static func fileStore(
    _ descriptor: consuming Descriptor, _ name: String
  ) throws(WorkerError) -> FileStore {
    do throws(IOError) {
      return try FileStore(descriptor, name: name)
    } catch { throw WorkerError(error) }
  }

  private func take(
    _ file: consuming Descriptor, _ witness: consuming Descriptor?, _ opening: Opening
  ) {
    guard let need = opening.need else { return }
    do throws(WorkerError) {
      files.append((need, try Self.fileStore(file, need.path)))
      if let witness { witnesses.append(try Self.fileStore(witness, need.path)) }
      var next = opening
      next.need = nil
      open(next)
    } catch { fail(error) }
  }

  private static func request(_ opening: Opening) throws(WorkerError) -> ImageRequest {
    let order = opening.order
    var request = ImageRequest()
    request.create = order.create
    request.blockSize = order.blockSize
    request.basePath = opening.base?.name
    if let format = order.baseFormat { request.baseFormat = try FormatName(named: format) }
    if let depth = order.depth { request.depth = depth }
    request.readOnly = order.readOnly
    request.force = order.force
    return request
  }

  /// Opens the image as far as the files go that are here.
  private func open(_ opening: Opening) {
    var missing: FileNeed?
    do throws(WorkerError) {
      let image: OpenImage
      do throws(WorkerError) {
        image = try self.image(opening) { need throws(ImageError) in
          if need.role == NamedFile.Role.base.rawValue, let base = opening.base,
            need.path == base.name
          {
            return base
          }
          if let found = files.first(where: { $0.need == need }) { return found.store }
          missing = need
          throw ImageError(.baseMissing, "\(need.path) is not here yet")
        }
      } catch {
        guard let missing else { throw error }
        var waiting = opening
        waiting.need = missing
        phase = .opening(waiting)
        return server.send(.needFile(missing))
      }
      pending = opening.descriptors.take(.pending)
      if opening.order.byNode {
        switch try plan(of: image) {
        case .plan(let plan): return try prepare(image, plan, opening)
        case .hindrance(let why):
          log(.info, "the kernel cannot serve it", ["reason": why])
          hindrance = why
        }
      }
      let disk = try Disk(
        image, pending: pending?.raw, policy: policy(opening.order), loop: loop, log: log,
        debugging: person?.debugging)
      disk.judgeFlush(isFlushed: isFlushed)
      serve(disk, opening.descriptors)
    } catch { fail(error) }
  }

  /// `opener` is asked for what the image names.
  private func image(
    _ opening: Opening, _ opener: OpenImage.Opener
  ) throws(WorkerError) -> OpenImage {
    let request = try Self.request(opening)
    if let plugin = person?.plugin {
      return try imaging { () throws(ImageError) in
        try OpenImage(
          plugin: plugin.name, plugin.entry, store: opening.store, base: opening.base, request)
      }
    }
    let name = try FormatName(named: opening.order.format)
    return try imaging { () throws(ImageError) in
      try OpenImage(name, store: opening.store, request, opener: opener)
    }
  }

  /// How the kernel may serve an image. What a former worker has left in the pending log, it
  /// cannot take up.
  private func plan(of image: OpenImage) throws(WorkerError) -> KernelPlan.Outcome {
    let log = try system { () throws(IOError) -> PendingSummary in
      // A descriptor of its own, since a file store closes what it is given.
      guard let copy = try pending?.duplicate() else { return .nothing }
      return try PendingSummary(FileStore(copy, name: "pending log"))
    }
    guard log.uncommitted == 0 else {
      return .hindrance("has writes in its pending log that are to be committed first")
    }
    return KernelPlan.make(image)
  }

  private func policy(_ order: StartOrder) -> DiskPolicy {
    var policy = DiskPolicy()
    policy.space = SpacePolicy(waits: !order.failsWhenFull, timeout: order.fullTimeout)
    policy.quietTime = order.quietTime
    policy.verifies = !order.isHeld
    policy.witnesses = witnesses
    return policy
  }

  /// Waits for the node of a device that stands on the files of a plan.
  private func prepare(
    _ image: OpenImage, _ plan: KernelPlan, _ opening: Opening
  ) throws(WorkerError) {
    var report = DiskReport(image)
    report.byNode = true
    report.parts = try plan.backings.map { backing throws(WorkerError) in
      DiskPart(
        try role(of: backing.descriptor, opening), isWritable: !backing.readOnly,
        isDirect: backing.isDirect, growth: backing.growth)
    }
    phase = .prepared(image, plan)
    server.send(.ready(named(report)))
  }

  private func role(
    of descriptor: Int32, _ opening: Opening
  ) throws(WorkerError) -> DiskPart.Role {
    if descriptor == opening.store.raw { return .store }
    if descriptor == opening.base?.raw { return .base }
    guard let index = files.firstIndex(where: { $0.store.raw == descriptor }) else {
      throw WorkerError(.offLink, "the image stands on a file that was not handed over")
    }
    return .file(index)
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

  /// Serves a device's node. What the device keeps is taken up first.
  private func serve(_ node: consuming Descriptor, _ image: OpenImage, _ plan: KernelPlan) {
    let name = order?.disk ?? ""
    do throws(WorkerError) {
      let node = try Self.node(node)
      let disk = try NodeDisk(
        node, image, plan, name: name, pending: pending?.raw,
        policy: order.map { policy($0) } ?? DiskPolicy(), loop: loop, log: log)
      disk.judgeFlush(isFlushed: isFlushed)
      disk.conditionChanged = { [unowned self] condition in
        server.send(.event(condition.state, error: condition.reason))
      }
      phase = .byNode(disk)
      log(.info, "serving the kernel's questions")
      server.send(.attached)
    } catch { fail(error) }
  }

  private static func node(_ descriptor: consuming Descriptor) throws(WorkerError) -> Node {
    do throws(IOError) { return try Node(owning: descriptor) } catch { throw WorkerError(error) }
  }

  /// One turn; a device that is gone leaves nothing to do but to hear the order to stop.
  private func turn(_ disk: NodeDisk) {
    do throws(WorkerError) {
      try disk.turn()
      guard try disk.isGone() else { return }
      log(.info, "the device is gone, ending")
      guard person != nil else { return stopping = true }
      // The keeper has something to take away yet, and then orders the end.
      disk.shutdown()
      phase = .withdrawn(disk)
      server.send(.detached)
    } catch {
      disk.shutdown()
      fail(error)
    }
  }

  private func named(_ report: DiskReport) -> DiskReport {
    var report = report
    report.disk = order?.disk ?? ""
    report.version = version
    return report
  }

  private func returnDescriptors(_ image: OpenImage, _ index: Int) {
    var lent: [LinkRole: Int32] = [:]
    var need: FileNeed?
    if index == 0 {
      lent[.store] = image.store.file?.raw
      lent[.base] = base?.raw
      lent[.pending] = pending?.raw
      lent[.witness] = witness(of: image.store.file)
    } else if files.indices.contains(index - 1) {
      need = files[index - 1].need
      lent[.file] = files[index - 1].store.raw
      lent[.witness] = witness(of: files[index - 1].store)
    }
    server.send(.descriptors(files: files.count, file: need), lending: lent)
  }

  private func witness(of store: FileStore?) -> Int32? {
    witnesses.first { $0.name == store?.name }?.raw
  }

  private func report(_ disk: Disk) -> DiskReport {
    var report = disk.report(disk: order?.disk ?? "", version: version)
    report.hindrance = hindrance
    return report
  }

  private func fail(_ error: WorkerError) {
    if person == nil {
      log(.error, "cannot serve the disk", ["code": error.fault.rawValue, "error": error.message])
    } else {
      log(.error, error.message)
    }
    server.send(.failed(error.fault, message: error.message))
    phase = .ended(1)
  }
}
