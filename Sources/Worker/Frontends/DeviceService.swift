// SPDX-License-Identifier: Apache-2.0
// A disk as a device of the kernel's nbd driver, with a link to it in /dev/mapper, where the
// admins of 2006 look for it.

import Glibc
import LinuxBlock
import SystemIO
import WorkerLink

/// A disk as /dev/mapper/NAME.
final class DeviceService: DiskService {
  private static let folder = "/dev/mapper"

  private let path: String
  private let identifier: String
  private let log: Log
  private let disk: KeptDisk
  private var index: UInt32?

  /// Attaches a disk of which `report` tells, and waits until the kernel has taken it.
  init(
    _ disk: KeptDisk, _ report: DiskReport, name: String, _ log: Log
  ) throws(WorkerError) {
    path = Self.folder + "/" + name
    identifier = "cowd:" + name
    self.log = log
    self.disk = disk
    guard try system({ () throws(IOError) in try NBDDevice.isAvailable() }) else {
      throw WorkerError(
        .io,
        "the kernel has no nbd driver: run 'modprobe nbd', or serve a socket with --nbd unix:PATH")
    }
    try Self.checkFree(path, identifier)
    try connect(report)
    do throws(WorkerError) {
      try link()
    } catch {
      try withdraw()
      throw error
    }
  }

  var greeting: String { path }

  /// A name that is one component of a path, and not one that device-mapper keeps.
  static func check(_ name: String) throws(WorkerError) {
    guard !name.isEmpty, name.utf8.count < 128, !name.contains("/"), !name.hasPrefix("."),
      name != "control"
    else { throw WorkerError(.usage, "'\(name)' cannot be the name of a device") }
  }

  /// A link that a killed worker has left may go, and so may the device behind it if it is
  /// still that worker's.
  private static func checkFree(_ path: String, _ identifier: String) throws(WorkerError) {
    var status = stat()
    guard lstat(path, &status) == 0 else { return }
    guard let index = try linked(path) else {
      throw WorkerError(.inUse, "\(path) exists and is none of ours: choose another name")
    }
    let connected = try system { () throws(IOError) in try NBDDevice.status()[index] ?? false }
    if connected, attribute("backend", of: index) == identifier {
      guard isOrphan(index) else {
        throw WorkerError(.inUse, "\(path) is in use: end its worker, or choose another name")
      }
      try system { () throws(IOError) in try NBDDevice.disconnect(index) }
    }
    guard unlink(path) == 0 else { throw WorkerError(IOError.last("replace", path)) }
  }

  /// Whether the keeper that connected a device has ended. It ends after its worker.
  private static func isOrphan(_ index: UInt32) -> Bool {
    for _ in 0..<50 {
      let owner = attribute("pid", of: index) ?? ""
      if owner.isEmpty || access("/proc/" + owner, F_OK) != 0 { return true }
      usleep(10_000)
    }
    return false
  }

  /// What the driver tells of a device: "backend" its identifier, "pid" who connected it.
  private static func attribute(_ name: String, of index: UInt32) -> String? {
    var buffer = [UInt8](repeating: 0, count: 256)
    do throws(IOError) {
      let path = "/sys/block/nbd\(index)/\(name)"
      let file = try Descriptor(path: path, flags: O_RDONLY)
      let count = read(file.raw, &buffer, buffer.count)
      guard count > 0 else { return nil }
      return String(decoding: buffer[..<count].prefix { $0 != 0x0a }, as: UTF8.self)
    } catch {
      // Older drivers do not tell, and a device that is not connected has neither.
      return nil
    }
  }

  /// The number of the nbd device that a link leads to.
  private static func linked(_ path: String) throws(WorkerError) -> UInt32? {
    do throws(IOError) {
      let target = try Folder.target(of: path)
      guard target.hasPrefix("/dev/nbd") else { return nil }
      return UInt32(target.dropFirst("/dev/nbd".count))
    } catch {
      guard error.code == EINVAL else { throw WorkerError(error) }
      return nil
    }
  }

  private func connect(_ report: DiskReport) throws(WorkerError) {
    let socket = try attachPair()
    let configuration = NBDConfiguration(
      size: report.size, flags: report.flags, timeout: 30, deadConnectionTimeout: 10,
      identifier: identifier)
    do throws(IOError) {
      index = try NBDDevice.connect(configuration, socket: socket.raw)
    } catch {
      guard error.code == EPERM || error.code == EACCES else { throw WorkerError(error) }
      throw WorkerError(
        .io, "attaching a device needs root: become root, or serve a socket with --nbd unix:PATH")
    }
  }

  /// Gives the worker one end of a new socket; the other is the kernel's.
  private func attachPair() throws(WorkerError) -> Descriptor {
    let pair = try system { () throws(IOError) in try UnixSocket.pair(.stream) }
    try disk.attach(.nbd, pair.first.raw)
    return pair.second
  }

  private func isConnected(_ index: UInt32) throws(WorkerError) -> Bool {
    try system { () throws(IOError) in try NBDDevice.status()[index] ?? false }
  }

  /// The kernel gives a socket up when a request takes too long: it gets another. When it is done
  /// with the device, that is the end.
  func detached() throws(WorkerError) {
    guard let index, try isConnected(index) else { return try end() }
    log(.warning, "the kernel has given its socket up and gets another")
    let socket = try attachPair()
    // It may take a moment to notice that the old socket is dead.
    for attempt in 0... {
      do throws(IOError) {
        return try NBDDevice.reconfigure(index, socket: socket.raw, identifier: identifier)
      } catch {
        guard try isConnected(index) else { return try end() }
        guard error.code == ENOSPC, attempt < 200 else {
          log(.error, "the device is lost", ["error": "\(error)"])
          return try end()
        }
        usleep(10_000)
      }
    }
  }

  /// The device is no more.
  private func end() throws(WorkerError) {
    unlinkPath()
    index = nil
    try disk.stop()
  }

  private func link() throws(WorkerError) {
    guard let index else { return }
    guard mkdir(Self.folder, 0o755) == 0 || errno == EEXIST else {
      throw WorkerError(IOError.last("make", Self.folder))
    }
    guard symlink(NBDDevice.path(index), path) == 0 else {
      throw WorkerError(IOError.last("make the link", path))
    }
  }

  private func unlinkPath() {
    do throws(WorkerError) {
      guard let index, try Self.linked(path) == index, unlink(path) != 0 else { return }
      throw WorkerError(IOError.last("remove", path))
    } catch { log(.warning, "the link is left behind", ["error": "\(error)"]) }
  }

  /// The driver keeps its device for a moment, and the next worker takes both over.
  func workerEnded() {}

  /// Writes out what the kernel holds for the device, disconnects it, removes the link.
  func withdraw() throws(WorkerError) {
    guard let index, try isConnected(index) else { return }
    unlinkPath()
    try system { () throws(IOError) in
      let node = NBDDevice.path(index)
      let device = try Descriptor(path: node, flags: O_RDONLY)
      if !disk.options.readOnly, fsync(device.raw) != 0 { throw IOError.last("write out", node) }
      try NBDDevice.disconnect(index)
    }
    try disk.wait(for: .detached)
  }
}
