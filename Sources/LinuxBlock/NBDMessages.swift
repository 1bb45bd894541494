// SPDX-License-Identifier: Apache-2.0
// What the kernel's nbd driver is told, as netlink messages. Source: linux/nbd-netlink.h,
// drivers/block/nbd.c.

/// Everything the kernel has to know of a disk before it serves it from a socket.
package struct NBDConfiguration: Sendable, Equatable {
  /// Length in bytes, a multiple of 512.
  package var size: UInt64
  /// Logical block size in bytes.
  package var blockSize: UInt32
  /// The server's transmission flags, as in the NBD protocol: bit 0 set, 1 read-only,
  /// 2 flush, 3 FUA, 5 trim, 6 write-zeroes, 8 multi-conn. Bits that a kernel does not know
  /// do no harm.
  package var flags: UInt16
  /// Seconds that a request may take before its socket counts as dead and it is sent again.
  /// What was under way when a socket died is sent again only then; with 0 it would hang for
  /// ever. Source: nbd_xmit_timeout in drivers/block/nbd.c.
  package var timeout: UInt64
  /// Seconds that requests wait for a new socket after the death of the old one.
  package var deadConnectionTimeout: UInt64
  /// A name that only a reconnection with the same name may replace the socket of (Linux
  /// 5.14 on; older kernels ignore it).
  package var identifier: String?
  /// The number N of /dev/nbdN; nil: any free one.
  package var index: UInt32?

  /// A configuration from its parts.
  package init(
    size: UInt64, blockSize: UInt32 = 512, flags: UInt16, timeout: UInt64,
    deadConnectionTimeout: UInt64, identifier: String? = nil, index: UInt32? = nil
  ) {
    self.size = size
    self.blockSize = blockSize
    self.flags = flags
    self.timeout = timeout
    self.deadConnectionTimeout = deadConnectionTimeout
    self.identifier = identifier
    self.index = index
  }
}

enum NBDMessage {
  static let connectCommand: UInt8 = 1
  static let disconnectCommand: UInt8 = 2
  static let reconfigureCommand: UInt8 = 3
  static let statusCommand: UInt8 = 5

  static let indexAttribute: UInt16 = 1
  private static let sizeAttribute: UInt16 = 2
  private static let blockSizeAttribute: UInt16 = 3
  private static let timeoutAttribute: UInt16 = 4
  private static let serverFlagsAttribute: UInt16 = 5
  private static let socketsAttribute: UInt16 = 7
  private static let deadTimeoutAttribute: UInt16 = 8
  private static let deviceListAttribute: UInt16 = 9
  private static let identifierAttribute: UInt16 = 10
  private static let item: UInt16 = 1
  private static let socketNumber: UInt16 = 1
  private static let deviceIndex: UInt16 = 1
  private static let deviceConnected: UInt16 = 2

  static func connect(
    family: UInt16, sequence: UInt32, socket: Int32, _ wanted: NBDConfiguration
  ) -> [UInt8] {
    var message = NetlinkEncoder(family: family, command: connectCommand, sequence: sequence)
    if let index = wanted.index { message.attribute(indexAttribute, index) }
    message.attribute(sizeAttribute, wanted.size)
    message.attribute(blockSizeAttribute, UInt64(wanted.blockSize))
    if wanted.timeout > 0 { message.attribute(timeoutAttribute, wanted.timeout) }
    message.attribute(serverFlagsAttribute, UInt64(wanted.flags))
    message.attribute(deadTimeoutAttribute, wanted.deadConnectionTimeout)
    if let name = wanted.identifier { message.attribute(identifierAttribute, name) }
    message.nestSocket(socket)
    return message.finished()
  }

  static func reconfigure(
    family: UInt16, sequence: UInt32, index: UInt32, socket: Int32, identifier: String?
  ) -> [UInt8] {
    var message = NetlinkEncoder(family: family, command: reconfigureCommand, sequence: sequence)
    message.attribute(indexAttribute, index)
    if let identifier { message.attribute(identifierAttribute, identifier) }
    message.nestSocket(socket)
    return message.finished()
  }

  static func disconnect(family: UInt16, sequence: UInt32, index: UInt32) -> [UInt8] {
    var message = NetlinkEncoder(family: family, command: disconnectCommand, sequence: sequence)
    message.attribute(indexAttribute, index)
    return message.finished()
  }

  static func status(family: UInt16, sequence: UInt32, index: UInt32?) -> [UInt8] {
    var message = NetlinkEncoder(family: family, command: statusCommand, sequence: sequence)
    if let index { message.attribute(indexAttribute, index) }
    return message.finished()
  }

  /// The devices of a status answer, and whether each is connected.
  static func devices(_ attributes: [NetlinkAttribute]) throws(NetlinkFault) -> [UInt32: Bool] {
    var devices: [UInt32: Bool] = [:]
    for list in attributes where list.type == deviceListAttribute {
      for entry in try list.attributes() where entry.type == item {
        let fields = try entry.attributes()
        guard let index = fields.first(where: { $0.type == deviceIndex })?.number(UInt32.self),
          let connected = fields.first(where: { $0.type == deviceConnected })?.number(UInt8.self)
        else { throw .truncated }
        devices[index] = connected != 0
      }
    }
    return devices
  }
}

extension NetlinkEncoder {
  fileprivate mutating func nestSocket(_ socket: Int32) {
    nest(7) { list in
      list.nest(1) { item in item.attribute(1, UInt32(bitPattern: socket)) }
    }
  }
}
