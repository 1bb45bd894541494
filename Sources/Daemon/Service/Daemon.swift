// SPDX-License-Identifier: Apache-2.0
// The whole daemon as a group of services: xenstore's events, the reconciler's looks, the
// control socket, signals. They start in this order and end in the reverse one.

import Glibc
internal import Logging
internal import ServiceLifecycle
internal import SystemIO
internal import UnixSignals
internal import XenStore

/// dmu-xend.
package struct Daemon: Sendable {
  /// What a run needs besides its configuration; the defaults are the real things.
  package struct Surroundings: Sendable {
    /// Starts workers.
    package var launcher: any WorkerLauncher = ProcessLauncher()
    /// Makes devices.
    package var attacher: any DeviceAttacher = KernelAttacher()
    /// Makes devices of the device-mapper.
    package var mapper: any DeviceMapping = KernelMapper()
    /// xenstored's socket; nil: where libxenstore finds it.
    package var xenStoreSocket: String?
    /// The file that is locked so that there is one daemon on a host; nil: none, for a daemon
    /// that makes no devices.
    package var hostLock: String? = "/run/dmu-xend.lock"
    var standInDevices: StandInAttacher?

    /// The real things.
    package init() {}

    /// Makes no devices, only keeps their sockets, and opens a door to them.
    /// With a folder there is a device-mapper, too, which keeps its devices there.
    package mutating func standIn(mapperFolder: String?) {
      let attacher = StandInAttacher()
      self.attacher = attacher
      mapper = StandInMapper(folder: mapperFolder)
      standInDevices = attacher
      hostLock = nil
    }
  }

  private let configuration: Configuration
  private let configurationPath: String
  private let surroundings: Surroundings

  /// A daemon with the configuration of a file. Throws what is wrong with the file.
  package init(
    configurationPath: String, surroundings: Surroundings = Surroundings()
  ) throws(ConfigurationError) {
    configuration = try Configuration.load(configurationPath)
    self.configurationPath = configurationPath
    self.surroundings = surroundings
  }

  /// Runs until a signal ends it. Workers and devices stay.
  package func run() async throws {
    let variables = ServiceManager.takeVariables()
    // Whoever reads the log may go away; that is no reason to end.
    signal(SIGPIPE, SIG_IGN)
    LogLevel.current = configuration.logLevel
    var log = Logger(label: "dmu-xend") { _ in JournalLog() }
    log.notice("dmu-xend starts", metadata: ["version": "\(Version.text)"])
    log.logLevel = configuration.logLevel
    try raiseLimits(log)
    let manager = try ServiceManager(variables, log: log)
    let hostLock = try surroundings.hostLock.map { path throws(IOError) in
      try DaemonLock(path, "on this host (\(path))")
    }
    let keeper = RunDirectoryKeeper(configuration, try RunDirectory.prepare(configuration))
    do throws(IOError) { try RunReserve.establish(in: configuration.runDirectory) } catch {
      log.error("the run directory has no space", metadata: ["reason": "\(error)"])
    }
    if let standIn = surroundings.standInDevices {
      log.warning("devices are stand-ins: no guest can use them")
      try StandInDoor.open(standIn, runDirectory: configuration.runDirectory)
    }
    var wish = XenStoreClient.Configuration(socketPath: surroundings.xenStoreSocket)
    // In a driver domain each request takes a turn of two domains, and one that is given up takes
    // the watches with it.
    if XenStoreClient.goesByDevice(socketPath: surroundings.xenStoreSocket) {
      wish.deadline = .seconds(20)
    }
    let connectionLog = log
    wish.onConnectionChange = { state in
      switch state {
      case .connecting(let failure?):
        connectionLog.warning("xenstored cannot be reached", metadata: ["reason": "\(failure)"])
      case .connected: connectionLog.info("connected to xenstored")
      case .connecting(nil), .closed: break
      }
    }
    let client = try XenStoreClient(wish)
    defer { client.close() }
    var host = Host(
      poller: try Poller(), view: XenStoreView(client: client), launcher: surroundings.launcher,
      attacher: surroundings.attacher, mapper: surroundings.mapper)
    if surroundings.standInDevices != nil {
      let stage = StandInXen(folder: configuration.runDirectory + "/stand-in-xen")
      (host.domains, host.traffic) = (stage, stage)
      host.links = DeviceLinks(
        folder: configuration.runDirectory + "/dev", files: configuration.runDirectory + "/links",
        udev: configuration.runDirectory + "/no-udev")
    }
    let reconciler = Reconciler(
      configuration: configuration, configurationPath: configurationPath, host: host,
      manager: manager, log: log)
    // Before anybody can ask for a disk: what is there already must be known.
    try await reconciler.adopt()
    let recovery = Task { await reconciler.recoverAll() }
    defer { recovery.cancel() }
    var services: [any Service] = [
      ReconcileService(reconciler: reconciler, client: client, keeper: keeper, log: log),
      ControlServer(
        path: configuration.controlSocket, reconciler: reconciler, keeper: keeper,
        manager: manager, log: log),
      ReloadService(reconciler: reconciler, manager: manager, log: log),
    ]
    if let address = configuration.metricsListen {
      services.append(MetricsServer(address: address, reconciler: reconciler, log: log))
    }
    if let manager { services.append(EndService(manager: manager)) }
    let pings = Task { await manager?.ping { await reconciler.answer() } }
    defer { pings.cancel() }
    // Its failures are thrown; its steps are nobody's concern.
    let quiet = Logger(label: "services") { _ in SwiftLogNoOpLogHandler() }
    let group = ServiceGroup(
      configuration: ServiceGroupConfiguration(
        services: services, gracefulShutdownSignals: [.sigterm, .sigint], logger: quiet))
    try await group.run()
    log.notice("dmu-xend ends; disks and their workers go on")
    keeper.keepUntilHere()
    hostLock?.keepUntilHere()
  }

  /// Five descriptors a disk: the usual soft limit of 1024 is soon reached.
  private func raiseLimits(_ log: Logger) throws {
    var limits = rlimit()
    guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limits) == 0 else {
      throw IOError.last("read the limit of open files")
    }
    limits.rlim_cur = limits.rlim_max
    guard setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limits) == 0 else {
      throw IOError.last("raise the limit of open files")
    }
    log.debug("open files", metadata: ["limit": "\(limits.rlim_cur)"])
  }
}

/// The run directory, which one daemon has to itself.
enum RunDirectory {
  /// Makes it if it is missing, and locks it. Throws EAGAIN when a daemon runs already.
  static func prepare(_ configuration: Configuration) throws(IOError) -> DaemonLock {
    // Tools that are not root may ask for the log of a store, whose name they know, and see
    // nothing else.
    for (path, mode) in [
      (configuration.runDirectory, mode_t(0o711)), (configuration.disksDirectory, 0o700),
      (configuration.recoveryDirectory, 0o700), (configuration.sourceRecords.folder, 0o700),
      (configuration.hookDirectory, 0o700),
    ] {
      guard mkdir(path, mode) == 0 || errno == EEXIST else { throw IOError.last("make", path) }
      guard chmod(path, mode) == 0 else { throw IOError.last("set the mode of", path) }
    }
    return try DaemonLock(
      configuration.runDirectory + "/lock", "in \(configuration.runDirectory)")
  }
}

/// Hears xenstore's events and looks at everything now and then.
private struct ReconcileService: Service {
  let reconciler: Reconciler
  let client: XenStoreClient
  let keeper: RunDirectoryKeeper
  let log: Logger

  func run() async throws {
    try await cancelWhenGracefulShutdown {
      try await withThrowingDiscardingTaskGroup { tasks in
        tasks.addTask { try await watchDisks() }
        tasks.addTask { try await watchDomains() }
        tasks.addTask { await look() }
        tasks.addTask { await watchLogs() }
      }
    }
    await reconciler.end()
  }

  /// Each event under backend/vbd marks a disk.
  private func watchDisks() async throws {
    while !Task.isCancelled {
      do throws(XenStoreError) {
        for try await event in try await client.watch(XenStoreView.root) {
          switch event {
          case .resync: try await reconciler.lookAtEverything()
          case .changed(let path):
            if let vbd = VBD(path: path) {
              if !XenStoreView.isOurs(path) { await reconciler.mark(vbd) }
            } else {
              try await reconciler.lookAtEverything()
            }
          }
        }
        return
      } catch { await pause(error) }
    }
  }

  /// A domain that has gone takes its disks with it.
  private func watchDomains() async throws {
    while !Task.isCancelled {
      do throws(XenStoreError) {
        for try await _ in try await client.watch("@releaseDomain") {
          try await reconciler.lookAtEverything()
        }
        return
      } catch { await pause(error) }
    }
  }

  /// A worker that fills the run directory is not given more than a moment, and a directory that
  /// has gone is made anew.
  private func watchLogs() async {
    while !Task.isCancelled {
      do { try await Task.sleep(for: .seconds(1)) } catch { return }
      let (keeper, log) = (keeper, log)
      do throws(IOError) {
        let isNew = try await reconciler.offload.run { () throws(IOError) in try keeper.look(log) }
        if isNew {
          await reconciler.rewriteWishes()
          await reconciler.rewriteSources()
        }
      } catch { log.error("the run directory cannot be made", metadata: ["error": "\(error)"]) }
      await reconciler.checkLogs()
    }
  }

  private func look() async {
    while !Task.isCancelled {
      await reconciler.sweepLoopMarks()
      await reconciler.endMeasuring()
      let interval = await reconciler.configuration.lookInterval
      do { try await Task.sleep(for: interval) } catch { return }
      do throws(XenStoreError) { try await reconciler.lookAtEverything() } catch {
        log.warning("cannot look at xenstore", metadata: ["error": "\(error)"])
      }
    }
  }

  /// Ends early when the daemon does, which is no error.
  private func pause(_ error: XenStoreError) async {
    if Task.isCancelled { return }
    log.warning("cannot watch xenstore", metadata: ["error": "\(error)"])
    do { try await Task.sleep(for: .seconds(1)) } catch { return }
  }
}

/// SIGHUP means: read the configuration anew.
private struct ReloadService: Service {
  let reconciler: Reconciler
  let manager: ServiceManager?
  let log: Logger

  func run() async throws {
    for await _ in await UnixSignalsSequence(trapping: .sighup).cancelOnGracefulShutdown() {
      manager?.reloading()
      defer { manager?.ready() }
      do throws(ConfigurationError) { try await reconciler.reload() } catch {
        log.error(
          "the running configuration stays in force", metadata: ["error": "\(error)"])
      }
    }
  }
}
