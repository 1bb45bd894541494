// SPDX-License-Identifier: Apache-2.0
// The processes of a simulated host: workers, which are played, on real sockets and with real
// files, locks and descriptors.

import BlockIO
import Glibc
import SystemIO
import TestSupport
import WorkerLink

@testable import Daemon

/// A worker, and the process that it is.
final class SimulatedWorker: @unchecked Sendable {  // One thread.
  let pid: Int32
  let startTime: UInt64
  let disk: DiskID
  let link: String
  let userID: UInt32
  /// Whose child it is.
  let parent: Life
  /// A signal has no effect yet.
  var isWedged = false
  /// It does not answer any more.
  var isMute = false
  private(set) var order: StartOrder?
  private(set) var status: ExitStatus?

  private let host: SimulatedHost
  private let end: Descriptor
  private var life: PassedDescriptor?
  private var isKilled = false
  private var listener: PassedDescriptor?
  private var connection: LinkConnection?
  private var listening: PollRegistration?
  private var linked: PollRegistration?
  private var served: PollRegistration?
  private var files: [LinkRole: PassedDescriptor] = [:]
  private var asked: [(need: FileNeed, file: PassedDescriptor)] = []
  private var wanted: [FileNeed] = []
  private var node: PassedDescriptor?
  private var socket: PassedDescriptor?

  init(
    _ disk: DiskID, pid: Int32, user: UInt32, listener: Int32, link: String, parent: Life,
    host: SimulatedHost
  ) throws(IOError) {
    (self.disk, self.pid, self.link, self.parent, self.host) = (disk, pid, link, parent, host)
    userID = user
    startTime = UInt64(pid) * 7
    let ends = try UnixSocket.pair(.stream)
    end = try ends.first.duplicate()
    life = PassedDescriptor(try ends.second.duplicate())
    self.listener = PassedDescriptor(try SimulatedWorker.copy(listener))
    if let raw = self.listener?.raw { listening = watch(raw) { [self] in try accept() } }
  }

  static func copy(_ raw: Int32) throws(IOError) -> Descriptor {
    let copy = fcntl(raw, F_DUPFD_CLOEXEC, 3)
    guard copy >= 0 else { throw IOError.last("duplicate a descriptor") }
    return Descriptor(owning: copy)
  }

  // MARK: The process

  var raw: Int32 { end.raw }
  var hasEnded: Bool { status != nil }

  func send(_ signal: Int32) {
    guard !isWedged else { return isKilled = true }
    finish(signal == SIGKILL ? .signalled(SIGKILL) : nil)
  }

  /// What it waited for in the kernel has answered.
  func unwedge() {
    isWedged = false
    guard status == nil else { return }
    if isKilled { return finish(.signalled(SIGKILL)) }
    // It looks again at what it did not look at meanwhile.
    forget(&listening)
    forget(&linked)
    if let raw = listener?.raw { listening = watch(raw) { [self] in try accept() } }
    if let connection { linked = watch(connection.raw) { [self] in try receive(connection) } }
  }

  /// Ends it; nil: after it has committed.
  func finish(_ how: ExitStatus?) {
    guard status == nil else { return }
    if how == nil { commit() }
    status = how ?? .exited(0)
    host.note("worker \(pid) of \(disk) ends: \(status.map { "\($0)" } ?? "")")
    forget(&listening)
    listener = nil
    drop()
    forget(&served)
    socket = nil
    node = nil
    life = nil
    (files, asked) = ([:], [])
  }

  func has(_ identity: FileIdentity) -> Bool {
    files.values.contains { file in
      guard let raw = file.raw else { return false }
      do throws(IOError) { return try FileIdentity(raw, name: "file") == identity } catch {
        return false
      }
    }
  }

  func openLog() throws(IOError) -> FileStore? {
    guard let raw = files[.pending]?.raw else { return nil }
    return try FileStore(Self.copy(raw), name: "log")
  }

  // MARK: The disk

  /// The store that it may write, by its identity; nil when there is none.
  var written: FileIdentity? {
    guard status == nil, let order, !order.readOnly, let raw = files[.store]?.raw else {
      return nil
    }
    do throws(IOError) { return try FileIdentity(raw, name: "store") } catch { return nil }
  }

  /// Whether it serves a device by a socket.
  var servesSocket: Bool {
    status == nil && !isWedged && socket != nil && order?.readOnly == false
  }
  var servesNode: Bool { status == nil && node != nil }
  var store: String { order?.storePath ?? "" }

  /// Acknowledges writes: they are in the log now.
  func acknowledge(_ count: Int) {
    guard servesSocket, let log = files[.pending]?.raw else { return }
    let held = SimulatedLog.count(log)
    guard held + count < 1000 else { return }
    SimulatedLog.write(log, held + count)
    host.stores[store, default: Truth()].acknowledged += count
  }

  /// What the log holds is in the store from now on.
  func commit() {
    guard status == nil, let order, !order.readOnly, let log = files[.pending]?.raw else { return }
    host.stores[store, default: Truth()].committed += SimulatedLog.count(log)
    SimulatedLog.write(log, 0)
  }

  /// The kernel drops its end.
  func loseSocket() {
    guard socket != nil, status == nil else { return }
    forget(&served)
    socket = nil
    send(.detached)
  }

  func tell(_ state: DiskState) { send(.event(state, error: state == .ready ? "" : "no space")) }

  private var report: DiskReport {
    var report = DiskReport()
    report.disk = "\(disk)"
    report.format = order?.format ?? ""
    report.version = "1"
    report.pid = pid
    report.size = 1 << 20
    report.blockSize = 65536
    report.byNode = order?.byNode == true
    report.attached = node != nil || socket != nil
    report.readOnly = order?.readOnly ?? false
    if report.byNode {
      report.parts = [DiskPart(.store, isWritable: !report.readOnly)]
      for index in asked.indices { report.parts.append(DiskPart(.file(index), isWritable: true)) }
      if files[.base] != nil { report.parts.append(DiskPart(.base, isWritable: false)) }
    }
    return report
  }

  // MARK: The link

  /// A descriptor is watched no longer than it is open: its number comes again.
  private func forget(_ registration: inout PollRegistration?) {
    if let registration { host.poller.remove(registration) }
    registration = nil
  }

  private func watch(_ raw: Int32, _ handle: @escaping @Sendable () throws -> Bool)
    -> PollRegistration
  {
    host.poller.add(raw) { [self] in
      guard status == nil, !isWedged else { return false }
      do { return try handle() } catch {
        host.note("worker \(pid) of \(disk): \(error)")
        return false
      }
    }
  }

  private func drop() {
    forget(&linked)
    connection = nil
  }

  private func accept() throws -> Bool {
    guard let raw = listener?.raw, let new = try UnixSocket.accept(from: raw) else { return true }
    drop()
    let link = LinkConnection(new)
    connection = link
    linked = watch(link.raw) { [self] in try receive(link) }
    return true
  }

  private func receive(_ link: LinkConnection) throws -> Bool {
    switch try link.receive() {
    case .none: return true
    case .end:
      drop()
      return false
    case .message(let message, let descriptors):
      let order = try WorkerOrder(message)
      let time = host.weather.callTime() + .microseconds(host.timeline.random.below(2000))
      host.timeline.after(time) { [self] in
        guard status == nil, !isMute, !isWedged else { return }
        obey(order, descriptors)
      }
      return true
    }
  }

  private func send(_ report: WorkerReport, lending lent: [LinkRole: Int32] = [:]) {
    guard status == nil, let connection, !isMute else { return }
    do throws(LinkError) { try connection.send(report, lending: lent) } catch { drop() }
  }

  private func obey(_ order: WorkerOrder, _ descriptors: LinkDescriptors) {
    switch order {
    case .start(let start): begin(start, descriptors)
    case .file:
      if let file = descriptors.take(.file), !wanted.isEmpty {
        asked.append((wanted.removeFirst(), PassedDescriptor(file)))
      }
      goOn()
    case .attach: attach(descriptors)
    case .ping: send(.alive)
    case .status, .clear: send(.status(report))
    case .descriptors(let index): giveBack(index)
    case .refuseFile: finish(.exited(1))
    case .stop:
      // Now and then it takes longer than anybody waits.
      let longest = host.weather.slow > 0 ? 15_000 : 500
      let time = Duration.milliseconds(host.timeline.random.below(longest))
      host.timeline.after(time) { [self] in if !isWedged { finish(nil) } }
    }
  }

  private func begin(_ start: StartOrder, _ descriptors: LinkDescriptors) {
    order = start
    for role in [LinkRole.store, .base, .pending, .witness] {
      if let file = descriptors.take(role) { files[role] = PassedDescriptor(file) }
    }
    host.checkWriters()
    host.checkAttached(store, isWritten: !start.readOnly)
    if start.create, ftruncate(files[.store]?.raw ?? -1, 4096) != 0 { return finish(.exited(1)) }
    if !start.readOnly { host.checkLog(of: self, files[.pending]?.raw ?? -1) }
    if start.format == "qcow2" {
      wanted = [FileNeed(role: "data-file", path: store + ".data", writable: true)]
    }
    if host.timeline.random.chance(host.weather.poor) {
      switch host.timeline.random.below(3) {
      case 0: return finish(.signalled(SIGSEGV))
      case 1: isMute = true
      default:
        send(.failed(.io, message: "the store cannot be read"))
        return finish(.exited(1))
      }
    }
    goOn()
  }

  private func goOn() { send(wanted.first.map { .needFile($0) } ?? .ready(report)) }

  private func attach(_ descriptors: LinkDescriptors) {
    if let new = descriptors.take(.nbd) {
      forget(&served)
      let raw = new.raw
      socket = PassedDescriptor(new)
      served = watch(raw) { [self] in
        loseSocket()
        return false
      }
      return
    }
    guard let new = descriptors.take(.node) else { return }
    node = PassedDescriptor(new)
    send(.attached)
  }

  private func giveBack(_ index: Int) {
    guard index > 0 else {
      var lent: [LinkRole: Int32] = [:]
      for (role, file) in files { lent[role] = file.raw }
      return send(.descriptors(files: asked.count, file: nil), lending: lent)
    }
    guard asked.indices.contains(index - 1), let raw = asked[index - 1].file.raw else { return }
    send(.descriptors(files: asked.count, file: asked[index - 1].need), lending: [.file: raw])
  }
}

/// A worker as a daemon has it, which can do nothing to it any more when it is dead.
struct FollowedWorker: HostProcess, WorkerAtLarge {
  let worker: SimulatedWorker
  let life: Life

  var process: any HostProcess { self }
  var disk: DiskID { worker.disk }
  var link: String { worker.link }
  var pid: Int32 { worker.pid }
  var startTime: UInt64 { worker.startTime }
  var raw: Int32 { worker.raw }
  var hasEnded: Bool { worker.hasEnded }

  func send(_ signal: Int32) throws(IOError) {
    if !life.isDead { worker.send(signal) }
  }

  func reap() throws(IOError) -> ExitStatus? {
    guard worker.parent === life else { throw IOError(ECHILD, "wait for", "process \(pid)") }
    return worker.status
  }

  func wait(milliseconds: Int32) throws(IOError) -> ExitStatus? { try reap() }
  func user() throws(IOError) -> UInt32 { worker.userID }
  func has(_ identity: FileIdentity) -> Bool { worker.has(identity) }
  func openLog() throws(IOError) -> FileStore? { try worker.openLog() }

  func end(within limit: Duration) throws(IOError) -> Bool {
    if !life.isDead { worker.send(SIGTERM) }
    return worker.hasEnded
  }
}

/// A pending log of so many placements, as PendingSummary reads it.
enum SimulatedLog {
  static func count(_ raw: Int32) -> Int {
    var words = [UInt64](repeating: 0, count: 5)
    guard pread(raw, &words, 40, 0) == 40, words[0] == 0x3164_6e65_7075_6d64 else { return 0 }
    return Int(words[4] >> 32)
  }

  static func write(_ raw: Int32, _ count: Int) {
    let words: [UInt64] = [0x3164_6e65_7075_6d64, 0, 0, 1024, UInt64(count) << 32, 0, 0, 0]
    let record: [UInt64] = [0, 0, UInt64(count), 0, 0]
    precondition(pwrite(raw, words, 64, 0) == 64, "a log cannot be written")
    if count > 0 {
      precondition(pwrite(raw, record, 40, off_t(4096 + (count - 1) * 40)) == 40, "nor its record")
    }
  }
}
