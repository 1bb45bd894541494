// SPDX-License-Identifier: Apache-2.0
// Unix sockets: streams for NBD, sequenced packets for the worker link. Source: unix(7).

internal import CLinux
import Glibc

/// Two sockets that are connected to each other.
@frozen package struct SocketPair: ~Copyable, Sendable {
  /// One end.
  package let first: Descriptor
  /// The other end.
  package let second: Descriptor
}

/// Who connected to a Unix socket, as the kernel noted it at that time.
package struct PeerCredentials: Sendable, Equatable {
  /// Process id.
  package let pid: Int32
  /// Effective user id.
  package let uid: UInt32
  /// Effective group id.
  package let gid: UInt32
}

/// Opening and examining Unix sockets. Every descriptor is close-on-exec.
package enum UnixSocket {
  /// What a socket carries.
  package enum Kind: Sendable {
    /// Bytes.
    case stream
    /// Packets, whole and in order.
    case packets
    /// Packets without a connection.
    case datagrams

    var type: Int32 {
      let kind =
        switch self {
        case .stream: SOCK_STREAM
        case .packets: SOCK_SEQPACKET
        case .datagrams: SOCK_DGRAM
        }
      return Int32(kind.rawValue) | Int32(SOCK_CLOEXEC.rawValue)
    }
  }

  /// Makes a connected pair. Throws: the errno of socketpair(2).
  package static func pair(_ kind: Kind) throws(IOError) -> SocketPair {
    var ends: [Int32] = [-1, -1]
    guard socketpair(AF_UNIX, kind.type, 0, &ends) == 0 else {
      throw IOError.last("make a socket pair")
    }
    return SocketPair(first: Descriptor(owning: ends[0]), second: Descriptor(owning: ends[1]))
  }

  /// Listens at a path. A socket file that nobody listens on any more is replaced; one in
  /// use throws EADDRINUSE, unless `replacing` says that the place is the caller's, and so does any
  /// other file there. `mode` are the permission bits of the socket file.
  package static func listen(
    at path: String, kind: Kind, mode: UInt32 = 0o600, backlog: Int32 = 64,
    replacing: Bool = false
  ) throws(IOError) -> Descriptor {
    let listener = try make(kind)
    do {
      try bind(listener.raw, path, mode)
    } catch {
      guard error.code == EADDRINUSE, try isAbandoned(path, kind, replacing) else { throw error }
      guard unlink(path) == 0 || errno == ENOENT else { throw IOError.last("replace", path) }
      try bind(listener.raw, path, mode)
    }
    guard Glibc.listen(listener.raw, backlog) == 0 else { throw IOError.last("listen on", path) }
    return listener
  }

  /// Connects to a path. A listener whose queue is full is waited for, at most so long. Throws: the
  /// errno of connect(2), ETIMEDOUT after that time.
  package static func connect(
    to path: String, kind: Kind, milliseconds: Int = 5000
  ) throws(IOError) -> Descriptor {
    let socket = try make(kind)
    try setSendTimeout(socket.raw, milliseconds)
    let code = try withAddress(path) { Glibc.connect(socket.raw, $0, $1) == 0 ? 0 : errno }
    guard code == 0 else {
      throw IOError(code == EAGAIN ? ETIMEDOUT : code, "connect to", path)
    }
    try setSendTimeout(socket.raw, 0)
    return socket
  }

  /// Source: socket(7), SO_SNDTIMEO; connect(2) of a Unix socket waits as long. 0: for ever.
  private static func setSendTimeout(_ raw: Int32, _ milliseconds: Int) throws(IOError) {
    var time = timeval(tv_sec: milliseconds / 1000, tv_usec: milliseconds % 1000 * 1000)
    guard
      setsockopt(
        raw, SOL_SOCKET, SO_SNDTIMEO, &time, socklen_t(MemoryLayout<timeval>.size)) == 0
    else { throw IOError.last("set up a socket") }
  }

  /// A socket that receives datagrams at a path, or, if it begins with "@", at the abstract address
  /// that follows. Throws: the errno of bind(2).
  package static func receiver(at path: String, mode: UInt32 = 0o600) throws(IOError) -> Descriptor
  {
    let socket = try make(.datagrams)
    guard path.hasPrefix("@") else {
      try bind(socket.raw, path, mode)
      return socket
    }
    let code = try withAddress(path, isAbstract: true) {
      Glibc.bind(socket.raw, $0, $1) == 0 ? 0 : errno
    }
    guard code == 0 else { throw IOError(code, "listen on", path) }
    return socket
  }

  /// A socket that sends datagrams.
  package static func sender() throws(IOError) -> Descriptor { try make(.datagrams) }

  /// Sends a datagram to the socket at a path, or, if the path begins with "@", at the abstract
  /// address that follows it. Does not wait. Throws: the errno of sendto(2), EAGAIN when the
  /// receiver's queue is full.
  package static func send(
    _ bytes: [UInt8], from socket: Int32, to path: String
  ) throws(IOError) {
    let code = try withAddress(path, isAbstract: path.hasPrefix("@")) {
      let flags = Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL)
      return sendto(socket, bytes, bytes.count, flags, $0, $1) >= 0 ? 0 : errno
    }
    guard code == 0 else { throw IOError(code, "send to", path) }
  }

  /// Takes the next connection of a listening socket that is waiting; nil when there is none
  /// (which only a non-blocking listener says) or it has gone. Throws: the errno of accept(2).
  package static func accept(from listener: Int32) throws(IOError) -> Descriptor? {
    while true {
      let raw = dmu_accept(listener)
      if raw >= 0 { return Descriptor(owning: raw) }
      switch errno {
      case EINTR: continue
      case EAGAIN, ECONNABORTED: return nil
      default: throw IOError.last("accept a connection")
      }
    }
  }

  /// Who is at the other end. Throws: the errno of getsockopt(2).
  package static func peer(of socket: Int32) throws(IOError) -> PeerCredentials {
    var pid: pid_t = 0
    var uid: uid_t = 0
    var gid: gid_t = 0
    guard dmu_peer_credentials(socket, &pid, &uid, &gid) == 0 else {
      throw IOError.last("examine the peer of a socket")
    }
    return PeerCredentials(pid: pid, uid: uid, gid: gid)
  }

  /// Makes reads and writes of a descriptor return at once instead of waiting.
  package static func setNonBlocking(_ raw: Int32) throws(IOError) {
    let flags = fcntl(raw, F_GETFL)
    guard flags >= 0, fcntl(raw, F_SETFL, flags | O_NONBLOCK) == 0 else {
      throw IOError.last("make a socket non-blocking")
    }
  }

  private static func make(_ kind: Kind) throws(IOError) -> Descriptor {
    let raw = socket(AF_UNIX, kind.type, 0)
    guard raw >= 0 else { throw IOError.last("make a socket") }
    return Descriptor(owning: raw)
  }

  /// Binds with the wanted permission bits from the first moment on: on Linux the bits of
  /// the socket itself, less the umask, become those of the file.
  private static func bind(_ socket: Int32, _ path: String, _ mode: UInt32) throws(IOError) {
    guard fchmod(socket, mode) == 0 else { throw IOError.last("set the mode of", path) }
    let code = try withAddress(path) { Glibc.bind(socket, $0, $1) == 0 ? 0 : errno }
    guard code == 0 else { throw IOError(code, "listen on", path) }
    guard chmod(path, mode) == 0 else { throw IOError.last("set the mode of", path) }
  }

  /// A listener just closed may live on for a moment in a program that is being started and
  /// has not yet dropped what it inherited: hence more than one look.
  private static func isAbandoned(
    _ path: String, _ kind: Kind, _ isOurs: Bool
  ) throws(IOError) -> Bool {
    for _ in 0..<3 {
      if try isStale(path, kind, isOurs) { return true }
      usleep(20_000)
    }
    return false
  }

  private static func isStale(
    _ path: String, _ kind: Kind, _ isOurs: Bool
  ) throws(IOError) -> Bool {
    var status = stat()
    guard lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFSOCK else { return false }
    if isOurs { return true }
    do {
      _ = try connect(to: path, kind: kind)
      return false
    } catch { return error.code == ECONNREFUSED }
  }

  /// The name of an abstract address is as long as the address is: unix(7).
  private static func withAddress(
    _ path: String, isAbstract: Bool = false,
    _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32
  ) throws(IOError) -> Int32 {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    let bytes = Array(path.utf8)
    let room = MemoryLayout.size(ofValue: address.sun_path)
    guard !bytes.isEmpty, bytes.count < room, !bytes.contains(0) else {
      throw IOError(ENAMETOOLONG, "use as a socket's path", path)
    }
    withUnsafeMutableBytes(of: &address.sun_path) {
      $0.copyBytes(from: bytes)
      if isAbstract { $0[0] = 0 }
    }
    let length =
      isAbstract
      ? MemoryLayout<sockaddr_un>.size - room + bytes.count : MemoryLayout<sockaddr_un>.size
    return withUnsafePointer(to: &address) { pointer in
      pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        body($0, socklen_t(length))
      }
    }
  }
}
