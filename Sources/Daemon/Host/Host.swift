// SPDX-License-Identifier: Apache-2.0
// The host as the reconciler has it: time, threads, descriptors, processes, devices, xenstore. All
// that a disk's way depends on comes from here, so that a simulation can have the same reconciler
// run on one thread, in a time of its own, with every event in an order that a seed decides.

import BlockIO
import Glibc
internal import Logging
package import SystemIO
internal import WorkerLink
internal import XenStore

/// Time, and where tasks run.
protocol Scheduling: Sendable {
  /// The instant, on a clock that is never set.
  var now: ContinuousClock.Instant { get }
  /// Seconds since 1970.
  var unixTime: Int64 { get }
  /// Waits. Throws when the task is cancelled.
  func sleep(for time: Duration) async throws(CancellationError)
  /// Blocks the thread, which has to be one that may.
  func block(for time: Duration)
  /// Begins a task of its own.
  @discardableResult
  func start(_ body: @escaping @Sendable () async -> Void) -> Task<Void, Never>
}

extension Scheduling {
  /// Does something later, unless the task is cancelled before.
  @discardableResult
  func after(
    _ time: Duration, _ body: @escaping @Sendable () async -> Void
  ) -> Task<Void, Never> {
    start {
      do throws(CancellationError) { try await sleep(for: time) } catch { return }
      await body()
    }
  }
}

/// The clocks and the threads of the system.
struct SystemScheduler: Scheduling {
  var now: ContinuousClock.Instant { .now }
  var unixTime: Int64 { Int64(time(nil)) }

  func sleep(for time: Duration) async throws(CancellationError) {
    do { try await Task.sleep(for: time) } catch { throw CancellationError() }
  }

  func block(for time: Duration) {
    let (seconds, attoseconds) = time.components
    usleep(UInt32(seconds * 1_000_000 + attoseconds / 1_000_000_000_000))
  }

  func start(_ body: @escaping @Sendable () async -> Void) -> Task<Void, Never> {
    Task { await body() }
  }
}

/// Runs what may block.
protocol Offloading: Sendable {
  /// Runs the work elsewhere and waits for it without blocking the caller's thread.
  func run<Value: Sendable, Failure: Error>(
    _ work: @escaping @Sendable () throws(Failure) -> Value
  ) async throws(Failure) -> Value
}

/// Names one watched descriptor.
struct PollRegistration: Hashable, Sendable {
  let number: UInt64
}

/// Watches descriptors for input.
protocol Polling: Sendable {
  /// Calls the handler whenever there is input or the other end has gone, until it returns
  /// false.
  @discardableResult
  func add(_ raw: Int32, _ handler: @escaping @Sendable () -> Bool) -> PollRegistration
  /// Ends a registration, before its descriptor is closed. Twice is once.
  func remove(_ registration: PollRegistration)
}

/// A process that is followed.
package protocol HostProcess: Sendable {
  /// Process id.
  var pid: Int32 { get }
  /// With `pid` its name for ever.
  var startTime: UInt64 { get }
  /// A descriptor, lent, that polls readable when the process has ended.
  var raw: Int32 { get }
  /// Whether it has ended.
  var hasEnded: Bool { get }
  /// Sends a signal; to a process that has ended, nothing happens.
  func send(_ signal: Int32) throws(IOError)
  /// Collects a child that has ended; nil while it runs. Throws ECHILD for no child.
  func reap() throws(IOError) -> ExitStatus?
  /// Waits for a child to end, at most so long; nil when it did not. Blocks.
  func wait(milliseconds: Int32) throws(IOError) -> ExitStatus?
  /// The user that it runs as.
  func user() throws(IOError) -> UInt32
}

extension ProcessHandle: HostProcess {}

/// The processes of the host, as far as they are looked for. All calls block.
protocol HostProcesses: Sendable {
  /// Takes hold of a process that runs. Throws ESRCH when there is none of that start time.
  func process(_ pid: Int32, startTime: UInt64) throws(IOError) -> any HostProcess
  /// Connects to a worker that listens at a path, which is not trusted.
  func link(at path: String) throws(IOError) -> LinkConnection
  /// Every supervised worker.
  func workers() throws(IOError) -> [any WorkerAtLarge]
  /// Ends what a worker has left. Throws EBUSY when something of it does not end.
  func end(_ remains: WorkerRemains, _ log: Logger) throws(IOError)
  /// Ends whoever listens at a link without being known. Throws EBUSY when it does not end.
  func endListener(at link: String) throws(IOError)
  /// The programs that have a file open, in words.
  func programs(using identity: FileIdentity) -> [String]
}

/// A worker that runs although no record names it.
protocol WorkerAtLarge: Sendable {
  var process: any HostProcess { get }
  /// The disk that its link was made for.
  var disk: DiskID { get }
  /// Where its link was bound.
  var link: String { get }
  /// Whether it has a file or device open.
  func has(_ identity: FileIdentity) -> Bool
  /// Opens its pending log, whether or not the file still has its name; nil when it has none.
  func openLog() throws(IOError) -> FileStore?
  /// Has it commit and end; kills it when that takes longer. False when it lives on. Blocks.
  func end(within limit: Duration) throws(IOError) -> Bool
}

extension WorkerAtLarge {
  /// The directory that the daemon which started it kept for the disk.
  var directory: DiskDirectory {
    DiskDirectory(path: String(link.dropLast("/link".count)))
  }
}

/// The processes that the kernel tells of in /proc.
struct SystemProcesses: HostProcesses {
  func process(_ pid: Int32, startTime: UInt64) throws(IOError) -> any HostProcess {
    try ProcessHandle(pid: pid, startTime: startTime)
  }

  func link(at path: String) throws(IOError) -> LinkConnection { try LinkConnection(path: path) }

  func workers() throws(IOError) -> [any WorkerAtLarge] { try FoundWorker.all() }

  func end(_ remains: WorkerRemains, _ log: Logger) throws(IOError) { try remains.end(log) }

  func endListener(at path: String) throws(IOError) {
    let link: LinkConnection
    do throws(IOError) { link = try LinkConnection(path: path) } catch {
      switch error.code {
      case ENOENT, ECONNREFUSED: return
      case ETIMEDOUT: throw IOError(EBUSY, "end", "the worker at \(path)")
      default: throw error
      }
    }
    do throws(LinkError) {
      try link.send(.stop)
      // Whoever has the link may never read it: all disks wait for this one.
      let limit = ContinuousClock.now + .seconds(10)
      while ContinuousClock.now < limit {
        if case .end = try link.receive(milliseconds: 1000) { return }
      }
    } catch {
      // Gone in the middle of a word is gone, too.
      if case .io = error { return }
    }
    throw IOError(EBUSY, "end", "the worker at \(path)")
  }

  func programs(using identity: FileIdentity) -> [String] { FileUsers.programs(of: identity) }
}

/// What the daemon reads of xenstore and writes into it; see XenStoreView.
protocol StoreView: Sendable {
  /// Looks at one vbd. Nil: the store has forgotten us.
  func look(_ vbd: VBD) async throws(XenStoreError) -> Sight?
  /// Looks at every dmu vbd there is, and at those known. Nil: the store has forgotten us.
  func lookAll(and known: [VBD: Sight?]) async throws(XenStoreError) -> [VBD: Sight]?
  /// The vbds of domains that exist, whoever serves them, that use a device ("fd:5").
  func users(of device: String) async throws(XenStoreError) -> [VBD]
  /// Writes a vbd's nodes. False, and nothing happens, when the entry has gone.
  func publish(_ vbd: VBD, _ nodes: DiskNodes) async throws(XenStoreError) -> Bool
  /// The vbds that have nodes of ours.
  func toldDisks() async throws(XenStoreError) -> [VBD]
  /// Gives the backend a disk's device; false, and nothing happens, when it waits for none.
  func connect(_ vbd: VBD, _ device: DeviceNode) async throws(XenStoreError) -> Bool
  /// Says in a disk's entry why it cannot be had.
  func refuse(_ vbd: VBD, _ sentence: String) async throws(XenStoreError)
  /// Deletes the entry of a vbd that has closed.
  func delete(_ vbd: VBD) async throws(XenStoreError)
  /// Takes a vbd's nodes back.
  func withdraw(_ vbd: VBD) async throws(XenStoreError)
  /// Tells of the daemon itself. False when the store has forgotten us, unless it is `anew`.
  func publishSelf(
    state: String, disks: Int, pending: Int, anew: Bool
  ) async throws(XenStoreError) -> Bool
  /// The domain's name, nil when it has none.
  func name(of domain: Int) async throws(XenStoreError) -> String?
  /// How a domain is related to others.
  func relation(of domain: Int) async throws(XenStoreError) -> DomainRelation
}

/// All of it. The defaults are the real things.
struct Host: Sendable {
  var scheduler: any Scheduling = SystemScheduler()
  var processes: any HostProcesses = SystemProcesses()
  /// For calls that may block, each with a thread to itself.
  var offload: any Offloading = Offload()
  /// The device-mapper's library takes one call at a time.
  var mapping: any Offloading = Offload(threads: 1)
  /// Flushes of devices that are about to go may hang for as long as what is below them.
  var flushing: any Offloading = Offload(threads: 32)
  /// What the hypervisor says of domains.
  var domains: any DomainStates = XenDomains()
  /// What is under way on devices.
  var traffic: any DeviceTraffic = BackendTraffic()
  /// Where named disks have their links.
  var links = DeviceLinks.host
  /// Runs the admin's programs.
  var hooks: any HookRunning = ProcessHooks()
  /// Hooks that are told of events: some at a time, so that those that hang take no more threads.
  var notifying: any Offloading = Offload(threads: 16)
  var poller: any Polling
  var view: any StoreView
  var launcher: any WorkerLauncher
  var attacher: any DeviceAttacher
  var mapper: any DeviceMapping
}
