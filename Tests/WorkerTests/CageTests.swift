// SPDX-License-Identifier: Apache-2.0
// The worker's cage: what it may not call ends it; every format and every order of the link works
// in it; what it costs.

import BlockIO
import Glibc
import SystemIO
import Testing
import TestSupport
import WorkerLink

@Suite("The worker's cage", .serialized) struct CageTests {
  private func trial(_ call: String) throws -> SystemIO.ExitStatus? {
    var command = Command(try program("cage-trial"), [call])
    // What a call is made on, where it is allowed.
    let null = try Descriptor(path: "/dev/null", flags: O_RDWR)
    command.descriptors = [0: null.raw]
    return try command.start().wait(milliseconds: 20_000)
  }

  @Test(arguments: ["none", "thread", "flags"]) func whatAWorkerNeedsIsAllowed(_ call: String)
    throws
  {
    #expect(try trial(call) == .exited(0))
  }

  @Test(arguments: [
    "socket", "socketpair", "connect", "bind", "setsockopt", "open", "openat", "openat2", "fork",
    "vfork", "clone", "execve", "kill", "ptrace", "process_vm_readv", "lock-process", "lock-file",
    "lock-wait", "flock", "lease", "ioctl-loop", "ioctl-freeze", "mount", "unshare", "setns",
    "setuid", "prlimit", "io_uring_setup", "bpf", "keyctl", "unlink", "memfd_create",
  ]) func whatNoWorkerNeedsEndsIt(_ call: String) throws {
    #expect(try trial(call) == .signalled(SIGSYS))
  }

  /// Whatever step of the way in fails, nothing is served: strace lets it fail.
  @Test(
    .enabled(if: access("/usr/bin/strace", X_OK) == 0 && geteuid() == 0),
    arguments: [
      "unshare", "mount", "pivot_root", "umount2", "setgroups", "setresgid", "setresuid", "prctl",
      "capset", "landlock_restrict_self", "seccomp",
    ]) func withoutItNothingIsServed(_ step: String) throws
  {
    let image = try TestImage(sectors: 64, blockSize: 4096)
    let daemon = try TestDaemon(image, injecting: "\(step):error=EPERM")
    var end = try daemon.worker.process.wait(milliseconds: 20_000)
    // A tracer hears of it first.
    for _ in 0..<300 where end == nil {
      usleep(10_000)
      end = try daemon.worker.process.wait(milliseconds: 100)
    }
    let words = try daemon.worker.messages()
    #expect(end == .exited(1), "\(words)")
    #expect(words.contains("the worker has failed"), "\(words)")
  }

  /// glibc tries to look into /proc now and then, and does without.
  @Test func whatIsReadAtMostFails() throws {
    #expect(try trial("openat-read") == .exited(2))
  }

  /// One that is taken over cannot have the host's memory.
  @Test func itsMemoryIsBounded() throws {
    #expect(try trial("memory") == .exited(2))
  }

  @Test func aWorkerHasNoRightsAndSeesNothing() throws {
    let image = try TestImage(sectors: 64, blockSize: 4096)
    let daemon = try TestDaemon(image)
    _ = try daemon.startReady()
    let process = "/proc/\(daemon.worker.process.pid)"
    let lines = try text("\(process)/status").split(separator: "\n").map(String.init)
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
      #expect(lines.contains("\(set):\t0000000000000000"))
    }
    #expect(lines.contains("NoNewPrivs:\t1"))
    #expect(lines.contains("Seccomp:\t2"))
    // A mount namespace of one mount, which is empty and read only.
    let mounts = try text("\(process)/mountinfo").split(separator: "\n")
    #expect(mounts.count == 1)
    #expect(mounts[0].contains(" / / ro,"))
    #expect(try Folder.names("\(process)/root").isEmpty)
    for kind in ["mnt", "net", "ipc", "uts", "cgroup"] {
      #expect(try link("\(process)/ns/\(kind)") != link("/proc/self/ns/\(kind)"), "\(kind)")
    }
    let limits = try text("\(process)/limits").split(separator: "\n")
    #expect(limits.contains { $0.hasPrefix("Max core file size        0") })
    #expect(limits.contains { $0.hasPrefix("Max open files            320 ") })
    if geteuid() == 0 {
      #expect(lines.contains("CapBnd:\t0000000000000000"))
      #expect(lines.contains("Uid:\t2000000\t2000000\t2000000\t2000000"))
      #expect(
        lines.contains { $0.hasPrefix("Groups:") && $0.dropFirst(7).allSatisfy(\.isWhitespace) })
      #expect(limits.contains { $0.hasPrefix("Max processes             64 ") })
    }
    try daemon.link.send(.stop)
    #expect(try daemon.worker.process.wait(milliseconds: 20_000) == .exited(0))
  }

  /// Whoever starts it may be the last to be chosen when memory runs out, or the first.
  @Test func itsMemoryScoreIsItsOwn() throws {
    let folder = try TemporaryFolder()
    let listener = try UnixSocket.listen(at: folder.file("link"), kind: .packets)
    var command = Command(
      "/usr/bin/choom", ["-n", "700", "--", try program("cowd"), "--supervised"])
    command.descriptors = [3: listener.raw]
    let process = try command.start()
    let link = try LinkConnection(path: folder.file("link"))
    try link.send(.ping)
    // It answers when it is in its cage.
    while case .none = try link.receive(milliseconds: 100) { try #require(!process.hasEnded) }
    #expect(try text("/proc/\(process.pid)/oom_score_adj") == "0\n")
    try link.send(.stop)
    #expect(try process.wait(milliseconds: 20_000) == .exited(0))
  }

  private func text(_ path: String) throws -> String { try kernelText(path) }

  private func link(_ path: String) throws -> String {
    var bytes = [CChar](repeating: 0, count: 256)
    let count = readlink(path, &bytes, bytes.count)
    guard count > 0 else { throw IOError.last("read", path) }
    return String(decoding: bytes[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  /// A store as a shell makes it in an empty folder, where `base.raw` is 4 MiB of other bytes.
  struct Recipe: Sendable, CustomTestStringConvertible {
    let format: String
    let store: String
    let shell: String
    var isReadOnly = false
    var testDescription: String { "\(format): \(shell)" }

    init(_ format: String, _ store: String, _ shell: String, isReadOnly: Bool = false) {
      (self.format, self.store, self.shell) = (format, store, shell)
      self.isReadOnly = isReadOnly
    }
  }

  static let recipes = [
    Recipe("raw", "s", "cp base.raw s"),
    Recipe("dscow", "s", "$DMU/dscow_tool -c s base.raw"),
    Recipe("qcow", "s", "qemu-img create -q -f qcow -b base.raw -F raw s"),
    Recipe("qcow2", "s", "qemu-img create -q -f qcow2 -b base.raw -F raw s"),
    Recipe("qcow2", "s", "qemu-img convert -c -O qcow2 base.raw s"),
    Recipe("qcow2", "s", "qemu-img convert -c -O qcow2 -o compression_type=zstd base.raw s"),
    Recipe(
      "qcow2", "s",
      "qemu-img convert -O qcow2 base.raw b && qemu-img create -q -f qcow2 -b b -F qcow2 m"
        + " && qemu-img create -q -f qcow2 -b m -F qcow2 s"),
    Recipe("qcow2", "s", "qemu-img create -q -f qcow2 -o data_file=d,data_file_raw=on s 4M"),
    Recipe("qcow2", "s", "qemu-img create -q -f qcow2 -o extended_l2=on,preallocation=falloc s 4M"),
    Recipe("vmdk", "s", "qemu-img convert -O vmdk base.raw s"),
    Recipe("vmdk", "s", "qemu-img convert -O vmdk -o subformat=twoGbMaxExtentFlat base.raw s"),
    Recipe("vmdk", "s", "qemu-img convert -O vmdk -o subformat=twoGbMaxExtentSparse base.raw s"),
    Recipe(
      "vmdk", "s", "qemu-img convert -O vmdk -o subformat=streamOptimized base.raw s",
      isReadOnly: true),
    Recipe("vpc", "s", "qemu-img convert -O vpc -o force_size base.raw s"),
    Recipe("vpc", "s", "qemu-img convert -O vpc -o subformat=fixed,force_size base.raw s"),
    Recipe(
      "vpc", "s",
      "qemu-img convert -O vpc -o force_size base.raw b && $DMU/dmu-img create -q -f vpc -b b -F vpc s"
    ),
  ]

  @Test(arguments: recipes) func everyFormatAndEveryOrderWorkInIt(_ recipe: Recipe) throws {
    let disk = try CagedDisk(recipe)
    let report = try disk.start()
    let client = try disk.attach()
    let size = Int(report.size)
    var model = try client.run(.read, offset: 0, length: size)
    func change(_ kind: TestNBDClient.Kind, _ offset: Int, _ bytes: [UInt8]) throws {
      try client.run(
        kind, offset: UInt64(offset), length: bytes.count, data: kind == .write ? bytes : [])
      model.replaceSubrange(offset..<(offset + bytes.count), with: bytes)
    }
    if !recipe.isReadOnly {
      for offset in stride(from: 512, to: size - 70_000, by: 300_000) {
        try change(.write, offset, [UInt8](repeating: 0x5a, count: 66_048))
      }
      try client.run(.flush)
      try change(.writeZeroes, 65_536, [UInt8](repeating: 0, count: 262_144))
      try client.run(.trim, offset: 1 << 20, length: 1 << 19)
      try client.run(
        .write, offset: 0, length: 4096, data: .init(repeating: 1, count: 4096), fua: true)
      model.replaceSubrange(0..<4096, with: [UInt8](repeating: 1, count: 4096))
      let trimmed = try client.run(.read, offset: 1 << 20, length: 1 << 19)
      model.replaceSubrange((1 << 20)..<(1 << 20 + 1 << 19), with: trimmed)
      try client.run(.flush)
    }
    #expect(try client.run(.read, offset: 0, length: size) == model)
    #expect(try disk.status().attached)
    try disk.tryOrders()
    let again = try disk.attach()
    #expect(try again.run(.read, offset: 0, length: size) == model)
    try disk.stop()
  }

  /// Start-up and idle memory with the cage and without, taken in turn.
  @Test func whatItCosts() throws {
    let image = try TestImage(sectors: 2048, blockSize: 65536)
    var times: [Bool: [Double]] = [:]
    var memory: [Bool: [UInt64]] = [:]
    for _ in 0..<15 {
      for caged in [true, false] {
        let begin = ContinuousClock.now
        let daemon = try TestDaemon(image, caged: caged)
        _ = try daemon.startReady()
        times[caged, default: []].append((ContinuousClock.now - begin) / .milliseconds(1))
        memory[caged, default: []].append(try daemon.status().memory)
        try daemon.link.send(.stop)
        #expect(try daemon.worker.process.wait(milliseconds: 20_000) == .exited(0))
      }
    }
    func best(_ caged: Bool) -> Double { times[caged]?.min() ?? .infinity }
    // What of the program's file is mapped differs from start to start.
    func least(_ caged: Bool) -> UInt64 { memory[caged]?.min() ?? .max }
    let cost: Comment = """
      start of a worker: \(best(true)) ms in its cage, \(best(false)) ms without; memory \
      \(least(true) >> 10) and \(least(false) >> 10) KiB
      """
    print(cost)
    #expect(best(true) <= 2.5 * best(false), cost)
    #expect(least(true) <= least(false) + 512 << 10, cost)
  }
}

/// One disk with a caged worker, and the files that its images name beside its store.
private final class CagedDisk {
  private let folder: TemporaryFolder
  private let recipe: CageTests.Recipe
  private let listener: Descriptor
  private let store: Descriptor
  private let pending: Descriptor
  private let worker: CowdProcess
  private let link: LinkConnection
  private var files = 0

  init(_ recipe: CageTests.Recipe) throws {
    self.recipe = recipe
    folder = try TemporaryFolder()
    let base = try FileStore(
      Descriptor(path: folder.file("base.raw"), flags: O_RDWR | O_CREAT, mode: 0o600), name: "base")
    try base.write((0..<(4 << 20)).map { UInt8(truncatingIfNeeded: $0 >> 9 &* 7) }, at: 0)
    let tool = try program("cowd").split(separator: "/").dropLast().joined(separator: "/")
    let shell = "DMU=/\(tool); cd '\(folder.path)' && \(recipe.shell)"
    let made = try Command("/bin/sh", ["-c", shell]).start().wait(milliseconds: 30_000)
    guard made == .exited(0) else { throw IOError(EINVAL, "make", recipe.shell) }
    listener = try UnixSocket.listen(at: folder.file("link"), kind: .packets)
    store = try Descriptor(
      path: folder.file(recipe.store), flags: recipe.isReadOnly ? O_RDONLY : O_RDWR)
    pending = try Descriptor(path: folder.file("pending"), flags: O_RDWR | O_CREAT, mode: 0o600)
    worker = try CowdProcess(
      ["--supervised", "--uid", "2000000", "--gid", "2000000"], descriptors: [3: listener.raw],
      folder: folder)
    link = try LinkConnection(path: folder.file("link"))
  }

  /// Starts it, and answers what it asks for.
  func start() throws -> DiskReport {
    var order = StartOrder(disk: "1-51712", format: recipe.format)
    order.storePath = folder.file(recipe.store)
    order.readOnly = recipe.isReadOnly
    order.isHeld = true
    let witness = try Descriptor(path: folder.file(recipe.store), flags: O_RDONLY)
    try link.send(
      .start(order),
      lending: [.store: store.raw, .pending: pending.raw, .witness: witness.raw])
    while true {
      switch try hear() {
      case (.ready(let report), _): return report
      case (.needFile(let need), _):
        files += 1
        let path = need.path.hasPrefix("/") ? need.path : folder.file(need.path)
        let file = try Descriptor(path: path, flags: need.writable ? O_RDWR : O_RDONLY)
        try link.send(.file, lending: [.file: file.raw])
      case (let other, _): throw IOError(EPROTO, "start (\(other))", try worker.messages())
      }
    }
  }

  func attach() throws -> TestNBDClient {
    let pair = try UnixSocket.pair(.stream)
    try link.send(.attach, lending: [.nbd: pair.second.raw])
    return try TestNBDClient(transmission: pair.first)
  }

  func status() throws -> DiskReport {
    try link.send(.status)
    while true {
      let report = try hear().0
      if case .status(let status) = report { return status }
      guard report == .detached else { throw IOError(EPROTO, "ask for", "\(report)") }
    }
  }

  /// Every order that is none of those above, and two that make no sense.
  func tryOrders() throws {
    try link.send(.clear)
    guard case .status = try hear().0 else { throw IOError(EPROTO, "clear", recipe.format) }
    try link.send(.ping)
    guard case .alive = try hear().0 else { throw IOError(EPROTO, "ask for life", recipe.format) }
    for index in 0...files {
      try link.send(.descriptors(index: index))
      let (report, descriptors) = try hear()
      #expect(report != .detached)
      #expect(descriptors.roles.contains(index == 0 ? .store : .file))
    }
    try link.send(.file)
    guard case .refused = try hear().0 else { throw IOError(EPROTO, "refuse", "a file") }
    try link.send(LinkMessage("dance"))
    guard case .refused = try hear().0 else { throw IOError(EPROTO, "refuse", "a dance") }
  }

  func stop() throws {
    try link.send(.stop)
    let end = try worker.process.wait(milliseconds: 20_000)
    let words = try worker.messages()
    #expect(end == .exited(0), "\(words)")
  }

  private func hear() throws -> (WorkerReport, LinkDescriptors) {
    for _ in 0..<200 {
      switch try link.receive(milliseconds: 100) {
      case .none: continue
      case .end:
        let end = try worker.process.wait(milliseconds: 1000)
        throw IOError(EPIPE, "hear (\(end.map { "\($0)" } ?? "alive"))", try worker.messages())
      case .message(let message, let descriptors):
        let report = try WorkerReport(message)
        if case .event = report { continue }
        if case .detached = report { continue }
        return (report, descriptors)
      }
    }
    throw IOError(ETIMEDOUT, "hear", try worker.messages())
  }
}
