// SPDX-License-Identifier: Apache-2.0
// A host for some minutes of virtual time: guests come and go, workers and daemons die, calls are
// slow or fail, disks are full. Then the weather calms, and everything has to be as it should be.
//
// The daemon is the real one (Reconciler and what it calls), on one thread and with a clock of its
// own; files, locks, descriptors and the workers' links are real. What is played is the kernel's
// devices, xenstore, the toolstack and the workers.
//
// What is checked after every step: two workers never write one store; whatever a guest was told is
// written is in the store, in its log or in its device; nobody waits without an answer; a device
// with such writes does not go; faults are not failed under a worker that lives. When it is calm:
// every disk is served that xenstore or the admin wants, and no other device, worker, lock, log,
// folder, link or file is left. Named disks: Simulation+Named. Guests that migrate: Simulation+Join.
// Sources: SimulatedHooks.

import BlockIO
import Glibc
import Logging
import SystemIO
import TestSupport
import WorkerLink
import XenStore

@testable import Daemon

/// What happens to the host.
enum Happening: Sendable {
  case attach(DiskID, store: Int, options: String, base: Bool, readOnly: Bool)
  case detach(DiskID)
  /// The admin has a named disk taken down and kept by its name, mostly to be served again later.
  case deactivate(DiskName)
  /// The guest is gone at once, and its entry.
  case crash(DiskID)
  case write(DiskID, Int)
  case flush(DiskID)
  case kill(Int)
  case mute(Int)
  case wedge(Int, Duration)
  case trouble(Int)
  case loseSocket(Int)
  case weather(failing: Int, slow: Int, silent: Int, poor: Int, lasting: Duration)
  case die(Duration)
  case stop(Duration)
  case status
  case recover
  /// The guest migrates to another domain of the same host.
  case migrate(DiskID, to: Int)
  /// The guest gets a stub domain, which has the disk, too.
  case stub(DiskID, Int)
}

/// A happening and its time.
struct Event: Sendable, CustomStringConvertible {
  let at: Duration
  let happening: Happening
  var description: String { "at \(at): \(happening)" }
}

/// A fault that is put into the daemon, to see that it is found.
enum Mutant: String, Sendable, CaseIterable {
  /// A disk that waits is not woken.
  case lostWake
  /// The lock of a store is not given back.
  case keptLock
  /// A worker is started beside the one there is.
  case secondWorker
  /// A vbd is given the disk of another before that one's requests are over.
  case hastyJoin
}

/// What a run came to.
struct Outcome: Sendable {
  var steps: Int
  var notes: [String]
  /// What was wrong; nil: nothing.
  var violation: String?
}

/// One run.
final class Simulation: @unchecked Sendable {  // One thread.
  /// How long the storm lasts.
  static let storm = 90
  private static let domains = 6
  private static let storeCount = 4

  struct Running {
    let life: Life
    let scheduler: SimulatedScheduler
    let poller: SimulatedPoller
    let reconciler: Reconciler
  }

  let timeline: Timeline
  private let weather: Weather
  let host: SimulatedHost
  let store = SimulatedStore()
  let outside: SimulatedScheduler
  let configuration: Configuration
  private let configurationPath: String
  private let events: [Event]
  private let mutant: Mutant?
  private(set) var running: Running?
  private(set) var isStormy = true
  var scripts: [DiskID: Duration] = [:]
  /// The named disks that the admin was told of, and those that he is detaching.
  var promises: [DiskName: Promise] = [:]
  var leaving: Set<DiskName> = []
  /// How they are, as the daemon said last.
  var states: [DiskName: PublicState] = [:]
  private var keptLocks: [FileStore] = []
  private var steps = 0
  private var parts = [0, 0, 0]

  init(seed: UInt64, events: [Event], mutant: Mutant? = nil) throws {
    timeline = Timeline(seed: seed)
    weather = Weather(timeline)
    host = try SimulatedHost(timeline, weather)
    outside = SimulatedScheduler(timeline: timeline, life: Life())
    self.events = events
    self.mutant = mutant
    let folder = host.folder
    configurationPath = folder.file("dmu-xen.toml")
    try TextFile.replace(
      configurationPath,
      with:
        "[daemon]\nrun-directory = \"\(folder.file("run"))\"\n[store]\ncreate-in = [\"\(folder.path)\"]\n"
        + "directories = [\"\(folder.path)\"]\n")
    configuration = try Configuration.load(configurationPath)
    for index in 0..<Simulation.storeCount - 1 {
      try TextFile.replace(folder.file("store\(index)"), with: "an image")
      try TextFile.replace(folder.file("store\(index).data"), with: "its data")
    }
    try TextFile.replace(folder.file("base"), with: "a base")
    try SimulatedHooks.install(configurationPath)
    store.changed = { [unowned self] in tell($0) }
  }

  /// No udev runs there: the daemon makes the links.
  var links: DeviceLinks {
    DeviceLinks(
      folder: host.folder.file("dev"), files: linkFiles, udev: host.folder.file("no-udev"))
  }
  var linkFiles: String { host.folder.file("run/links") }

  /// The happenings of a seed.
  static func events(seed: UInt64) -> [Event] {
    var random = SplitMix64(seed: seed &* 0x5DEE_CE66 &+ 11)
    func disk() -> DiskID {
      guard random.chance(75) else { return .named(names[random.below(names.count)]) }
      return DiskID(domain: 1 + random.below(domains), device: 51712)
    }
    return (0..<70).map { _ in
      let at = Duration.milliseconds(random.below(storm * 1000))
      let happening: Happening
      switch random.below(112) {
      case 0..<28:
        let options = ["", "?transport=nbd", "?transport=dm"][random.below(3)]
        happening = .attach(
          disk(), store: random.below(storeCount), options: options, base: random.chance(60),
          readOnly: random.chance(10))
      case 28..<37: happening = .detach(disk())
      case 37..<40: happening = .deactivate(names[random.below(names.count)])
      case 40..<45: happening = .crash(disk())
      case 45..<62: happening = .write(disk(), 1 + random.below(5))
      case 62..<66: happening = .flush(disk())
      case 66..<74: happening = .kill(random.below(8))
      case 74..<76: happening = .mute(random.below(8))
      case 76..<79: happening = .wedge(random.below(8), .seconds(random.below(40)))
      case 79..<81: happening = .trouble(random.below(8))
      case 81..<83: happening = .loseSocket(random.below(8))
      case 83..<90:
        happening = .weather(
          failing: random.chance(50) ? random.below(30) : 0,
          slow: random.chance(50) ? random.below(30) : 0,
          silent: random.chance(30) ? random.below(50) : 0,
          poor: random.chance(50) ? random.below(60) : 0, lasting: .seconds(random.below(20)))
      case 90..<94: happening = .die(.milliseconds(random.below(5000)))
      case 94..<96: happening = .stop(.milliseconds(random.below(5000)))
      case 96..<98: happening = .status
      case 98..<100: happening = .recover
      case 100..<109: happening = .migrate(disk(), to: 1 + random.below(domains))
      default: happening = .stub(disk(), 1 + random.below(domains))
      }
      return Event(at: at, happening: happening)
    }.sorted { $0.at < $1.at }
  }

  // MARK: The run

  /// From the first event to the last check.
  func run() -> Outcome {
    begin()
    for event in events {
      timeline.add(timeline.number(), after: event.at) { [unowned self] _ in
        host.note("\(event.happening)")
        happen(event.happening)
      }
    }
    if mutant != nil { timeline.after(.seconds(2)) { [unowned self] in mutate() } }
    advance(.seconds(Simulation.storm))
    calm()
    advance(.seconds(190))
    askForStates()
    advance(.seconds(10))
    checkServed()
    for id in store.entries.keys.sorted() { detach(id) }
    for name in promises.keys.sorted() { detach(.named(name)) }
    advance(.seconds(60))
    admin { reconciler in
      do throws(DiskFailure) { _ = try await reconciler.recover(store: nil) } catch {}
    }
    advance(.seconds(100))
    checkGone()
    die()
    checkFiles()
    return Outcome(steps: steps, notes: host.notes, violation: host.violation)
  }

  /// Lets things happen for so long.
  private func advance(_ time: Duration) {
    let end = timeline.elapsed + time
    while host.violation == nil {
      steps += 1
      guard steps < 200_000 else {
        return host.violated("it does not come to rest: \(parts) of tasks, descriptors and timers")
      }
      if timeline.random.chance(10), dispatch() { continue }
      if timeline.runJob() {
        parts[0] += 1
        continue
      }
      if dispatch() {
        parts[1] += 1
        continue
      }
      parts[2] += 1
      guard timeline.fireNext(until: end) else { return }
    }
  }

  private func dispatch() -> Bool {
    let daemon = running?.poller.dispatch() ?? false
    return host.poller.dispatch() || daemon
  }

  private func happen(_ happening: Happening) {
    switch happening {
    case .attach(let id, let index, let options, let base, let readOnly):
      attach(id, index, options, base, readOnly)
    case .detach(let id): detach(id)
    case .deactivate(let name): deactivateNamed(name)
    case .crash(.named(let name)): use(name, false)
    case .crash(let id):
      guard store.entries[id] != nil else { return }
      host.disconnect(id)
      store.remove(id)
    case .write(let id, let count):
      if case .named(let name) = id { use(name, true) }
      if id.vbd == nil || runs(id) { host.write(id, count) }
    case .flush(let id): host.flush(id)
    case .kill(let index): worker(index)?.finish(.signalled(SIGKILL))
    case .mute(let index): worker(index)?.isMute = true
    case .wedge(let index, let time):
      guard let worker = worker(index) else { return }
      worker.isWedged = true
      timeline.after(time) { worker.unwedge() }
    case .trouble(let index):
      guard let worker = worker(index) else { return }
      worker.tell(.noSpace)
      timeline.after(.seconds(3)) { worker.tell(.ready) }
    case .loseSocket(let index): worker(index)?.loseSocket()
    case .weather(let failing, let slow, let silent, let poor, let time):
      (weather.failing, weather.slow, weather.silent, weather.poor) = (failing, slow, silent, poor)
      timeline.after(time) { [weather] in weather.calm() }
    case .die(let time):
      die()
      timeline.after(time) { [unowned self] in begin() }
    case .stop(let time): stop(time)
    case .status:
      admin { reconciler in
        do throws(DiskFailure) { _ = try await reconciler.status(domain: nil) } catch {}
      }
    case .recover:
      admin { reconciler in
        do throws(DiskFailure) { _ = try await reconciler.recover(store: nil) } catch {}
      }
    case .migrate(let id, let domain): migrate(id, to: domain)
    case .stub(let id, let domain): addStub(id, domain)
    }
  }

  private func worker(_ index: Int) -> SimulatedWorker? {
    let living = host.living
    return living.isEmpty ? nil : living[index % living.count]
  }

  /// The storm is over; an admin has what has failed tried again.
  private func calm() {
    host.note("it is calm")
    isStormy = false
    weather.calm()
    for worker in host.living where worker.isWedged { worker.unwedge() }
    admin { reconciler in
      do throws(ConfigurationError) { try await reconciler.reload() } catch {}
    }
    look()
    // Again and again, so that a successor has to wait for its time.
    for time in [60_000, 60_050, 60_200, 60_500] {
      timeline.after(.milliseconds(time)) { [host] in
        for worker in host.living { worker.send(SIGKILL) }
      }
    }
  }

  // MARK: The daemon

  private func begin() {
    guard running == nil else { return }
    host.note("a daemon starts")
    let life = Life()
    let scheduler = SimulatedScheduler(timeline: timeline, life: life)
    let kernel = SimulatedKernel(host: host, life: life)
    let offload = SimulatedOffload(scheduler: scheduler, weather: weather)
    let poller = SimulatedPoller(timeline)
    let world = host
    let log = Logger(label: "dmu-xend") { _ in NotingLog(host: world) }
    let reconciler = Reconciler(
      configuration: configuration, configurationPath: configurationPath,
      host: Host(
        scheduler: scheduler, processes: kernel, offload: offload, mapping: offload,
        flushing: offload, domains: SimulatedXen(store: store, kernel: kernel), traffic: kernel,
        links: links, hooks: SimulatedHooks(host: world, life: life), notifying: offload,
        poller: poller,
        view: SimulatedView(store: store, scheduler: scheduler, weather: weather),
        launcher: kernel, attacher: kernel, mapper: SimulatedMapper(kernel: kernel)),
      manager: nil, log: log)
    running = Running(life: life, scheduler: scheduler, poller: poller, reconciler: reconciler)
    do throws(IOError) { _ = try RunDirectory.prepare(configuration) } catch {
      return host.violated("\(error)")
    }
    scheduler.start { [unowned self] in await serve(reconciler, life, scheduler) }
  }

  /// What the daemon's services do.
  private func serve(
    _ reconciler: Reconciler, _ life: Life, _ scheduler: SimulatedScheduler
  ) async {
    do throws(IOError) { try await reconciler.adopt() } catch {
      guard !life.isDead else { return }
      // The service manager starts it again.
      host.note("the daemon cannot start: \(error)")
      timeline.after(.zero) { [unowned self] in
        guard running?.life === life else { return }
        die()
        timeline.after(.seconds(1)) { [unowned self] in begin() }
      }
      return
    }
    guard !life.isDead else { return }
    life.isOpen = true
    host.note("the daemon is ready")
    scheduler.start { await reconciler.recoverAll() }
    scheduler.start { [unowned self] in await look(reconciler, life, scheduler) }
    while !life.isDead {
      do throws(CancellationError) { try await scheduler.sleep(for: .seconds(5)) } catch { return }
      if !life.isDead { await reconciler.checkLogs() }
    }
  }

  /// At the start, and every minute while events are lost.
  private func look(
    _ reconciler: Reconciler, _ life: Life, _ scheduler: SimulatedScheduler
  ) async {
    var isFirst = true
    while !life.isDead {
      var wait = Duration.seconds(60)
      if isStormy || isFirst {
        do throws(XenStoreError) {
          try await reconciler.lookAtEverything()
          isFirst = false
        } catch { wait = .seconds(1) }
      }
      do throws(CancellationError) { try await scheduler.sleep(for: wait) } catch { return }
    }
  }

  private func look() {
    guard let running, running.life.isOpen else { return }
    let reconciler = running.reconciler
    running.scheduler.start {
      do throws(XenStoreError) { try await reconciler.lookAtEverything() } catch {}
    }
  }

  /// From one instant to the next nothing that it does has an effect; its descriptors are closed.
  private func die() {
    guard let old = running else { return }
    running = nil
    host.note("the daemon dies")
    old.life.isDead = true
    let reconciler = old.reconciler
    Task(executorPreference: timeline) { await reconciler.vanish() }
    // What it waits for is over.
    for number in old.life.timers.sorted() { timeline.end(number, hasPassed: true) }
    old.poller.end()
    var limit = 100_000
    while timeline.runJob() {
      for number in old.life.timers.sorted() { timeline.end(number, hasPassed: true) }
      limit -= 1
      guard limit > 0 else { return host.violated("the tasks of a dead daemon do not end") }
    }
  }

  private func stop(_ time: Duration) {
    guard let old = running else { return }
    let reconciler = old.reconciler
    outside.start { [unowned self] in
      await reconciler.end()
      timeline.after(.zero) { [unowned self] in
        guard running?.life === old.life else { return }
        die()
        timeline.after(time) { [unowned self] in begin() }
      }
    }
  }

  func admin(_ body: @escaping @Sendable (Reconciler) async -> Void) {
    guard let running, running.life.isOpen else { return }
    let reconciler = running.reconciler
    running.scheduler.start { await body(reconciler) }
  }

  private func mutate() {
    guard let mutant else { return }
    // A disk waits for some tenths of a second.
    let isBrief = mutant == .lostWake || mutant == .hastyJoin
    timeline.after(isBrief ? .milliseconds(100) : .seconds(2)) { [unowned self] in
      self.mutate()
    }
    guard let running, running.life.isOpen else { return }
    let reconciler = running.reconciler
    running.scheduler.start { [unowned self] in
      keptLocks += await reconciler.suffer(mutant)
    }
  }

  // MARK: The toolstack

  /// xenstored tells the daemon of a change, soon.
  private func tell(_ id: DiskID) {
    if isStormy, timeline.random.chance(3) { return }
    timeline.after(.milliseconds(timeline.random.below(20))) { [unowned self] in
      guard let running, running.life.isOpen else { return }
      let reconciler = running.reconciler
      running.scheduler.start {
        if let vbd = id.vbd { await reconciler.mark(vbd) } else { await reconciler.mark(id) }
      }
    }
  }

  private func attach(
    _ id: DiskID, _ index: Int, _ options: String, _ base: Bool, _ readOnly: Bool
  ) {
    let format = index == 1 ? "qcow2" : "dscow"
    let path = host.folder.file("store\(index)")
    // The last one is not there at first.
    let hasBase = base || index == Simulation.storeCount - 1
    var (own, under) = (path, host.folder.file("base"))
    if index == SimulatedHooks.storeIndex { (own, under) = ("fake//store\(index)", "fake//base") }
    let params = "dmu:\(format)\(options):\(own)" + (hasBase ? ":\(under)" : "")
    if case .named(let name) = id { return attachNamed(name, params, readOnly: readOnly) }
    guard store.entries[id] == nil, scripts[id] == nil else { return }
    if let domain = id.vbd?.domain { store.create(domain, nil, DomainState(isPaused: false)) }
    store.add(id, SimulatedStore.Entry(params: params, readOnly: readOnly))
    scripts[id] = timeline.elapsed
    outside.start { [unowned self] in
      await script(id)
      scripts[id] = nil
    }
  }

  /// The block script's `add`, and what the toolstack makes of its answer.
  func script(_ id: DiskID) async {
    let end = timeline.elapsed + .seconds(40)
    while timeline.elapsed < end {
      guard let current = running, current.life.isOpen else {
        await pause(.milliseconds(200))
        continue
      }
      let asked = timeline.elapsed
      let result = await current.reconciler.attach(id, boots: true)
      let took = timeline.elapsed - asked
      if took > configuration.attachTimeout + .seconds(5) {
        host.violated("the script of \(id) waited \(took) for its answer")
      }
      switch result {
      case .success(let device):
        guard let entry = store.entries[id], !entry.isGoing else { return }
        host.note("\(id) is attached: \(device.path)")
        checkDevice(id, entry.params, device)
        checkShared(id, device)
        host.connect(id, to: device)
        return store.change(id) {
          ($0.device, $0.hotplug, $0.state) = (device.hexadecimal, "connected", "4")
        }
      case .failure(let failure):
        if failure.code == .daemon || current.life.isDead {
          await pause(.milliseconds(200))
          continue
        }
        host.note("\(id) is refused: \(failure.sentence)")
        return await refuse(id)
      }
    }
    await refuse(id)
  }

  /// A guest gets the store that it was attached.
  func checkDevice(_ id: DiskID, _ params: String, _ device: DeviceNode) {
    let served =
      device.kind == .dm
      ? host.mapped.values.first { $0.node == device }?.stores.first
      : host.living.last { $0.disk == host.disk(of: device) && $0.order != nil }?.store
    guard let served, !isMeant(params, by: served) else { return }
    host.violated("\(id) is given \(served) in place of \(params)")
  }

  private func refuse(_ id: DiskID) async {
    store.change(id) { $0.hotplug = "error" }
    await pause(.milliseconds(500))
    await released(id)
    if store.entries[id]?.hotplug == "error" { store.remove(id) }
  }

  func detach(_ id: DiskID) {
    if case .named(let name) = id { return detachNamed(name) }
    guard let entry = store.entries[id], !entry.isGoing, entry.hotplug == "connected" else {
      return
    }
    store.change(id) { ($0.state, $0.online) = ("5", "0") }
    outside.start { [unowned self] in
      await pause(.milliseconds(50 + timeline.random.below(500)))
      host.disconnect(id)
      store.change(id) { $0.state = "6" }
      await pause(.milliseconds(timeline.random.below(300)))
      await released(id)
      if let entry = store.entries[id], entry.isGoing { store.remove(id) }
    }
  }

  /// The script's `remove`.
  private func released(_ id: DiskID) async {
    guard let running, running.life.isOpen else { return }
    await running.reconciler.detach(id)
  }

  func pause(_ time: Duration) async {
    do throws(CancellationError) { try await outside.sleep(for: time) } catch {}
  }

  // MARK: When it is calm

  private func checkServed() {
    guard host.violation == nil else { return }
    checkNamesServed()
    checkSources()
    for (id, since) in scripts { host.violated("\(id) waits for its answer since \(since)") }
    for (id, entry) in store.entries where entry.hotplug == "connected" && !entry.isGoing {
      guard entry.told?.state == .ready else {
        host.violated(
          "\(id) is wanted and \(entry.told?.state.rawValue ?? "nothing"): \(entry.told?.error ?? "")"
        )
        continue
      }
      let nodes = host.mapped.values.map(\.node) + host.sockets.values.map(\.node)
      guard nodes.contains(where: { $0.hexadecimal == entry.device }) else {
        host.violated("\(id) has no device")
        continue
      }
      let disk = host.owner(of: id)
      if !host.living.contains(where: { $0.disk == disk && ($0.servesNode || $0.order != nil) }) {
        host.violated("\(id) has no worker")
      }
    }
  }

  private func checkGone() {
    guard host.violation == nil else { return }
    checkNamesGone()
    checkDetached()
    for id in store.entries.keys { host.violated("the toolstack cannot take \(id) away") }
    for device in host.mapped.values { host.violated("\(device.node.path) is left") }
    for device in host.sockets.values { host.violated("\(device.node.path) is left") }
    for worker in host.living { host.violated("worker \(worker.pid) of \(worker.disk) is left") }
    for path in host.stores.keys.sorted() { host.checkWrites(path, held: 0) }
    do throws(IOError) {
      for folder in [configuration.disksDirectory, configuration.recoveryDirectory] {
        for name in try Folder.names(folder) { host.violated("\(folder)/\(name) is left") }
      }
      for entry in try PendingEntry.all(configuration.registry) {
        host.violated("the log \(entry.key) is left")
      }
    } catch { host.violated("\(error)") }
    for index in 0..<Simulation.storeCount {
      let path = host.folder.file("store\(index)")
      guard access(path, F_OK) == 0 else { continue }
      do {
        guard case .opened = try Images.open(Spec("dmu:dscow:\(path)"), readOnly: false) else {
          host.violated("\(path) is locked")
          continue
        }
      } catch { host.violated("\(error)") }
    }
  }

  /// Of a daemon that has ended nothing is open.
  private func checkFiles() {
    guard host.violation == nil else { return }
    for path in FileUsers.descriptors(of: getpid()) {
      guard let target = FileUsers.link(path), target.hasPrefix(host.folder.path + "/") else {
        continue
      }
      host.violated("\(target) is open")
    }
  }
}

/// Has the daemon's log in the trace.
private struct NotingLog: LogHandler {
  let host: SimulatedHost
  var metadata: Logger.Metadata = [:]
  var logLevel = Logger.Level.info

  subscript(metadataKey key: String) -> Logger.Metadata.Value? {
    get { metadata[key] }
    set { metadata[key] = newValue }
  }

  func log(event: LogEvent) {
    let facts = metadata.merging(event.metadata ?? [:]) { $1 }.sorted { $0.key < $1.key }
    let text = facts.map { "\($0.key)=\($0.value)" }.joined(separator: " ")
    host.note("  \(event.message) \(text)")
  }
}

extension Reconciler {
  /// As if the process were killed.
  func vanish() {
    refuseAllWaiters()
    ending = true
    for disk in Array(table.values) + recovering.values { disk.worker?.channel.close() }
  }

  /// Has a fault.
  func suffer(_ mutant: Mutant) async -> [FileStore] {
    var kept: [FileStore] = []
    for disk in table.values {
      switch mutant {
      case .lostWake: disk.timer?.cancel()
      case .keptLock: kept += [disk.store?.guardian].compactMap { $0 }
      case .secondWorker:
        guard case .serving = disk.phase, !disk.busy else { continue }
        await restart(disk)
        return []
      case .hastyJoin:
        guard let other = disk.host, !disk.hasJoined, other.device != nil else { continue }
        disk.hasJoined = true
        enter(disk, .joined(other.id))
      }
    }
    return kept
  }
}
