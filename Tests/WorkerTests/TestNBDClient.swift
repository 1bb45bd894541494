// SPDX-License-Identifier: Apache-2.0
// The client's side of NBD, as small as tests need it: many requests under way, none of
// which waits. Source: the NBD protocol, doc/proto.md.

import Glibc
import SystemIO

/// A client of one connection.
final class TestNBDClient {
  enum Kind: UInt16, CaseIterable {
    case read = 0
    case write = 1
    case disconnect = 2
    case flush = 3
    case trim = 4
    case writeZeroes = 6
  }

  struct Reply {
    let handle: UInt64
    let error: UInt32
    let data: [UInt8]
  }

  /// Bytes of the disk, when the handshake told them.
  private(set) var size: UInt64 = 0
  private(set) var flags: UInt16 = 0
  /// Whether the server has gone.
  private(set) var ended = false
  /// Bytes that the replies to reads under way will bring.
  private var readLengths: [UInt64: Int] = [:]
  private var lastHandle: UInt64 = 0
  private var outgoing: [UInt8] = []
  private var incoming: [UInt8] = []
  private let socket: Descriptor

  /// A client of a socket that is past its handshake.
  init(transmission socket: consuming Descriptor) throws {
    try UnixSocket.setNonBlocking(socket.raw)
    self.socket = socket
  }

  /// A client of the only export of a server.
  init(path: String) throws {
    socket = try UnixSocket.connect(to: path, kind: .stream)
    try UnixSocket.setNonBlocking(socket.raw)
    let greeting = try gather(18)
    guard greeting[..<16] == Array("NBDMAGICIHAVEOPT".utf8)[...] else {
      throw IOError(EPROTO, "greet", path)
    }
    // Flags: fixed newstyle, no zeroes. Option: export name, "".
    outgoing = bytes(UInt32(3)) + Array("IHAVEOPT".utf8) + bytes(UInt32(1)) + bytes(UInt32(0))
    let answer = try gather(10)
    size = number(answer[..<8])
    flags = number(answer[8...])
  }

  /// Queues a request; answers its handle.
  func submit(
    _ kind: Kind, offset: UInt64 = 0, length: Int = 0, data: [UInt8] = [], fua: Bool = false
  )
    -> UInt64
  {
    lastHandle += 1
    submit(kind, handle: lastHandle, offset: offset, length: length, data: data, fua: fua)
    return lastHandle
  }

  func submit(
    _ kind: Kind, handle: UInt64, offset: UInt64, length: Int, data: [UInt8], fua: Bool
  ) {
    outgoing += bytes(UInt32(0x2560_9513)) + bytes(UInt16(fua ? 1 : 0)) + bytes(kind.rawValue)
    outgoing += bytes(handle) + bytes(offset) + bytes(UInt32(length))
    outgoing += data
    if kind == .read { readLengths[handle] = length }
  }

  /// Sends and receives what can be, waiting at most so long for something to come.
  func turn(milliseconds: Int32) throws -> [Reply] {
    var item = pollfd(fd: socket.raw, events: Int16(POLLIN), revents: 0)
    if !outgoing.isEmpty { item.events |= Int16(POLLOUT) }
    guard poll(&item, 1, milliseconds) >= 0 || errno == EINTR else {
      throw IOError.last("wait for the server")
    }
    send()
    try receive()
    var replies: [Reply] = []
    while let reply = try takeReply() { replies.append(reply) }
    return replies
  }

  /// Sends one request and waits for its reply. Throws its errno.
  @discardableResult
  func run(_ kind: Kind, offset: UInt64 = 0, length: Int = 0, data: [UInt8] = [], fua: Bool = false)
    throws -> [UInt8]
  {
    let handle = submit(kind, offset: offset, length: length, data: data, fua: fua)
    for _ in 0..<1000 {
      for reply in try turn(milliseconds: 100) where reply.handle == handle {
        guard reply.error == 0 else { throw IOError(Int32(reply.error), "do", "\(kind)") }
        return reply.data
      }
      if ended { throw IOError(EPIPE, "do", "\(kind)") }
    }
    throw IOError(ETIMEDOUT, "do", "\(kind)")
  }

  private func gather(_ count: Int) throws -> [UInt8] {
    for _ in 0..<100 where incoming.count < count && !ended {
      var item = pollfd(fd: socket.raw, events: Int16(POLLIN), revents: 0)
      send()
      _ = poll(&item, 1, 100)
      try receive()
    }
    guard incoming.count >= count else { throw IOError(ETIMEDOUT, "hear", "the server") }
    defer { incoming.removeFirst(count) }
    return Array(incoming[..<count])
  }

  private func send() {
    guard !outgoing.isEmpty, !ended else { return }
    let count = Glibc.send(
      socket.raw, outgoing, outgoing.count,
      Int32(bitPattern: UInt32(truncatingIfNeeded: MSG_NOSIGNAL)))
    // A server that has gone is seen by receiving, after the replies that it still sent.
    if count > 0 { outgoing.removeFirst(count) }
    if count < 0, errno == EPIPE || errno == ECONNRESET { outgoing = [] }
  }

  private func receive() throws {
    var buffer = [UInt8](repeating: 0, count: 1 << 18)
    while !ended {
      let count = recv(socket.raw, &buffer, buffer.count, 0)
      if count > 0 { incoming += buffer[..<count] }
      if count == 0 || (count < 0 && errno == ECONNRESET) { ended = true }
      if count < 0 {
        guard errno == EAGAIN || errno == EINTR || errno == ECONNRESET else {
          throw IOError.last("hear", "the server")
        }
        return
      }
    }
  }

  private func takeReply() throws -> Reply? {
    guard incoming.count >= 16 else { return nil }
    guard number(incoming[..<4]) as UInt32 == 0x6744_6698 else {
      throw IOError(EPROTO, "understand", "the server")
    }
    let error: UInt32 = number(incoming[4..<8])
    let handle: UInt64 = number(incoming[8..<16])
    let length = error == 0 ? readLengths[handle] ?? 0 : 0
    guard incoming.count >= 16 + length else { return nil }
    let data = Array(incoming[16..<16 + length])
    incoming.removeFirst(16 + length)
    readLengths[handle] = nil
    return Reply(handle: handle, error: error, data: data)
  }

  private func bytes<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    withUnsafeBytes(of: value.bigEndian) { Array($0) }
  }

  private func number<T: FixedWidthInteger>(_ bytes: ArraySlice<UInt8>) -> T {
    bytes.reduce(0) { $0 << 8 | T($1) }
  }
}
