// SPDX-License-Identifier: Apache-2.0
// The words of NBD. All numbers on the wire are big endian.
// Source: the NBD protocol specification (doc/proto.md of the nbd project).

import Glibc
import SystemIO
import Target

enum NBD {
  // MARK: Handshake

  static let magic: UInt64 = 0x4e42_444d_4147_4943
  static let optionMagic: UInt64 = 0x4948_4156_454f_5054
  static let optionReplyMagic: UInt64 = 0x0003_e889_0455_65a9
  static let fixedNewstyle: UInt16 = 1
  static let noZeroes: UInt16 = 2

  enum Option {
    static let exportName: UInt32 = 1
    static let abort: UInt32 = 2
    static let list: UInt32 = 3
    static let startTLS: UInt32 = 5
    static let info: UInt32 = 6
    static let go: UInt32 = 7
    static let structuredReply: UInt32 = 8
    static let listMetaContext: UInt32 = 9
    static let setMetaContext: UInt32 = 10
  }

  enum Reply {
    static let ack: UInt32 = 1
    static let server: UInt32 = 2
    static let info: UInt32 = 3
    static let metaContext: UInt32 = 4
    static let errorUnsupported: UInt32 = 1 << 31 | 1
    static let errorPolicy: UInt32 = 1 << 31 | 2
    static let errorInvalid: UInt32 = 1 << 31 | 3
    static let errorUnknown: UInt32 = 1 << 31 | 6
    static let errorTooBig: UInt32 = 1 << 31 | 9
  }

  enum Info {
    static let export: UInt16 = 0
    static let name: UInt16 = 1
    static let description: UInt16 = 2
    static let blockSize: UInt16 = 3
  }

  // MARK: Transmission

  static let requestMagic: UInt32 = 0x2560_9513
  static let requestSize = 28
  static let simpleReplyMagic: UInt32 = 0x6744_6698
  static let simpleReplySize = 16
  static let chunkMagic: UInt32 = 0x668e_33ef
  static let chunkSize = 20
  static let maximumPayload: UInt32 = 32 << 20

  enum Flag {
    static let hasFlags: UInt16 = 1 << 0
    static let readOnly: UInt16 = 1 << 1
    static let sendFlush: UInt16 = 1 << 2
    static let sendFUA: UInt16 = 1 << 3
    static let sendTrim: UInt16 = 1 << 5
    static let sendWriteZeroes: UInt16 = 1 << 6
    static let sendDontFragment: UInt16 = 1 << 7
    static let multiConnection: UInt16 = 1 << 8
  }

  enum Command {
    static let read: UInt16 = 0
    static let write: UInt16 = 1
    static let disconnect: UInt16 = 2
    static let flush: UInt16 = 3
    static let trim: UInt16 = 4
    static let writeZeroes: UInt16 = 6
    static let blockStatus: UInt16 = 7
  }

  enum CommandFlag {
    static let forced: UInt16 = 1 << 0
    static let noHole: UInt16 = 1 << 1
    static let dontFragment: UInt16 = 1 << 2
    static let requestOne: UInt16 = 1 << 3
  }

  enum Chunk {
    static let done: UInt16 = 1
    static let none: UInt16 = 0
    static let offsetData: UInt16 = 1
    static let offsetHole: UInt16 = 2
    static let blockStatus: UInt16 = 5
    static let error: UInt16 = 1 << 15 | 1
  }

  static let stateHoleAndZero: UInt32 = 3
  static let allocationContext = "base:allocation"
  static let allocationID: UInt32 = 1

  /// The errno that the wire knows for one of ours.
  static func error(_ code: Int32) -> UInt32 {
    switch code {
    case EPERM, EROFS, EACCES: 1
    case ENOMEM: 12
    case EINVAL: 22
    case ENOSPC, EDQUOT, EFBIG: 28
    case EOVERFLOW: 75
    case EOPNOTSUPP: 95
    case ESHUTDOWN: 108
    default: 5
    }
  }
}

/// A request of the transmission phase as it came.
struct NBDRequest {
  var flags: UInt16
  var command: UInt16
  var cookie: UInt64
  var offset: UInt64
  var count: UInt32

  /// Decodes 28 bytes; nil when the magic is not there.
  init?(_ from: UnsafeRawPointer) {
    guard from.bigEndian(0, UInt32.self) == NBD.requestMagic else { return nil }
    flags = from.bigEndian(4, UInt16.self)
    command = from.bigEndian(6, UInt16.self)
    cookie = from.bigEndian(8, UInt64.self)
    offset = from.bigEndian(16, UInt64.self)
    count = from.bigEndian(24, UInt32.self)
  }
}

extension UnsafeRawPointer {
  @inline(__always)
  func bigEndian<Number: FixedWidthInteger>(_ offset: Int, _: Number.Type) -> Number {
    Number(bigEndian: loadUnaligned(fromByteOffset: offset, as: Number.self))
  }
}

extension UnsafeMutableRawPointer {
  @inline(__always)
  func putBigEndian<Number: FixedWidthInteger>(_ value: Number, _ offset: Int) {
    storeBytes(of: value.bigEndian, toByteOffset: offset, as: Number.self)
  }
}

extension [UInt8] {
  /// Appends a number, big endian.
  mutating func put<Number: FixedWidthInteger>(_ value: Number) {
    Swift.withUnsafeBytes(of: value.bigEndian) { append(contentsOf: $0) }
  }
}
