// A disk by hand through the device-mapper: /dev/mapper/NAME with the target `userspace`, as
// in 2006. The device outlives a worker that is killed; the same command takes it over.

internal import DMU
import DeviceMapper
import Glibc
import ImageFormats
import Posix
import WorkerLink

/// A worker by hand whose device is the device-mapper's.
struct ByMapper {
  let options: ByHandOptions
  let request: ImageRequest
  let format: FormatName
  let name: String
  let loop: EventLoop
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
        "usage",
        "--transport dm serves no plugin's format, and neither traces nor holds: "
          + "leave it out")
    }
    let there = try mapping { () throws(DeviceMapperError) in try ServedDevice.isAvailable() }
    guard !there, transport == .dm else { return there }
    throw WorkerError(
      "io",
      "the kernel has no device-mapper target 'userspace', version 1: "
        + "install its module, dm-userspace, or say --transport nbd")
  }

  /// Serves until a signal, or until somebody removes the device. Returns when all that was
  /// written is durable and the device is gone. False, and nothing has happened, when the
  /// image is none that the kernel can serve and another way may be taken.
  func run(isStopping: () -> Bool) throws(WorkerError) -> Bool {
    guard Userspace.isName(name), name != "control" else {
      throw WorkerError("usage", "'\(name)' cannot be the name of a device")
    }
    guard let (image, plan, state) = try open() else { return false }
    Self.harden(log)
    if state == .absent {
      try mapping { () throws(DeviceMapperError) in
        _ = try device.make(
          size: image.format.size, blockSize: image.format.blockSize, plan.backings,
          readOnly: options.readOnly)
      }
    }
    let disk: NodeDisk
    do throws(WorkerError) {
      disk = try NodeDisk(
        try Self.node(name), image, plan, name: name, policy: options.policy, loop: loop, log: log)
    } catch {
      if state == .absent { giveUp() }
      throw error
    }
    defer { disk.shutdown() }
    let started = device
    if state == .absent {
      // Whoever opens the new device at once waits for answers.
      try disk.elsewhere { () throws(WorkerError) in
        try mapping { () throws(DeviceMapperError) in try started.start() }
      }
    }
    ByHand.say("\(options.store) (\(image.format.size) bytes) is served: \(device.device.path)")
    while !isStopping(), try !disk.isGone() { try disk.turn() }
    if try !disk.isGone() { try withdraw(disk) }
    return true
  }

  /// Opens the image. One that a former worker's device holds is taken over with the locks
  /// that the kernel keeps for it. nil, and nothing has happened, when it is none that the
  /// kernel can serve and another way may be taken.
  private func open() throws(WorkerError) -> (OpenImage, KernelPlan, ServedDevice.State)? {
    var request = request
    request.isLocked = try mapping { () throws(DeviceMapperError) in
      try device.device.information() != nil
    }
    let image = try Opening.image(format, store: options.store, request)
    let plan: KernelPlan
    switch KernelPlan.make(image) {
    case .plan(let it): plan = it
    case .hindrance(let why):
      guard options.transport != .dm else {
        throw WorkerError("unsupported", "\(options.store) \(why): say --transport nbd")
      }
      log(.info, "serving by nbd", ["reason": why])
      return nil
    }
    let state = try mapping { () throws(DeviceMapperError) in
      try device.state(over: plan.backings)
    }
    switch state {
    case .absent, .ours: return (image, plan, state)
    case .foreign(let why): throw WorkerError("in-use", "\(why): choose another name")
    case .unfinished:
      // Its maker died before anybody could use it.
      try remove()
      return try open()
    }
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
  private func withdraw(_ disk: NodeDisk) throws(WorkerError) {
    let (device, readOnly) = (device.device, options.readOnly)
    try disk.elsewhere { () throws(WorkerError) in
      if !readOnly {
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
          "in-use",
          "\(device.path) is in use and stays, all that was written is durable: "
            + "unmount it and remove it (dmsetup remove), or start cowd again to go on")
      }
    }
    sweep()
  }

  /// Removes what could not be brought into use; why it could not is the error, not this.
  private func giveUp() {
    do throws(WorkerError) { try remove() } catch {
      log(.warning, "the device is left behind", ["error": "\(error)"])
    }
  }

  private func remove() throws(WorkerError) {
    try mapping { () throws(DeviceMapperError) in try device.device.remove(patient: true) }
    sweep()
  }

  /// Removes the marks of the device's loop devices, which have gone with it.
  private func sweep() {
    do throws(IOError) { try LoopMarks.host.sweep() } catch {
      log(.warning, "a mark of a loop device is left behind", ["error": "\(error)"])
    }
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
