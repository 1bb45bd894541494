// SPDX-License-Identifier: Apache-2.0
// The two processes of cowd by hand: the worker in its cage, and the keeper that opens files for
// it and believes nothing of what it says. The played worker here is a hostile image's.

import BlockIO
import Glibc
import SystemIO
import Testing
import TestSupport
import WorkerLink

@Suite("A keeper") struct KeeperTests {
  private let image: TestImage
  private var folder: TemporaryFolder { image.folder }
  private var socket: String { image.folder.file("s") }

  init() throws { image = try TestImage(sectors: 256, blockSize: 4096) }

  /// A keeper whose worker is this test.
  private func keeper(_ options: [String] = []) throws -> (CowdProcess, LinkConnection) {
    let pair = try UnixSocket.pair(.packets)
    let process = try CowdProcess(
      ["--keeper", "-p", "dscow", "--nbd", "unix:\(socket)"] + options + [image.store],
      descriptors: [3: pair.second.raw], folder: folder)
    return (process, LinkConnection(pair.first))
  }

  private func receive(_ link: LinkConnection) throws -> (WorkerOrder, LinkDescriptors)? {
    guard case .message(let message, let descriptors) = try link.receive(milliseconds: 10_000)
    else { return nil }
    return (try WorkerOrder(message), descriptors)
  }

  /// What the keeper says when its worker asks for a file; nil when it gives it.
  private func refusal(
    _ role: String, _ path: String, writable: Bool, _ options: String...
  ) throws -> String? {
    let (process, link) = try keeper(options)
    let start = try #require(try receive(link))
    #expect(start.0.message.verb == "start" && start.1.roles == [.store])
    let before = try process.messages()
    try link.send(.needFile(FileNeed(role: role, path: path, writable: writable)))
    guard let (order, descriptors) = try receive(link) else {
      // It has closed the link: then it has said why.
      #expect(try process.process.wait(milliseconds: 10_000) == .exited(1))
      return String(try process.messages().dropFirst(before.count))
    }
    #expect(order == .file && descriptors.roles == [.file])
    // The next one may have the store.
    try process.kill9()
    return nil
  }

  private func make(_ path: String) throws {
    let file = try FileStore(
      Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600), name: path)
    try file.resize(to: 65536)
  }

  @Test func whatIsNamedIsWrittenOnlyBesideTheStore() throws {
    let elsewhere = try TemporaryFolder()
    for path in [folder.file("extent"), elsewhere.file("extent"), elsewhere.file("other")] {
      try make(path)
    }
    #expect(mkdir(folder.file("below"), 0o700) == 0)
    try make(folder.file("below/extent"))
    #expect(symlink(elsewhere.file("extent"), folder.file("link")) == 0)
    #expect(try refusal("extent", folder.file("extent"), writable: true) == nil)
    #expect(try refusal("extent", folder.file("below/extent"), writable: true) == nil)
    for path in [elsewhere.file("extent"), folder.file("link"), "/etc/passwd"]
    where access(path, W_OK) == 0 {
      let words = try #require(try refusal("extent", path, writable: true))
      #expect(words.contains("which is no file in the store's folder or below"), "\(words)")
    }
    for place in [elsewhere.path, elsewhere.file("extent")] {
      #expect(
        try refusal("extent", elsewhere.file("extent"), writable: true, "--allow", place) == nil)
    }
    #expect(
      try refusal(
        "extent", elsewhere.file("other"), writable: true, "--allow", elsewhere.file("extent"))
        != nil)
    // A path that only begins like one that is allowed.
    try make(elsewhere.path + "x")
    defer { unlink(elsewhere.path + "x") }
    #expect(
      try refusal("extent", elsewhere.path + "x", writable: true, "--allow", elsewhere.path) != nil)
    // To read them is what an image's owner may expect, unless nobody vouches for the image.
    #expect(try refusal("base", elsewhere.file("extent"), writable: false) == nil)
    let words = try #require(
      try refusal("base", elsewhere.file("extent"), writable: false, "--untrusted"))
    #expect(words.contains("as its base, which --untrusted refuses"), "\(words)")
  }

  /// The command ends when the link does: whoever reads what it said then, reads all.
  @Test func whatIsWrongIsToldBeforeTheLinkEnds() throws {
    let (process, link) = try keeper()
    #expect(try receive(link) != nil)
    // A slow log.
    let pid = process.process.pid
    let slow = Command(
      "/usr/bin/strace",
      ["-f", "-q", "-p", "\(pid)", "-o", "/dev/null", "-e", "trace=write"]
        + ["-e", "inject=write:delay_enter=300000"])
    let strace = try slow.start()
    defer { kill(strace.pid, SIGKILL) }
    for _ in 0..<500 where try kernelText("/proc/\(pid)/status").contains("TracerPid:\t0\n") {
      usleep(10_000)
    }
    try link.send(
      .needFile(FileNeed(role: "base", path: folder.file("nothing"), writable: false)))
    #expect(try receive(link) == nil)
    let words = try process.messages()
    #expect(words.contains(folder.file("nothing")), "\(words)")
  }

  @Test func whatNoImageNeedsEndsIt() throws {
    try make(folder.file("extent"))
    // No base is ever written to, and nothing of a disk that is only read.
    #expect(try refusal("base", folder.file("extent"), writable: true) != nil)
    #expect(try refusal("extent", folder.file("extent"), writable: true, "--read-only") != nil)
    // The store again, as what is under it.
    let itself = try #require(try refusal("base", image.store, writable: false))
    #expect(itself.contains("is, through others, its own base"), "\(itself)")
    // Files without end.
    let (process, link) = try keeper()
    _ = try receive(link)
    var given = 0
    while true {
      try link.send(
        .needFile(FileNeed(role: "base", path: folder.file("extent"), writable: false)))
      guard try receive(link) != nil else { break }
      given += 1
      try #require(given <= 256)
    }
    #expect(given == 256)
    #expect(try process.process.wait(milliseconds: 10_000) == .exited(1))
  }

  @Test func nonsenseEndsItAndLeavesNothing() throws {
    var seeds = SeededRandom(announcedAs: "nonsense to a keeper")
    for _ in 0..<40 {
      let (process, link) = try keeper()
      _ = try receive(link)
      for _ in 0..<(seeds.next() % 4) {
        let reports: [WorkerReport] = [
          .attached, .detached, .alive, .event(.degraded, error: "x"),
          .descriptors(files: 7, file: nil),
        ]
        try link.send(reports[Int(seeds.next() % UInt64(reports.count))])
      }
      var bytes = (0..<(1 + seeds.next() % 100)).map { _ in UInt8(truncatingIfNeeded: seeds.next())
      }
      if seeds.next() % 2 == 0 { bytes = Array("ready\nsize=512\n".utf8) }
      try PacketSocket.send(bytes, descriptors: [], to: link.raw)
      #expect(try process.process.wait(milliseconds: 10_000) == .exited(1))
      #expect(access(socket, F_OK) != 0)
    }
  }

  /// Somebody ends the keeper: what was written is durable, and the worker has failed.
  @Test func aWorkerEndsWithItsKeeper() throws {
    let cowd = try CowdProcess(
      ["-p", "dscow", "--nbd", "unix:\(socket)", image.store], folder: folder)
    try cowd.expectReady()
    let client = try TestNBDClient(path: socket)
    try client.run(.write, offset: 1024, length: 512, data: Stamp.sectors(1, 5))
    try ProcessHandle(pid: try keeper(of: cowd)).send(SIGKILL)
    #expect(try cowd.process.wait(milliseconds: 10_000) == .exited(1))
    try image.check()
    let again = try CowdProcess(
      ["-p", "dscow", "--nbd", "unix:\(socket)", image.store], folder: folder)
    try again.expectReady()
    let reader = try TestNBDClient(path: socket)
    #expect(try reader.run(.read, offset: 1024, length: 512) == Stamp.sectors(1, 5))
    try again.stop()
  }

  /// A service manager tells every process of a service to end.
  @Test func aSignalToBothEndsItWell() throws {
    let cowd = try CowdProcess(
      ["-p", "dscow", "--nbd", "unix:\(socket)", image.store], folder: folder)
    try cowd.expectReady()
    let keeper = try ProcessHandle(pid: try keeper(of: cowd))
    try keeper.send(SIGTERM)
    try keeper.send(SIGINT)
    let client = try TestNBDClient(path: socket)
    try client.run(.write, offset: 0, length: 512, data: Stamp.sectors(1, 6))
    try cowd.stop()
    #expect(try cowd.messages() == "")
    #expect(access(socket, F_OK) != 0)
  }

  private func keeper(of cowd: CowdProcess) throws -> Int32 {
    let pid = cowd.process.pid
    let children = try kernelText("/proc/\(pid)/task/\(pid)/children").split(separator: " ")
    return try #require(children.first.flatMap { Int32($0) })
  }
}

/// The README's try: with root and without, in the cage.
@Suite("By hand in the cage") struct ByHandCageTests {
  @Test(arguments: [false, true]) func itIsCaged(asNobody: Bool) throws {
    guard geteuid() == 0 || !asNobody else { return }
    let image = try TestImage(sectors: 256, blockSize: 4096)
    let folder = image.folder
    let socket = folder.file("s")
    var command = Command(try program("cowd"), ["-p", "dscow", "--nbd", "unix:\(socket)"])
    command.arguments += ["--trace", folder.file("trace"), image.store]
    // What a shell, or who knows who, has left open.
    let left = folder.file("left")
    let open = try Descriptor(path: left, flags: O_RDWR | O_CREAT, mode: 0o600)
    if asNobody {
      for path in [folder.path, image.base, image.store] {
        guard chown(path, 65534, 65534) == 0 else { throw IOError.last("give", path) }
      }
      command = Command(
        "/usr/bin/setpriv",
        ["--reuid", "65534", "--regid", "65534", "--clear-groups", "--", command.path]
          + command.arguments)
    }
    command.descriptors = [0: open.raw, 7: open.raw, 300: open.raw]
    let process = try command.start()
    defer { if !process.hasEnded { kill(process.pid, SIGKILL) } }
    for _ in 0..<500 where access(socket, F_OK) != 0 && !process.hasEnded { usleep(10_000) }
    let client = try TestNBDClient(path: socket)
    try client.run(.write, offset: 1024, length: 512, data: Stamp.sectors(1, 5))
    let lines = try kernelText("/proc/\(process.pid)/status").split(separator: "\n")
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
      #expect(lines.contains { $0 == line }, "\(line)")
    }
    #expect(!lines.contains("Uid:\t0\t0\t0\t0"))
    #expect(try Folder.names("/proc/\(process.pid)/root").isEmpty)
    let opened = "/proc/\(process.pid)/fd"
    let targets = try Folder.names(opened).map { try Folder.target(of: "\(opened)/\($0)") }
    #expect(!targets.contains(left))
    #expect(targets.contains(folder.file("trace")), "what is named is opened")
    #expect(try Folder.target(of: "\(opened)/0") == "/dev/null")
    try process.send(SIGTERM)
    #expect(try process.wait(milliseconds: 20_000) == .exited(0))
    #expect(access(socket, F_OK) != 0)
  }
}
