// A worker that a person started: it opens its store itself and serves it on a Unix socket,
// for which it needs no rights and no help of the kernel, or as a device of the kernel: of
// the device-mapper, or of the nbd driver. It stays in the foreground until SIGTERM or SIGINT.

import Glibc
import Posix
import Target
public import WorkerLink

/// What a person asked for.
public struct ByHandOptions: Sendable {
  /// Where the disk shall appear.
  public enum Service: Sendable, Equatable {
    /// At a Unix socket, by NBD.
    case socket(path: String)
    /// As a device of the kernel, with a link of this name in /dev/mapper.
    case device(name: String)
  }

  /// Name of the image format.
  public var format: String
  /// Path of the store.
  public var store: String
  /// Where the disk shall appear.
  public var service: Service
  /// Path of the base, instead of the one that the image names.
  public var base: String?
  /// Name of the base's format, whatever the image says of it.
  public var baseFormat: String?
  /// Whether the disk is only read.
  public var readOnly = false
  /// Whether a base that has changed is accepted.
  public var force = false
  /// By which way a device reaches the kernel.
  public var transport = Transport.auto
  /// Whether a write that finds no space fails, instead of waiting for some.
  public var failsWhenFull = false
  /// The folder of plugins; nil: the usual one.
  public var plugins: String?
  /// Where every fault and answer is written as a line; "-" is standard error.
  public var trace: String?
  /// A named pipe by which held writes are let go.
  public var hold: String?
  /// What is logged.
  public var level = Log.Level.warning

  /// Options from what is always needed.
  public init(format: String, store: String, service: Service) {
    self.format = format
    self.store = store
    self.service = service
  }
}

extension ByHandOptions {
  var policy: DiskPolicy {
    var policy = DiskPolicy()
    policy.space.waits = !failsWhenFull
    return policy
  }
}

/// A place where a disk appears, and from which it is taken again.
protocol DiskService: AnyObject {
  /// One line that says where the disk is.
  var greeting: String { get }
  /// The attached socket has ended. `over` is called when the disk has, with it.
  func socketEnded(_ end: NBDEnd, _ disk: Disk, over: @escaping () -> Void)
  /// Takes the disk away. Turns the loop if need be.
  func withdraw(_ disk: Disk) throws(WorkerError)
}

/// The life of a worker by hand.
public enum ByHand {
  /// Serves until a signal or, for a device, until somebody disconnects it. Returns when all
  /// that was written is durable. Throws when the disk cannot be served or committed.
  public static func run(_ options: ByHandOptions) throws(WorkerError) {
    let log = Log(level: options.level, journal: Log.underJournal)
    let signals = try system { () throws(IOError) in
      try SignalSource([SIGTERM, SIGINT, SIGHUP])
    }
    let loop = try system { () throws(IOError) in try EventLoop() }
    var stopping = false
    try system { () throws(IOError) in try loop.addStop(signals, log) { stopping = true } }
    let request = try self.request(options)
    if case .device(let device) = options.service, try ByMapper.isWay(options) {
      let mapper = ByMapper(
        options: options, request: request, format: try FormatName(named: options.format),
        name: device, loop: loop, log: log)
      if try mapper.run(isStopping: { stopping }) { return }
    }
    let disk = try Disk(
      try image(options, request), pending: nil, policy: options.policy, loop: loop, log: log,
      debugging: DiskDebugging(trace: options.trace, hold: options.hold))
    let service = try publish(disk, options, log)
    disk.detached = { [unowned disk] end in
      service.socketEnded(end, disk) { stopping = true }
    }
    say("\(options.store) (\(disk.size) bytes) is served: \(service.greeting)")
    while !stopping { try system { () throws(IOError) in try disk.turn() } }
    try service.withdraw(disk)
    let code = try system { () throws(IOError) in try disk.finish() }
    guard code == 0 else {
      throw WorkerError(IOError(code, "make everything durable in", options.store))
    }
  }

  private static func request(_ options: ByHandOptions) throws(WorkerError) -> ImageRequest {
    var request = ImageRequest()
    request.readOnly = options.readOnly
    request.force = options.force
    request.basePath = options.base
    if let format = options.baseFormat { request.baseFormat = try FormatName(named: format) }
    return request
  }

  private static func image(
    _ options: ByHandOptions, _ request: ImageRequest
  ) throws(WorkerError) -> OpenImage {
    guard let kind = FormatName.kind(options.format) else {
      return try Opening.image(
        plugin: options.format, in: options.plugins ?? PluginFolder.usual, store: options.store,
        request)
    }
    return try Opening.image(FormatName(kind), store: options.store, request)
  }

  private static func publish(
    _ disk: Disk, _ options: ByHandOptions, _ log: Log
  ) throws(WorkerError) -> any DiskService {
    switch options.service {
    case .socket(let path): try SocketService(disk, path: path, log)
    case .device(let name): try DeviceService(disk, name: name, log)
    }
  }

  /// Writes a line to standard output at once, for whoever waits for it.
  static func say(_ line: String) {
    let bytes = Array((ForeignText.shown(line, limit: 8192) + "\n").utf8)
    // Nobody may be listening; that is no reason not to serve.
    _ = Glibc.write(1, bytes, bytes.count)
  }
}

/// A disk at a Unix socket.
final class SocketService: DiskService {
  private let path: String
  private let log: Log
  private let device: UInt
  private let inode: UInt

  init(_ disk: Disk, path: String, _ log: Log) throws(WorkerError) {
    self.path = path
    self.log = log
    let listener: Descriptor
    do throws(IOError) {
      listener = try UnixSocket.listen(at: path, kind: .stream)
    } catch {
      guard error.code == EADDRINUSE else { throw WorkerError(error) }
      throw WorkerError(
        "in-use", "\(path) is in use: end the program that listens there, or choose another path")
    }
    var status = stat()
    guard lstat(path, &status) == 0 else { throw WorkerError(IOError.last("examine", path)) }
    device = UInt(status.st_dev)
    inode = UInt(status.st_ino)
    do throws(IOError) {
      try disk.listen(listener)
    } catch { throw WorkerError(error) }
  }

  var greeting: String { "nbdinfo '\(Self.uri(path))'" }

  /// An address as NBD clients take it. Source: the NBD URI specification.
  static func uri(_ path: String) -> String {
    var absolute = path
    if !path.hasPrefix("/"), let folder = getcwd(nil, 0) {
      absolute = String(cString: folder) + "/" + path
      free(folder)
    }
    let plain = Set("/-._~".utf8)
    let digits = Array("0123456789ABCDEF")
    var encoded = ""
    for byte in absolute.utf8 {
      let letter = (0x30...0x39).contains(byte) || (0x41...0x5a).contains(byte & 0xdf)
      if letter || plain.contains(byte) {
        encoded.unicodeScalars.append(Unicode.Scalar(byte))
      } else {
        encoded += "%\(digits[Int(byte >> 4)])\(digits[Int(byte & 15)])"
      }
    }
    return "nbd+unix:///?socket=" + encoded
  }

  /// Clients come and go.
  func socketEnded(_ end: NBDEnd, _ disk: Disk, over: @escaping () -> Void) {}

  /// Removes the socket file, unless somebody has put another in its place.
  func withdraw(_ disk: Disk) {
    var status = stat()
    guard lstat(path, &status) == 0, UInt(status.st_dev) == device, UInt(status.st_ino) == inode
    else { return }
    if unlink(path) != 0 {
      log(.warning, "the socket is left behind", ["error": "\(IOError.last("remove", path))"])
    }
  }
}
