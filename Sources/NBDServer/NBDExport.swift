// SPDX-License-Identifier: Apache-2.0
// A target as an NBD export: the listening sockets, the connections, and what they share.
//
// Several connections may be open at once, and any flush covers the writes completed on
// all of them, as they are all requests of the one target: the multi-conn promise.

import Glibc
package import SystemIO
package import Target

/// A disk served over NBD, to any number of clients up to a limit. Source: the NBD
/// protocol specification.
package final class NBDExport {
  /// What is offered, and the bounds of what it may cost.
  package struct Options: Sendable {
    /// The export's name; the empty name finds it too.
    package var name = ""
    /// Shown to clients that ask.
    package var description = ""
    /// Writes are refused.
    package var readOnly = false
    /// Connections at once; more are closed at once.
    package var maxConnections = 16
    /// Requests of one connection at once.
    package var maxRequests = 256
    /// Bytes of buffers of one connection; a single larger request is let in alone.
    package var maxBytes = 16 << 20
    /// Milliseconds that a handshake may take.
    package var handshakeTime: Int64 = 30_000

    /// The defaults.
    package init() {}
  }

  let target: UserTarget
  let loop: EventLoop
  let options: Options
  /// How long requests took, of all connections.
  package internal(set) var times = RequestTimes()
  let buffers = BufferPool(keep: 16 << 20)
  private var listeners: [(socket: Int32, registration: EventLoop.Registration)] = []
  private var sessions: [NBDSession] = []
  private var withOutput: [NBDSession] = []
  private var over: [NBDSession] = []
  private var timer: EventLoop.Timer?
  private var requestsSeen: UInt64 = 0

  /// An export without sockets yet.
  package init(target: UserTarget, loop: EventLoop, options: Options = Options()) {
    self.target = target
    self.loop = loop
    var options = options
    if target.isReadOnly { options.readOnly = true }
    self.options = options
    loop.addStage(.send) { [weak self] in self?.send() ?? false }
    timer = loop.addTimer(after: 2000, every: 2000) { [weak self] in self?.tidy() }
  }

  deinit {
    for listener in listeners { _ = Glibc.close(listener.socket) }
  }

  /// What the kernel's nbd is to be told in NBD_ATTR_SERVER_FLAGS, and clients are told.
  package static func transmissionFlags(readOnly: Bool) -> UInt16 {
    NBD.Flag.hasFlags | NBD.Flag.sendFlush | NBD.Flag.sendFUA | NBD.Flag.sendTrim
      | NBD.Flag.sendWriteZeroes | NBD.Flag.multiConnection
      | (readOnly ? NBD.Flag.readOnly : 0)
  }

  /// Connections that are open, or whose last requests are not back yet.
  package var sessionCount: Int { sessions.count }

  /// Bytes of the buffers of all connections.
  var bufferBytes: Int { sessions.reduce(0) { $0 + $1.slabs.bytes } }

  /// Takes connections from a listening stream socket. Throws: what adding it to the loop
  /// throws.
  package func listen(_ socket: consuming Descriptor) throws(IOError) {
    let raw = socket.raw
    try UnixSocket.setNonBlocking(raw)
    let registration = try loop.add(raw, for: .readable) { [unowned self] _ in accept(raw) }
    listeners.append((socket.release(), registration))
  }

  /// Serves a connection that is in the transmission phase already, with simple replies, as
  /// the kernel's client wants it. `ended` is called once, when all is over.
  @discardableResult
  package func serve(
    _ socket: consuming Descriptor, ended: @escaping (NBDEnd) -> Void
  ) throws(IOError) -> NBDSession {
    let session = try NBDSession(self, socket, inTransmission: true, ended: ended)
    sessions.append(session)
    return session
  }

  /// Stops listening and drops every connection. Requests under way run to their end.
  package func close() {
    for listener in listeners {
      loop.remove(listener.registration)
      _ = Glibc.close(listener.socket)
    }
    listeners = []
    for session in sessions { session.close(.dropped) }
    if let timer { loop.cancel(timer) }
    timer = nil
  }

  /// Drops one connection.
  package func drop(_ session: NBDSession) {
    session.close(.dropped)
  }

  private func accept(_ raw: Int32) {
    while true {
      do throws(IOError) {
        guard let connection = try UnixSocket.accept(from: raw) else { return }
        guard sessions.count < options.maxConnections else { continue }
        sessions.append(try NBDSession(self, connection, inTransmission: false, ended: nil))
      } catch {
        // Out of descriptors or memory: who is turned away sees the end of the connection,
        // and who waits is taken by a later turn.
        return
      }
    }
  }

  // MARK: What sessions tell

  func hasOutput(_ session: NBDSession) {
    guard !session.isListed else { return }
    session.isListed = true
    withOutput.append(session)
  }

  func hasEnded(_ session: NBDSession) {
    over.append(session)
  }

  private func send() -> Bool {
    var any = false
    while !withOutput.isEmpty {
      let batch = withOutput
      withOutput.removeAll(keepingCapacity: true)
      for session in batch {
        session.isListed = false
        if session.settle() { any = true }
      }
    }
    if !over.isEmpty { bury() }
    return any
  }

  private func bury() {
    let done = over.filter(\.isOver)
    guard !done.isEmpty else { return }
    over.removeAll(where: \.isOver)
    sessions.removeAll { session in done.contains { $0 === session } }
    for session in done { session.bury() }
  }

  /// Gives memory back when nothing happens, and drops who will not finish the handshake.
  private func tidy() {
    let seen = target.counters.reads + target.counters.writes
    if seen == requestsSeen, target.outstanding == 0 { buffers.trim() }
    requestsSeen = seen
    let now = NBDExport.now()
    for session in sessions
    where session.isInHandshake && now - session.since > options.handshakeTime {
      session.close(.dropped)
    }
  }

  static func now() -> Int64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Int64(time.tv_sec) * 1000 + Int64(time.tv_nsec) / 1_000_000
  }
}
