// Taking over what an earlier daemon left running: workers, devices, state files.
//
// A worker is taken over when its process is the very one that was started (id and start
// time), when it answers on its link, and when it gives the descriptors back. In any other
// case it is ended and replaced, which a guest sees as a pause at most.

internal import DeviceMapper
internal import Logging
internal import Posix
internal import WorkerLink
import Glibc

extension Reconciler {
  /// Takes over every disk that has a directory, and ends devices that belong to none.
  func adopt() async throws(IOError) {
    let configuration = configuration
    let found = try await offload.run { () throws(IOError) in
      try DiskDirectory.all(configuration)
    }
    await withTaskGroup { group in
      for id in found { group.addTask { await self.adopt(id) } }
    }
    await endStrayDevices()
    if !table.isEmpty { log.notice("took over disks", metadata: ["disks": "\(table.count)"]) }
  }

  private func adopt(_ id: DiskID) async {
    let directory = DiskDirectory(configuration, id)
    let disk = Disk(id, configuration: configuration, now: Reconciler.unixTime)
    let log = log(for: disk)
    do throws(IOError) {
      let record = try await offload.run { () throws(IOError) in try directory.load() }
      guard let record, let device = record.device, let spec = Reconciler.spec(record.params)
      else {
        // It was not yet served, or its file was not written to the end.
        try await end(record, directory)
        try await offload.run { () throws(IOError) in try directory.remove() }
        return
      }
      disk.params = record.params
      disk.spec = spec
      disk.readOnly = record.readOnly
      disk.vdev = record.vdev
      disk.allowed = record.files
      disk.since = record.since
      guard try await isAttached(disk, device) else {
        log.error("the device has gone", metadata: ["device": "\(device.path)"])
        try await end(record, directory)
        try await offload.run { () throws(IOError) in try directory.remove() }
        return
      }
      disk.device = device
      table[id] = disk
      if await !takeOver(disk, record) {
        try await end(record, directory)
        disk.phase = .restarting(at: .now)
        log.error("the worker is gone and is replaced", metadata: ["worker": "\(record.worker)"])
      }
    } catch {
      table[id] = disk
      disk.phase = .failed(DiskFailure(error), attached: disk.device != nil)
      log.error("cannot take the disk over", metadata: ["error": "\(error)"])
    }
  }

  private func isAttached(
    _ disk: Disk, _ device: DeviceNode
  ) async throws(IOError) -> Bool {
    switch device.kind {
    case .nbd:
      let (attacher, identifier) = (attacher, disk.identifier)
      return try await offload.run { () throws(IOError) in
        try attacher.isAttached(device, identifier: identifier)
      }
    case .dm:
      let (mapper, id) = (mapper, disk.id)
      do throws(DeviceMapperError) {
        return try await mapping.run { () throws(DeviceMapperError) in
          try mapper.isAttached(id, device)
        }
      } catch { throw IOError(error.code, error.operation, error.subject) }
    }
  }

  private static func spec(_ params: String) -> Spec? {
    do { return try Spec(params) } catch { return nil }
  }

  /// Connects to a worker that runs and asks the descriptors back. False when that fails.
  private func takeOver(_ disk: Disk, _ record: DiskRecord) async -> Bool {
    let directory = DiskDirectory(configuration, disk.id)
    let log = log(for: disk)
    do {
      let (process, link) = try await offload.run { () throws(IOError) in
        let process = try ProcessHandle(pid: record.worker, startTime: record.workerStart)
        return (process, try LinkConnection(path: directory.link))
      }
      let worker = follow(disk, process, link)
      let patience = Duration.seconds(5)
      let answer = try await worker.channel.ask(.status, within: patience) { report in
        switch report {
        case .status, .failed: true
        case .refused(let order, _): order == "status"
        default: false
        }
      }
      guard case .status(let report) = answer.report else {
        throw WorkerSilence.closed("it is not serving")
      }
      let handed = try await descriptors(0, of: worker)
      guard case .descriptors(let count, _) = handed.report, let spec = disk.spec,
        let store = handed.descriptors.take(.store)
      else { throw WorkerSilence.closed("it does not give the descriptors back") }
      disk.store = try OpenImage(store, name: spec.store)
      try await takePending(handed.descriptors, disk)
      if let base = handed.descriptors.take(.base) {
        disk.base = try OpenImage(base, name: spec.base ?? "base")
      }
      try await takeFiles(min(count, NamingPolicy.mostFiles), worker, disk)
      disk.report = report
      guard report.byNode == disk.isHeldByKernel, report.attached || !report.byNode else {
        throw WorkerSilence.closed("it does not serve the device")
      }
      disk.hindrance = report.hindrance
      disk.socketLost = !report.attached
      disk.phase = .serving(DiskPhase.Trouble(report))
      log.info("took the worker over", metadata: ["worker": "\(record.worker)"])
      return true
    } catch {
      let reason = (error as? WorkerSilence)?.words ?? "\(error)"
      log.warning("cannot take the worker over", metadata: ["reason": "\(reason)"])
      disk.worker?.channel.close()
      let (device, allowed) = (disk.device, disk.allowed)
      release(disk)
      disk.device = device
      disk.allowed = allowed
      return false
    }
  }

  /// A worker that serves a node has no use for the file, but the next one is given it again.
  private func takePending(_ handed: LinkDescriptors, _ disk: Disk) async throws {
    let directory = DiskDirectory(configuration, disk.id)
    if let pending = handed.take(.pending) {
      disk.pending = try FileStore(pending, name: directory.pending)
    } else if disk.isHeldByKernel {
      disk.pending = try await offload.run { () throws(IOError) in
        try directory.openPending(new: false)
      }
    } else {
      throw WorkerSilence.closed("it does not give the descriptors back")
    }
  }

  /// Takes back so many files. A function of its own: within its caller, whose moved
  /// descriptors live across the loop, the compiler's pass for their debug information does
  /// not end (Swift 6.3).
  private func takeFiles(_ count: Int, _ worker: Worker, _ disk: Disk) async throws {
    for index in 0..<count {
      try takeFile(try await descriptors(index + 1, of: worker), disk)
    }
  }

  /// Takes back a file that the disk was allowed.
  private func takeFile(_ handed: WorkerReply, _ disk: Disk) throws {
    let strange = WorkerSilence.closed("it has a file that it was never given")
    guard case .descriptors(_, let need) = handed.report, let need else { throw strange }
    guard let file = disk.allowed.first(where: { $0.need == need }) else { throw strange }
    guard let raw = handed.descriptors.take(.file) else { throw strange }
    disk.files[file] = try OpenImage(raw, name: file.path)
  }

  private func descriptors(
    _ index: Int, of worker: Worker
  ) async throws(WorkerSilence) -> WorkerReply {
    try await worker.channel.ask(.descriptors(index: index), within: .seconds(5)) { report in
      switch report {
      case .descriptors, .failed: true
      case .refused(let order, _): order == "descriptors"
      default: false
      }
    }
  }

  /// Ends every worker of a disk that still runs: the one of the record, and one that a
  /// daemon started and did not live to write down.
  private func end(_ record: DiskRecord?, _ directory: DiskDirectory) async throws(IOError) {
    if let record { try await end(record) }
    try await offload.run { () throws(IOError) in
      let link: LinkConnection
      do throws(IOError) { link = try LinkConnection(path: directory.link) } catch {
        if error.code == ENOENT || error.code == ECONNREFUSED { return }
        throw error
      }
      do throws(LinkError) {
        try link.send(.stop)
        for _ in 0..<64 {
          if case .end = try link.receive(milliseconds: 10_000) { return }
        }
      } catch {
        // Gone in the middle of a word is gone, too.
        if case .io = error { return }
      }
      throw IOError(EBUSY, "end", "the worker at \(directory.link)")
    }
  }

  private func end(_ record: DiskRecord) async throws(IOError) {
    try await offload.run { () throws(IOError) in
      let process: ProcessHandle
      do throws(IOError) {
        process = try ProcessHandle(pid: record.worker, startTime: record.workerStart)
      } catch {
        if error.code == ESRCH || error.code == ENOENT { return }
        throw error
      }
      try process.send(SIGKILL)
      for _ in 0..<500 where !process.hasEnded { usleep(10_000) }
      guard process.hasEnded else { throw IOError(EBUSY, "end", "process \(record.worker)") }
      // A child of ours when the earlier daemon lived in this very process.
      do throws(IOError) { _ = try process.reap() } catch {
        guard error.code == ECHILD else { throw error }
      }
    }
  }

  /// Ends devices with our name that no disk has: an earlier daemon died between making a
  /// device and writing it down.
  private func endStrayDevices() async {
    let attacher = attacher
    let devices = table.values.compactMap(\.device)
    let known = Set(devices.filter { $0.kind == .nbd }.map(\.index))
    do throws(IOError) {
      let strays = try await offload.run { () throws(IOError) in
        try attacher.devices().filter { !known.contains($0.index) }
      }
      for stray in strays {
        log.warning("ends a device of no disk", metadata: ["device": "\(stray.path)"])
        try await offload.run { () throws(IOError) in try attacher.detach(stray) }
      }
    } catch { log.error("cannot look for stray devices", metadata: ["error": "\(error)"]) }
    let mapper = mapper
    do throws(DeviceMapperError) {
      let found = try await mapping.run { () throws(DeviceMapperError) in try mapper.devices() }
      for (id, stray) in found where table[id]?.device != stray {
        log.warning("ends a device of no disk", metadata: ["device": "\(stray.path)"])
        try await mapping.run { () throws(DeviceMapperError) in
          try mapper.failFaults(id)
          try mapper.remove(id, deferred: true)
        }
      }
    } catch { log.error("cannot end stray devices", metadata: ["error": "\(error)"]) }
  }
}

extension OpenImage {
  /// Takes over a descriptor that is open and locked.
  init(_ descriptor: consuming Descriptor, name: String) throws(IOError) {
    let identity = try FileIdentity(descriptor.raw, name: name)
    self.init(file: try FileStore(descriptor, name: name), identity: identity)
  }
}
