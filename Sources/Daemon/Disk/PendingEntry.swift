// SPDX-License-Identifier: Apache-2.0
// The pending log of one store, as the daemon keeps it: the file that its workers record
// uncommitted placements in, and the text beside it that says whose it is. Both outlive the
// disk for as long as the log holds something that is not in the store.
//
// Invariant: a log that holds something is removed only by order of the admin.

internal import BlockIO
import Glibc
internal import SystemIO
internal import WorkerLink

/// What is remembered of the disk that a pending log belongs to.
struct PendingInfo: Sendable, Equatable {
  /// Path of the store.
  var store: String
  /// Params of the disk.
  var params: String
  var disk: DiskID
  /// The disk's name in the guest; nil for a named disk.
  var vdev: String?
  /// The domain's name, if it was known.
  var domainName: String?
  /// The files that the images named and were allowed.
  var files: [AllowedFile] = []
  /// Path of the device that holds placements in the kernel; nil with nbd.
  var device: String?
  /// Keys of the other files that the disk writes to.
  var others: [String] = []
  /// Why the log is kept although no disk uses it; nil while one does.
  var why: String?
  /// Unix time since which that is so.
  var since: Int64

  var text: String {
    var fields = [
      "store=" + PercentCode.encode(store), "params=" + PercentCode.encode(params),
      "disk=\(disk)", "since=\(since)",
    ]
    if let vdev { fields.append("vdev=" + PercentCode.encode(vdev)) }
    if let domainName { fields.append("domain-name=" + PercentCode.encode(domainName)) }
    if let device { fields.append("device=" + PercentCode.encode(device)) }
    if let why { fields.append("why=" + PercentCode.encode(why)) }
    if !others.isEmpty { fields.append("others=" + others.joined(separator: "%20")) }
    return (fields + DiskRecord.lines(files)).map { $0 + "\n" }.joined()
  }

  /// Reads the text beside a log; nil when it is not one.
  init?(_ text: String) {
    guard let fields = DiskRecord.fields(text), let store = fields["store"],
      let params = fields["params"], let disk = fields["disk"].flatMap({ DiskID($0) }),
      let since = fields["since"].flatMap({ Int64($0) }),
      let files = DiskRecord.files(fields)
    else { return nil }
    self.init(
      store: store, params: params, disk: disk, vdev: fields["vdev"],
      domainName: fields["domain-name"],
      files: files, device: fields["device"], why: fields["why"], since: since)
    others = (fields["others"] ?? "").split(separator: " ").map { String($0) }
  }

  init(
    store: String, params: String, disk: DiskID, vdev: String?, domainName: String? = nil,
    files: [AllowedFile] = [], device: String? = nil, why: String? = nil, since: Int64
  ) {
    self.store = store
    self.params = params
    self.disk = disk
    self.vdev = vdev
    self.domainName = domainName
    self.files = files
    self.device = device
    self.why = why
    self.since = since
  }
}

/// A store's pending log by its key. All calls block.
struct PendingEntry: Sendable, Hashable {
  let registry: PendingRegistry
  let key: String

  init(_ registry: PendingRegistry, _ key: String) {
    self.registry = registry
    self.key = key
  }

  /// The log of an open store.
  init(_ registry: PendingRegistry, of store: OpenImage) throws(IOError) {
    self.init(registry, try PendingRegistry.key(of: store.file))
  }

  var path: String { registry.log(key) }

  /// Makes the folder. It may be searched by everybody, so that tools can ask for a log by its
  /// key, and listed by root only.
  static func prepare(_ registry: PendingRegistry) throws(IOError) {
    let path = registry.directory
    guard mkdir(path, 0o711) == 0 || errno == EEXIST else { throw IOError.last("make", path) }
    guard chmod(path, 0o711) == 0 else { throw IOError.last("set the mode of", path) }
  }

  /// Every log.
  static func all(_ registry: PendingRegistry) throws(IOError) -> [PendingEntry] {
    var found: Set<String> = []
    for name in try Folder.names(registry.directory) {
      let parts = name.split(separator: ".", omittingEmptySubsequences: false)
      guard parts.count == 1 || parts.last == "info" else { continue }
      let key = parts.first.map { String($0) } ?? ""
      if key.hasPrefix("f-") || key.hasPrefix("b-") { found.insert(key) }
    }
    return found.sorted().map { PendingEntry(registry, $0) }
  }

  /// Opens the log, making an empty one if there is none. An empty one gets the space here that its
  /// worker needs to begin it: a file system that is full keeps no worker from starting.
  func open() throws(IOError) -> FileStore {
    let descriptor = try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600)
    let log = try FileStore(descriptor, name: path)
    guard log.size < PendingSummary.firstSize else { return log }
    try RunReserve.writing(path) { () throws(IOError) in
      try log.allocate(at: 0, count: PendingSummary.firstSize)
    }
    return log
  }

  /// What the log holds; nothing when there is none.
  func summary() throws(IOError) -> PendingSummary {
    do throws(IOError) {
      return try PendingSummary(FileStore(path: path, writable: false))
    } catch {
      if error.code == ENOENT { return .nothing }
      throw error
    }
  }

  /// The text beside it; nil when there is none that makes sense.
  func info() throws(IOError) -> PendingInfo? {
    do throws(IOError) {
      return PendingInfo(try TextFile.read(registry.info(key)))
    } catch {
      if error.code == ENOENT || error.code == EILSEQ { return nil }
      throw error
    }
  }

  /// Replaces the text beside it, and marks the other files that the disk writes to.
  func save(_ info: PendingInfo) throws(IOError) {
    try TextFile.replace(registry.info(key), with: info.text)
    for other in info.others { try TextFile.replace(registry.mark(other), with: key + "\n") }
  }

  /// Takes over the log of a daemon that kept it with the disk.
  func takeOver(_ old: String) throws(IOError) {
    guard access(path, F_OK) != 0 else { return }
    guard rename(old, path) == 0 || errno == ENOENT else { throw IOError.last("move", old) }
  }

  /// Sees to it that a log that is open here is the one of this name, which it may have left when
  /// the run directory was changed. Throws ESTALE when it has no name any more.
  func takeOver(_ open: FileStore) throws(IOError) {
    var (own, named) = (stat(), stat())
    guard fstat(open.raw, &own) == 0 else { throw IOError.last("examine", path) }
    if stat(path, &named) == 0 {
      guard FileIdentity(own) == FileIdentity(named) else {
        throw IOError(ESTALE, "take over", path)
      }
      return
    }
    guard let old = FileUsers.link("/proc/self/fd/\(open.raw)"), old.hasPrefix("/"),
      own.st_nlink > 0
    else { throw IOError(ESTALE, "take over", path) }
    try takeOver(old)
  }

  /// Writes a log that has lost its name anew.
  func rescue(_ lost: FileStore) throws(IOError) {
    guard access(path, F_OK) != 0, lost.size > 0 else { return }
    let new = path + ".new"
    let descriptor = try Descriptor(path: new, flags: O_RDWR | O_CREAT | O_TRUNC, mode: 0o600)
    let copy = try FileStore(descriptor, name: new)
    let size = min(lost.size, PendingSummary.largestSize)
    try RunReserve.writing(new) { () throws(IOError) in try copy.allocate(at: 0, count: size) }
    var offset: UInt64 = 0
    while offset < size {
      let count = Int(min(1 << 20, size - offset))
      try copy.write(try lost.read(at: offset, count: count), at: offset)
      offset += UInt64(count)
    }
    guard rename(new, path) == 0 else { throw IOError.last("name", path) }
  }

  /// Removes the log, whatever it holds, the marks of other files, and the text.
  func remove() throws(IOError) {
    for other in try info()?.others ?? [] {
      guard unlink(registry.mark(other)) == 0 || errno == ENOENT else {
        throw IOError.last("remove", registry.mark(other))
      }
    }
    for file in [path, path + ".new", registry.info(key), registry.info(key) + ".new"] {
      guard unlink(file) == 0 || errno == ENOENT else { throw IOError.last("remove", file) }
    }
  }
}

/// A log that no disk uses and that holds something.
struct KeptLog: Sendable {
  let entry: PendingEntry
  let info: PendingInfo?
  let summary: PendingSummary

  /// The path of the store, or the key of one that nobody knows the path of.
  var store: String { info?.store ?? entry.key }

  /// The sentence of status.
  var sentence: String {
    let why = info?.why.map { " (\($0))" } ?? ""
    return "store \(store) has writes that are not in it yet: \(summary.words)\(why): run"
      + " 'dmu-xen recover \(store)', or attach the disk again"
  }
}
