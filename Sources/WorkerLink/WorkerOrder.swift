// SPDX-License-Identifier: Apache-2.0
// What the daemon says to a worker.

/// The disk that a worker shall serve.
package struct StartOrder: Sendable, Equatable {
  /// What the daemon calls the disk, "DOMAIN-VDEV"; for the log.
  package var disk: String
  /// Name of the image format.
  package var format: String
  /// The store's path, only for what is said to people; the worker opens nothing.
  package var storePath: String?
  /// Whether the store is new and empty, and the image shall be made in it.
  package var create = false
  /// For a new image: bytes of a block; nil: the format's own choice.
  package var blockSize: UInt32?
  /// The path of the base that comes along, for what is said to people and, in a new image,
  /// for the header.
  package var basePath: String?
  /// Name of the base's format, whatever the image says of it.
  package var baseFormat: String?
  /// How many images there may be in a row; nil: the worker's own bound.
  package var depth: Int?
  /// Whether the guest may only read.
  package var readOnly = false
  /// Whether a base that has changed is accepted and noted anew.
  package var force = false
  /// Whether a node shall follow in place of an nbd socket, if the kernel can serve the image
  /// by itself; the report says.
  package var byNode = false
  /// Whether the store's lock was held ever since its pending log was begun. Without it the log is
  /// compared with the store, which another program may have changed meanwhile.
  package var isHeld = false
  /// Whether a write that finds no space fails at once. Without it the write waits for space.
  package var failsWhenFull = false
  /// Seconds that a write waits for space before it fails; 0: without a limit.
  package var fullTimeout: UInt32 = 0
  /// Seconds without an I/O error after which a disk that had some counts as ready again; 0:
  /// only after `clear`.
  package var quietTime: UInt32 = 0

  /// An order from what every disk needs.
  package init(disk: String, format: String) {
    self.disk = disk
    self.format = format
  }
}

/// What the daemon wants of a worker. Descriptors travel beside it, as each case says.
package enum WorkerOrder: Sendable, Equatable {
  /// The first order, once. Roles: store; base if known; pending; nbd unless handed later;
  /// witness: the store by an open file description of its own, which nobody flushes until a
  /// worker has to learn whether the flush in which its predecessor died has failed.
  case start(StartOrder)
  /// The answer to `needFile`. Roles: file; witness, as of the store, if it may be written.
  case file
  /// The other answer to `needFile`; the worker fails with it as its message.
  case refuseFile(reason: String)
  /// Serve this nbd socket from now on, in place of any former. Role: nbd. Or serve this node,
  /// once, and say `attached`. Role: node. Or serve, with NBD's handshake, whoever connects to
  /// this socket. Role: listener.
  case attach
  /// Tell your state and counters.
  case status
  /// Say `alive`.
  case ping
  /// An admin has acted: flushes may succeed again after one that failed, and counted I/O
  /// errors are forgotten. Answered with `status`.
  case clear
  /// Give descriptors back, for a daemon that has forgotten them: 0 for those of `start`, from
  /// 1 on for the files that were asked for.
  case descriptors(index: Int)
  /// Finish what is under way, commit, end.
  case stop

  /// As a message.
  package var message: LinkMessage {
    switch self {
    case .start(let order):
      var fields = ["disk": order.disk, "format": order.format]
      if order.create { fields["create"] = "1" }
      if order.readOnly { fields["readonly"] = "1" }
      if order.force { fields["force"] = "1" }
      if order.byNode { fields["by-node"] = "1" }
      fields["block-size"] = order.blockSize.map(String.init)
      fields["store-path"] = order.storePath
      fields["base-path"] = order.basePath
      fields["base-format"] = order.baseFormat
      fields["depth"] = order.depth.map { String($0) }
      if order.isHeld { fields["held"] = "1" }
      if order.failsWhenFull { fields["fails-when-full"] = "1" }
      if order.fullTimeout > 0 { fields["full-timeout"] = String(order.fullTimeout) }
      if order.quietTime > 0 { fields["quiet-time"] = String(order.quietTime) }
      return LinkMessage("start", fields)
    case .file: return LinkMessage("file")
    case .refuseFile(let reason): return LinkMessage("file", ["refused": reason])
    case .attach: return LinkMessage("attach")
    case .status: return LinkMessage("status")
    case .ping: return LinkMessage("ping")
    case .clear: return LinkMessage("clear")
    case .descriptors(let index): return LinkMessage("descriptors", ["index": "\(index)"])
    case .stop: return LinkMessage("stop")
    }
  }

  /// From a message. Fields that are not known are skipped: a newer daemon may send them.
  package init(_ message: LinkMessage) throws(LinkFault) {
    switch message.verb {
    case "start":
      var order = StartOrder(disk: try message.text("disk"), format: try message.text("format"))
      order.create = try message.flag("create")
      order.readOnly = try message.flag("readonly")
      order.force = try message.flag("force")
      order.byNode = try message.flag("by-node")
      order.blockSize = try message.optionalNumber("block-size")
      order.storePath = message.fields["store-path"]
      order.basePath = message.fields["base-path"]
      order.baseFormat = message.fields["base-format"]
      order.depth = try message.optionalNumber("depth")
      order.isHeld = try message.flag("held")
      order.failsWhenFull = try message.flag("fails-when-full")
      order.fullTimeout = try message.optionalNumber("full-timeout") ?? 0
      order.quietTime = try message.optionalNumber("quiet-time") ?? 0
      self = .start(order)
    case "file":
      self = message.fields["refused"].map { .refuseFile(reason: $0) } ?? .file
    case "attach": self = .attach
    case "status": self = .status
    case "ping": self = .ping
    case "clear": self = .clear
    case "descriptors":
      self = .descriptors(index: try message.optionalNumber("index") ?? 0)
    case "stop": self = .stop
    default: throw .unknownVerb(message.verb)
    }
  }
}

extension LinkConnection {
  /// Sends an order. Throws as `send(_:lending:)` of a message.
  package func send(
    _ order: WorkerOrder, lending descriptors: [LinkRole: Int32] = [:]
  ) throws(LinkError) {
    try send(order.message, lending: descriptors)
  }
}

extension LinkMessage {
  func text(_ field: String) throws(LinkFault) -> String {
    guard let value = fields[field] else { throw .badField(verb: verb, field: field) }
    return value
  }

  func flag(_ field: String) throws(LinkFault) -> Bool {
    switch fields[field] {
    case nil, "0": return false
    case "1": return true
    default: throw .badField(verb: verb, field: field)
    }
  }

  func optionalNumber<T: FixedWidthInteger>(_ field: String) throws(LinkFault) -> T? {
    guard let text = fields[field] else { return nil }
    guard let value = T(text) else { throw .badField(verb: verb, field: field) }
    return value
  }

  func number<T: FixedWidthInteger>(_ field: String) throws(LinkFault) -> T {
    guard let value: T = try optionalNumber(field) else {
      throw .badField(verb: verb, field: field)
    }
    return value
  }
}
