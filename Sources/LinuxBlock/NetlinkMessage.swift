// SPDX-License-Identifier: Apache-2.0
// The bytes of generic netlink, encoded and decoded by hand.
//
//   message    u32 length of all; u16 type (family); u16 flags; u32 sequence; u32 port
//   generic    u8 command; u8 version; u16 zero
//   attribute  u16 length with these four bytes; u16 type; payload; zeroes up to four bytes
//
// Numbers are in the machine's byte order. Every length is checked before it is used.
// Source: netlink(7); linux/netlink.h, linux/genetlink.h.

/// One attribute: its type without the flag bits, and its payload.
struct NetlinkAttribute: Equatable {
  static let nested: UInt16 = 0x8000

  let type: UInt16
  let payload: [UInt8]

  /// The payload as a number of that width; nil when it is shorter.
  func number<T: FixedWidthInteger>(_: T.Type) -> T? {
    guard payload.count >= MemoryLayout<T>.size else { return nil }
    return payload.withUnsafeBytes { $0.loadUnaligned(as: T.self) }
  }

  /// The payload as attributes.
  func attributes() throws(NetlinkFault) -> [NetlinkAttribute] {
    try NetlinkDecoder.attributes(payload[...])
  }
}

/// Bytes that are not a netlink message.
enum NetlinkFault: Error, Equatable {
  case truncated
  case badLength(Int)
}

/// Builds one request.
struct NetlinkEncoder {
  static let request: UInt16 = 1
  static let acknowledge: UInt16 = 4

  private(set) var bytes: [UInt8]

  init(family: UInt16, command: UInt8, version: UInt8 = 1, sequence: UInt32) {
    bytes = []
    put(UInt32(0))
    put(family)
    put(Self.request | Self.acknowledge)
    put(sequence)
    put(UInt32(0))
    put(command)
    put(version)
    put(UInt16(0))
  }

  mutating func attribute<T: FixedWidthInteger>(_ type: UInt16, _ value: T) {
    put(UInt16(4 + MemoryLayout<T>.size))
    put(type)
    put(value)
    pad()
  }

  mutating func attribute(_ type: UInt16, _ text: String) {
    put(UInt16(4 + text.utf8.count + 1))
    put(type)
    bytes += Array(text.utf8) + [0]
    pad()
  }

  mutating func nest(_ type: UInt16, _ body: (inout NetlinkEncoder) -> Void) {
    let start = bytes.count
    put(UInt16(0))
    put(type | NetlinkAttribute.nested)
    body(&self)
    set(UInt16(bytes.count - start), at: start)
  }

  /// The whole message, its length filled in.
  func finished() -> [UInt8] {
    var copy = self
    copy.set(UInt32(bytes.count), at: 0)
    return copy.bytes
  }

  private mutating func put<T: FixedWidthInteger>(_ value: T) {
    withUnsafeBytes(of: value) { bytes += $0 }
  }

  private mutating func pad() {
    while bytes.count % 4 != 0 { bytes.append(0) }
  }

  private mutating func set<T: FixedWidthInteger>(_ value: T, at offset: Int) {
    withUnsafeBytes(of: value) { bytes.replaceSubrange(offset..<offset + $0.count, with: $0) }
  }
}

/// One message from the kernel.
enum NetlinkReply: Equatable {
  /// The end of a request: 0, or the errno, and the kernel's words if it sent any.
  case result(sequence: UInt32, code: Int32, text: String?)
  /// An answer with attributes.
  case answer(sequence: UInt32, command: UInt8, attributes: [NetlinkAttribute])
  /// Something that says nothing to us.
  case other
}

enum NetlinkDecoder {
  private static let header = 16
  private static let errorType: UInt16 = 2
  private static let firstFamily: UInt16 = 16
  private static let capped: UInt16 = 0x100
  private static let extended: UInt16 = 0x200
  private static let messageAttribute: UInt16 = 1

  /// Every message of a datagram.
  static func replies(_ datagram: [UInt8]) throws(NetlinkFault) -> [NetlinkReply] {
    var replies: [NetlinkReply] = []
    var rest = datagram[...]
    while !rest.isEmpty {
      let length = Int(try number(UInt32.self, rest, at: 0))
      guard length >= header, length <= rest.count else { throw .badLength(length) }
      replies.append(try reply(rest.prefix(length)))
      rest = rest.dropFirst((length + 3) & ~3)
    }
    return replies
  }

  private static func reply(_ message: ArraySlice<UInt8>) throws(NetlinkFault) -> NetlinkReply {
    let type = try number(UInt16.self, message, at: 4)
    let flags = try number(UInt16.self, message, at: 6)
    let sequence = try number(UInt32.self, message, at: 8)
    if type == errorType {
      let code = try number(Int32.self, message, at: header)
      // A negative errno; anything else from the kernel would be a lie.
      guard code <= 0, code > -4096 else { throw .badLength(Int(code)) }
      let text = try flags & extended != 0 ? errorText(message, capped: flags & capped != 0) : nil
      return .result(sequence: sequence, code: -code, text: text)
    }
    guard type >= firstFamily else { return .other }
    guard message.count >= header + 4 else { throw .truncated }
    let command = message[message.startIndex + header]
    let attributes = try attributes(message.dropFirst(header + 4))
    return .answer(sequence: sequence, command: command, attributes: attributes)
  }

  /// The extended acknowledgement that follows the request's copy (or its header alone).
  private static func errorText(
    _ message: ArraySlice<UInt8>, capped: Bool
  ) throws(NetlinkFault) -> String? {
    let copied = capped ? header : Int(try number(UInt32.self, message, at: header + 4))
    let start = header + 4 + ((copied + 3) & ~3)
    guard start <= message.count else { throw .truncated }
    for attribute in try attributes(message.dropFirst(start))
    where attribute.type == messageAttribute {
      return String(decoding: attribute.payload.prefix { $0 != 0 }, as: UTF8.self)
    }
    return nil
  }

  static func attributes(_ bytes: ArraySlice<UInt8>) throws(NetlinkFault) -> [NetlinkAttribute] {
    var attributes: [NetlinkAttribute] = []
    var rest = bytes
    while !rest.isEmpty {
      let length = Int(try number(UInt16.self, rest, at: 0))
      let type = try number(UInt16.self, rest, at: 2)
      guard length >= 4, length <= rest.count else { throw .badLength(length) }
      let payload = Array(rest.dropFirst(4).prefix(length - 4))
      attributes.append(NetlinkAttribute(type: type & 0x3fff, payload: payload))
      rest = rest.dropFirst((length + 3) & ~3)
    }
    return attributes
  }

  private static func number<T: FixedWidthInteger>(
    _: T.Type, _ bytes: ArraySlice<UInt8>, at offset: Int
  ) throws(NetlinkFault) -> T {
    guard offset >= 0, bytes.count - offset >= MemoryLayout<T>.size else { throw .truncated }
    return bytes.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: offset, as: T.self) }
  }
}
