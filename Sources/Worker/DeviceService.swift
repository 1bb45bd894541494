// A disk as a device of the kernel's nbd driver, with a link to it in /dev/mapper, where the
// admins of 2006 look for it.

import Glibc
import Posix
import Synchronization
import Target

/// A disk as /dev/mapper/NAME.
final class DeviceService: DiskService {
  private static let folder = "/dev/mapper"

  private let path: String
  private let log: Log
  private let readOnly: Bool
  private var index: UInt32?

  /// Attaches the disk, turning its loop until the kernel has taken it.
  init(_ disk: Disk, name: String, _ log: Log) throws(WorkerError) {
    path = Self.folder + "/" + name
    self.log = log
    readOnly = disk.image.readOnly
    try Self.check(name)
    try Self.checkFree(path)
    guard try system({ () throws(IOError) in try NBDDevice.isAvailable() }) else {
      throw WorkerError(
        "io",
        "the kernel has no nbd driver: run 'modprobe nbd', or serve a socket with --nbd unix:PATH")
    }
    Self.prepare(log)
    try connect(disk)
    do throws(WorkerError) {
      try link()
    } catch {
      try withdraw(disk)
      throw error
    }
  }

  var greeting: String { path }

  /// A name that is one component of a path, and not one that device-mapper keeps.
  private static func check(_ name: String) throws(WorkerError) {
    guard !name.isEmpty, name.utf8.count < 128, !name.contains("/"), !name.hasPrefix("."),
      name != "control"
    else { throw WorkerError("usage", "'\(name)' cannot be the name of a device") }
  }

  /// A link whose device is not served any more, left by a worker that was killed, may go.
  private static func checkFree(_ path: String) throws(WorkerError) {
    var status = stat()
    guard lstat(path, &status) == 0 else { return }
    guard let index = try linked(path) else {
      throw WorkerError("in-use", "\(path) exists and is none of ours: choose another name")
    }
    let connected = try system { () throws(IOError) in try NBDDevice.status()[index] ?? false }
    guard !connected else {
      throw WorkerError("in-use", "\(path) is in use: end its worker, or choose another name")
    }
    guard unlink(path) == 0 else { throw WorkerError(IOError.last("replace", path)) }
  }

  /// The number of the nbd device that a link leads to.
  private static func linked(_ path: String) throws(WorkerError) -> UInt32? {
    var buffer = [CChar](repeating: 0, count: 256)
    let count = readlink(path, &buffer, buffer.count)
    if count < 0 {
      guard errno == EINVAL else { throw WorkerError(IOError.last("examine", path)) }
      return nil
    }
    let target = String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
    guard target.hasPrefix("/dev/nbd") else { return nil }
    return UInt32(target.dropFirst("/dev/nbd".count))
  }

  /// The kernel may write its memory out through this process: it must not wait for memory.
  private static func prepare(_ log: Log) {
    do throws(IOError) {
      try Hardening.lockMemory()
      try Hardening.becomeFlusher()
    } catch { log(.warning, "going on without locked memory", ["error": "\(error)"]) }
  }

  private func connect(_ disk: Disk) throws(WorkerError) {
    let other: PassedDescriptor
    do throws(IOError) {
      let pair = try UnixSocket.pair(.stream)
      other = PassedDescriptor(pair.second)
      disk.attach(pair.first)
    } catch { throw WorkerError(error) }
    let configuration = NBDConfiguration(
      size: disk.size, flags: NBDExport.transmissionFlags(readOnly: readOnly),
      deadConnectionTimeout: 0)
    let result = SharedNumber()
    let failure = try elsewhere(disk) { () throws(IOError) in
      guard let socket = other.take() else { return }
      let number = try NBDDevice.connect(configuration, socket: socket.raw)
      result.value.store(number, ordering: .relaxed)
    }
    guard let failure else {
      index = result.value.load(ordering: .relaxed)
      return
    }
    guard failure.code == EPERM || failure.code == EACCES else { throw WorkerError(failure) }
    throw WorkerError(
      "io", "attaching a device needs root: become root, or serve a socket with --nbd unix:PATH")
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

  /// Writes out what the kernel holds for the device, disconnects it, removes the link.
  func withdraw(_ disk: Disk) throws(WorkerError) {
    guard let index else { return }
    if (try Self.linked(path)) == index, unlink(path) != 0 {
      log(.warning, "the link is left behind", ["error": "\(IOError.last("remove", path))"])
    }
    guard disk.isAttached else { return }
    let readOnly = readOnly
    let failure = try elsewhere(disk) { () throws(IOError) in
      let node = NBDDevice.path(index)
      let device = try Descriptor(path: node, flags: O_RDONLY)
      if !readOnly, fsync(device.raw) != 0 { throw IOError.last("write out", node) }
      try NBDDevice.disconnect(index)
    }
    if let failure { throw WorkerError(failure) }
    while disk.isAttached { try system { () throws(IOError) in try disk.turn(timeout: 100) } }
  }

  /// Does something that may wait for this very disk on another thread, serving meanwhile.
  private func elsewhere(
    _ disk: Disk, _ work: @escaping @Sendable () throws(IOError) -> Void
  ) throws(WorkerError) -> IOError? {
    var result: IOError??
    disk.pool.run(
      {
        do throws(IOError) {
          try work()
          return nil
        } catch { return error }
      },
      then: { result = .some($0) })
    while result == nil { try system { () throws(IOError) in try disk.turn() } }
    return result ?? nil
  }
}

/// A number that one thread leaves for another.
private final class SharedNumber: Sendable {
  let value = Atomic<UInt32>(0)
}
