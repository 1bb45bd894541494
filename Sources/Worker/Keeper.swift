// SPDX-License-Identifier: Apache-2.0
// The keeper of a disk that a person serves: the other process of `cowd`. It has the person's
// rights, opens the files, and makes the disk appear; it parses nothing and serves nothing. The
// worker in its cage does, at the other end of a link.
//
//   cowd (signals, terminal)  -- becomes --> the caged worker
//     \-- starts --> cowd --keeper (opens, makes devices, takes them away)
//
// Invariants:
// - The worker is the process that the person started: what ends it ends the disk at that instant,
//   and its exit status is the command's.
// - The keeper holds no file once the disk has appeared: a lock lasts as long as the worker does,
//   or its device.
// - Told to stop, the worker asks the keeper to take the disk away, and serves until that is done.
// - What the worker says may be an image's words.

import BlockIO
import DiskFormats
import Glibc
import LinuxBlock
import SystemIO
import WorkerLink

/// Runs a keeper.
package enum Keeper {
  /// Keeps a disk until its worker ends, at the other end of the connected socket `raw`. Answers
  /// the exit status, which nobody sees but in a trace of the system: what goes wrong is told here,
  /// and the worker ends with the link.
  package static func run(_ options: ByHandOptions, link raw: Int32) -> Int32 {
    let log = Log(level: options.level, journal: Log.underJournal)
    // The worker, and with it the command, ends with the link: not before what is wrong is told.
    let link = LinkConnection(Descriptor(owning: raw))
    defer { withExtendedLifetime(link) {} }
    do throws(WorkerError) {
      // Those are the worker's to hear; they may come to the whole group.
      let signals = try system { () throws(IOError) in
        try SignalSource([SIGTERM, SIGINT, SIGHUP])
      }
      defer { withExtendedLifetime(signals) {} }
      try serve(options, link, log)
      return 0
    } catch {
      if error != .workerEnded { log(.error, "\(error)") }
      return 1
    }
  }

  private static func serve(
    _ options: ByHandOptions, _ link: LinkConnection, _ log: Log
  ) throws(WorkerError) {
    let disk: KeptDisk
    let service: any DiskService
    switch options.service {
    case .socket(let path):
      disk = KeptDisk(options, try KeptFiles(options, isLocked: false), link)
      _ = try disk.start(byNode: false)
      service = try SocketService(disk, path: path, log)
    case .device(let name):
      if try ByMapper.isWay(options) {
        (disk, service) = try ByMapper(options: options, name: name, link: link, log: log).serve()
      } else {
        disk = KeptDisk(options, try KeptFiles(options, isLocked: false), link)
        try DeviceService.check(name)
        service = try DeviceService(disk, try disk.start(byNode: false), name: name, log)
      }
    }
    disk.releaseFiles()
    ByHand.say("\(options.store) (\(disk.size) bytes) is served: \(service.greeting)")
    while true {
      switch try disk.next() {
      case .detached: try service.detached()
      case .stopping:
        try service.withdraw()
        return try disk.stop()
      case nil: return service.workerEnded()
      default: break
      }
    }
  }
}

extension WorkerError {
  /// The worker has gone, and has said why.
  static let workerEnded = WorkerError(.ended, "the worker has ended")
}

/// A place where a disk appears, and from which it is taken again.
protocol DiskService: AnyObject {
  /// One line that says where the disk is.
  var greeting: String { get }
  /// The nbd socket has ended, or the device of a node is gone.
  func detached() throws(WorkerError)
  /// Takes the disk away, which the worker still serves.
  func withdraw() throws(WorkerError)
  /// The worker has gone by itself.
  func workerEnded()
}

/// A disk as its keeper sees it: its files and the link to its worker.
final class KeptDisk {
  let options: ByHandOptions
  /// Length in bytes, once it is started.
  private(set) var size: UInt64 = 0
  /// What it lives in, until it has appeared.
  private(set) var files: KeptFiles?
  private let link: LinkConnection

  init(_ options: ByHandOptions, _ files: consuming KeptFiles, _ link: LinkConnection) {
    self.options = options
    self.files = files
    self.link = link
  }

  /// Has the worker open the image, and hands it what that names. `byNode`: a node shall follow, if
  /// the kernel can serve the image by itself. Throws `workerEnded` when the worker could not.
  func start(byNode: Bool) throws(WorkerError) -> DiskReport {
    guard let files else { throw .workerEnded }
    var order = StartOrder(disk: name, format: options.format)
    order.storePath = options.store
    order.basePath = options.base
    order.baseFormat = options.baseFormat
    order.readOnly = options.readOnly
    order.force = options.force
    order.byNode = byNode
    order.failsWhenFull = options.failsWhenFull
    var lent: [LinkRole: Int32] = [.store: files.store.raw]
    lent[.base] = files.base?.raw
    try send(.start(order), lending: lent)
    while true {
      switch try next() {
      case .needFile(let need):
        guard let file = try self.files?.open(need) else { throw .workerEnded }
        try send(.file, lending: [.file: file.raw])
      case .ready(let report):
        size = report.size
        return report
      // Told to end before there was anything to take away: the worker does.
      case .stopping, nil: throw .workerEnded
      default: break
      }
    }
  }

  private var name: String {
    switch options.service {
    case .socket: options.store
    case .device(let name): name
    }
  }

  /// Locks the files after all: no device holds them.
  func lock() throws(WorkerError) { try files?.lock() }

  /// Closes the files: the worker has them.
  func releaseFiles() { files = nil }

  /// Hands the worker what it shall serve.
  func attach(_ role: LinkRole, _ raw: Int32) throws(WorkerError) {
    try send(.attach, lending: [role: raw])
  }

  /// Waits for what the worker says of itself. nil: it has ended, or says that it cannot serve,
  /// which is the same and told by it.
  func next() throws(WorkerError) -> WorkerReport? {
    while true {
      do throws(LinkError) {
        switch try link.receive(milliseconds: -1) {
        case .none: continue
        case .end: return nil
        case .message(let message, _):
          let report: WorkerReport
          do throws(LinkFault) { report = try WorkerReport(message) } catch {
            throw LinkError.fault(error)
          }
          if case .failed = report { return nil }
          if case .refused(let order, let reason) = report {
            throw LinkError.fault(.malformed("'\(order)' was refused: \(reason)"))
          }
          return report
        }
      } catch {
        if case .io(let error) = error, error.code == ECONNRESET { return nil }
        throw WorkerError(.offLink, "the worker cannot be spoken to: \(error)")
      }
    }
  }

  /// Waits for one report. Throws `workerEnded`.
  func wait(for wanted: WorkerReport) throws(WorkerError) {
    while true {
      guard let report = try next(), report != .stopping else { throw .workerEnded }
      if report == wanted { return }
    }
  }

  /// Has the worker end, now that nobody uses the disk any more, and waits for that.
  func stop() throws(WorkerError) {
    try send(.stop)
    while try next() != nil {}
  }

  private func send(
    _ order: WorkerOrder, lending descriptors: [LinkRole: Int32] = [:]
  ) throws(WorkerError) {
    do throws(LinkError) {
      try link.send(order, lending: descriptors)
    } catch {
      if case .io(let error) = error, error.code == EPIPE { throw .workerEnded }
      throw WorkerError(.offLink, "the worker cannot be spoken to: \(error)")
    }
  }
}
