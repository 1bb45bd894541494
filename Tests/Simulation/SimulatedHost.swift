// SPDX-License-Identifier: Apache-2.0
// The kernel of a simulated host: devices of both kinds, processes, and what is true of each store.

import Glibc
import LinuxBlock
import Logging
import SystemIO
import TestSupport
import WorkerLink

@testable import Daemon

/// What guests believe of a store's content, and what is in it.
struct Truth {
  /// Writes that were acknowledged.
  var acknowledged = 0
  /// Those of them that are in the store, whoever dies.
  var committed = 0
}

/// What outlives every daemon.
final class SimulatedHost: @unchecked Sendable {  // One thread.
  /// A device of either kind.
  struct Device {
    var node: DeviceNode
    var identifier = ""
    var isLive = false
    /// The vbds of guests that are connected, or the named disk that a guest uses.
    var openers: Set<DiskID> = []
    var isOpen: Bool { !openers.isEmpty }
    /// Requests wait, by order of the daemon.
    var isHeld = false
    var isReadOnly = false
    /// The kernel's end of an nbd device's socket, or its end of a node.
    var end: PassedDescriptor?
    /// What a mapped device stands on, with its locks.
    var backings: [PassedDescriptor] = []
    var stores: [String] = []
    var uncommitted = 0
  }

  let timeline: Timeline
  let poller: SimulatedPoller
  let weather: Weather
  let folder: TemporaryFolder
  /// By path.
  var stores: [String: Truth] = [:]
  var workers: [SimulatedWorker] = []
  /// What the hook has attached, and whether it may be written to.
  var attached: [String: Bool] = [:]
  var sockets: [UInt32: Device] = [:]
  var mapped: [DiskID: Device] = [:]
  /// Devices on which a request is under way that takes its time.
  var busy: [DeviceNode: Int] = [:]
  /// How many requests backends have taken.
  var taken: [VBD: UInt64] = [:]
  private(set) var violation: String?
  private(set) var notes: [String] = []
  private var lastPid: Int32 = 10_000_000
  private var lastIndex: UInt32 = 0

  init(_ timeline: Timeline, _ weather: Weather) throws(IOError) {
    self.timeline = timeline
    self.weather = weather
    poller = SimulatedPoller(timeline)
    folder = try TemporaryFolder()
  }

  var living: [SimulatedWorker] { workers.filter { !$0.hasEnded } }

  /// A line of the trace.
  func note(_ text: String) {
    let (seconds, fraction) = timeline.elapsed.components
    let milliseconds = String(fraction / 1_000_000_000_000_000 + 1000).dropFirst()
    notes.append("\(seconds).\(milliseconds) \(text)")
    if notes.count > 4000 { notes.removeFirst(2000) }
  }

  /// Something is so that may never be.
  func violated(_ what: String) {
    note("WRONG: \(what)")
    if violation == nil { violation = what }
  }

  // MARK: What may never be

  /// Never two writers.
  func checkWriters() {
    var seen: [FileIdentity: SimulatedWorker] = [:]
    for worker in living {
      guard let store = worker.written else { continue }
      if let other = seen[store] {
        violated("two workers write \(worker.store): \(other.pid) and \(worker.pid)")
      }
      seen[store] = worker
    }
  }

  /// A worker begins: everything that was acknowledged is in the store, in the log that it was
  /// given, or in a device.
  func checkLog(of worker: SimulatedWorker, _ log: Int32) {
    checkWrites(worker.store, held: SimulatedLog.count(log))
  }

  func checkWrites(_ store: String, held: Int) {
    let truth = stores[store] ?? Truth()
    let inDevices = mapped.values.filter { $0.stores.first == store }.reduce(0) {
      $0 + $1.uncommitted
    }
    guard truth.acknowledged != truth.committed + held + inDevices else { return }
    violated(
      "of \(truth.acknowledged) writes to \(store) \(truth.committed) are in it, \(held) in its log"
        + " and \(inDevices) in its device")
  }

  // MARK: What guests do

  /// The disk whose device a vbd, or the guest of a named disk, is connected to.
  func owner(of user: DiskID) -> DiskID? {
    if let disk = mapped.first(where: { $0.value.openers.contains(user) })?.key { return disk }
    return sockets.values.first { $0.openers.contains(user) }.flatMap { Self.disk($0) }
  }

  /// The disk of a device that is served by a socket.
  func disk(of node: DeviceNode) -> DiskID? {
    sockets.values.first { $0.node == node }.flatMap { Self.disk($0) }
  }

  fileprivate static func disk(_ device: Device) -> DiskID? {
    DiskID(device.identifier.dropFirst("dmu-xen ".count))
  }

  func write(_ user: DiskID, _ count: Int) {
    guard let disk = owner(of: user) else { return }
    if let vbd = user.vbd { taken[vbd, default: 0] += 1 }
    if let device = mapped[disk] {
      guard device.isLive, !device.isHeld, !device.isReadOnly, let store = device.stores.first
      else { return }
      mapped[disk]?.uncommitted += count
      stores[store, default: Truth()].acknowledged += count
      return
    }
    living.first { $0.disk == disk && $0.servesSocket }?.acknowledge(count)
  }

  /// A write that a backend has taken and that takes its time, whatever becomes of the guest.
  func writeLate(_ user: DiskID, after time: Duration) {
    let devices = mapped.values.map { $0 } + sockets.values.map { $0 }
    guard let node = devices.first(where: { $0.openers.contains(user) })?.node else { return }
    busy[node, default: 0] += 1
    timeline.after(time) { [self] in
      write(user, 1)
      busy[node, default: 1] -= 1
      note("a late write of \(user) is over")
    }
  }

  func flush(_ user: DiskID) {
    let disk = owner(of: user) ?? user
    guard let worker = living.first(where: { $0.disk == disk && !$0.isMute && !$0.isWedged }) else {
      return
    }
    if worker.servesNode { return commit(disk) }
    worker.commit()
  }

  fileprivate func commit(_ disk: DiskID) {
    guard let device = mapped[disk], let store = device.stores.first else { return }
    stores[store, default: Truth()].committed += device.uncommitted
    mapped[disk]?.uncommitted = 0
  }

  /// A guest gets a device.
  func connect(_ user: DiskID, to node: DeviceNode) {
    for (disk, device) in mapped where device.node == node {
      mapped[disk]?.openers.insert(user)
    }
    for (index, device) in sockets where device.node == node {
      sockets[index]?.openers.insert(user)
    }
  }

  /// A guest lets go of its device.
  func disconnect(_ user: DiskID) {
    for disk in mapped.keys { mapped[disk]?.openers.remove(user) }
    for index in sockets.keys { sockets[index]?.openers.remove(user) }
  }

  /// Whether a guest has a device.
  func isConnected(_ user: DiskID) -> Bool { owner(of: user) != nil }

  // MARK: Processes

  func launch(
    _ disk: DiskID, _ listener: Int32, _ user: UInt32, link: String, _ life: Life
  ) throws(IOError) -> FollowedWorker {
    lastPid += 1
    let worker = try SimulatedWorker(
      disk, pid: lastPid, user: user, listener: listener, link: link, parent: life, host: self)
    workers.removeAll { $0.hasEnded }
    workers.append(worker)
    note("worker \(worker.pid) of \(disk) starts")
    return FollowedWorker(worker: worker, life: life)
  }

  fileprivate func newIndex() -> UInt32 {
    lastIndex += 1
    return lastIndex
  }
}

/// A daemon's way to the kernel, which ends with it.
struct SimulatedKernel: Sendable {
  let host: SimulatedHost
  let life: Life

  fileprivate func check() throws(IOError) {
    if life.isDead || host.weather.fails(), let error = host.weather.error(IOError.self) {
      throw error
    }
  }

  fileprivate func mapping<Value>(
    _ body: () throws(IOError) -> Value
  ) throws(DeviceMapperError) -> Value {
    do throws(IOError) {
      try check()
      return try body()
    } catch { throw DeviceMapperError(error.code, error.operation, error.subject) }
  }
}

extension SimulatedKernel: HostProcesses {
  func process(_ pid: Int32, startTime: UInt64) throws(IOError) -> any HostProcess {
    try check()
    guard let worker = host.living.first(where: { $0.pid == pid && $0.startTime == startTime })
    else { throw IOError(ESRCH, "open", "process \(pid)") }
    return FollowedWorker(worker: worker, life: life)
  }

  func link(at path: String) throws(IOError) -> LinkConnection {
    try check()
    return LinkConnection(try UnixSocket.connect(to: path, kind: .packets))
  }

  func workers() throws(IOError) -> [any WorkerAtLarge] {
    try check()
    return host.living.map { FollowedWorker(worker: $0, life: life) }
  }

  func end(_ remains: WorkerRemains, _ log: Logger) throws(IOError) { try check() }

  func endListener(at link: String) throws(IOError) {
    try check()
    for worker in host.living where worker.link == link {
      guard !worker.isWedged else { throw IOError(EBUSY, "end", "the worker at \(link)") }
      worker.finish(nil)
    }
  }

  func programs(using identity: FileIdentity) -> [String] {
    host.living.filter { $0.has(identity) }.map { "cowd (process \($0.pid))" }
  }
}

extension SimulatedKernel: WorkerLauncher {
  func launch(
    disk: DiskID, listener: Int32, user: UInt32, configuration: Configuration
  ) throws(IOError) -> any HostProcess {
    try check()
    return try host.launch(disk, listener, user, link: SimulatedKernel.path(of: listener), life)
  }

  /// Where a socket is bound.
  private static func path(of socket: Int32) -> String {
    var address = sockaddr_un()
    var length = socklen_t(MemoryLayout<sockaddr_un>.size)
    withUnsafeMutablePointer(to: &address) { pointer in
      pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        _ = getsockname(socket, $0, &length)
      }
    }
    return withUnsafeBytes(of: address.sun_path) { bytes in
      String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
    }
  }
}

extension SimulatedKernel: DeviceAttacher {
  func attach(_ wish: DeviceWish, socket: Int32) throws(IOError) -> DeviceNode {
    try check()
    let index = host.newIndex()
    let node = DeviceNode(index: index, path: "/dev/nbd\(index)", major: 43, minor: index << 5)
    var device = SimulatedHost.Device(node: node, identifier: wish.identifier, isLive: true)
    device.end = PassedDescriptor(try SimulatedWorker.copy(socket))
    host.sockets[index] = device
    return node
  }

  func reattach(_ node: DeviceNode, socket: Int32, identifier: String) throws(IOError) {
    try check()
    guard host.sockets[node.index]?.identifier == identifier else {
      throw IOError(EINVAL, "reconfigure", node.path)
    }
    host.sockets[node.index]?.end = PassedDescriptor(try SimulatedWorker.copy(socket))
  }

  func detach(_ node: DeviceNode) throws(IOError) {
    try check()
    if let device = host.sockets[node.index], let user = device.openers.first {
      host.violated("\(device.identifier) is disconnected while \(user) has it")
    }
    host.sockets[node.index] = nil
  }

  func flush(_ node: DeviceNode) throws(IOError) {
    try check()
    guard let disk = host.sockets[node.index].flatMap({ SimulatedHost.disk($0) }),
      let worker = host.living.first(where: { $0.disk == disk && $0.servesSocket }), !worker.isMute
    else { throw IOError(EIO, "write out", node.path) }
    worker.commit()
  }

  func isAttached(_ node: DeviceNode, identifier: String) throws(IOError) -> Bool {
    try check()
    return host.sockets[node.index]?.identifier == identifier
  }

  func devices() throws(IOError) -> [(identifier: String, node: DeviceNode)] {
    try check()
    return host.sockets.sorted { $0.key < $1.key }.map { ($0.value.identifier, $0.value.node) }
  }

  func isInUse(_ node: DeviceNode) throws(IOError) -> Bool {
    try check()
    return host.sockets[node.index]?.isOpen == true
  }
}

extension SimulatedKernel: DeviceTraffic {
  func look(_ device: DeviceNode, _ users: [VBD]) throws(IOError) -> DeviceSight {
    try check()
    return DeviceSight(
      isBusy: host.busy[device, default: 0] > 0, taken: users.map { host.taken[$0] ?? 0 })
  }
}

/// The hypervisor.
struct SimulatedXen: DomainStates {
  let store: SimulatedStore
  let kernel: SimulatedKernel

  func state(of domain: Int) throws(IOError) -> DomainState? {
    try kernel.check()
    return store.domains[domain]
  }
}

/// The device-mapper.
struct SimulatedMapper: DeviceMapping {
  let kernel: SimulatedKernel
  var host: SimulatedHost { kernel.host }

  func isAvailable() throws(DeviceMapperError) -> Bool { true }

  func make(_ wish: MappedWish) throws(DeviceMapperError) -> DeviceNode {
    try kernel.mapping { () throws(IOError) in
      if let old = host.mapped[wish.disk] {
        guard !old.isLive else { throw IOError(EBUSY, "create", "dmu-\(wish.disk)") }
      }
      let index = host.newIndex()
      let node = DeviceNode(
        kind: .dm, index: index, path: "/dev/mapper/dmu-\(wish.disk)", major: 253, minor: index)
      var device = SimulatedHost.Device(node: node)
      device.stores = wish.backings.map(\.name)
      device.isReadOnly = wish.readOnly
      for backing in wish.backings {
        device.backings.append(PassedDescriptor(try SimulatedWorker.copy(backing.descriptor)))
      }
      host.mapped[wish.disk] = device
      return node
    }
  }

  /// One end of a socket pair: as long as a worker has it, the other end does not read its end.
  func openNode(_ disk: DiskID) throws(IOError) -> Descriptor {
    try kernel.check()
    guard let device = host.mapped[disk] else { throw IOError(ENOENT, "open", "the node") }
    if let raw = device.end?.raw {
      var item = pollfd(fd: raw, events: Int16(POLLIN), revents: 0)
      if poll(&item, 1, 0) == 0 { throw IOError(EBUSY, "open", "the node") }
    }
    let ends = try UnixSocket.pair(.stream)
    host.mapped[disk]?.end = PassedDescriptor(try ends.first.duplicate())
    return try ends.second.duplicate()
  }

  func start(_ disk: DiskID, probed: Bool) throws(DeviceMapperError) {
    try kernel.mapping { () throws(IOError) in
      guard host.mapped[disk] != nil else { throw IOError(ENXIO, "resume", "dmu-\(disk)") }
      host.mapped[disk]?.isLive = true
    }
  }

  func state(
    _ disk: DiskID, over backings: [ServedDevice.Backing]
  ) throws(DeviceMapperError) -> ServedDevice.State {
    try kernel.mapping { () throws(IOError) in
      guard let device = host.mapped[disk] else { return .absent }
      guard device.isLive else { return .unfinished }
      let names = backings.map(\.name)
      return device.stores == names ? .ours : .foreign("\(device.stores) is not \(names)")
    }
  }

  func isAttached(_ disk: DiskID, _ node: DeviceNode) throws(DeviceMapperError) -> Bool {
    try kernel.mapping { () throws(IOError) in
      host.mapped[disk].map { $0.isLive && $0.node == node } ?? false
    }
  }

  func users(_ disk: DiskID) throws(DeviceMapperError) -> Int {
    try kernel.mapping { () throws(IOError) in host.mapped[disk]?.isOpen == true ? 1 : 0 }
  }

  func clear(_ disk: DiskID) throws(DeviceMapperError) {
    try kernel.mapping { () throws(IOError) in }
  }

  func flush(_ node: DeviceNode) throws(IOError) {
    try kernel.check()
    guard let disk = host.mapped.first(where: { $0.value.node == node })?.key,
      let worker = host.living.first(where: { $0.disk == disk && $0.servesNode }),
      !worker.isMute, !worker.isWedged
    else { throw IOError(EIO, "write out", node.path) }
    host.commit(disk)
  }

  func failFaults(_ disk: DiskID) throws(DeviceMapperError) {
    try kernel.mapping { () throws(IOError) in
      if host.living.contains(where: { $0.disk == disk && $0.servesNode && !$0.isWedged }) {
        host.violated("faults of \(disk) are failed while a worker answers them")
      }
    }
  }

  func remove(_ disk: DiskID, deferred: Bool) throws(DeviceMapperError) {
    try kernel.mapping { () throws(IOError) in
      guard let device = host.mapped[disk] else { return }
      guard !device.isOpen else { throw IOError(EBUSY, "remove", "dmu-\(disk)") }
      if device.uncommitted > 0 {
        host.violated("the device of \(disk) goes with \(device.uncommitted) writes")
      }
      host.mapped[disk] = nil
    }
  }

  func retire(
    _ disk: DiskID, _ node: DeviceNode, losing: Bool
  ) throws(DeviceMapperError) -> Bool {
    try kernel.mapping { () throws(IOError) in
      guard let device = host.mapped[disk], losing || device.uncommitted == 0 else { return false }
      if let user = device.openers.first {
        host.violated("the device of \(disk) loses its files while \(user) has it")
      }
      host.mapped[disk] = nil
      return true
    }
  }

  func hold(_ disk: DiskID) throws(DeviceMapperError) {
    try kernel.mapping { () throws(IOError) in host.mapped[disk]?.isHeld = true }
  }

  func letGo(_ disk: DiskID) throws(DeviceMapperError) {
    try kernel.mapping { () throws(IOError) in host.mapped[disk]?.isHeld = false }
  }

  func counters(_ disk: DiskID, _ node: DeviceNode) throws(DeviceMapperError) -> MappedCounters {
    try kernel.mapping { () throws(IOError) in
      var counters = MappedCounters()
      counters.uncommitted = UInt64(host.mapped[disk]?.uncommitted ?? 0)
      return counters
    }
  }

  func latencies(_ disk: DiskID) throws(DeviceMapperError) -> LatencyHistogram {
    LatencyHistogram()
  }
  func stopLatencies(_ disk: DiskID) throws(DeviceMapperError) {}
  func sweepMarks() throws(IOError) {}

  func devices() throws(DeviceMapperError) -> [DiskID: DeviceNode] {
    try kernel.mapping { () throws(IOError) in host.mapped.mapValues(\.node) }
  }
}
