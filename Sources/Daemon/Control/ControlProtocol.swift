// SPDX-License-Identifier: Apache-2.0
// The control socket's words: one JSON object a line, a request and its reply in turn.
//
//   {"command":"status","domain":5}    -> {"ok":true,"disks":[...]}
//   {"command":"attach","path":"backend/vbd/5/51712"}
//                                      -> {"ok":true,"device":{"path":"/dev/nbd0",...}}
//   {"command":"attach-named","name":"data","spec":"dmu:..."}
//                                      -> {"ok":true,"device":{"path":"/dev/dmu/data",...}}
//   anything that fails                -> {"ok":false,"error":"one sentence","code":"in-use"}

internal import FoundationEssentials
internal import SystemIO

/// What a client asks.
package struct ControlRequest: Codable, Sendable, Equatable {
  /// The commands.
  package enum Command: String, Codable, Sendable, CaseIterable {
    /// Tell of the disks.
    case status
    /// The same with what is counted and measured of them. Where the kernel serves a disk, it
    /// measures latencies from the first such request on.
    case metrics
    /// A block script's `add`: wait until the disk is served.
    case attach
    /// A block script's `remove`: the toolstack is done with the disk.
    case detach
    /// Take a disk up under a name, and wait until it is served.
    case attachNamed = "attach-named"
    /// Take a named disk down, unless its device is in use.
    case detachNamed = "detach-named"
    /// Serve a named disk that is inactive, and wait until it is served.
    case activate
    /// Take a named disk down, unless its device is in use, and keep its name.
    case deactivate
    /// Read the configuration anew and try failed disks again.
    case reload
    /// Commit the pending logs of a store, or all.
    case recover
    /// Tell what `discard` would lose.
    case pending
    /// Give up what a store's pending log holds.
    case discard
    /// Errors of a disk or a domain were seen to: let its flushes succeed again.
    case clear
    /// Forget the failed attaches of a disk or a domain, or all.
    case forget
    /// Tell what is left of disks that are no more.
    case leftovers
    /// Remove one of these.
    case clean
    /// Tell of the daemon.
    case version
  }

  /// What is wanted.
  package var command: Command
  /// For `status` and `metrics`: the domain by number or name; nil: all.
  package var domain: String?
  /// For `attach` and `detach`: the backend's path in xenstore.
  package var path: String?
  /// For `attach`: whether the script knows that the domain boots.
  package var boots: Bool?
  /// For `recover`, `pending` and `discard`: path of the store, or the log's key; nil: all.
  package var store: String?
  /// For `clear` and `forget`: "5", "web", "5-51712", "web:xvda"; nil: all. For `clean`: the
  /// name of a leftover.
  package var target: String?
  /// For `attach-named`, `detach-named`, `activate` and `deactivate`.
  package var name: String?
  /// For `attach-named`: the spec, beginning "dmu:".
  package var spec: String?
  /// For `attach-named`: whether the disk is only read.
  package var readOnly: Bool?
  /// For `attach-named`: whether a store that does not exist is created.
  package var create: Bool?
  /// For `attach-named`: the UUID of the virtual machine that the disk belongs to.
  package var owner: String?
  /// For `attach-named`: whether udev may look into the device.
  package var probe: Bool?
  /// For `attach-named`: whether the disk is only kept by its name, and not served.
  package var inactive: Bool?

  /// A request from its parts.
  package init(
    _ command: Command, domain: String? = nil, path: String? = nil, boots: Bool? = nil,
    store: String? = nil, target: String? = nil
  ) {
    self.command = command
    self.domain = domain
    self.path = path
    self.boots = boots
    self.store = store
    self.target = target
  }
}

/// What the daemon answers.
package struct ControlReply: Codable, Sendable, Equatable {
  /// A device, in the words of the toolstack.
  package struct Device: Codable, Sendable, Equatable {
    /// Path of its node.
    package var path: String
    /// "MAJOR:MINOR" in hexadecimal.
    package var number: String
  }

  /// Whether it was done.
  package var ok: Bool
  /// Why not: one sentence.
  package var error: String?
  /// The kind of failure.
  package var code: DiskFailure.Code?
  /// For `status` and `metrics`.
  package var disks: [DiskStatus]?
  /// For `attach`.
  package var device: Device?
  /// For `recover`, `pending` and `discard`.
  package var stores: [RecoveredStore]?
  /// For `forget`: how many.
  package var count: Int?
  /// For `leftovers`.
  package var leftovers: [Leftover]?
  /// For `version`.
  package var version: String?
  /// For `version`: the daemon's process id.
  package var pid: Int32?

  /// Success with nothing to tell.
  package static var done: ControlReply { ControlReply(ok: true) }

  /// A failure as a reply.
  package static func failure(_ failure: DiskFailure) -> ControlReply {
    ControlReply(ok: false, error: failure.sentence, code: failure.code)
  }
}

/// One JSON object as a line, without the newline.
package enum ControlLine {
  /// The longest request, in bytes. A reply may be longer.
  package static let longestRequest = 16384

  /// Writes a value.
  package static func encode(_ value: some Encodable) throws -> [UInt8] {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
    return Array(try encoder.encode(value))
  }

  /// Writes a value for people and scripts, over several lines.
  package static func pretty(_ value: some Encodable) throws -> String {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
    return ForeignText.json(String(decoding: try encoder.encode(value), as: UTF8.self))
  }

  /// Reads a value.
  package static func decode<Value: Decodable>(_ type: Value.Type, _ bytes: [UInt8]) throws -> Value
  {
    try JSONDecoder().decode(type, from: Data(bytes))
  }
}
