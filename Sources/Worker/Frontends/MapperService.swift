// SPDX-License-Identifier: Apache-2.0
// A disk by hand through the device-mapper: /dev/mapper/NAME with the target `userspace`, as
// in 2006. The device outlives a worker that is killed; the same command takes it over.

import DiskFormats
import Glibc
import LinuxBlock
import SystemIO
import WorkerLink

/// Brings a disk by hand to the device-mapper.
struct ByMapper {
  let options: ByHandOptions
  let name: String
  let link: LinkConnection
  let log: Log

  private var device: ServedDevice { ServedDevice(name: name, owner: "cowd") }

  /// Whether this kernel has the way. Throws when it was wished and is not there.
  /// Tracing and holding are of the engine in user space, and plugins are served there.
  static func isWay(_ options: ByHandOptions) throws(WorkerError) -> Bool {
    let transport = options.transport
    guard transport != .nbd else { return false }
    guard options.trace == nil, options.hold == nil, FormatName.kind(options.format) != nil else {
      guard transport == .dm else { return false }
      throw WorkerError(
        .usage,
        "--transport dm serves no plugin's format, and neither traces nor holds: "
          + "leave it out")
    }
    let there = try mapping { () throws(DeviceMapperError) in try ServedDevice.isAvailable() }
    guard !there, transport == .dm else { return there }
    throw WorkerError(
      .io,
      "the kernel has no device-mapper target 'userspace', version 1: "
        + "install its module, dm-userspace, or say --transport nbd")
  }

  /// Has the disk appear, by the nbd driver where the image is none that the kernel can serve and
  /// another way may be taken.
  func serve() throws(WorkerError) -> (KeptDisk, any DiskService) {
    guard Userspace.isName(name), name != "control" else {
      throw WorkerError(.usage, "'\(name)' cannot be the name of a device")
    }
    // Whoever has the node of a device that lives, has its files, which the kernel holds locked.
    let isLive = try isLive()
    let node = isLive ? try Self.node(name) : nil
    let disk = KeptDisk(options, try KeptFiles(options, isLocked: isLive), link)
    let report = try disk.start(byNode: true)
    guard report.byNode, let files = disk.files else {
      let why = report.hindrance ?? "cannot be served by the kernel"
      guard options.transport != .dm else {
        throw WorkerError(.unsupported, "\(options.store) \(why): say --transport nbd")
      }
      log(.info, "serving by nbd", ["reason": why])
      try disk.lock()
      return (disk, try DeviceService(disk, report, name: name, log))
    }
    let backings = try files.backings(report.parts)
    switch try mapping({ () throws(DeviceMapperError) in try device.state(over: backings) }) {
    case .absent, .unfinished:
      try mapping { () throws(DeviceMapperError) in
        _ = try device.make(
          size: report.size, blockSize: report.blockSize, backings, readOnly: options.readOnly)
      }
      do throws(WorkerError) {
        try attach(disk, try Self.node(name))
        try mapping { () throws(DeviceMapperError) in try device.start() }
      } catch {
        giveUp()
        throw error
      }
    case .ours:
      // Else another cowd has made it since.
      guard let node else { throw Self.inUse(name) }
      try attach(disk, node)
    case .foreign(let why): throw WorkerError(.inUse, "\(why): choose another name")
    }
    return (disk, MapperService(disk, device: device, log))
  }

  /// Whether a former worker's device is there. One whose maker died before anybody could use it is
  /// removed. Throws when the name is another's.
  private func isLive() throws(WorkerError) -> Bool {
    let found = try mapping { () throws(DeviceMapperError) in try device.device.information() }
    guard let found else { return false }
    let owner = try mapping { () throws(DeviceMapperError) in try device.device.uuid() }
    guard owner == device.identifier else {
      throw WorkerError(
        .inUse, "\(device.device.path) exists and is none of ours: choose another name")
    }
    if !found.hasLiveTable { try remove() }
    return found.hasLiveTable
  }

  private func attach(
    _ disk: KeptDisk, _ node: borrowing Descriptor
  ) throws(WorkerError) {
    try disk.attach(.node, node.raw)
    try disk.wait(for: .attached)
  }

  private static func node(_ name: String) throws(WorkerError) -> Descriptor {
    do throws(IOError) {
      return try Descriptor(path: "/dev/dmu/" + name, flags: O_RDWR | O_NONBLOCK)
    } catch {
      throw error.code == EBUSY ? inUse(name) : WorkerError(error)
    }
  }

  private static func inUse(_ name: String) -> WorkerError {
    WorkerError(.inUse, "/dev/mapper/\(name) is in use: end its worker, or choose another name")
  }

  /// Removes what could not be brought into use; why it could not is the error, not this.
  private func giveUp() {
    do throws(WorkerError) { try remove() } catch {
      log(.warning, "the device is left behind", ["error": "\(error)"])
    }
  }

  private func remove() throws(WorkerError) {
    try mapping { () throws(DeviceMapperError) in try device.device.remove(patient: true) }
    LoopMarks.sweep(log)
  }
}

/// A disk as a device of the device-mapper. It outlives a worker that is killed.
final class MapperService: DiskService {
  private let device: ServedDevice
  private let disk: KeptDisk
  private let log: Log

  init(_ disk: KeptDisk, device: ServedDevice, _ log: Log) {
    self.disk = disk
    self.device = device
    self.log = log
  }

  var greeting: String { device.device.path }

  /// Somebody has removed it.
  func detached() throws(WorkerError) {
    LoopMarks.sweep(log)
    try disk.stop()
  }

  /// It waits for the next.
  func workerEnded() {}

  /// Writes out what the kernel holds for the device, which commits it, and removes it. One
  /// that is in use stays, and waits for its next worker.
  func withdraw() throws(WorkerError) {
    let device = device.device
    if !disk.options.readOnly {
      try system { () throws(IOError) in
        let node = try Descriptor(path: device.path, flags: O_RDONLY)
        guard fsync(node.raw) == 0 else { throw IOError.last("write out", device.path) }
      }
    }
    do throws(DeviceMapperError) {
      try device.remove(patient: true)
    } catch {
      guard error.code == EBUSY else { throw WorkerError(error) }
      throw WorkerError(
        .inUse,
        "\(device.path) is in use and stays, all that was written is durable: "
          + "unmount it and remove it (dmsetup remove), or start cowd again to go on")
    }
    LoopMarks.sweep(log)
  }
}

extension LoopMarks {
  /// Removes the marks of loop devices that have gone with their device.
  fileprivate static func sweep(_ log: Log) {
    do throws(IOError) { try host.sweep() } catch {
      log(.warning, "a mark of a loop device is left behind", ["error": "\(error)"])
    }
  }
}

extension WorkerError {
  /// The device-mapper refused something.
  init(_ error: DeviceMapperError) {
    guard error.code == EPERM || error.code == EACCES else {
      self.init(.io, error.description)
      return
    }
    self.init(
      .io, "\(error): attaching a device needs root: become root, or use --nbd unix:PATH")
  }
}

/// Does something with the device-mapper; its failure is the worker's.
func mapping<R>(_ body: () throws(DeviceMapperError) -> R) throws(WorkerError) -> R {
  do throws(DeviceMapperError) { return try body() } catch { throw WorkerError(error) }
}
