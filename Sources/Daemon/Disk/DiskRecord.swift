// SPDX-License-Identifier: Apache-2.0
// The state file of a disk: what a restarted daemon has to know in order to take the disk
// over. It is text, one KEY=VALUE a line, values percent-encoded, replaced whole.
//
// It lies in the disk's directory together with `link`, the socket that the worker listens
// on.

import Glibc
internal import SystemIO
internal import WorkerLink

/// Which files a disk was started with, whatever has their names by now.
struct DiskIdentities: Sendable, Equatable {
  var store: FileIdentity?
  var base: FileIdentity?
  /// The pending log.
  var log: FileIdentity?
}

/// What is remembered of a disk across a restart of the daemon.
struct DiskRecord: Sendable, Equatable {
  var params: String
  var readOnly: Bool
  /// The disk's name in the guest; nil for a named disk.
  var vdev: String?
  /// The files that the images named and were allowed.
  var files: [AllowedFile] = []
  var worker: Int32
  var workerStart: UInt64
  var device: DeviceNode?
  /// Unix time of the last change of state.
  var since: Int64
  /// Key of the store's pending log; nil when the disk is read only.
  var pending: String?
  /// Path of the worker's link, when it does not lie in the disk's directory.
  var link: String?
  /// Which files they are; not known of an earlier daemon's disk.
  var identities = DiskIdentities()
  /// Whether a worker has served the disk with these files.
  var isComplete = false
  /// The vbds that use the disk; empty: its own alone. One that is not named here has gone.
  var users: [VBD] = []
  /// Whether requests are held.
  var isHeld = false

  var text: String {
    var fields = [
      "params=" + PercentCode.encode(params), "readonly=" + (readOnly ? "1" : "0"),
      "worker=\(worker)", "worker-start=\(workerStart)", "since=\(since)",
    ]
    if let vdev { fields.append("vdev=" + PercentCode.encode(vdev)) }
    if let pending { fields.append("pending=\(pending)") }
    if let store = identities.store { fields.append("store-file=" + store.text) }
    if let base = identities.base { fields.append("base-file=" + base.text) }
    if let log = identities.log { fields.append("log-file=" + log.text) }
    if isComplete { fields.append("settled=1") }
    if !users.isEmpty {
      fields.append("users=" + users.map(\.description).joined(separator: " "))
    }
    if isHeld { fields.append("held=1") }
    if let link { fields.append("link=" + PercentCode.encode(link)) }
    fields += DiskRecord.lines(files)
    if let device {
      fields += [
        "device-kind=\(device.kind.rawValue)", "device=\(device.index)",
        "device-path=" + PercentCode.encode(device.path),
        "device-major=\(device.major)", "device-minor=\(device.minor)",
      ]
    }
    return fields.map { $0 + "\n" }.joined()
  }

  /// The files that its worker may write.
  var writtenFiles: [FileIdentity] {
    guard !readOnly else { return [] }
    return [identities.store].compactMap { $0 }
      + files.filter(\.need.writable).compactMap(\.identity)
  }

  /// The lines that remember files.
  static func lines(_ files: [AllowedFile]) -> [String] {
    files.enumerated().map { index, file in
      var parts = [file.need.role, file.need.writable ? "1" : "0", file.need.path, file.path]
      if let identity = file.identity { parts.append(identity.text) }
      let codes = parts.map { PercentCode.encode($0) }.joined(separator: " ")
      return "file-\(index)=" + PercentCode.encode(codes)
    }
  }

  /// The fields of a text of lines KEY=VALUE; nil when it is not one.
  static func fields(_ text: String) -> [String: String]? {
    var fields: [String: String] = [:]
    for line in text.split(separator: "\n") {
      guard let equals = line.firstIndex(of: "=") else { return nil }
      guard let value = DiskRecord.decode(line[line.index(after: equals)...]) else { return nil }
      fields[String(line[..<equals])] = value
    }
    return fields
  }

  /// Reads the text of a state file; nil when it is not one.
  init?(_ text: String) {
    guard let fields = DiskRecord.fields(text), let params = fields["params"],
      let worker = fields["worker"].flatMap({ Int32($0) }),
      let workerStart = fields["worker-start"].flatMap({ UInt64($0) }),
      let since = fields["since"].flatMap({ Int64($0) }), let files = DiskRecord.files(fields)
    else { return nil }
    self.init(
      params: params, readOnly: fields["readonly"] == "1", vdev: fields["vdev"],
      files: files, worker: worker, workerStart: workerStart, device: nil, since: since,
      pending: fields["pending"], link: fields["link"])
    isComplete = fields["settled"] == "1"
    isHeld = fields["held"] == "1"
    let words = fields["users"]?.split(separator: " ") ?? []
    users = words.compactMap { VBD($0) }
    guard users.count == words.count else { return nil }
    identities = DiskIdentities(
      store: fields["store-file"].flatMap { FileIdentity($0) },
      base: fields["base-file"].flatMap { FileIdentity($0) },
      log: fields["log-file"].flatMap { FileIdentity($0) })
    if let index = fields["device"].flatMap({ UInt32($0) }), let path = fields["device-path"],
      let major = fields["device-major"].flatMap({ UInt32($0) }),
      let minor = fields["device-minor"].flatMap({ UInt32($0) })
    {
      // A record without it is of a daemon that knew nbd only.
      guard let kind = DeviceKind(rawValue: fields["device-kind"] ?? "nbd") else { return nil }
      device = DeviceNode(kind: kind, index: index, path: path, major: major, minor: minor)
    }
  }

  init(
    params: String, readOnly: Bool, vdev: String?, files: [AllowedFile], worker: Int32,
    workerStart: UInt64, device: DeviceNode?, since: Int64, pending: String? = nil,
    link: String? = nil
  ) {
    self.params = params
    self.readOnly = readOnly
    self.vdev = vdev
    self.files = files
    self.worker = worker
    self.workerStart = workerStart
    self.device = device
    self.since = since
    self.pending = pending
    self.link = link
  }

  static func files(_ fields: [String: String]) -> [AllowedFile]? {
    var files: [AllowedFile] = []
    for index in 0..<fields.count {
      guard let text = fields["file-" + String(index)] else { break }
      guard let file = file(text) else { return nil }
      files.append(file)
    }
    return files
  }

  private static func file(_ text: String) -> AllowedFile? {
    let parts: [String] = text.split(separator: " ").compactMap { decode($0) }
    // A record without it is of a daemon that did not remember which file it was.
    guard parts.count == 4 || parts.count == 5 else { return nil }
    let need = FileNeed(role: parts[0], path: parts[2], writable: parts[1] == "1")
    return AllowedFile(
      need: need, path: parts[3],
      identity: parts.count == 5 ? FileIdentity(parts[4]) : nil)
  }

  private static func decode(_ text: Substring) -> String? {
    do { return try PercentCode.decode(text) } catch { return nil }
  }
}

/// The directory of one disk under the run directory.
struct DiskDirectory: Sendable {
  let path: String
  var link: String { path + "/link" }
  /// The log of a daemon that kept it here.
  var pending: String { path + "/pending" }
  private var record: String { path + "/disk" }

  init(_ configuration: Configuration, _ id: DiskID) {
    self.init(path: "\(configuration.disksDirectory)/\(id)")
  }

  init(path: String) { self.path = path }

  /// The disks that have a directory.
  static func all(_ configuration: Configuration) throws(IOError) -> [DiskID] {
    try named(in: configuration.disksDirectory)
  }

  /// The disks that something in a folder is named after.
  static func named(in path: String) throws(IOError) -> [DiskID] {
    try Folder.names(path).compactMap { DiskID($0) }.sorted()
  }

  /// Makes it, empty but for what an earlier life of the disk left there.
  func make() throws(IOError) {
    guard mkdir(path, 0o700) == 0 || errno == EEXIST else { throw IOError.last("make", path) }
  }

  /// Removes the socket of an earlier worker.
  func removeLink() throws(IOError) {
    guard unlink(link) == 0 || errno == ENOENT else { throw IOError.last("remove", link) }
  }

  /// Reads the state file; nil when there is none that makes sense.
  func load() throws(IOError) -> DiskRecord? {
    do throws(IOError) {
      return DiskRecord(try TextFile.read(record))
    } catch {
      if error.code == ENOENT || error.code == EILSEQ { return nil }
      throw error
    }
  }

  /// Replaces the state file.
  func save(_ new: DiskRecord) throws(IOError) { try TextFile.replace(record, with: new.text) }

  /// Removes everything.
  func remove() throws(IOError) {
    for file in [link, pending, record, record + ".new"] {
      guard unlink(file) == 0 || errno == ENOENT else { throw IOError.last("remove", file) }
    }
    guard rmdir(path) == 0 || errno == ENOENT else { throw IOError.last("remove", path) }
  }
}
