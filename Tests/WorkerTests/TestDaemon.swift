// SPDX-License-Identifier: Apache-2.0
// The daemon's part, played by a test: it opens the files, keeps the pending file, starts
// workers, and plays the kernel's nbd driver at the other end of the socket.

import Glibc
import SystemIO
import Testing
import TestSupport
import WorkerLink

/// One disk and its worker of the moment.
final class TestDaemon {
  let image: TestImage
  let linkPath: String
  private(set) var worker: CowdProcess
  private(set) var link: LinkConnection
  private let listener: Descriptor
  private let store: Descriptor
  private let base: Descriptor
  private let pending: Descriptor
  /// The store once more, by an open file description that only a successor asks.
  private let witness: Descriptor
  private let injecting: String?

  /// `store` and `base` stand in for the image's own.
  /// `injecting`: as of `CowdProcess`, for the first worker.
  init(
    _ image: TestImage, store path: String? = nil, base: String? = nil, injecting: String? = nil,
    caged: Bool = true
  ) throws {
    self.image = image
    self.injecting = injecting
    linkPath = image.folder.file("link")
    listener = try UnixSocket.listen(at: linkPath, kind: .packets)
    store = try Descriptor(path: path ?? image.store, flags: O_RDWR)
    witness = try Descriptor(path: path ?? image.store, flags: O_RDONLY)
    self.base = try Descriptor(path: base ?? image.base, flags: O_RDONLY)
    pending = try Descriptor(
      path: image.folder.file("pending"), flags: O_RDWR | O_CREAT, mode: 0o600)
    worker = try Self.spawn(listener.raw, image.folder, injecting, caged: caged)
    link = try LinkConnection(path: linkPath)
  }

  private static func spawn(
    _ listener: Int32, _ folder: TemporaryFolder, _ injecting: String? = nil, caged: Bool = true
  ) throws -> CowdProcess {
    try CowdProcess(
      ["--supervised", "--uid", "2000000", "--gid", "2000000"] + (caged ? [] : ["--no-sandbox"]),
      descriptors: [3: listener], injecting: injecting, folder: folder)
  }

  /// Another process in place of a dead one.
  func replaceWorker() throws {
    link = try LinkConnection(path: linkPath)
    worker = try Self.spawn(listener.raw, image.folder)
  }

  /// Another link, as a daemon that has been restarted makes.
  func relink() throws { link = try LinkConnection(path: linkPath) }

  static let all: Set<LinkRole> = [.store, .base, .pending, .witness]

  var order: StartOrder {
    var order = StartOrder(disk: "1-51712", format: "dscow")
    order.storePath = image.store
    order.basePath = image.base
    order.isHeld = true
    return order
  }

  /// Sends `start`, with the descriptors of these roles.
  func start(_ order: StartOrder? = nil, roles: Set<LinkRole> = TestDaemon.all) throws {
    var lent: [LinkRole: Int32] = [:]
    if roles.contains(.store) { lent[.store] = store.raw }
    if roles.contains(.base) { lent[.base] = base.raw }
    if roles.contains(.pending) { lent[.pending] = pending.raw }
    if roles.contains(.witness) { lent[.witness] = witness.raw }
    try link.send(.start(order ?? self.order), lending: lent)
  }

  func answerFile() throws { try link.send(.file, lending: [.file: base.raw]) }

  /// What is asked for when no base comes with the order.
  var need: FileNeed { FileNeed(role: "base", path: image.base, writable: false) }

  /// Gives the worker a socket and answers the client at its other end.
  func attach() throws -> TestNBDClient {
    let pair = try UnixSocket.pair(.stream)
    try link.send(.attach, lending: [.nbd: pair.second.raw])
    return try TestNBDClient(transmission: pair.first)
  }

  /// The next report that is not an event, within ten seconds.
  func report() throws -> (WorkerReport, LinkDescriptors) {
    for _ in 0..<100 {
      switch try link.receive(milliseconds: 100) {
      case .none: continue
      case .end: throw IOError(EPIPE, "hear", "the worker: \(try worker.messages())")
      case .message(let message, let descriptors):
        let report = try WorkerReport(message)
        if case .event = report { continue }
        return (report, descriptors)
      }
    }
    throw IOError(ETIMEDOUT, "hear", "the worker: \(try worker.messages())")
  }

  /// The state that the next event tells, within ten seconds.
  func event() throws -> DiskState {
    for _ in 0..<100 {
      guard case .message(let message, _) = try link.receive(milliseconds: 100) else { continue }
      if case .event(let state, _) = try WorkerReport(message) { return state }
    }
    throw IOError(ETIMEDOUT, "hear", "an event: \(try worker.messages())")
  }

  /// Starts the disk and expects it to be ready.
  func startReady(
    _ order: StartOrder? = nil, roles: Set<LinkRole> = TestDaemon.all
  ) throws -> DiskReport {
    try start(order, roles: roles)
    guard case .ready(let report) = try report().0 else {
      throw IOError(EPROTO, "start", "the worker: \(try worker.messages())")
    }
    return report
  }

  func status() throws -> DiskReport {
    try link.send(.status)
    while true {
      let report = try report().0
      if case .status(let status) = report { return status }
      guard report == .detached else { throw IOError(EPROTO, "ask for", "\(report)") }
    }
  }
}
