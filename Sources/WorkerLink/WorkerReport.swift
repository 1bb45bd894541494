// SPDX-License-Identifier: Apache-2.0
// What a worker says to the daemon.

/// How a disk is.
package enum DiskState: String, Sendable {
  /// It serves.
  case ready
  /// It serves, but something has failed; see the error.
  case degraded
  /// A write found no space; others may still succeed.
  case noSpace = "no-space"
}

/// A disk that is served, as its worker sees it.
package struct DiskReport: Sendable, Equatable {
  /// What the daemon calls the disk.
  package var disk = ""
  /// Name of the image format.
  package var format = ""
  /// The worker's version.
  package var version = ""
  /// The worker's process id.
  package var pid: Int32 = 0
  /// Length of the disk in bytes.
  package var size: UInt64 = 0
  /// Bytes of a block.
  package var blockSize: UInt32 = 0
  /// Bytes of the blocks that have a place in the store.
  package var allocated: UInt64 = 0
  /// The base as it stands in the image; nil: it has none.
  package var basePath: String?
  /// NBD transmission flags to tell the kernel.
  package var flags: UInt16 = 0
  /// Whether the guest may only read.
  package var readOnly = false
  /// How it is.
  package var state = DiskState.ready
  /// Why it is not ready; empty when it is.
  package var error = ""
  /// Whether an nbd socket or a node is served now.
  package var attached = false
  /// Whether it is a node that is served or waited for.
  package var byNode = false
  /// Why no node can be served although one was to follow; nil when one can.
  package var hindrance: String?
  /// With a node: what its device has to stand on, in the order of their numbers.
  package var parts: [DiskPart] = []
  /// Placements that are not durable yet.
  package var uncommitted: UInt64 = 0
  /// Requests since the worker started.
  package var reads: UInt64 = 0
  /// Write requests.
  package var writes: UInt64 = 0
  /// Flush requests.
  package var flushes: UInt64 = 0
  /// Faults that the format was asked for.
  package var faults: UInt64 = 0
  /// Resident memory of the worker in bytes.
  package var memory: UInt64 = 0
  /// What it has measured of the requests that it serves; nil when the kernel serves them.
  package var times: ReportedTimes?

  /// An empty report.
  package init() {}

  var fields: [String: String] {
    var fields = [
      "disk": disk, "format": format, "version": version, "pid": String(pid),
      "size": String(size), "block-size": String(blockSize), "allocated": String(allocated),
      "flags": String(flags), "readonly": readOnly ? "1" : "0", "state": state.rawValue,
      "error": error, "attached": attached ? "1" : "0", "uncommitted": String(uncommitted),
      "reads": String(reads), "writes": String(writes), "flushes": String(flushes),
      "faults": String(faults), "memory": String(memory),
    ]
    fields["base-path"] = basePath
    if byNode { fields["by-node"] = "1" }
    fields["hindrance"] = hindrance
    if !parts.isEmpty { fields["parts"] = parts.map(\.word).joined(separator: ",") }
    times?.write(to: &fields)
    return fields
  }

  init(_ message: LinkMessage) throws(LinkFault) {
    disk = try message.text("disk")
    format = try message.text("format")
    version = try message.text("version")
    pid = try message.number("pid")
    size = try message.number("size")
    blockSize = try message.number("block-size")
    allocated = try message.number("allocated")
    basePath = message.fields["base-path"]
    flags = try message.number("flags")
    readOnly = try message.flag("readonly")
    state = try message.state()
    error = message.fields["error"] ?? ""
    attached = try message.flag("attached")
    byNode = try message.flag("by-node")
    hindrance = message.fields["hindrance"]
    let words = (message.fields["parts"] ?? "").split(separator: ",")
    guard words.count <= DiskPart.most else {
      throw .badField(verb: message.verb, field: "parts")
    }
    parts = try words.map { word throws(LinkFault) in
      guard let part = DiskPart(word) else {
        throw .badField(verb: message.verb, field: "parts")
      }
      return part
    }
    uncommitted = try message.number("uncommitted")
    reads = try message.number("reads")
    writes = try message.number("writes")
    flushes = try message.number("flushes")
    faults = try message.number("faults")
    memory = try message.number("memory")
    times = try ReportedTimes(message)
    // What is not so in any honest report, and what other programs may divide by.
    guard size % 512 == 0, size <= 1 << 62 else {
      throw .badField(verb: message.verb, field: "size")
    }
    guard blockSize >= 512, blockSize & (blockSize - 1) == 0 else {
      throw .badField(verb: message.verb, field: "block-size")
    }
  }
}

/// A file that an image names. A worker may be lied to by its image, and may lie itself: what
/// it asks for is allowed or refused, never believed.
package struct FileNeed: Sendable, Hashable {
  /// What it is for: "base", "data-file" or what else formats have.
  package var role: String
  /// Its path; one that is relative starts at the store's folder.
  package var path: String
  /// Whether the disk's own data shall be written there.
  package var writable: Bool

  /// A need from its parts.
  package init(role: String, path: String, writable: Bool) {
    self.role = role
    self.path = path
    self.writable = writable
  }

  var fields: [String: String] {
    ["role": role, "path": path, "write": writable ? "1" : "0"]
  }

  init(_ message: LinkMessage) throws(LinkFault) {
    role = try message.text("role")
    path = try message.text("path")
    writable = try message.flag("write")
  }
}

/// What a worker tells. Descriptors travel beside it, as each case says.
package enum WorkerReport: Sendable, Equatable {
  /// The image is open and the disk can be served. Once, after `start`.
  case ready(DiskReport)
  /// The image names this file: answer `file` or `refuseFile`.
  case needFile(FileNeed)
  /// The disk cannot be served; the worker ends with exit status 1.
  case failed(WorkerFault, message: String)
  /// The answer to `status`.
  case status(DiskReport)
  /// The answer to `descriptors`: how many files were asked for, and which one this is. Roles
  /// with index 0: store; base, pending and witness if there are any. Else: file, and witness.
  case descriptors(files: Int, file: FileNeed?)
  /// The node is served and knows the whole mapping: the device may be brought into use.
  case attached
  /// The answer to `ping`.
  case alive
  /// The nbd socket has ended; the disk is kept and waits for another. From a worker that a person
  /// started also: the device of its node is gone.
  case detached
  /// Unasked, from a worker that a person started: it was told to end, and does when its disk has
  /// been taken away: order `stop` then.
  case stopping
  /// Unasked: the state has changed.
  case event(DiskState, error: String)
  /// An order that was not understood or came at a wrong time; the worker goes on.
  case refused(order: String, message: String)

  /// The roles of the descriptors that may travel beside it.
  package var roles: Set<LinkRole> {
    guard case .descriptors(_, let file) = self else { return [] }
    return file == nil ? [.store, .base, .pending, .witness] : [.file, .witness]
  }

  /// As a message.
  package var message: LinkMessage {
    switch self {
    case .ready(let report): LinkMessage("ready", report.fields)
    case .needFile(let need): LinkMessage("need-file", need.fields)
    case .failed(let fault, let text):
      LinkMessage("failed", ["code": fault.rawValue, "message": text])
    case .status(let report): LinkMessage("status", report.fields)
    case .descriptors(let files, let file):
      LinkMessage(
        "descriptors", ["files": "\(files)"].merging(file?.fields ?? [:]) { one, _ in one })
    case .attached: LinkMessage("attached")
    case .alive: LinkMessage("alive")
    case .detached: LinkMessage("detached")
    case .stopping: LinkMessage("stopping")
    case .event(let state, let error):
      LinkMessage("event", ["state": state.rawValue, "error": error])
    case .refused(let order, let text):
      LinkMessage("refused", ["order": order, "message": text])
    }
  }

  /// From a message. Fields that are not known are skipped.
  package init(_ message: LinkMessage) throws(LinkFault) {
    switch message.verb {
    case "ready": self = .ready(try DiskReport(message))
    case "need-file": self = .needFile(try FileNeed(message))
    case "failed":
      let fault = WorkerFault(word: try message.text("code"))
      self = .failed(fault, message: try message.text("message"))
    case "status": self = .status(try DiskReport(message))
    case "descriptors":
      let file = message.fields["path"] == nil ? nil : try FileNeed(message)
      let files: Int = try message.optionalNumber("files") ?? 0
      guard files >= 0 else { throw .badField(verb: message.verb, field: "files") }
      self = .descriptors(files: files, file: file)
    case "attached": self = .attached
    case "alive": self = .alive
    case "detached": self = .detached
    case "stopping": self = .stopping
    case "event":
      self = .event(try message.state(), error: message.fields["error"] ?? "")
    case "refused":
      self = .refused(order: try message.text("order"), message: try message.text("message"))
    default: throw .unknownVerb(message.verb)
    }
  }
}

extension LinkConnection {
  /// Sends a report. Throws as `send(_:lending:)` of a message.
  package func send(
    _ report: WorkerReport, lending descriptors: [LinkRole: Int32] = [:]
  ) throws(LinkError) {
    try send(report.message, lending: descriptors)
  }
}

extension LinkMessage {
  fileprivate func state() throws(LinkFault) -> DiskState {
    guard let state = DiskState(rawValue: try text("state")) else {
      throw .badField(verb: verb, field: "state")
    }
    return state
  }
}
