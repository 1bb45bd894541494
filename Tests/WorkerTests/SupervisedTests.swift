// SPDX-License-Identifier: Apache-2.0
// A supervised worker over its link, with the test as daemon and as kernel.

import BlockIO
import DiskFormats
import Glibc
import SystemIO
import Testing
import TestSupport
import WorkerLink

@Suite("Supervised", .serialized) struct SupervisedTests {
  private static let kills = getenv("DMU_KILLS").flatMap { Int(String(cString: $0)) } ?? 30

  /// Neither what it tells of itself nor a guest's requests wait for the reader of its log.
  @Test func aLogThatNobodyReadsStopsNothing() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096)
    let pipe = try FullPipe()
    let listener = try UnixSocket.listen(at: image.folder.file("link"), kind: .packets)
    let worker = try CowdProcess(
      ["--supervised", "--uid", "2000000", "--gid", "2000000"],
      descriptors: [2: pipe.raw, 3: listener.raw], folder: image.folder)
    let link = try LinkConnection(path: image.folder.file("link"))
    let store = try Descriptor(path: image.store, flags: O_RDWR)
    let base = try Descriptor(path: image.base, flags: O_RDONLY)
    var order = StartOrder(disk: "1-51712", format: "dscow")
    order.storePath = image.store
    order.basePath = image.base
    try link.send(.start(order), lending: [.store: store.raw, .base: base.raw])
    guard case .message(let message, _) = try link.receive(milliseconds: 10_000) else {
      Issue.record("it does not say that it is ready")
      return
    }
    #expect(message.verb == "ready")
    let socket = image.folder.file("s")
    let clients = try UnixSocket.listen(at: socket, kind: .stream)
    try link.send(.attach, lending: [.listener: clients.raw])
    let client = try TestNBDClient(path: socket)
    try client.run(.write, offset: 1024, length: 512, data: Stamp.sectors(1, 5))
    try client.run(.flush)
    try link.send(.stop)
    #expect(try worker.process.wait(milliseconds: 20_000) == .exited(0))
  }

  /// The guest lives on: whatever it was told of is there, flushed or not, and what it was
  /// not told of is asked again. No error reaches it.
  @Test(arguments: [4096, 65536] as [UInt32])
  func killedItLosesNothingAcknowledged(blockSize: UInt32) throws {
    var seeds = SeededRandom(announcedAs: "killed while supervised, blocks of \(blockSize)")
    // So large that the load does not come to an end of new blocks.
    let image = try TestImage(sectors: blockSize == 4096 ? 32768 : 65536, blockSize: blockSize)
    let daemon = try TestDaemon(image)
    let load = RandomLoad(
      image.model(), seed: seeds.next(), longest: Int(blockSize) / 512 * 2, repeats: true)
    var most: UInt64 = 0
    for round in 0..<Self.kills {
      if round > 0 { try daemon.replaceWorker() }
      let report = try daemon.startReady()
      #expect(report.size == UInt64(image.sectors) * 512)
      most = max(most, report.uncommitted)
      let client = try daemon.attach()
      load.resend(client)
      let end = milliseconds() + Int(seeds.next() % 50)
      let depth = 1 + Int(seeds.next() % 16)
      while milliseconds() < end { try load.turn(client, depth: depth, milliseconds: 1) }
      try daemon.worker.kill9()
      try load.takeRest(client)
      let messages = load.wrongs.isEmpty ? "" : try daemon.worker.messages()
      #expect(load.wrongs == [], "\(messages)")
      guard load.wrongs.isEmpty else { return }
    }
    #expect(most > 0, "no worker found anything uncommitted: nothing was tested")

    // What is left at the end is what the model says, to the letter; and after a stop the
    // store alone holds it.
    try daemon.replaceWorker()
    _ = try daemon.startReady()
    let client = try daemon.attach()
    load.resend(client)
    try load.drain(client)
    #expect(load.outstanding == 0)
    let start = load.model.beginFlush()
    try daemon.link.send(.stop)
    #expect(try daemon.worker.process.wait(milliseconds: 30_000) == .exited(0))
    load.model.flushed(start)
    try image.check()
    let path = image.folder.file("nbd")
    let alone = try CowdProcess(
      ["-p", "dscow", "--nbd", "unix:\(path)", image.store], folder: image.folder)
    #expect(alone.line() != nil)
    let reader = try TestNBDClient(path: path)
    load.settle(try reader.run(.read, offset: 0, length: image.sectors * 512), after: "the end")
    #expect(load.wrongs == [])
    try alone.stop()
    print("killed while supervised, blocks of \(blockSize): \(Self.kills) kills, ", terminator: "")
    print("\(load.replies) replies, up to \(most) uncommitted")
  }

  /// What the pending file is for: a worker that starts without it does not know of a write
  /// that was acknowledged and not flushed.
  @Test(arguments: [true, false]) func itIsThePendingFileThatRemembers(_ kept: Bool) throws {
    let daemon = try TestDaemon(TestImage(sectors: 256, blockSize: 4096))
    _ = try daemon.startReady()
    let client = try daemon.attach()
    try client.run(.write, offset: 512, length: 512, data: Stamp.sectors(1, 7))
    #expect(try daemon.status().uncommitted == 1)
    try daemon.worker.kill9()
    try daemon.replaceWorker()
    try daemon.start(roles: kept ? [.store, .base, .pending] : [.store, .base])
    guard case .ready(let report) = try daemon.report().0 else {
      Issue.record("not ready")
      return
    }
    #expect(report.uncommitted == (kept ? 1 : 0))
    let found = try daemon.attach().run(.read, offset: 512, length: 512)
    #expect(found == Stamp.sectors(1, kept ? 7 : TestImage.stamp(1)))
  }

  /// A daemon that is restarted takes the worker over, disk and descriptors and all.
  @Test func anotherDaemonTakesItOverUnderLoad() throws {
    var seeds = SeededRandom(announcedAs: "adoption")
    let image = try TestImage(sectors: 2048, blockSize: 4096)
    let daemon = try TestDaemon(image)
    _ = try daemon.startReady()
    let client = try daemon.attach()
    let load = RandomLoad(image.model(), seed: seeds.next(), longest: 16, repeats: true)
    for round in 0..<20 {
      for _ in 0..<20 { try load.turn(client, depth: 8, milliseconds: 1) }
      try daemon.relink()
      let status = try daemon.status()
      #expect(status.pid == daemon.worker.process.pid && status.attached)
      #expect(status.state == .ready && status.blockSize == 4096 && status.disk == "1-51712")
      #expect(status.basePath == "base", "as it stands in the image")
      guard round % 5 == 0 else { continue }
      try daemon.link.send(WorkerOrder.descriptors(index: 0))
      let (report, descriptors) = try daemon.report()
      #expect(report == WorkerReport.descriptors(files: 0, file: nil))
      #expect(descriptors.roles == TestDaemon.all)
      var given = stat()
      var known = stat()
      let store = try #require(descriptors.raw(.store))
      #expect(fstat(store, &given) == 0 && stat(image.store, &known) == 0)
      #expect(given.st_ino == known.st_ino && given.st_dev == known.st_dev)
    }
    try load.drain(client)
    #expect(load.wrongs == [] && load.outstanding == 0)
    let status = try daemon.status()
    #expect(status.writes > 0 && status.reads > 0 && status.faults > 0)
    #expect(status.memory > 0 && status.allocated > 0)
    try daemon.link.send(.stop)
    #expect(try daemon.worker.process.wait(milliseconds: 30_000) == .exited(0))
  }

  /// The socket is replaced while requests are under way: they are sent again on the new one,
  /// and no old one lands after them.
  @Test func anotherSocketTakesOverUnderLoad() throws {
    var seeds = SeededRandom(announcedAs: "sockets replaced")
    let image = try TestImage(sectors: 2048, blockSize: 4096)
    let daemon = try TestDaemon(image)
    _ = try daemon.startReady()
    let load = RandomLoad(image.model(), seed: seeds.next(), longest: 16, repeats: true)
    for round in 0..<30 {
      let client = try daemon.attach()
      load.resend(client)
      for _ in 0..<10 { try load.turn(client, depth: 16, milliseconds: 1) }
      // Sometimes the client goes first, sometimes the worker is told first.
      if round % 2 == 0 { continue }
      let next = try daemon.attach()
      try load.takeRest(client)
      load.resend(next)
      for _ in 0..<10 { try load.turn(next, depth: 16, milliseconds: 1) }
      try load.drain(next)
    }
    let client = try daemon.attach()
    load.resend(client)
    try load.drain(client)
    #expect(load.wrongs == [] && load.outstanding == 0)
  }

  @Test func theEndOfTheSocketIsTold() throws {
    let daemon = try TestDaemon(TestImage(sectors: 256, blockSize: 4096))
    _ = try daemon.startReady()
    do {
      let client = try daemon.attach()
      try client.run(.write, offset: 0, length: 512, data: Stamp.sectors(1, 9))
    }
    #expect(try daemon.report().0 == .detached)
    #expect(try !daemon.status().attached)
    let client = try daemon.attach()
    #expect(try client.run(.read, offset: 0, length: 512) == Stamp.sectors(1, 9))
    _ = client.submit(.disconnect)
    _ = try client.turn(milliseconds: 100)
    #expect(try daemon.report().0 == .detached)
  }

  @Test func theBaseThatTheImageNamesIsAskedFor() throws {
    let daemon = try TestDaemon(TestImage(sectors: 256, blockSize: 4096))
    try daemon.start(roles: [.store, .pending])
    #expect(try daemon.report().0 == .needFile(daemon.need))
    // Another daemon is told anew what is waited for.
    try daemon.relink()
    #expect(try daemon.report().0 == .needFile(daemon.need))
    try daemon.link.send(.status)
    guard case .refused("status", _) = try daemon.report().0 else {
      Issue.record("a disk that is not open has no status")
      return
    }
    try daemon.answerFile()
    guard case .ready(let report) = try daemon.report().0 else {
      Issue.record("not ready")
      return
    }
    #expect(report.size == 256 * 512)
  }

  @Test func aBaseThatIsNotAllowedEndsIt() throws {
    let daemon = try TestDaemon(TestImage(sectors: 256, blockSize: 4096))
    try daemon.start(roles: [.store, .pending])
    #expect(try daemon.report().0 == .needFile(daemon.need))
    try daemon.link.send(.refuseFile(reason: "base base is not allowed here"))
    #expect(
      try daemon.report().0
        == .failed(.baseRefused, message: "base base is not allowed here"))
    #expect(try daemon.worker.process.wait(milliseconds: 10_000) == .exited(1))
  }

  @Test func aNewStoreIsMadeAndAWorkerKilledMeanwhileIsNoHarm() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096, create: false)
    let daemon = try TestDaemon(image)
    var order = daemon.order
    order.create = true
    order.blockSize = 16384
    for round in 0..<10 {
      try daemon.start(order)
      if round < 9 { usleep(UInt32(round) * 1500) }
      if round == 9 { break }
      try daemon.worker.kill9()
      try daemon.replaceWorker()
    }
    guard case .ready(let report) = try daemon.report().0 else {
      Issue.record("not ready: \(try daemon.worker.messages())")
      return
    }
    #expect(report.blockSize == 16384 && report.size == 256 * 512)
    #expect(report.basePath == image.base)
    let client = try daemon.attach()
    #expect(try client.run(.read, offset: 512, length: 512) == Stamp.sectors(1, TestImage.stamp(1)))
  }

  @Test func whatCannotBeServedIsSaidInASentence() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096)
    func failure(_ change: (inout StartOrder) -> Void, _ roles: Set<LinkRole>) throws
      -> WorkerReport
    {
      let daemon = try TestDaemon(image)
      var order = daemon.order
      change(&order)
      try daemon.start(order, roles: roles)
      let report = try daemon.report().0
      #expect(try daemon.worker.process.wait(milliseconds: 10_000) == .exited(1))
      return report
    }
    guard
      case .failed(.unknownFormat, let words) = try failure(
        { $0.format = "foo" }, [.store, .base])
    else {
      Issue.record("an unknown format was taken")
      return
    }
    #expect(words.hasPrefix("format 'foo' is unknown: this dmu-xen has dscow, "))
    #expect(
      try failure({ _ in }, [.base])
        == .failed(.offLink, message: "'start' came without a store"))
    // The base is grown under the store.
    let file = try Descriptor(path: image.base, flags: O_WRONLY | O_APPEND)
    #expect(write(file.raw, [UInt8](repeating: 0, count: 512), 512) == 512)
    guard case .failed(.baseChanged, let message) = try failure({ _ in }, [.store, .base]) else {
      Issue.record("a changed base was taken")
      return
    }
    #expect(message.contains("has changed since"))
    #expect(message.contains(image.base) && message.contains(image.store))
    let daemon = try TestDaemon(image)
    var order = daemon.order
    order.force = true
    try daemon.start(order)
    guard case .ready = try daemon.report().0 else {
      Issue.record("force did not help")
      return
    }
  }

  /// Anything at all on the link: what is not an order is refused, the disk goes on.
  @Test func hostileMessagesHarmNobody() throws {
    var random = SeededRandom(announcedAs: "hostile link")
    let daemon = try TestDaemon(TestImage(sectors: 256, blockSize: 4096))
    _ = try daemon.startReady()
    let client = try daemon.attach()
    let texts = [
      "dance\n", "start\n", "start\ndisk=1\nformat=dscow\n", "file\n", "attach\n", "", "\u{0}",
      "attach\nroles=nbd\n", "stop", "descriptors\nroles=store\n", "status\nx=%\n",
    ]
    for round in 0..<300 {
      var bytes = Array(texts[Int(random.next() % UInt64(texts.count))].utf8)
      if round % 3 == 0 {
        bytes = (0..<Int(random.next() % 16384)).map { _ in .random(in: 0...255, using: &random) }
      }
      if bytes.isEmpty { bytes = [0x0a] }
      // One descriptor would make an order of some of them.
      let count = Int(random.next() % 8)
      let descriptors = [Int32](repeating: 0, count: count == 1 ? 8 : count)
      try PacketSocket.send(bytes, descriptors: descriptors, to: daemon.link.raw)
      guard case .refused = try daemon.report().0 else {
        Issue.record("an answer to \(bytes.prefix(20)) other than a refusal")
        return
      }
    }
    // A socket that is none is no way to attach; what comes of it is told, and the next works.
    let file = try Descriptor(path: daemon.image.base, flags: O_RDONLY)
    try daemon.link.send(.attach, lending: [.nbd: file.raw])
    #expect(try daemon.report().0 == .detached)
    let next = try daemon.attach()
    #expect(try next.run(.read, offset: 0, length: 512) == Stamp.sectors(1, TestImage.stamp(0)))
    _ = client
    let descriptors = try #require(try openDescriptors(daemon.worker.process.pid))
    #expect(descriptors < 40, "descriptors that came with refused messages are closed")
    try daemon.link.send(.stop)
    #expect(try daemon.worker.process.wait(milliseconds: 10_000) == .exited(0))
  }

  /// What a worker costs that has nothing to do, however large its disk; also where one block of each
  /// second 64 KiB is in the store, so that there is a bitmap of 32 MiB to look through.
  @Test(arguments: [false, true]) func anIdleWorkerOfATebibyteIsSmall(isMixed: Bool) throws {
    let image = try TestImage(sectors: 256, blockSize: 4096, create: false)
    let base = try FileStore(path: image.base, writable: true)
    try base.resize(to: 1 << 40)
    let store = try FileStore(path: image.store, writable: true)
    let header = try Dscow.create(store: store, base: base, baseName: image.base)
    if isMixed {
      #expect(header.bitmapCount * 4 == 32 << 20)
      let piece = (0..<1 << 20).map { UInt8($0 % 4 == 0 ? 1 : 0) }
      for number in UInt64(0)..<32 {
        try store.write(piece, at: header.bitmapOffset + number << 20)
      }
    }
    let daemon = try TestDaemon(image)
    let report = try daemon.startReady()
    #expect(report.size == 1 << 40)
    let client = try daemon.attach()
    #expect(try client.run(.read, offset: 1 << 39, length: 4096).allSatisfy { $0 == 0 })
    let status = try daemon.status()
    #expect(status.allocated == (isMixed ? 1 << 23 : 0) * 4096)
    let memory = try memory(daemon.worker.process.pid)
    let milliseconds = try processorTime(daemon.worker.process.pid)
    print(
      "an idle worker of 1 TiB\(isMixed ? ", half of it mixed" : ""): \(memory.resident) KiB resident,"
        + " \(memory.own) of them its own, \(milliseconds) ms of processor time")
    #expect(milliseconds <= 1000)
    #expect(status.memory / 1024 <= memory.resident + 64)
    // Not as it is installed, it shares far larger libraries with everybody.
    if getenv("DMU_BIN_DIR") != nil { #expect(memory.resident < 16 * 1024) }
    #expect(memory.own < 6 * 1024)
  }

  /// Milliseconds of processor time.
  private func processorTime(_ pid: Int32) throws -> Int {
    let words = try kernelText("/proc/\(pid)/stat").split(separator: ")").last?
      .split(separator: " ")
    let fields = try #require(words)
    let ticks = try #require(Int(fields[11])) + #require(Int(fields[12]))
    return ticks * 1000 / sysconf(Int32(_SC_CLK_TCK))
  }

  /// KiB resident in all, and of those not backed by files.
  private func memory(_ pid: Int32) throws -> (resident: UInt64, own: UInt64) {
    let path = "/proc/\(pid)/status"
    let file = try Descriptor(path: path, flags: O_RDONLY)
    var buffer = [UInt8](repeating: 0, count: 8192)
    let count = read(file.raw, &buffer, buffer.count)
    guard count > 0 else { throw IOError.last("read", path) }
    var values: [Substring: UInt64] = [:]
    for line in String(decoding: buffer[..<count], as: UTF8.self).split(separator: "\n") {
      let words = line.split(whereSeparator: { $0 == " " || $0 == "\t" })
      if words.count == 3 { values[words[0]] = UInt64(words[1]) }
    }
    return (try #require(values["VmRSS:"]), try #require(values["RssAnon:"]))
  }

  private func openDescriptors(_ pid: Int32) throws -> Int? {
    guard let folder = opendir("/proc/\(pid)/fd") else { return nil }
    defer { closedir(folder) }
    var count = 0
    while readdir(folder) != nil { count += 1 }
    return count
  }
}
