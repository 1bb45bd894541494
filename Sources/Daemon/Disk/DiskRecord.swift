// The state file of a disk: what a restarted daemon has to know in order to take the disk
// over. It is text, one KEY=VALUE a line, values percent-encoded, replaced whole.
//
// It lies in the disk's directory together with `link`, the socket that the worker listens
// on, and `pending`, the memory file of uncommitted placements.

internal import Posix
import Glibc

/// What is remembered of a disk across a restart of the daemon.
struct DiskRecord: Sendable, Equatable {
  var params: String
  var readOnly: Bool
  var vdev: String
  /// The base that the image named, when the spec named none.
  var imageBase: String?
  var worker: Int32
  var workerStart: UInt64
  var device: DeviceNode?
  /// Unix time at which the disk became ready.
  var since: Int64

  var text: String {
    var fields = [
      "params=" + PercentCode.encode(params), "readonly=" + (readOnly ? "1" : "0"),
      "vdev=" + PercentCode.encode(vdev), "worker=\(worker)", "worker-start=\(workerStart)",
      "since=\(since)",
    ]
    if let imageBase { fields.append("image-base=" + PercentCode.encode(imageBase)) }
    if let device {
      fields += [
        "device=\(device.index)", "device-path=" + PercentCode.encode(device.path),
        "device-major=\(device.major)", "device-minor=\(device.minor)",
      ]
    }
    return fields.map { $0 + "\n" }.joined()
  }

  /// Reads the text of a state file; nil when it is not one.
  init?(_ text: String) {
    var fields: [String: String] = [:]
    for line in text.split(separator: "\n") {
      guard let equals = line.firstIndex(of: "=") else { return nil }
      guard let value = DiskRecord.decode(line[line.index(after: equals)...]) else { return nil }
      fields[String(line[..<equals])] = value
    }
    guard let params = fields["params"], let vdev = fields["vdev"],
      let worker = fields["worker"].flatMap({ Int32($0) }),
      let workerStart = fields["worker-start"].flatMap({ UInt64($0) }),
      let since = fields["since"].flatMap({ Int64($0) })
    else { return nil }
    self.init(
      params: params, readOnly: fields["readonly"] == "1", vdev: vdev,
      imageBase: fields["image-base"], worker: worker, workerStart: workerStart,
      device: nil, since: since)
    if let index = fields["device"].flatMap({ UInt32($0) }), let path = fields["device-path"],
      let major = fields["device-major"].flatMap({ UInt32($0) }),
      let minor = fields["device-minor"].flatMap({ UInt32($0) })
    {
      device = DeviceNode(index: index, path: path, major: major, minor: minor)
    }
  }

  init(
    params: String, readOnly: Bool, vdev: String, imageBase: String?, worker: Int32,
    workerStart: UInt64, device: DeviceNode?, since: Int64
  ) {
    self.params = params
    self.readOnly = readOnly
    self.vdev = vdev
    self.imageBase = imageBase
    self.worker = worker
    self.workerStart = workerStart
    self.device = device
    self.since = since
  }

  private static func decode(_ text: Substring) -> String? {
    do { return try PercentCode.decode(text) } catch { return nil }
  }
}

/// The directory of one disk under the run directory.
struct DiskDirectory: Sendable {
  let path: String
  var link: String { path + "/link" }
  var pending: String { path + "/pending" }
  private var record: String { path + "/disk" }

  init(_ configuration: Configuration, _ id: DiskID) {
    path = "\(configuration.disksDirectory)/\(id)"
  }

  /// The disks that have a directory.
  static func all(_ configuration: Configuration) throws(IOError) -> [DiskID] {
    guard let folder = opendir(configuration.disksDirectory) else {
      if errno == ENOENT { return [] }
      throw IOError.last("list", configuration.disksDirectory)
    }
    defer { closedir(folder) }
    var found: [DiskID] = []
    while let entry = readdir(folder) {
      let name = withUnsafeBytes(of: entry.pointee.d_name) {
        String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
      }
      if let id = DiskID(name) { found.append(id) }
    }
    return found.sorted()
  }

  /// Makes it, empty but for what an earlier life of the disk left there.
  func make() throws(IOError) {
    guard mkdir(path, 0o700) == 0 || errno == EEXIST else { throw IOError.last("make", path) }
  }

  /// The memory file of uncommitted placements: a new one, or the one that is there.
  func openPending(new: Bool) throws(IOError) -> FileStore {
    if new, unlink(pending) != 0, errno != ENOENT { throw IOError.last("remove", pending) }
    let descriptor = try Descriptor(path: pending, flags: O_RDWR | O_CREAT, mode: 0o600)
    return try FileStore(descriptor, name: pending)
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
