// SPDX-License-Identifier: Apache-2.0
//
// From a path to a connection.
//
// xs_open takes its path from the environment, falls back to the kernel's /dev/xen/xenbus when
// the socket refuses (where, in a dom0 whose xenstored is gone, requests then hang in the
// kernel), and does not say which descriptor it opened. So:
//
// 1. a knock: a connection of our own asks xenstored one thing, with a time limit;
// 2. xs_open, with the variable set for just as long;
// 3. the socket it opened is the one descriptor that is new and has the same peer.
//
// One opening at a time in the whole process (`SocketVariable`).

import CXenStore
import Glibc

/// Why there is no connection: one sentence, for a log and for errors.
struct OpeningFailure: Error {
  let reason: String
}

enum Opening {
  /// Opens a connection, waiting for xenstored no longer than `limit`.
  ///
  /// `path` nil means what libxenstore takes by itself. A path that is no socket is opened as
  /// the kernel's device, as libxenstore does.
  static func open(
    path explicit: String?, generation: Int, limit: Duration
  ) throws(OpeningFailure) -> Connection {
    let path = explicit ?? SocketVariable.defaultPath()
    var status = stat()
    guard stat(path, &status) == 0 else {
      let reason = failure("no xenstored at \(path)", errno)
      guard explicit == nil, !runsInControlDomain() else { throw reason }
      return try openDevice(path: nil, generation: generation)
    }
    guard status.st_mode & S_IFMT == S_IFSOCK else {
      return try openDevice(path: path, generation: generation)
    }
    return try openSocket(path: path, explicit: explicit, generation: generation, limit: limit)
  }

  /// Whether such a connection goes by the kernel's device.
  static func goesByDevice(_ explicit: String?) -> Bool {
    var status = stat()
    guard stat(explicit ?? SocketVariable.defaultPath(), &status) == 0 else {
      return explicit == nil && !runsInControlDomain()
    }
    return status.st_mode & S_IFMT != S_IFSOCK
  }

  private static func openDevice(
    path: String?, generation: Int
  ) throws(OpeningFailure) -> Connection {
    guard let handle = SocketVariable.withPath(path, { xs_open(0) }) else {
      throw failure("cannot open xenstore's device", errno)
    }
    return Connection(
      handle: handle, generation: generation, events: xs_fileno(handle), socket: -1,
      lifeline: -1)
  }

  private static func openSocket(
    path: String, explicit: String?, generation: Int, limit: Duration
  ) throws(OpeningFailure) -> Connection {
    let peer = try Knock.knock(at: path, limit: limit)
    let opened = SocketVariable.withPath(explicit) { () -> (OpaquePointer, [Int32])? in
      let before = socketsConnected(to: peer)
      guard let handle = xs_open(0) else { return nil }
      return (handle, socketsConnected(to: peer).filter { !before.contains($0) })
    }
    guard let (handle, sockets) = opened else {
      throw failure("cannot connect to \(path)", errno)
    }
    // More than one: somebody beside this library connected at the same moment. Try again.
    guard sockets.count == 1, let lifeline = duplicate(sockets[0]) else {
      xs_close(handle)
      throw OpeningFailure(reason: "cannot tell which socket belongs to \(path)")
    }
    return Connection(
      handle: handle, generation: generation, events: xs_fileno(handle), socket: sockets[0],
      lifeline: lifeline)
  }

  private static func duplicate(_ descriptor: Int32) -> Int32? {
    let copy = fcntl(descriptor, F_DUPFD_CLOEXEC, 0)
    return copy < 0 ? nil : copy
  }

  /// The descriptors of this process that are Unix sockets connected to `peer`.
  static func socketsConnected(to peer: [UInt8]) -> [Int32] {
    guard let directory = opendir("/proc/self/fd") else { return [] }
    defer { closedir(directory) }
    var found: [Int32] = []
    while let entry = readdir(directory) {
      let name = withUnsafeBytes(of: entry.pointee.d_name) { bytes in
        String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
      }
      guard let descriptor = Int32(name), peerName(of: descriptor) == peer else { continue }
      found.append(descriptor)
    }
    return found
  }

  /// The address that the other end of a connected Unix socket is bound to, byte for byte.
  static func peerName(of descriptor: Int32) -> [UInt8]? {
    var address = sockaddr_un()
    var length = socklen_t(MemoryLayout<sockaddr_un>.size)
    let result = withUnsafeMutablePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { getpeername(descriptor, $0, &length) }
    }
    guard result == 0, address.sun_family == sa_family_t(AF_UNIX) else { return nil }
    return withUnsafeBytes(of: address) { Array($0.prefix(Int(length))) }
  }

  /// In the control domain a missing socket means that xenstored is not up yet; in any other
  /// domain it means that the kernel's device is the way.
  private static func runsInControlDomain() -> Bool {
    let file = Glibc.open("/proc/xen/capabilities", O_RDONLY | O_CLOEXEC)
    guard file >= 0 else { return access("/dev/xen/xenbus", F_OK) != 0 }
    defer { close(file) }
    var bytes = [UInt8](repeating: 0, count: 256)
    let count = read(file, &bytes, bytes.count)
    return String(decoding: bytes.prefix(max(0, count)), as: UTF8.self).contains("control_d")
  }

  static func failure(_ what: String, _ number: Int32) -> OpeningFailure {
    OpeningFailure(reason: "\(what): \(String(cString: strerror(number)))")
  }
}
