// SPDX-License-Identifier: Apache-2.0
//
// A knock at xenstored's socket: connect without waiting, ask for a domain's path, and see an
// answer come, all with a time limit, which libxenstore has not.
//
// The question, as it goes over the socket (host byte order, xen/io/xs_wire.h):
//
//     offset  size  field
//          0     4  type, XS_GET_DOMAIN_PATH
//          4     4  request id, 0
//          8     4  transaction id, 0
//         12     4  length of what follows, 2
//         16     2  "0" and a NUL

import CXenStore
import Glibc

enum Knock {
  /// Returns the address that xenstored is bound to, once it has answered.
  static func knock(at path: String, limit: Duration) throws(OpeningFailure) -> [UInt8] {
    let kind = Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)
    let descriptor = socket(AF_UNIX, kind, 0)
    guard descriptor >= 0 else { throw Opening.failure("cannot make a socket", errno) }
    defer { close(descriptor) }
    try connect(descriptor, to: path)
    guard let peer = Opening.peerName(of: descriptor) else {
      throw Opening.failure("cannot tell who listens at \(path)", errno)
    }
    try ask(descriptor, path, limit)
    return peer
  }

  private static func connect(_ descriptor: Int32, to path: String) throws(OpeningFailure) {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let room = MemoryLayout.size(ofValue: address.sun_path)
    guard path.utf8.count < room else {
      throw OpeningFailure(reason: "the socket path \(path) has more than \(room - 1) bytes")
    }
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
    let size = socklen_t(MemoryLayout<sockaddr_un>.size)
    let result = withUnsafePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { Glibc.connect(descriptor, $0, size) }
    }
    guard result == 0 else {
      // A Unix socket is busy at once when its queue is full, that is when nobody accepts.
      let number = errno
      if number == EAGAIN {
        throw OpeningFailure(reason: "xenstored at \(path) accepts no connections")
      }
      throw Opening.failure("cannot connect to \(path)", number)
    }
  }

  private static func ask(
    _ descriptor: Int32, _ path: String, _ limit: Duration
  ) throws(OpeningFailure) {
    var message: [UInt8] = []
    for word in [UInt32(XS_GET_DOMAIN_PATH.rawValue), 0, 0, 2] {
      withUnsafeBytes(of: word) { message.append(contentsOf: $0) }
    }
    message += [UInt8(ascii: "0"), 0]
    let sent = send(descriptor, message, message.count, Int32(MSG_NOSIGNAL))
    guard sent == message.count else { throw Opening.failure("cannot ask \(path)", errno) }
    var item = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
    let ready = poll(&item, 1, limit.pollMilliseconds)
    guard ready > 0 else {
      throw OpeningFailure(reason: "xenstored at \(path) does not answer within \(limit)")
    }
    var answer: UInt8 = 0
    guard recv(descriptor, &answer, 1, 0) == 1 else {
      throw OpeningFailure(reason: "xenstored at \(path) hung up")
    }
  }
}
