// SPDX-License-Identifier: Apache-2.0
// A host in small: the real xenstored, a toolstack that is played, the daemon as a
// process of its own, real workers, and devices that are only the kernel's ends of their
// sockets (StandInAttacher).

import Daemon
import Fakes
import Glibc
import Synchronization
import SystemIO
import Testing
import TestSupport

/// Where the programs are that this test run was built with.
enum Programs {
  static let directory: String = {
    if let given = getenv("DMU_BIN_DIR") { return String(cString: given) }
    var buffer = [CChar](repeating: 0, count: 4096)
    let count = readlink("/proc/self/exe", &buffer, buffer.count)
    let path = String(
      decoding: buffer[..<max(count, 0)].map { UInt8(bitPattern: $0) }, as: UTF8.self)
    // Run by the package manager, the tests are a program beside the others, or loaded by a
    // helper that says in its arguments where they are.
    for candidate in [path] + CommandLine.arguments {
      guard let slash = candidate.lastIndex(of: "/") else { continue }
      let directory = String(candidate[..<slash])
      if access(directory + "/cowd", X_OK) == 0 { return directory }
    }
    return ""
  }()

  static var arePresent: Bool {
    ["cowd", "dmu-xend", "dmu-xen", "dscow_tool", "dmu-img"].allSatisfy {
      access(directory + "/" + $0, X_OK) == 0
    }
  }
}

/// Something did not come about in time.
struct TooLate: Error, CustomStringConvertible {
  let description: String
}

/// Waits until a condition holds.
func eventually(
  _ what: String, within limit: Duration = .seconds(20), _ condition: () async throws -> Bool
) async throws {
  let end = ContinuousClock.now + limit
  while try await !condition() {
    guard ContinuousClock.now < end else { throw TooLate(description: "not in time: \(what)") }
    try await Task.sleep(for: .milliseconds(10))
  }
}

/// Whether a process runs. One that has ended and was not collected yet does not: an
/// orphan is collected by whoever has the time.
func isAlive(_ pid: Int32) -> Bool {
  guard kill(pid, 0) == 0 else { return false }
  do {
    let text = try SmallFile.read("/proc/\(pid)/stat")
    return text.split(separator: ")").last?.dropFirst().first != "Z"
  } catch { return false }
}

/// One host.
final class World: Sendable {
  let folder: TemporaryFolder
  let xenstored: XenStored
  let toolstack: FakeToolstack
  private let running = Mutex<ProcessHandle?>(nil)

  /// The daemon of this world has a device-mapper, which is played, and so are its workers.
  let hasMapper: Bool
  /// The driver domain in which the daemon runs; nil: it runs in domain 0.
  let driver: Int?

  init(_ settings: [String: String] = [:], hasMapper: Bool = false, driver: Int? = nil) throws {
    self.hasMapper = hasMapper
    self.driver = driver
    folder = try TemporaryFolder()
    xenstored = try XenStored.start(domain: driver)
    toolstack = try FakeToolstack(xenstored)
    if let driver { try toolstack.createDomain(driver, name: "driver") }
    try useWorkers()
    try #require(mkdir(mapper, 0o700) == 0)
    try configure(settings)
    try file("base", [UInt8](repeating: 0xB5, count: 1 << 20))
    // Workers run as nobody: they get descriptors, but the sockets' directory is root's.
    try #require(chmod(folder.path, 0o700) == 0)
  }

  /// Has workers started from now on in this way: "exec" before the program and its arguments, or
  /// another shell command in their place. Their log is put aside.
  func useWorkers(_ prefix: String = "exec", instead: String? = nil) throws {
    let program = "\(Programs.directory)/\(hasMapper ? "played-worker" : "cowd")"
    let command = instead ?? "\(prefix) '\(program)' \"$@\" 2>>'\(workerLog)'"
    let new = try file("cowd.new", Array("#!/bin/sh\n\(command)\n".utf8))
    try #require(chmod(new, 0o755) == 0)
    try #require(rename(new, folder.file("cowd")) == 0)
  }

  /// How programs of the domain in which the daemon runs find xenstored.
  var xenstorePath: String { driver == nil ? xenstored.socketPath : xenstored.domainPath }
  var configurationPath: String { folder.file("dmu-xen.toml") }
  var workerLog: String { folder.file("workers.log") }
  /// Where the stand-in of the device-mapper has its devices.
  var mapper: String { folder.file("mapper") }
  var runDirectory: String { folder.file("run") }
  var socket: String { runDirectory + "/control.sock" }

  /// Writes the configuration file; keys as "table.key".
  func configure(_ settings: [String: String]) throws {
    var all = [
      "daemon.run-directory": "\"\(runDirectory)\"", "daemon.log-level": "\"info\"",
      "worker.program": "\"\(folder.file("cowd"))\"",
      "store.create-in": "[\"\(folder.path)\"]",
    ]
    all.merge(settings) { $1 }
    let text = all.sorted { $0.key < $1.key }.map { "\($0) = \($1)\n" }.joined()
    try file("dmu-xen.toml", Array(text.utf8))
  }

  @discardableResult
  func file(_ name: String, _ bytes: [UInt8]) throws -> String {
    let path = folder.file(name)
    let file = try Descriptor(path: path, flags: O_WRONLY | O_CREAT | O_TRUNC, mode: 0o644)
    try #require(write(file.raw, bytes, bytes.count) == bytes.count)
    return path
  }

  /// A spec of a store of that name on the common base.
  func spec(_ store: String, base: String? = "base", options: String = "") -> String {
    "dmu:dscow\(options):\(folder.file(store))" + (base.map { ":\(folder.file($0))" } ?? "")
  }

  /// Makes a store on the common base, as an admin does.
  func makeStore(_ name: String) async throws {
    try await run("dscow_tool", "-c", folder.file(name), folder.file("base"))
  }

  /// Runs one of the programs to its end; its exit status has to be this.
  func run(_ program: String, _ arguments: String..., expecting: Int32 = 0) async throws {
    let path = program.contains("/") ? program : Programs.directory + "/" + program
    let null = try Descriptor(path: "/dev/null", flags: O_RDWR)
    var command = Command(
      path, arguments,
      environment: ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DMU_XEN_RUN=\(runDirectory)"])
    command.descriptors = [0: null.raw, 1: null.raw, 2: null.raw]
    let process = try command.start()
    let status = try await blocking { try process.wait(milliseconds: 60_000) }
    #expect(status == .exited(expecting), "\(program) \(arguments)")
  }

  // MARK: - The daemon, a process

  /// `log`: where it logs to, instead of a file in the folder.
  func startDaemon(
    _ options: [String] = [], environment: [String] = [], log other: Int32? = nil
  ) async throws {
    var command = Command(
      Programs.directory + "/dmu-xend",
      ["--config", configurationPath, "--stand-in-devices"] + options
        + (hasMapper ? ["--stand-in-mapper", mapper] : []),
      environment: ["XENSTORED_PATH=\(xenstorePath)", "PATH=/usr/bin:/bin"]
        + environment)
    let log = try Descriptor(
      path: folder.file("daemon.log"), flags: O_WRONLY | O_CREAT | O_APPEND, mode: 0o600)
    // Not ours: what a daemon holds open, whoever waits for the end of a test run waits for.
    let null = try Descriptor(path: "/dev/null", flags: O_RDWR)
    command.descriptors = [0: null.raw, 1: null.raw, 2: other ?? log.raw]
    let process = try command.start()
    running.withLock { $0 = process }
    try await eventually("the daemon answers") { try await version() != nil }
  }

  var daemonProcess: ProcessHandle? { running.withLock { $0 } }

  /// As `systemctl stop`, or as a crash.
  func stopDaemon(_ signal: Int32 = SIGTERM) async throws {
    let process = running.withLock { running in
      defer { running = nil }
      return running
    }
    guard let process else { return }
    try process.send(signal)
    let status = try await blocking { try process.wait(milliseconds: 20_000) }
    #expect(status == (signal == SIGTERM ? .exited(0) : .signalled(signal)))
  }

  private func version() async throws -> String? {
    do {
      return try await ask(ControlRequest(.version)).version
    } catch let error as DiskFailure {
      if error.code == .daemon { return nil }
      throw error
    }
  }

  /// Asks the daemon on a thread that may block.
  func ask(_ request: ControlRequest) async throws -> ControlReply {
    let socket = socket
    return try await blocking {
      try ControlClient(path: socket).ask(request, within: .seconds(40))
    }
  }

  /// Runs one of dmu-xen's commands.
  func command(
    _ body: @escaping @Sendable (ClientCommands) -> CommandStatus
  ) async throws -> CommandStatus {
    let client = ClientCommands(configurationPath: configurationPath, socket: nil)
    return try await blocking { body(client) }
  }

  /// The kernel's end of a device.
  func wire(_ index: UInt32 = 0) throws -> NBDWire {
    NBDWire(try StandInDoor.socket(of: index, runDirectory: runDirectory))
  }

  /// The kernel's end of a disk's device.
  func wire(of disk: FakeDisk) async throws -> NBDWire {
    let path = try #require(try await status(disk.domain).first { $0.worker != nil }?.device)
    return try wire(try #require(UInt32(path.replacing("/stand-in/nbd", with: ""))))
  }

  /// Names of the pending logs that are kept, of disks in use too.
  func logs() -> [String] {
    World.names(runDirectory + "/pending").filter { !$0.contains(".") }
  }

  /// How many stores have something to recover, as xenstore says.
  func announcedPending() throws -> String? {
    try toolstack.read("/local/domain/0/dmu-xen/pending")
  }

  /// Waits until a disk holds nothing any more.
  func isGone(_ disk: FakeDisk, within limit: Duration = .seconds(30)) async throws {
    try await eventually("\(disk.domain) is gone", within: limit) {
      !directories().contains("\(disk.domain)-\(disk.device)")
    }
  }

  var devices: Int {
    get throws { try StandInDoor.counts(runDirectory: runDirectory).devices }
  }

  var reattachments: Int {
    get throws { try StandInDoor.counts(runDirectory: runDirectory).reattachments }
  }

  // MARK: - Disks

  /// A disk attached by the toolstack, up to the point where the script would be run.
  @discardableResult
  func attach(
    _ domain: Int, _ params: String, name: String = "xvda", writable: Bool = true
  ) throws -> FakeDisk {
    var disk = FakeDisk(domain: domain, name: name, params: params, isWritable: writable)
    disk.backendDomain = driver ?? 0
    if try toolstack.read("/local/domain/\(domain)/domid") == nil {
      try toolstack.createDomain(domain, name: "guest\(domain)")
    }
    try toolstack.attach(disk)
    try toolstack.backendWaits(disk)
    return disk
  }

  /// The whole way out of a disk.
  func detach(_ disk: FakeDisk) throws {
    try toolstack.beginDetach(disk)
    try toolstack.backendCloses(disk)
    try toolstack.finishDetach(disk)
  }

  /// What the block script asks, of a domain that boots unless something else is said.
  @discardableResult
  func add(_ disk: FakeDisk, boots: Bool = true) async throws -> ControlReply.Device {
    let reply = try await ask(
      ControlRequest(.attach, path: disk.relativeBackend, boots: boots))
    return try #require(reply.device)
  }

  /// The sentence with which the script's question fails.
  func addFailure(_ disk: FakeDisk, boots: Bool = true) async throws -> String {
    do {
      return "attached \(try await add(disk, boots: boots))"
    } catch let error as DiskFailure { return error.sentence }
  }

  func status(_ domain: Int? = nil) async throws -> [DiskStatus] {
    try await ask(ControlRequest(.status, domain: domain.map { String($0) })).disks ?? []
  }

  /// Whether no disk is left but in the memory of attaches that failed.
  func isQuiet() async throws -> Bool {
    try await status().allSatisfy { $0.state == .failed && $0.note != nil }
  }

  func state(_ disk: FakeDisk) async throws -> PublicState? {
    try await status(disk.domain).first { $0.number == disk.device }?.state
  }

  func worker(_ disk: FakeDisk) async throws -> Int32 {
    try #require(try await status(disk.domain).first { $0.number == disk.device }?.worker)
  }

  func node(_ disk: FakeDisk, _ name: String) throws -> String? {
    try toolstack.read("\(disk.backend)/dmu/\(name)")
  }

  /// Names in the directory of disks.
  func directories() -> [String] { World.names(runDirectory + "/disks") }

  static func names(_ path: String) -> [String] {
    guard let folder = opendir(path) else { return [] }
    defer { closedir(folder) }
    var found: [String] = []
    while let entry = readdir(folder) {
      let name = withUnsafeBytes(of: entry.pointee.d_name) {
        String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
      }
      if name != ".", name != ".." { found.append(name) }
    }
    return found.sorted()
  }

  /// Processes that are workers of this world: their log is in its folder.
  func workers(_ programs: [String] = ["cowd", "played-worker"]) async throws -> [Int32] {
    let log = workerLog
    return try await blocking {
      World.names("/proc").compactMap { Int32($0) }.filter { pid in
        programs.contains { World.link("/proc/\(pid)/exe").hasSuffix("/" + $0) }
          && World.link("/proc/\(pid)/fd/2") == log
      }
    }
  }

  /// What a symbolic link names; empty when it cannot be read.
  private static func link(_ path: String) -> String {
    var buffer = [CChar](repeating: 0, count: 4096)
    let count = readlink(path, &buffer, buffer.count)
    return String(decoding: buffer[..<max(count, 0)].map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  /// Ends everything, so that no test leaves a worker behind.
  func end() async throws {
    try await stopDaemon()
    for pid in try await workers() + workers(["strace"]) { kill(pid, SIGKILL) }
    xenstored.stop()
  }

  /// The workers that the state files name.
  static func pids(_ disks: String) throws -> [Int32] {
    var found: [Int32] = []
    for name in names(disks) where name.contains("-") {
      guard let file = fopen("\(disks)/\(name)/disk", "r") else { continue }
      defer { fclose(file) }
      var buffer = [CChar](repeating: 0, count: 4096)
      while fgets(&buffer, Int32(buffer.count), file) != nil {
        let line = String(
          decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
        guard line.hasPrefix("worker="), let pid = Int32(line.dropFirst(7).dropLast()) else {
          continue
        }
        found.append(pid)
      }
    }
    return found
  }
}

/// Runs a test in a world and ends it, whatever the test throws.
func inWorld(
  _ settings: [String: String] = [:], daemon: Bool = true, hasMapper: Bool = false,
  driver: Int? = nil, _ body: (World) async throws -> Void
) async throws {
  let world = try World(settings, hasMapper: hasMapper, driver: driver)
  do {
    if daemon { try await world.startDaemon() }
    try await body(world)
  } catch {
    // What may explain it.
    print("daemon.log:\n\(try SmallFile.read(world.folder.file("daemon.log")).suffix(60_000))")
    let workers = try SmallFile.read(world.workerLog)
    print("workers.log:\n\(workers.suffix(2000))")
    print("state: \(World.names(world.runDirectory + "/disks")), \(try await world.workers())")
    try await world.end()
    throw error
  }
  try await world.end()
}
