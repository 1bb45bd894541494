// SPDX-License-Identifier: Apache-2.0
// The client's end of the control socket: blocking, one request at a time, no threads.

internal import FoundationEssentials
import Glibc
internal import SystemIO

/// A connection to the daemon.
package struct ControlClient: ~Copyable {
  private let socket: Descriptor
  private let path: String

  /// Connects. Throws `daemonNotRunning` when nobody listens, and the reason when one may not.
  package init(path: String) throws(DiskFailure) {
    do {
      socket = try UnixSocket.connect(to: path, kind: .stream)
    } catch {
      switch error.code {
      case ENOENT, ECONNREFUSED: throw .daemonNotRunning
      case EACCES, EPERM:
        throw DiskFailure(.daemon, "the control socket \(path) is root's: run this as root")
      default: throw DiskFailure(.daemon, "\(error.description): see to it")
      }
    }
    self.path = path
  }

  /// Connects to a daemon that may just be starting: tries for so long.
  package static func connect(
    path: String, patience: Duration
  ) throws(DiskFailure) -> ControlClient {
    let end = ContinuousClock.now + patience
    while true {
      do {
        return try ControlClient(path: path)
      } catch {
        guard error == .daemonNotRunning, ContinuousClock.now < end else { throw error }
        usleep(100_000)
      }
    }
  }

  /// Sends a request and waits for its reply, at most so long. Throws what the daemon
  /// answered when it is a failure.
  package func ask(
    _ request: ControlRequest, within limit: Duration
  ) throws(DiskFailure) -> ControlReply {
    let bytes: [UInt8]
    do { bytes = try ControlLine.encode(request) + [10] } catch {
      throw DiskFailure(.daemon, "the request cannot be written: \(error)")
    }
    let end = ContinuousClock.now + limit
    let line: [UInt8]
    do throws(IOError) {
      try send(bytes, until: end)
      line = try receive(until: end)
    } catch {
      switch error.code {
      case EPIPE, ECONNRESET: throw .daemonGone
      case ETIMEDOUT:
        throw .timeout("dmu-xend did not answer", limit, remedy: "look at its log")
      default: throw DiskFailure(.daemon, "\(error.description): look at dmu-xend's log")
      }
    }
    let reply: ControlReply
    do { reply = try ControlLine.decode(ControlReply.self, line) } catch {
      throw DiskFailure(
        .daemon, "dmu-xend's answer makes no sense: are dmu-xen and dmu-xend of one version?")
    }
    guard reply.ok else {
      throw DiskFailure(reply.code ?? .daemon, reply.error ?? "dmu-xend gave no reason")
    }
    return reply
  }

  private func send(_ bytes: [UInt8], until end: ContinuousClock.Instant) throws(IOError) {
    var rest = bytes[...]
    while !rest.isEmpty {
      try wait(Int16(POLLOUT), until: end)
      let count = rest.withUnsafeBytes {
        Glibc.send(socket.raw, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL | MSG_DONTWAIT))
      }
      if count < 0 {
        guard errno == EINTR || errno == EAGAIN else { throw IOError.last("write to", path) }
      } else {
        rest = rest.dropFirst(count)
      }
    }
  }

  private func receive(until end: ContinuousClock.Instant) throws(IOError) -> [UInt8] {
    var line: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65536)
    while true {
      try wait(Int16(POLLIN), until: end)
      let count = recv(socket.raw, &buffer, buffer.count, Int32(MSG_DONTWAIT))
      if count < 0 {
        guard errno == EINTR || errno == EAGAIN else { throw IOError.last("read from", path) }
        continue
      }
      guard count > 0 else { throw IOError(ECONNRESET, "read from", path) }
      line += buffer[..<count]
      if line.last == 10 { return Array(line.dropLast()) }
    }
  }

  private func wait(_ events: Int16, until end: ContinuousClock.Instant) throws(IOError) {
    while true {
      let left = end - .now
      guard left > .zero else { throw IOError(ETIMEDOUT, "wait for", path) }
      var item = pollfd(fd: socket.raw, events: events, revents: 0)
      let milliseconds = min(Int64(Int32.max), Int64(left / .milliseconds(1)) + 1)
      let count = poll(&item, 1, Int32(milliseconds))
      if count > 0 { return }
      guard count == 0 || errno == EINTR else { throw IOError.last("wait for", path) }
    }
  }
}

extension DiskFailure {
  static let daemonGone = DiskFailure(
    .daemon,
    "dmu-xend has ended before it answered: look at its log, start it and try again")
}
