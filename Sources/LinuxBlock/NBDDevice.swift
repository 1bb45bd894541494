// SPDX-License-Identifier: Apache-2.0
// The kernel's nbd driver by generic netlink: a disk that is served from a socket. Needs
// CAP_SYS_ADMIN and the driver (modprobe nbd).

internal import CLinux
import Glibc
package import SystemIO

/// Block devices /dev/nbdN. Every call opens its own netlink socket and waits for the
/// kernel's answer, a few milliseconds (`disconnect`: until the device is idle); they may
/// come from any thread.
package enum NBDDevice {
  /// The device node of a number.
  package static func path(_ index: UInt32) -> String { "/dev/nbd\(index)" }

  /// Whether the driver is there. Throws: the errno of the netlink socket.
  package static func isAvailable() throws(IOError) -> Bool {
    var channel = try GenericNetlink()
    do {
      _ = try channel.family("nbd")
      return true
    } catch {
      guard error.code == ENOENT else { throw error }
      return false
    }
  }

  /// Makes the kernel serve a disk from a connected stream socket, whose other end already
  /// speaks the transmission phase. The kernel keeps its own reference; the descriptor stays
  /// the caller's, who should close it. Answers the device's number. Throws: ENOENT without
  /// the driver, EBUSY when the wished number is taken, EPERM without the right.
  package static func connect(
    _ configuration: NBDConfiguration, socket: Int32
  ) throws(IOError) -> UInt32 {
    var channel = try GenericNetlink()
    let family = try channel.family("nbd")
    let subject = configuration.index.map(path) ?? "an nbd device"
    let request = NBDMessage.connect(
      family: family, sequence: channel.nextSequence(), socket: socket, configuration)
    let answers = try channel.exchange(request, operation: "connect", subject: subject)
    guard
      let index = answers.first(where: { $0.type == NBDMessage.indexAttribute })?
        .number(UInt32.self)
    else { throw IOError(EPROTO, "learn the number of", subject) }
    return index
  }

  /// Gives a device a new socket in place of one that has died; new requests use it at once,
  /// what was under way is sent again when its timeout is over. Throws: ENOSPC while no socket of the device has died (the kernel has not yet
  /// noticed: try again), EINVAL when the device is not connected or bears another
  /// identifier.
  package static func reconfigure(
    _ index: UInt32, socket: Int32, identifier: String? = nil
  ) throws(IOError) {
    var channel = try GenericNetlink()
    let family = try channel.family("nbd")
    let request = NBDMessage.reconfigure(
      family: family, sequence: channel.nextSequence(), index: index, socket: socket,
      identifier: identifier)
    _ = try channel.exchange(request, operation: "reconnect", subject: path(index))
  }

  /// Ends a device: the server is told (NBD_CMD_DISC), what still comes fails with EIO.
  /// Throws: EINVAL when there is no such device.
  package static func disconnect(_ index: UInt32) throws(IOError) {
    var channel = try GenericNetlink()
    let family = try channel.family("nbd")
    let request = NBDMessage.disconnect(
      family: family, sequence: channel.nextSequence(), index: index)
    _ = try channel.exchange(request, operation: "disconnect", subject: path(index))
  }

  /// Every device that the driver knows, and whether it is connected, or at least still open
  /// somewhere.
  package static func status() throws(IOError) -> [UInt32: Bool] {
    var channel = try GenericNetlink()
    let family = try channel.family("nbd")
    let request = NBDMessage.status(
      family: family, sequence: channel.nextSequence(), index: nil)
    let answers = try channel.exchange(request, operation: "list", subject: "nbd devices")
    do {
      return try NBDMessage.devices(answers)
    } catch { throw IOError(EPROTO, "list", "nbd devices") }
  }
}

/// A generic netlink socket: one request at a time, with its answers.
struct GenericNetlink: ~Copyable {
  private static let controlFamily: UInt16 = 0x10
  private static let getFamily: UInt8 = 3
  private static let familyIdentifier: UInt16 = 1
  private static let familyName: UInt16 = 2
  private static let genericProtocol: Int32 = 16
  private static let patience: Int32 = 30_000

  private let socket: Descriptor
  private var sequence: UInt32 = 0

  init() throws(IOError) {
    let raw = dmu_netlink_open(Self.genericProtocol, Self.patience)
    guard raw >= 0 else { throw IOError.last("open", "a netlink socket") }
    socket = Descriptor(owning: raw)
  }

  mutating func nextSequence() -> UInt32 {
    sequence += 1
    return sequence
  }

  /// The number of a family. Throws ENOENT when no driver has registered it.
  mutating func family(_ name: String) throws(IOError) -> UInt16 {
    var request = NetlinkEncoder(
      family: Self.controlFamily, command: Self.getFamily, sequence: nextSequence())
    request.attribute(Self.familyName, name)
    let answers = try exchange(
      request.finished(), operation: "find", subject: "the kernel's \(name) driver")
    let identifier = answers.first { $0.type == Self.familyIdentifier }?.number(UInt16.self)
    guard let identifier else { throw IOError(EPROTO, "find", "the kernel's \(name) driver") }
    return identifier
  }

  /// Sends the request of the latest sequence number and gathers the attributes of its
  /// answers until the kernel says how it ended.
  func exchange(
    _ request: [UInt8], operation: String, subject: String
  ) throws(IOError) -> [NetlinkAttribute] {
    guard send(socket.raw, request, request.count, 0) == request.count else {
      throw IOError.last(operation, subject)
    }
    var gathered: [NetlinkAttribute] = []
    var buffer = [UInt8](repeating: 0, count: 32768)
    while true {
      let count = recv(socket.raw, &buffer, buffer.count, 0)
      if count < 0 && errno == EINTR { continue }
      guard count >= 0 else {
        throw IOError(errno == EAGAIN ? ETIMEDOUT : errno, operation, subject)
      }
      let replies: [NetlinkReply]
      do {
        replies = try NetlinkDecoder.replies(Array(buffer[..<count]))
      } catch { throw IOError(EPROTO, operation, subject) }
      for reply in replies {
        switch reply {
        case .answer(sequence, _, let attributes): gathered += attributes
        case .result(sequence, 0, _): return gathered
        case .result(sequence, let code, let text):
          throw IOError(code, operation, text.map { "\(subject) (\($0))" } ?? subject)
        default: continue
        }
      }
    }
  }
}
