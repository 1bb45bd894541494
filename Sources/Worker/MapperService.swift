// A disk by hand through the device-mapper: /dev/mapper/NAME with the target `userspace`, as
// in 2006. The device outlives a worker that is killed; the same command takes it over.

internal import DMU
import DeviceMapper
import Glibc
import ImageFormats
import Posix

/// The way by which the kernel reaches a disk.
public enum Transport: String, Sendable, CaseIterable {
  /// The device-mapper when the module is there, else nbd.
  case auto
  /// The device-mapper's target `userspace`.
  case dm
  /// The nbd driver.
  case nbd
}

/// The life of a worker by hand whose device is the device-mapper's.
enum ByMapper {
  /// Whether a disk goes this way. Throws when it was wished and cannot be.
  static func isWay(_ transport: Transport, _ log: Log) throws(WorkerError) -> Bool {
    guard transport != .nbd else { return false }
    let there: Bool
    do throws(DeviceMapperError) {
      there = try ServedDevice.isAvailable()
    } catch { throw WorkerError(error) }
    guard !there, transport == .dm else { return there }
    throw WorkerError(
      "io",
      "the kernel has no device-mapper target 'userspace', version 1: "
        + "install its module, dm-userspace, or say --transport nbd")
  }

  /// Serves until a signal, or until somebody removes the device. Returns when all that was
  /// written is durable and the device is gone.
  static func run(
    _ options: ByHandOptions, name: String, format: FormatName, loop: EventLoop, log: Log,
    isStopping: () -> Bool
  ) throws(WorkerError) {
    guard Userspace.isName(name), name != "control" else {
      throw WorkerError("usage", "'\(name)' cannot be the name of a device")
    }
    let device = ServedDevice(name: name, owner: "cowd")
    let (image, state) = try open(options, format, device)
    guard image.format.size % 512 == 0 else {
      throw WorkerError("size", "\(options.store) is no multiple of 512 bytes: use --transport nbd")
    }
    harden(log)
    if state == .absent {
      do throws(DeviceMapperError) {
        _ = try device.make(
          size: image.format.size, blockSize: image.format.blockSize,
          try backings(of: image, options), readOnly: options.readOnly)
      } catch { throw WorkerError(error) }
    }
    let disk: NodeDisk
    do throws(WorkerError) {
      let node = try self.node(name)
      disk = try NodeDisk(node, image, name: name, loop: loop, log: log)
    } catch {
      if state == .absent { giveUp(device, log) }
      throw error
    }
    defer { disk.shutdown() }
    if state == .absent {
      // Whoever opens the new device at once waits for answers.
      try disk.elsewhere { () throws(WorkerError) in
        try mapping { () throws(DeviceMapperError) in try device.start() }
      }
    }
    ByHand.say("\(options.store) (\(image.format.size) bytes) is served: \(device.device.path)")
    while !isStopping(), try !disk.isGone() { try disk.turn() }
    guard try !disk.isGone() else { return }
    try withdraw(device, disk, options)
  }

  /// Opens the image. One that a former worker's device holds is taken over with the locks
  /// that the kernel keeps for it.
  private static func open(
    _ options: ByHandOptions, _ format: FormatName, _ device: ServedDevice
  ) throws(WorkerError) -> (OpenImage, ServedDevice.State) {
    var request = ImageRequest()
    request.readOnly = options.readOnly
    request.force = options.force
    let isThere = try mapping { () throws(DeviceMapperError) in
      try device.device.information() != nil
    }
    request.isLocked = isThere
    let image = try Opening.image(format, store: options.store, base: options.base, request)
    let state = try mapping { () throws(DeviceMapperError) in
      try device.state(over: try backings(of: image, options))
    }
    switch state {
    case .absent, .ours: return (image, state)
    case .foreign(let why):
      throw WorkerError("in-use", "\(why): choose another name")
    case .unfinished:
      // Its maker died before anybody could use it.
      try remove(device)
      return try open(options, format, device)
    }
  }

  /// What the device stands on: the store, and the base under it.
  private static func backings(
    of image: OpenImage, _ options: ByHandOptions
  ) throws(DeviceMapperError) -> [ServedDevice.Backing] {
    let devices = [(image.store, options.readOnly)] + (image.base.map { [($0, true)] } ?? [])
    var backings: [ServedDevice.Backing] = []
    for (store, readOnly) in devices {
      guard let file = store as? FileStore else {
        throw DeviceMapperError(
          ENOTSUP, "serve", options.store,
          explanation: "it has to be read through user space: use --transport nbd")
      }
      backings.append(.init(descriptor: file.raw, name: file.name, readOnly: readOnly))
    }
    return backings
  }

  private static func node(_ name: String) throws(WorkerError) -> Node {
    do throws(IOError) {
      return try Node(name: name)
    } catch {
      guard error.code == EBUSY else { throw WorkerError(error) }
      throw WorkerError(
        "in-use", "/dev/mapper/\(name) is in use: end its worker, or choose another name")
    }
  }

  /// The kernel may write its memory out through this process: it must not wait for memory.
  static func harden(_ log: Log) {
    do throws(IOError) {
      try Hardening.lockMemory()
      try Hardening.becomeFlusher()
    } catch { log(.warning, "going on without locked memory", ["error": "\(error)"]) }
  }

  /// Writes out what the kernel holds for the device, which commits it, and removes it. One
  /// that is in use stays, and waits for its next worker.
  private static func withdraw(
    _ device: ServedDevice, _ disk: NodeDisk, _ options: ByHandOptions
  ) throws(WorkerError) {
    let (path, readOnly) = (device.device.path, options.readOnly)
    try disk.elsewhere { () throws(WorkerError) in
      if !readOnly {
        try system { () throws(IOError) in
          let node = try Descriptor(path: path, flags: O_RDONLY)
          guard fsync(node.raw) == 0 else { throw IOError.last("write out", path) }
        }
      }
      do throws(DeviceMapperError) {
        try device.device.remove(patient: true)
      } catch {
        guard error.code == EBUSY else { throw WorkerError(error) }
        throw WorkerError(
          "in-use",
          "\(path) is in use and stays, all that was written is durable: "
            + "unmount it and remove it (dmsetup remove), or start cowd again to go on")
      }
    }
  }

  /// Removes what could not be brought into use; why it could not is the error, not this.
  private static func giveUp(_ device: ServedDevice, _ log: Log) {
    do throws(WorkerError) { try remove(device) } catch {
      log(.warning, "the device is left behind", ["error": "\(error)"])
    }
  }

  private static func remove(_ device: ServedDevice) throws(WorkerError) {
    try mapping { () throws(DeviceMapperError) in try device.device.remove(patient: true) }
  }
}

extension WorkerError {
  /// The device-mapper refused something.
  init(_ error: DeviceMapperError) {
    guard error.code == EPERM || error.code == EACCES else {
      self.init("io", error.description)
      return
    }
    self.init(
      "io", "\(error): attaching a device needs root: become root, or use --nbd unix:PATH")
  }
}

/// Does something with the device-mapper; its failure is the worker's.
func mapping<R>(_ body: () throws(DeviceMapperError) -> R) throws(WorkerError) -> R {
  do throws(DeviceMapperError) { return try body() } catch { throw WorkerError(error) }
}
