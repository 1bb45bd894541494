// SPDX-License-Identifier: Apache-2.0
// The worker's end of the link: a listening socket that the daemon made, and at most one
// connection, of which the newest holds; or one connection for good, where a keeper started with
// the worker. Its messages are not trusted to be well formed.

import Glibc
import SystemIO
import WorkerLink

/// Takes orders from the daemon of the moment, and gives it reports. On the loop's thread.
final class LinkServer {
  /// An order, and the descriptors that came with it.
  var received: (WorkerOrder, LinkDescriptors) -> Void = { _, _ in }
  /// A daemon has connected.
  var connected: () -> Void = {}
  /// The connection has ended.
  var lost: () -> Void = {}

  /// So many messages are read in a turn at most, so that a talkative peer starves nobody.
  private static let batch = 32

  private let loop: EventLoop
  private let listener: Descriptor?
  private let owner: UInt32
  private let log: Log
  private var link: LinkConnection?
  private var registration: EventLoop.Registration?

  /// Listens on a socket of packets. Only root and `owner` may connect. Throws: EINVAL for a
  /// descriptor that does not listen.
  init(
    _ listener: consuming Descriptor, owner: UInt32, loop: EventLoop, log: Log
  ) throws(IOError) {
    var listens: Int32 = 0
    var length = socklen_t(MemoryLayout<Int32>.size)
    guard getsockopt(listener.raw, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length) == 0,
      listens != 0
    else { throw IOError(EINVAL, "listen on", "the worker link") }
    try UnixSocket.setNonBlocking(listener.raw)
    let raw = listener.raw
    self.listener = consume listener
    self.owner = owner
    self.loop = loop
    self.log = log
    _ = try loop.add(raw, for: .readable) { [unowned self] _ in accept(raw) }
  }

  /// Serves one connection of packets and no other.
  init(connected socket: consuming Descriptor, loop: EventLoop, log: Log) throws(IOError) {
    listener = nil
    owner = geteuid()
    self.loop = loop
    self.log = log
    try UnixSocket.setNonBlocking(socket.raw)
    try use(socket)
  }

  /// Sends a report, if there is a daemon. One that does not read is let go.
  func send(_ report: WorkerReport, lending descriptors: [LinkRole: Int32] = [:]) {
    guard let link else { return }
    do throws(LinkError) {
      try link.send(report, lending: descriptors)
    } catch {
      log(.warning, "cannot tell the daemon", ["error": "\(error)"])
      drop()
    }
  }

  private func use(_ socket: consuming Descriptor) throws(IOError) {
    let connection = LinkConnection(socket)
    registration = try loop.add(connection.raw, for: .readable) { [unowned self] _ in read() }
    link = connection
  }

  private func accept(_ listener: Int32) {
    do throws(IOError) {
      while let socket = try UnixSocket.accept(from: listener) {
        let peer = try UnixSocket.peer(of: socket.raw)
        guard peer.uid == 0 || peer.uid == owner else {
          log(.warning, "a stranger was turned away from the link", ["uid": "\(peer.uid)"])
          continue
        }
        drop()
        try use(socket)
        log(.info, "a daemon has connected", ["pid": "\(peer.pid)"])
        connected()
      }
    } catch { log(.error, "cannot take a daemon's connection", ["error": "\(error)"]) }
  }

  private func read() {
    for _ in 0..<Self.batch {
      guard let link else { return }
      do throws(LinkError) {
        switch try link.receive() {
        case .none: return
        case .end:
          if listener != nil { log(.info, "the daemon has gone") }
          return drop()
        case .message(let message, let descriptors): take(message, descriptors)
        }
      } catch {
        guard case .fault(let fault) = error else {
          log(.warning, "the link has failed", ["error": "\(error)"])
          return drop()
        }
        refuse("", fault.description)
      }
    }
  }

  private func take(_ message: LinkMessage, _ descriptors: LinkDescriptors) {
    do throws(LinkFault) {
      received(try WorkerOrder(message), descriptors)
    } catch { refuse(message.verb, error.description) }
  }

  /// Says that an order is not followed.
  func refuse(_ order: String, _ reason: String) {
    log(.warning, "an order was refused", ["order": order, "reason": reason])
    send(.refused(order: order, message: reason))
  }

  private func drop() {
    if let registration { loop.remove(registration) }
    registration = nil
    guard link != nil else { return }
    link = nil
    lost()
  }
}
