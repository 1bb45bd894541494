// SPDX-License-Identifier: Apache-2.0
// A door to the stand-in devices of a daemon in another process: whoever connects may have
// the kernel's end of a device's socket, and speak NBD on it. For tests.

import Glibc
package import SystemIO
internal import WorkerLink

/// Hands the sockets of stand-in devices out.
package enum StandInDoor {
  /// The door's socket in a run directory.
  package static func path(_ runDirectory: String) -> String { runDirectory + "/stand-in" }

  /// Opens the door, on a thread of its own. Throws: the errno of bind(2) or
  /// pthread_create(3).
  package static func open(_ attacher: StandInAttacher, runDirectory: String) throws(IOError) {
    let listener = try UnixSocket.listen(at: path(runDirectory), kind: .packets)
    let opened = Opened(listener: listener, attacher: attacher)
    var thread = pthread_t()
    let context = Unmanaged.passRetained(opened)
    let code = pthread_create(
      &thread, nil,
      { argument in
        guard let argument else { return nil }
        Unmanaged<Opened>.fromOpaque(argument).takeRetainedValue().run()
        return nil
      }, context.toOpaque())
    guard code == 0 else { throw IOError(code, "start a thread") }
    pthread_detach(thread)
  }

  /// Asks for a device's socket. Throws: ENODEV when there is no such device.
  package static func socket(
    of index: UInt32, runDirectory: String
  ) throws(IOError) -> Descriptor {
    let (_, descriptors) = try ask(LinkMessage("socket", ["index": "\(index)"]), runDirectory)
    guard let socket = descriptors.take(.nbd) else { throw IOError(ENODEV, "use", "nbd\(index)") }
    return socket
  }

  /// How many devices there are, and how often one was given another socket.
  package static func counts(
    runDirectory: String
  ) throws(IOError) -> (devices: Int, reattachments: Int) {
    let (message, _) = try ask(LinkMessage("counts"), runDirectory)
    guard let devices = message.fields["devices"].flatMap({ Int($0) }),
      let reattachments = message.fields["reattachments"].flatMap({ Int($0) })
    else { throw IOError(EPROTO, "count", "stand-in devices") }
    return (devices, reattachments)
  }

  private static func ask(
    _ message: LinkMessage, _ runDirectory: String
  ) throws(IOError) -> (LinkMessage, LinkDescriptors) {
    let link = try LinkConnection(path: path(runDirectory))
    do throws(LinkError) {
      try link.send(message)
      if case .message(let answer, let descriptors) = try link.receive(milliseconds: 10_000) {
        return (answer, descriptors)
      }
    } catch { throw IOError(EIO, "ask", "the stand-in's door (\(error))") }
    throw IOError(ETIMEDOUT, "ask", "the stand-in's door")
  }
}

private final class Opened: Sendable {
  let listener: Descriptor
  let attacher: StandInAttacher

  init(listener: consuming Descriptor, attacher: StandInAttacher) {
    self.listener = listener
    self.attacher = attacher
  }

  func run() {
    while true {
      do {
        guard let socket = try UnixSocket.accept(from: listener.raw) else { continue }
        try answer(LinkConnection(socket))
      } catch {
        // A client that left; the next one is not its concern.
        continue
      }
    }
  }

  private func answer(_ link: LinkConnection) throws {
    guard case .message(let message, _) = try link.receive(milliseconds: 10_000) else { return }
    if message.verb == "socket", let index = message.fields["index"].flatMap({ UInt32($0) }) {
      guard let socket = try attacher.socket(of: index) else {
        return try link.send(LinkMessage("none"))
      }
      return try link.send(LinkMessage("socket"), lending: [.nbd: socket.raw])
    }
    let counts = attacher.counts
    try link.send(
      LinkMessage(
        "counts",
        ["devices": "\(counts.devices)", "reattachments": "\(counts.reattachments)"]))
  }
}
