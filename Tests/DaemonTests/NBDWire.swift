// SPDX-License-Identifier: Apache-2.0
// NBD's transmission phase by hand: what the kernel's driver would say on its end.
// Source: the NBD protocol, "Transmission phase".

import Glibc
import SystemIO

/// The worker at the other end does not serve any more, or not in time.
struct WireEnded: Error, CustomStringConvertible {
  let description: String
}

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
    let code = try ask(type: 0, offset, UInt32(count))
    guard code == 0 else { throw WireEnded(description: "a read failed with errno \(code)") }
    return try receive(count)
  }

  private func ask(
    type: UInt16, _ offset: UInt64, _ length: UInt32, payload: [UInt8] = []
  ) throws -> UInt32 {
    var bytes = big(UInt32(0x2560_9513)) + big(UInt16(0)) + big(type)
    bytes += big(UInt64(7)) + big(offset) + big(length) + payload
    while !bytes.isEmpty {
      let count = send(socket.raw, bytes, bytes.count, Int32(MSG_NOSIGNAL))
      guard count > 0 else { throw WireEnded(description: "the worker does not take requests") }
      bytes.removeFirst(count)
    }
    let reply = try receive(16)
    guard Array(reply[..<4]) == big(UInt32(0x6744_6698)) else {
      throw WireEnded(description: "no simple reply")
    }
    return reply[4..<8].reduce(0) { $0 << 8 | UInt32($1) }
  }

  private func receive(_ count: Int) throws -> [UInt8] {
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: count)
    while bytes.count < count {
      var item = pollfd(fd: socket.raw, events: Int16(POLLIN), revents: 0)
      guard poll(&item, 1, 10_000) == 1 else { throw WireEnded(description: "no reply in time") }
      let got = recv(socket.raw, &buffer, count - bytes.count, 0)
      guard got > 0 else { throw WireEnded(description: "the worker has closed the socket") }
      bytes += buffer[..<got]
    }
    return bytes
  }

  private func big<Number: FixedWidthInteger>(_ number: Number) -> [UInt8] {
    withUnsafeBytes(of: number.bigEndian) { Array($0) }
  }
}
