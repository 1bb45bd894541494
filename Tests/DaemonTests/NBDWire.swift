// NBD's transmission phase by hand: what the kernel's driver would say on its end.
// Source: the NBD protocol, "Transmission phase".

import Glibc
import Posix
import Testing

/// A client of a connected socket, one request at a time.
struct NBDWire: ~Copyable {
  private let socket: Descriptor

  init(_ socket: consuming Descriptor) { self.socket = socket }

  /// The errno of a write's reply.
  func write(_ bytes: [UInt8], at offset: UInt64) throws -> UInt32 {
    try ask(type: 1, offset, UInt32(bytes.count), payload: bytes)
  }

  /// The errno of a flush's reply.
  func flush() throws -> UInt32 { try ask(type: 3, 0, 0) }

  /// Bytes of the disk.
  func read(_ count: Int, at offset: UInt64) throws -> [UInt8] {
    try #require(try ask(type: 0, offset, UInt32(count)) == 0)
    return try receive(count)
  }

  private func ask(
    type: UInt16, _ offset: UInt64, _ length: UInt32, payload: [UInt8] = []
  ) throws -> UInt32 {
    var bytes = big(UInt32(0x2560_9513)) + big(UInt16(0)) + big(type)
    bytes += big(UInt64(7)) + big(offset) + big(length) + payload
    while !bytes.isEmpty {
      let count = send(socket.raw, bytes, bytes.count, Int32(MSG_NOSIGNAL))
      try #require(count > 0, "the worker does not take requests")
      bytes.removeFirst(count)
    }
    let reply = try receive(16)
    try #require(Array(reply[..<4]) == big(UInt32(0x6744_6698)), "no simple reply")
    return reply[4..<8].reduce(0) { $0 << 8 | UInt32($1) }
  }

  private func receive(_ count: Int) throws -> [UInt8] {
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: count)
    while bytes.count < count {
      var item = pollfd(fd: socket.raw, events: Int16(POLLIN), revents: 0)
      try #require(poll(&item, 1, 10_000) == 1, "no reply in time")
      let got = recv(socket.raw, &buffer, count - bytes.count, 0)
      try #require(got > 0, "the worker has closed the socket")
      bytes += buffer[..<got]
    }
    return bytes
  }

  private func big<Number: FixedWidthInteger>(_ number: Number) -> [UInt8] {
    withUnsafeBytes(of: number.bigEndian) { Array($0) }
  }
}
