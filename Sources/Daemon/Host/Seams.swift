// SPDX-License-Identifier: Apache-2.0
// Where the daemon touches the machine: starting workers and attaching devices. Both have
// a real implementation and stand-ins in the tests, so that the whole daemon runs on a
// machine without Xen and without the nbd driver.

import Glibc
import LinuxBlock
internal import Logging
package import SystemIO

/// Starts workers.
package protocol WorkerLauncher: Sendable {
  /// Starts a worker for a disk with the listening end of its link, to run as this user where
  /// this process is root. Blocks. The process is a child of this one. Throws: the errno of
  /// posix_spawn(3) or unshare(2).
  func launch(
    disk: DiskID, listener: Int32, user: UInt32, configuration: Configuration
  ) throws(IOError) -> any HostProcess
}

/// What a device has to be made with.
package struct DeviceWish: Sendable {
  /// Length in bytes.
  package var size: UInt64
  /// NBD transmission flags of the worker.
  package var flags: UInt16
  /// Time that one request may take, at least a second.
  package var requestTimeout: Duration
  /// Time that requests wait for a new worker.
  package var deadConnectionTimeout: Duration
  /// A name by which the device is known again.
  package var identifier: String
}

/// By which way a device came to be.
package enum DeviceKind: String, Sendable, Codable {
  /// By the device-mapper's target `userspace`.
  case dm
  /// By the nbd driver.
  case nbd
}

/// A device that is attached.
package struct DeviceNode: Sendable, Hashable {
  /// By which way.
  package var kind: DeviceKind
  /// Its number among its kind.
  package var index: UInt32
  /// Path of its node.
  package var path: String
  /// Major and minor number.
  package var major: UInt32
  /// Minor number.
  package var minor: UInt32

  /// A node from its parts.
  package init(
    kind: DeviceKind = .nbd, index: UInt32, path: String, major: UInt32, minor: UInt32
  ) {
    self.kind = kind
    self.index = index
    self.path = path
    self.major = major
    self.minor = minor
  }

  /// Path of the node that the kernel names it by: "/dev/nbd0", "/dev/dm-3".
  package var kernelPath: String { kind == .dm ? "/dev/dm-\(index)" : path }

  /// Has the device's page cache written, and the device flushed. Blocks.
  func writeOut() throws(IOError) {
    let device = try Descriptor(path: path, flags: O_RDONLY)
    guard fsync(device.raw) == 0 else { throw IOError.last("write out", path) }
  }

  /// "2b:20": as the toolstack wants `physical-device`.
  package var hexadecimal: String { String(major, radix: 16) + ":" + String(minor, radix: 16) }
}

/// Makes block devices that are served from a socket. All calls block, and may come from
/// any thread.
package protocol DeviceAttacher: Sendable {
  /// Makes a device of a connected socket whose other end serves NBD's transmission phase.
  /// The socket stays the caller's, who closes it.
  func attach(_ wish: DeviceWish, socket: Int32) throws(IOError) -> DeviceNode
  /// Gives a device another socket after the death of the old one. It may be dropped without
  /// a word when that death has not been noticed yet: then its other end reads the end of
  /// the stream at once, and the caller tries again.
  func reattach(_ node: DeviceNode, socket: Int32, identifier: String) throws(IOError)
  /// Ends a device. One that is not there is no error.
  func detach(_ node: DeviceNode) throws(IOError)
  /// Whether a device made earlier, perhaps by an earlier daemon, is there and ours.
  func isAttached(_ node: DeviceNode, identifier: String) throws(IOError) -> Bool
  /// Every device that a daemon like this one has made, with its identifier.
  func devices() throws(IOError) -> [(identifier: String, node: DeviceNode)]
  /// Writes out what was written to a device and has it flushed. Waits for the worker.
  func flush(_ node: DeviceNode) throws(IOError)
  /// Whether a program of this host has the device open, or the kernel uses it otherwise than
  /// for a guest.
  func isInUse(_ node: DeviceNode) throws(IOError) -> Bool
}

/// The kernel's nbd driver.
package struct KernelAttacher: DeviceAttacher {
  /// The attacher.
  package init() {}

  /// Connects a free /dev/nbdN.
  package func attach(_ wish: DeviceWish, socket: Int32) throws(IOError) -> DeviceNode {
    let configuration = NBDConfiguration(
      size: wish.size, blockSize: 512, flags: wish.flags,
      timeout: UInt64(wish.requestTimeout.components.seconds),
      deadConnectionTimeout: UInt64(wish.deadConnectionTimeout.components.seconds),
      identifier: wish.identifier)
    let index = try NBDDevice.connect(configuration, socket: socket)
    do throws(IOError) {
      return try node(index)
    } catch {
      // Without its numbers the device is of no use; an error of undoing would hide the first.
      do { try NBDDevice.disconnect(index) } catch let second {
        throw IOError(error.code, error.operation, "\(error.subject) (and \(second))")
      }
      throw error
    }
  }

  /// Replaces the socket.
  package func reattach(
    _ node: DeviceNode, socket: Int32, identifier: String
  ) throws(IOError) {
    do {
      try NBDDevice.reconfigure(node.index, socket: socket, identifier: identifier)
    } catch let error where error.code == ENOSPC {
      throw IOError(EAGAIN, error.operation, error.subject)
    }
  }

  /// Disconnects the device.
  package func detach(_ node: DeviceNode) throws(IOError) {
    do {
      try NBDDevice.disconnect(node.index)
    } catch let error where error.code == EINVAL || error.code == ENOENT {}
  }

  /// Looks for the device in /sys, where a connected one has its owner's name.
  package func isAttached(_ node: DeviceNode, identifier: String) throws(IOError) -> Bool {
    guard try NBDDevice.status()[node.index] == true else { return false }
    do {
      let name = try TextFile.read("/sys/block/nbd\(node.index)/backend")
      return name.trimmingNewline == identifier
    } catch let error where error.code == ENOENT {
      return true  // A kernel before 5.14 has no such name.
    }
  }

  /// Every connected device that bears one of our names.
  package func devices() throws(IOError) -> [(identifier: String, node: DeviceNode)] {
    guard try NBDDevice.isAvailable() else { return [] }
    var found: [(identifier: String, node: DeviceNode)] = []
    for (index, connected) in try NBDDevice.status() where connected {
      do throws(IOError) {
        let name = try TextFile.read("/sys/block/nbd\(index)/backend").trimmingNewline
        if name.hasPrefix(KernelAttacher.mark) { found.append((name, try node(index))) }
      } catch {
        guard error.code == ENOENT else { throw error }
      }
    }
    return found
  }

  /// Has the device's page cache written, and the device flushed.
  package func flush(_ node: DeviceNode) throws(IOError) { try node.writeOut() }

  /// Looks for processes, mounts and devices on top of it.
  package func isInUse(_ node: DeviceNode) throws(IOError) -> Bool {
    let name = "nbd\(node.index)"
    let holders = FileUsers.names(in: "/sys/block/\(name)/holders")
    if !holders.isEmpty { return true }
    let number = " \(node.major):\(node.minor) "
    if try TextFile.read("/proc/self/mountinfo").contains(number) { return true }
    let isOpen = FileUsers.processes().contains { pid in
      pid != getpid()
        && FileUsers.descriptors(of: pid).contains { FileUsers.link($0) == node.path }
    }
    if isOpen { return true }
    return try TextFile.read("/proc/swaps").contains(node.path + " ")
  }

  /// How the identifiers of our devices begin.
  static let mark = "dmu-xen "

  private func node(_ index: UInt32) throws(IOError) -> DeviceNode {
    let path = "/sys/block/nbd\(index)/dev"
    let numbers = try TextFile.read(path).trimmingNewline.split(separator: ":").map { UInt32($0) }
    guard numbers.count == 2, let major = numbers[0], let minor = numbers[1] else {
      throw IOError(EPROTO, "read", path)
    }
    return DeviceNode(index: index, path: NBDDevice.path(index), major: major, minor: minor)
  }
}

/// Starts cowd.
package struct ProcessLauncher: WorkerLauncher {
  /// The launcher.
  package init() {}

  /// Starts cowd with the link's listener as descriptor 3, and with nothing of this process's
  /// environment.
  package func launch(
    disk: DiskID, listener: Int32, user: UInt32, configuration: Configuration
  ) throws(IOError) -> any HostProcess {
    let isCaged = configuration.sandbox == .on
    var command = Command(
      try ProcessLauncher.program(configuration),
      ["--supervised", "--uid", String(user), "--gid", String(user)]
        + (isCaged ? [] : ["--no-sandbox"])
        + (configuration.logLevel <= .debug ? ["--verbose"] : []))
    command.descriptors = [3: listener]
    command.newSession = true
    command.environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
    // Only root may make one by itself; a worker without root makes its others itself.
    command.newProcessNamespace = isCaged && geteuid() == 0
    return try command.start()
  }

  /// Where cowd is: as configured, else beside this program, else along PATH. Throws ENOENT.
  package static func program(_ configuration: Configuration) throws(IOError) -> String {
    if !configuration.workerProgram.isEmpty {
      guard access(configuration.workerProgram, X_OK) == 0 else {
        throw IOError.last("start", configuration.workerProgram)
      }
      return configuration.workerProgram
    }
    var places: [String] = []
    if let own = FileUsers.link("/proc/self/exe"), let slash = own.lastIndex(of: "/") {
      places.append(String(own[..<slash]))
    }
    places +=
      getenv("PATH").map { String(cString: $0).split(separator: ":").map(String.init) } ?? []
    for place in places where access(place + "/cowd", X_OK) == 0 { return place + "/cowd" }
    throw IOError(ENOENT, "find", "cowd (beside dmu-xend or along PATH)")
  }
}

extension String {
  /// Without the newline at its end.
  var trimmingNewline: String { hasSuffix("\n") ? String(dropLast()) : self }
}
