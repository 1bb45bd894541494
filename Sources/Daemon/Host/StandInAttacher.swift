// SPDX-License-Identifier: Apache-2.0
// Devices that are none: for tests, and for trying the daemon on a machine without the
// nbd driver. The end of the socket that the kernel would have is kept open here, and
// whoever wants to can speak NBD on it. It says what it is in the path of its devices.

import Glibc
import Synchronization
package import SystemIO

/// Keeps the kernel's ends of the sockets.
package final class StandInAttacher: DeviceAttacher {
  private struct Device {
    var socket: Int32
    var identifier: String
  }

  private struct State {
    var devices: [UInt32: Device] = [:]
    var reattached = 0
  }

  private let state = Mutex(State())
  /// An attacher. Devices that it does not know count as there, as the kernel's are for a
  /// daemon that was started again.
  package init() {}

  /// How many devices there are, and how often one was given another socket.
  package var counts: (devices: Int, reattachments: Int) {
    state.withLock { ($0.devices.count, $0.reattached) }
  }

  /// A duplicate of the kernel's end of a device's socket; nil when there is no such device.
  package func socket(of index: UInt32) throws(IOError) -> Descriptor? {
    try state.withLock { state throws(IOError) in
      guard let device = state.devices[index] else { return nil }
      return try StandInAttacher.duplicate(device.socket)
    }
  }

  /// Keeps the socket under the lowest free number.
  package func attach(_ wish: DeviceWish, socket: Int32) throws(IOError) -> DeviceNode {
    let kept = try StandInAttacher.duplicate(socket).release()
    return state.withLock { state in
      var index: UInt32 = 0
      while state.devices[index] != nil { index += 1 }
      state.devices[index] = Device(socket: kept, identifier: wish.identifier)
      return DeviceNode(
        index: index, path: "/stand-in/nbd\(index)", major: 43, minor: index << 5)
    }
  }

  /// Puts another socket in the place of the first.
  package func reattach(
    _ node: DeviceNode, socket: Int32, identifier: String
  ) throws(IOError) {
    let kept = try StandInAttacher.duplicate(socket).release()
    let old: Int32? = state.withLock { state in
      defer {
        state.devices[node.index] = Device(socket: kept, identifier: identifier)
        state.reattached += 1
      }
      return state.devices[node.index]?.socket
    }
    if let old { try Descriptor(owning: old).close() }
  }

  /// Closes the socket.
  package func detach(_ node: DeviceNode) throws(IOError) {
    let old = state.withLock { $0.devices.removeValue(forKey: node.index)?.socket }
    if let old { try Descriptor(owning: old).close() }
  }

  /// Whether it is kept here, or might be by another.
  package func isAttached(_ node: DeviceNode, identifier: String) throws(IOError) -> Bool {
    let known = state.withLock { $0.devices[node.index] }
    return known.map { $0.identifier == identifier } ?? true
  }

  /// Everything that is kept.
  package func devices() throws(IOError) -> [(identifier: String, node: DeviceNode)] {
    state.withLock { state in
      state.devices.map { index, device in
        (
          device.identifier,
          DeviceNode(index: index, path: "/stand-in/nbd\(index)", major: 43, minor: index << 5)
        )
      }
    }
  }

  /// Has nothing to write out: whoever has the socket flushes.
  package func flush(_ node: DeviceNode) throws(IOError) {}

  /// Nobody can open it.
  package func isInUse(_ node: DeviceNode) throws(IOError) -> Bool { false }

  private static func duplicate(_ raw: Int32) throws(IOError) -> Descriptor {
    let copy = fcntl(raw, F_DUPFD_CLOEXEC, 3)
    guard copy >= 0 else { throw IOError.last("duplicate a socket") }
    return Descriptor(owning: copy)
  }
}
