// SPDX-License-Identifier: Apache-2.0
// What a worker may try that an image or a guest has taken over. PLAYED=ACT[:ARGUMENT] names it:
//
//   linger        sends, unasked, a TCP socket whose close(2) waits for its unsent data
//   many          the same among more descriptors than a message may have
//   stranger:PATH gives another file back than the ones that it was given
//   children      leaves a process that keeps the link's listener, with no room in its queue, and
//                 the store
//   unlock        gives the locks of its store and base up
//   lock-base     takes the locks on its base that a writer has
//   grow-log:N    makes its pending log N bytes long
//   fill-log      fills the file system of its pending log
//   need:PATHS    asks for these files, separated by commas, before it is ready

import BlockIO
import Glibc
import SystemIO
import WorkerLink

struct Hostile {
  /// The descriptors that the worker was given, lent.
  struct Files {
    let store: Int32?
    let base: Int32?
    let pending: Int32?
  }

  private let name: String
  private let argument: String

  init() {
    let text = getenv("PLAYED").map { String(cString: $0) } ?? ""
    let parts = text.split(separator: ":", maxSplits: 1).map { String($0) }
    name = parts.first ?? ""
    argument = parts.count > 1 ? parts[1] : ""
  }

  /// What is asked for before the disk is ready.
  var needs: [FileNeed] {
    guard name == "need" else { return [] }
    return argument.split(separator: ",").map {
      FileNeed(role: "extent", path: String($0), writable: false)
    }
  }

  /// Does its act, once the disk is served.
  func act(_ files: Files, _ link: LinkConnection) throws {
    switch name {
    case "linger", "many":
      let socket = try Self.lingeringSocket()
      if name == "linger" {
        return try link.send(.event(.ready, error: ""), lending: [.file: socket.raw])
      }
      try Self.send([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, socket.raw], over: link.raw)
    case "children": try children(files)
    case "unlock":
      for raw in [files.store, files.base].compactMap({ $0 }) {
        try FileStore(Descriptor(owning: dup(raw)), name: "file").unlock()
      }
    case "lock-base":
      // Through an open file description of its own: those of the daemon's do not conflict.
      guard let base = files.base else { return }
      let file = try FileStore(Descriptor(owning: dup(base)), name: "base")
      try file.unlock()
      try file.lock(exclusive: true)
    case "grow-log":
      guard ftruncate(files.pending ?? -1, off_t(argument) ?? 0) == 0 else {
        throw IOError.last("grow", "the log")
      }
    case "fill-log":
      var size: off_t = 1 << 20
      while posix_fallocate(files.pending ?? -1, 0, size) == 0 { size *= 2 }
    default: break
    }
  }

  /// Puts another file in the place of the pending log and of the base.
  func exchange(_ lent: inout [LinkRole: Int32]) {
    guard name == "stranger" else { return }
    let raw = open(argument, O_RDONLY | O_CLOEXEC)
    guard raw >= 0 else { return }
    lent[.pending] = raw
    if lent[.base] != nil { lent[.base] = raw }
  }

  private func children(_ files: Files) throws {
    guard listen(3, 0) == 0 else { throw IOError.last("listen on", "the link") }
    var command = Command("/bin/sleep", ["600"])
    command.newSession = true
    command.descriptors = [3: 3, 4: files.store ?? 0]
    _ = try command.start()
  }

  /// A connection to this very process, which reads nothing, full of data.
  private static func lingeringSocket() throws -> Descriptor {
    let listener = try tcp()
    guard listen(listener.raw, 1) == 0 else { throw IOError.last("listen") }
    var address = sockaddr_in()
    var length = socklen_t(MemoryLayout<sockaddr_in>.size)
    let socket = try tcp()
    let isConnected = withUnsafeMutablePointer(to: &address) { pointer in
      pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        getsockname(listener.raw, $0, &length) == 0 && connect(socket.raw, $0, length) == 0
      }
    }
    guard isConnected else { throw IOError.last("connect") }
    var time = linger(l_onoff: 1, l_linger: 100_000)
    guard
      setsockopt(
        socket.raw, SOL_SOCKET, SO_LINGER, &time, socklen_t(MemoryLayout<linger>.size)) == 0
    else { throw IOError.last("set up a socket") }
    let bytes = [UInt8](repeating: 0, count: 1 << 16)
    while Glibc.send(socket.raw, bytes, bytes.count, Int32(MSG_DONTWAIT | MSG_NOSIGNAL)) > 0 {}
    // The listener stays, or the connection would be reset.
    _ = listener.release()
    return socket
  }

  private static func tcp() throws -> Descriptor {
    let raw = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
    guard raw >= 0 else { throw IOError.last("make a socket") }
    return Descriptor(owning: raw)
  }

  /// One message with any number of descriptors.
  private static func send(_ numbers: [Int32], over link: Int32) throws {
    let header = MemoryLayout<cmsghdr>.size
    var control = [UInt8](repeating: 0, count: header + (numbers.count * 4 + 7) / 8 * 8)
    control.withUnsafeMutableBytes { control in
      var value = cmsghdr()
      value.cmsg_len = header + numbers.count * 4
      value.cmsg_level = SOL_SOCKET
      value.cmsg_type = 1  // SCM_RIGHTS
      control.storeBytes(of: value, as: cmsghdr.self)
      for (index, number) in numbers.enumerated() {
        control.storeBytes(of: number, toByteOffset: header + index * 4, as: Int32.self)
      }
    }
    var bytes = Array("event\nerror=\nstate=ready\n".utf8)
    let count = bytes.count
    let sent = bytes.withUnsafeMutableBytes { bytes in
      control.withUnsafeMutableBytes { control in
        var vector = iovec(iov_base: bytes.baseAddress, iov_len: count)
        return withUnsafeMutablePointer(to: &vector) { vector in
          var message = msghdr()
          message.msg_iov = vector
          message.msg_iovlen = 1
          message.msg_control = control.baseAddress
          message.msg_controllen = control.count
          return sendmsg(link, &message, 0)
        }
      }
    }
    guard sent == count else { throw IOError.last("send") }
  }
}
