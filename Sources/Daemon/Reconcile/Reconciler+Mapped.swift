// Disks whose device is the device-mapper's: making the device, giving its node to a worker,
// and taking it down.
//
// The order of a start: the worker opens the image, the device is made and is suspended, the
// worker gets the node and tells the whole mapping, and only then the device is resumed. The
// kernel keeps device, mapping and questions when a worker dies: another one gets the node, and
// nothing is done to the device.

internal import DeviceMapper
internal import Logging
internal import Posix
internal import WorkerLink
import Glibc

/// A file or device that a disk stands on, and how its worker wishes it to be used.
struct DiskBacking: Sendable {
  let image: OpenImage
  let part: DiskPart

  var lent: ServedDevice.Backing {
    ServedDevice.Backing(
      descriptor: image.file.raw, name: image.file.name, readOnly: !part.isWritable,
      isDirect: part.isDirect, growth: part.growth)
  }
}

extension Reconciler {
  /// Whether a new disk shall be served by its node. Throws when that is wished and cannot be.
  func wantsNode(_ transport: Transport) async throws(DiskFailure) -> Bool {
    guard transport != .nbd else { return false }
    let mapper = mapper
    let isThere: Bool
    do throws(DeviceMapperError) {
      isThere = try await mapping.run { () throws(DeviceMapperError) in try mapper.isAvailable() }
    } catch {
      guard transport == .auto else { throw .mapper(error) }
      log.warning("going on without the device-mapper", metadata: ["error": "\(error)"])
      return false
    }
    guard isThere || transport == .auto else { throw .noTarget }
    return isThere
  }

  /// Makes the device, gives its node to the worker and brings it into use.
  func attachMapped(_ disk: Disk) async throws(DiskFailure) {
    guard let report = disk.report else { return }
    let (mapper, id, backings) = (mapper, disk.id, disk.backings)
    let wish = MappedWish(
      disk: id, size: report.size, blockSize: report.blockSize, backings: backings.map(\.lent),
      readOnly: disk.readOnly)
    disk.device = try await mapped { () throws(DeviceMapperError) in
      defer { withExtendedLifetime(backings) {} }
      return try mapper.make(wish)
    }
    try await handNode(disk)
    try await mapped { () throws(DeviceMapperError) in try mapper.start(id) }
  }

  /// Gives the node of a device that is there to a new worker.
  func handNodeAgain(_ disk: Disk) async throws(DiskFailure) {
    guard let report = disk.report else { return }
    guard report.byNode else {
      throw .worker(
        "the worker cannot serve the disk's device (\(report.hindrance ?? "it does not say why")):"
          + " is cowd of this version?")
    }
    let (mapper, id, backings) = (mapper, disk.id, disk.backings)
    let state = try await mapped { () throws(DeviceMapperError) in
      defer { withExtendedLifetime(backings) {} }
      return try mapper.state(id, over: backings.map(\.lent))
    }
    switch state {
    case .ours: try await handNode(disk)
    case .foreign(let why):
      throw DiskFailure(.device, "\(why): detach the disk and attach it again")
    case .absent, .unfinished:
      throw DiskFailure(
        .device,
        "\(disk.device?.path ?? "the device") is gone: detach the disk and attach it again")
    }
  }

  /// Gives the node to the worker and waits until it has told the whole mapping.
  private func handNode(_ disk: Disk) async throws(DiskFailure) {
    guard let worker = disk.worker else { return }
    let (mapper, id) = (mapper, disk.id)
    let node = try await offload.run { () throws(DiskFailure) in
      // The last worker's descriptor goes a moment after its process, or is still on its way.
      var attempts = 100
      while true {
        do throws(IOError) { return PassedDescriptor(try mapper.openNode(id)) } catch {
          guard error.code == EBUSY, attempts > 0 else { throw DiskFailure.node(error) }
          attempts -= 1
          usleep(50_000)
        }
      }
    }
    guard let raw = node.raw else { return }
    let reply: WorkerReply
    do throws(WorkerSilence) {
      reply = try await worker.channel.ask(
        .attach, lending: [.node: raw], within: configuration.readyTimeout
      ) { report in
        switch report {
        case .attached, .failed: true
        case .refused(let order, _): order == "attach"
        default: false
        }
      }
    } catch { throw await silence(worker, error) }
    switch reply.report {
    case .attached: return
    case .failed(let code, let message): throw DiskFailure(worker: code, message, disk)
    default: throw .worker("the worker refused its device's node: is cowd of this version?")
    }
  }

  /// Takes a device down: writes out and commits what it holds while there is a worker, and
  /// removes it. False when something below it hangs; then it is still there.
  func withdraw(_ disk: Disk, _ device: DeviceNode) async -> Bool {
    let (mapper, id, log) = (mapper, disk.id, log(for: disk))
    let isServed = disk.worker.map { $0.ended == nil } ?? false
    if case .stopping = disk.phase, isServed, !disk.readOnly {
      guard await flush(device, disk) else { return false }
    } else {
      await failFaults(disk)
    }
    for attempt in 1...10 {
      do throws(DeviceMapperError) {
        let deferred = attempt == 10
        try await mapping.run { () throws(DeviceMapperError) in
          try mapper.remove(id, deferred: deferred)
        }
        if deferred {
          log.error(
            "the device is in use and goes with its last user: end that program",
            metadata: ["device": "\(device.path)"])
        }
        return true
      } catch {
        if attempt > 2, error.code != EBUSY || attempt == 10 {
          log.error(
            "cannot remove the device",
            metadata: ["device": "\(device.path)", "error": "\(error)"])
          return true
        }
        await pause(.milliseconds(500))
      }
      // Whoever still reads it gets no worker any more.
      if attempt == 9 { await failFaults(disk) }
    }
    return true
  }

  /// Flushes a device that is about to go. False when that comes to no end.
  private func flush(_ device: DeviceNode, _ disk: Disk) async -> Bool {
    let (mapper, log) = (mapper, log(for: disk))
    let ended = Ended()
    let flush = Task { [offload] in
      defer { ended.set() }
      do throws(IOError) {
        try await offload.run { () throws(IOError) in try mapper.flush(device) }
      } catch {
        log.error(
          "what was not flushed may be lost",
          metadata: ["device": "\(device.path)", "error": "\(error)"])
      }
    }
    if await ended.wait(configuration.stopTimeout) { return true }
    log.error("the device is not flushed in time", metadata: ["device": "\(device.path)"])
    await failFaults(disk)
    defer { withExtendedLifetime(flush) {} }
    return await ended.wait(.seconds(5))
  }

  private func failFaults(_ disk: Disk) async {
    let (mapper, id) = (mapper, disk.id)
    do throws(DeviceMapperError) {
      try await mapping.run { () throws(DeviceMapperError) in try mapper.failFaults(id) }
    } catch {
      log(for: disk).warning("cannot fail what waits", metadata: ["error": "\(error)"])
    }
  }

  private func pause(_ time: Duration) async {
    // A cancelled task only hurries.
    do { try await Task.sleep(for: time) } catch { return }
  }

  /// Does something with the device-mapper; its failure is the disk's.
  private func mapped<Value: Sendable>(
    _ work: @escaping @Sendable () throws(DeviceMapperError) -> Value
  ) async throws(DiskFailure) -> Value {
    do throws(DeviceMapperError) { return try await mapping.run(work) } catch {
      throw .mapper(error)
    }
  }
}

extension Disk {
  /// What the disk's device stands on, by the worker's report. `asked` are the files that the
  /// worker asked for, in that order. It may write what it was lent for writing.
  func backings(
    _ parts: [DiskPart], asked: [NamedFile]
  ) throws(DiskFailure) -> [DiskBacking] {
    try parts.map { part throws(DiskFailure) in
      var found: OpenImage?
      var mayWrite = !readOnly
      switch part.role {
      case .store: found = store
      case .base: (found, mayWrite) = (base, false)
      case .file(let index):
        guard asked.indices.contains(index) else { break }
        found = files[asked[index]]
        mayWrite = mayWrite && asked[index].need.writable
      }
      guard let found, mayWrite || !part.isWritable else {
        throw .worker("the worker wishes for what it was not given: is cowd of this version?")
      }
      return DiskBacking(image: found, part: part)
    }
  }
}

extension DiskFailure {
  static func mapper(_ error: DeviceMapperError) -> DiskFailure {
    let remedy =
      switch error.code {
      case EPERM, EACCES: "dmu-xend has to run as root"
      case EBUSY: "look who has it open (fuser), and end that program"
      default: "look at the kernel's log (dmesg), or use transport nbd"
      }
    return DiskFailure(.device, "\(error): \(remedy)")
  }

  static func node(_ error: IOError) -> DiskFailure {
    let remedy =
      error.code == EBUSY
      ? "end the process that has it open" : "look at the kernel's log (dmesg)"
    return DiskFailure(.device, "\(error.description): \(remedy)")
  }

  static let noTarget = DiskFailure(
    .device,
    "the kernel has no device-mapper target 'userspace', version 1: install its module,"
      + " dm-userspace (dkms install dm-userspace/1.0; modprobe dm-userspace), or use transport"
      + " auto or nbd")

  static func notMappable(_ store: String, _ why: String) -> DiskFailure {
    DiskFailure(
      .device,
      "store \(store) cannot be served by the device-mapper (it \(why)): use transport auto or nbd")
  }
}
