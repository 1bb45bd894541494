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
  private let identifier: String
  private let log: Log
  private let readOnly: Bool
  private var index: UInt32?

  /// Attaches the disk, turning its loop until the kernel has taken it.
  init(_ disk: Disk, name: String, _ log: Log) throws(WorkerError) {
    path = Self.folder + "/" + name
    identifier = "cowd:" + name
    self.log = log
    readOnly = disk.image.readOnly
    try Self.check(name)
    guard try system({ () throws(IOError) in try NBDDevice.isAvailable() }) else {
      throw WorkerError(
        "io",
        "the kernel has no nbd driver: run 'modprobe nbd', or serve a socket with --nbd unix:PATH")
    }
    try Self.checkFree(path, identifier)
    ByMapper.harden(log)
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

  /// A link that a killed worker has left may go, and so may the device behind it if it is
  /// still that worker's.
  private static func checkFree(_ path: String, _ identifier: String) throws(WorkerError) {
    var status = stat()
    guard lstat(path, &status) == 0 else { return }
    guard let index = try linked(path) else {
      throw WorkerError("in-use", "\(path) exists and is none of ours: choose another name")
    }
    let connected = try system { () throws(IOError) in try NBDDevice.status()[index] ?? false }
    if connected, attribute("backend", of: index) == identifier {
      let owner = attribute("pid", of: index) ?? ""
      guard owner.isEmpty || access("/proc/" + owner, F_OK) != 0 else {
        throw WorkerError("in-use", "\(path) is in use: end its worker, or choose another name")
      }
      try system { () throws(IOError) in try NBDDevice.disconnect(index) }
    }
    guard unlink(path) == 0 else { throw WorkerError(IOError.last("replace", path)) }
  }

  /// What the driver tells of a device: "backend" its identifier, "pid" who connected it.
  private static func attribute(_ name: String, of index: UInt32) -> String? {
    var buffer = [UInt8](repeating: 0, count: 256)
    do throws(IOError) {
      let path = "/sys/block/nbd\(index)/\(name)"
      let file = try Descriptor(path: path, flags: O_RDONLY)
      let count = read(file.raw, &buffer, buffer.count)
      guard count > 0 else { return nil }
      return String(decoding: buffer[..<count].prefix { $0 != 0x0a }, as: UTF8.self)
    } catch {
      // Older drivers do not tell, and a device that is not connected has neither.
      return nil
    }
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

  private func connect(_ disk: Disk) throws(WorkerError) {
    let other = try system { () throws(IOError) in try attachPair(disk) }
    let configuration = NBDConfiguration(
      size: disk.size, flags: NBDExport.transmissionFlags(readOnly: readOnly),
      timeout: 30, deadConnectionTimeout: 10, identifier: identifier)
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

  /// Gives the disk one end of a new socket; the other is the kernel's.
  private func attachPair(_ disk: Disk) throws(IOError) -> PassedDescriptor {
    let pair = try UnixSocket.pair(.stream)
    disk.attach(pair.first)
    return PassedDescriptor(pair.second)
  }

  /// The kernel gives a socket up when a request takes too long: it gets another. When it
  /// has said that it is done with the device, that is the end.
  func socketEnded(_ end: NBDEnd, _ disk: Disk, over: @escaping () -> Void) {
    guard end != .disconnected, let index else { return over() }
    log(.warning, "the kernel has given its socket up and gets another", ["how": "\(end)"])
    let other: PassedDescriptor
    do throws(IOError) {
      other = try attachPair(disk)
    } catch {
      log(.error, "cannot go on", ["error": "\(error)"])
      return over()
    }
    let identifier = identifier
    disk.pool.run(
      {
        guard let socket = other.take() else { return nil }
        return Self.reconnect(index, socket.raw, identifier)
      },
      then: { [log] failure in
        guard let failure else { return }
        log(.error, "the device is lost", ["error": "\(failure)"])
        over()
      })
  }

  private static func reconnect(
    _ index: UInt32, _ socket: Int32, _ identifier: String
  ) -> IOError? {
    // The kernel may take a moment to notice that the old socket is dead.
    for attempt in 0... {
      do throws(IOError) {
        try NBDDevice.reconfigure(index, socket: socket, identifier: identifier)
        return nil
      } catch {
        guard error.code == ENOSPC, attempt < 200 else { return error }
        usleep(10_000)
      }
    }
    return nil
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
