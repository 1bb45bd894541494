// SPDX-License-Identifier: Apache-2.0
// A connected end of the worker link: typed messages out, messages and descriptors in.

import Glibc
package import SystemIO

/// What a descriptor on the link is.
package enum LinkRole: String, Sendable, CaseIterable {
  /// The image that holds the disk's own blocks.
  case store
  /// The image under it, when the spec names it.
  case base
  /// A file that the worker asked for.
  case file
  /// The memory file of uncommitted placements.
  case pending
  /// The worker's end of the socket that the kernel's nbd driver reads and writes.
  case nbd
  /// A socket that listens for NBD clients.
  case listener
  /// The opened node of the disk's device: /dev/dmu/NAME.
  case node
  /// A file that is also handed over as store or file, opened a second time.
  case witness
}

/// The descriptors of one message, by role. Those not taken are closed with it.
package struct LinkDescriptors: Sendable {
  private let owners: [LinkRole: PassedDescriptor]

  init(_ owners: [LinkRole: PassedDescriptor]) {
    self.owners = owners
  }

  /// Whether there are none.
  package var isEmpty: Bool { owners.isEmpty }

  /// The roles present.
  package var roles: Set<LinkRole> { Set(owners.keys) }

  /// Gives the descriptor of a role to the caller, once.
  package func take(_ role: LinkRole) -> Descriptor? { owners[role]?.take() }

  /// The descriptor of a role, lent.
  package func raw(_ role: LinkRole) -> Int32? { owners[role]?.raw }
}

/// Why a link is of no use any more, or a message was not accepted.
package enum LinkError: Error, Sendable, Equatable, CustomStringConvertible {
  /// A system call failed. EAGAIN on sending: the peer does not read.
  case io(IOError)
  /// The peer sent something that is not a message; the next one may be. Its descriptors
  /// have been closed.
  case fault(LinkFault)

  /// One sentence without a final stop.
  package var description: String {
    switch self {
    case .io(let error): error.description
    case .fault(let fault): fault.description
    }
  }
}

/// What one receive brought.
package enum LinkEvent: Sendable {
  /// A message and its descriptors.
  case message(LinkMessage, LinkDescriptors)
  /// Nothing there now; poll the connection's descriptor for input.
  case none
  /// The peer has closed the link, or is gone.
  case end
}

/// One end of a link. Sending and receiving never wait, and may be done from any thread.
package final class LinkConnection: Sendable {
  /// The socket, lent: poll it for input.
  package let raw: Int32

  private let socket: PassedDescriptor
  private let closer: Closer?

  /// Takes over a connected packet socket. With a closer the peer is not trusted: whatever it
  /// sends, and the socket whose queue may hold more of it, is closed there.
  package init(_ socket: consuming Descriptor, closer: Closer? = nil) {
    raw = socket.raw
    self.socket = PassedDescriptor(socket, closer: closer)
    self.closer = closer
  }

  /// Connects to a worker that listens at a path, which is not trusted. Throws: the errno of
  /// connect(2), ETIMEDOUT when it takes no connection for some seconds.
  package convenience init(path: String) throws(IOError) {
    self.init(try UnixSocket.connect(to: path, kind: .packets), closer: Closer())
  }

  /// Sends a message with descriptors, which stay the caller's. Throws `io` with EAGAIN when
  /// the peer's queue is full, EPIPE when it is gone.
  package func send(
    _ message: LinkMessage, lending descriptors: [LinkRole: Int32] = [:]
  ) throws(LinkError) {
    var message = message
    let ordered = descriptors.sorted { $0.key.rawValue < $1.key.rawValue }
    if !ordered.isEmpty {
      message.fields[LinkMessage.rolesField] =
        ordered.map(\.key.rawValue).joined(separator: ",")
    }
    let bytes: [UInt8]
    do { bytes = try message.encoded() } catch { throw .fault(error) }
    do {
      try PacketSocket.send(bytes, descriptors: ordered.map(\.value), to: raw)
    } catch { throw .io(error) }
  }

  /// Receives the next message, if there is one. The field `roles` is not among its fields.
  package func receive() throws(LinkError) -> LinkEvent {
    let packet: Packet
    do {
      packet = try PacketSocket.receive(from: raw, limit: LinkMessage.limit, closer: closer)
    } catch { throw .io(error) }
    switch packet {
    case .none: return .none
    case .end: return .end
    case .tooLarge: throw .fault(.tooLarge)
    case .packet(let bytes, let passed):
      do throws(LinkFault) {
        var message = try LinkMessage(decoding: bytes)
        let descriptors = try Self.assign(passed, to: &message)
        return .message(message, descriptors)
      } catch { throw .fault(error) }
    }
  }

  /// Receives the next message, waiting for it at most so long; `none` when none came. For
  /// whoever has a thread to spare.
  package func receive(milliseconds: Int32) throws(LinkError) -> LinkEvent {
    var item = pollfd(fd: raw, events: Int16(POLLIN), revents: 0)
    while poll(&item, 1, milliseconds) < 0 {
      guard errno == EINTR else { throw .io(.last("wait for the worker link")) }
    }
    return try receive()
  }

  private static func assign(
    _ passed: [PassedDescriptor], to message: inout LinkMessage
  ) throws(LinkFault) -> LinkDescriptors {
    let text = message.fields.removeValue(forKey: LinkMessage.rolesField)
    let names = text?.split(separator: ",", omittingEmptySubsequences: false) ?? []
    guard names.count == passed.count else {
      throw .malformed("\(passed.count) descriptors for \(names.count) roles")
    }
    var owners: [LinkRole: PassedDescriptor] = [:]
    for (name, descriptor) in zip(names, passed) {
      guard let role = LinkRole(rawValue: String(name)) else {
        throw .malformed("a descriptor has an unknown role")
      }
      guard owners.updateValue(descriptor, forKey: role) == nil else {
        throw .malformed("the role '\(name)' stands twice")
      }
    }
    return LinkDescriptors(owners)
  }
}
