// SPDX-License-Identifier: Apache-2.0
// One disk with several users: a guest that migrates to the same host, a guest and its stub domain. The
// hypervisor and the kernel's counters are played (StandInXen), by files in the run directory.

import Daemon
import Fakes
import Glibc
import Synchronization
import SystemIO
import Testing
import TestSupport

private let hasStrace = access("/usr/bin/strace", X_OK) == 0

extension World {
  fileprivate var xen: String { runDirectory + "/stand-in-xen" }

  /// Has the hypervisor say this of a domain; nil: it does not know it.
  fileprivate func play(_ domain: Int, _ words: String?) throws {
    try #require(mkdir(xen, 0o700) == 0 || errno == EEXIST)
    let path = xen + "/domain-\(domain)"
    guard let words else {
      try #require(unlink(path) == 0)
      return
    }
    try replace(path, words)
  }

  /// Has the kernel count requests as under way on a device.
  fileprivate func setBusy(_ device: ControlReply.Device, _ isBusy: Bool) throws {
    let words = device.number.split(separator: ":").compactMap { UInt32($0, radix: 16) }
    let path = xen + "/busy-\(words[0]):\(words[1])"
    if isBusy { try replace(path, "") } else { try #require(unlink(path) == 0) }
  }

  fileprivate func replace(_ path: String, _ text: String) throws {
    let file = try Descriptor(path: path + ".new", flags: O_WRONLY | O_CREAT | O_TRUNC, mode: 0o600)
    try #require(Glibc.write(file.raw, text, text.utf8.count) == text.utf8.count)
    try #require(rename(path + ".new", path) == 0)
  }

  /// A domain of a VM, and what the hypervisor says of it.
  fileprivate func create(
    _ domain: Int, vm: String = "/vm/7c1d", target: Int? = nil, _ words: String
  ) throws {
    try toolstack.createDomain(domain, name: "guest\(domain)")
    try toolstack.write("/local/domain/\(domain)/vm", vm)
    if let target { try toolstack.write("/local/domain/\(domain)/target", "\(target)") }
    try play(domain, words)
  }

  /// What the script and blkback do after an answer.
  fileprivate func connect(_ disk: FakeDisk, _ device: ControlReply.Device) throws {
    try toolstack.write(disk.backend + "/physical-device", device.number)
    try toolstack.write(disk.backend + "/hotplug-status", "connected")
    try toolstack.connect(disk, sectors: 2048)
  }

  /// A guest with a disk that is connected.
  fileprivate func start(
    _ domain: Int, _ spec: String
  ) async throws -> (FakeDisk, ControlReply.Device) {
    let disk = try attach(domain, spec)
    let device = try await add(disk)
    try connect(disk, device)
    return (disk, device)
  }

  /// Domain 5 is suspended, and domain 6 gets its disk, up to the point where the script would be run.
  fileprivate func suspend(_ spec: String) throws -> FakeDisk {
    try play(5, "shutdown")
    try create(6, "paused")
    return try attach(6, spec)
  }

  /// A guest that migrates from domain 5 to domain 6, up to the point where that would run.
  fileprivate func migrate(
    _ spec: String
  ) async throws -> (old: FakeDisk, new: FakeDisk, device: ControlReply.Device) {
    try create(5, "running")
    let (old, device) = try await start(5, spec)
    let new = try suspend(spec)
    let same = try await add(new)
    #expect(same == device)
    try connect(new, device)
    return (old, new, device)
  }

  /// The toolstack destroys a domain: its disk, then all of it.
  fileprivate func destroy(_ disk: FakeDisk) async throws {
    try toolstack.beginDetach(disk)
    try toolstack.backendCloses(disk)
    _ = try await ask(ControlRequest(.detach, path: disk.relativeBackend))
    try toolstack.finishDetach(disk)
    try toolstack.destroyDomain(disk.domain)
    try play(disk.domain, nil)
  }

  fileprivate func write(_ disk: FakeDisk, _ bytes: [UInt8]) async throws -> UInt32 {
    let client = try await wire(of: disk)
    return try client.write(bytes, at: 0)
  }

  fileprivate func isAllGone() async throws {
    try await eventually("everything is gone") {
      let workers = try await workers()
      return try workers.isEmpty && directories().isEmpty && devices == 0
    }
    #expect(logs().isEmpty)
    try await eventually("nothing is known") { try await isQuiet() }
  }
}

/// What a task has come to.
private final class Answer<Value: Sendable>: Sendable {
  private let value = Mutex<Value?>(nil)
  var now: Value? { value.withLock { $0 } }

  init(_ body: @escaping @Sendable () async throws -> Value) {
    Task {
      let result = try await body()
      value.withLock { $0 = result }
    }
  }
}

private func filled(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 4096) }

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct JoinTests {
  @Test("A guest that migrates to the same host goes on with its device and its worker")
  func migration() async throws {
    try await inWorld { world in
      let spec = world.spec("g.dscow")
      try world.create(5, "running")
      let (old, device) = try await world.start(5, spec)
      let worker = try await world.worker(old)
      let wire = try await world.wire(of: old)
      #expect(try wire.write(filled(7), at: 0) == 0)

      try world.play(5, "shutdown")
      try world.create(6, "paused")
      let (new, same) = try await world.start(6, spec)
      #expect(same == device)
      try world.play(6, "running")
      for disk in [old, new] {
        let status = try #require(try await world.status(disk.domain).first)
        #expect(status.state == .ready)
        #expect(status.users == ["5-51712", "6-51712"])
        #expect(status.worker == worker)
      }
      try await eventually("it is told") { try world.node(new, "state") == "ready" }
      #expect(try world.node(new, "worker") == "\(worker)")
      #expect(try world.toolstack.read("/local/domain/0/dmu-xen/disks") == "1")
      try await world.run("dmu-xen", "clear", "6", "--socket", world.socket)

      try await world.destroy(old)
      try await eventually("one is left") { try await world.status().map(\.domain) == [6] }
      let status = try #require(try await world.status(6).first)
      #expect(status.users == nil)
      #expect(status.identity == "5-51712")
      #expect(status.worker == worker)
      #expect(try wire.read(4096, at: 0) == filled(7))
      #expect(try wire.write(filled(8), at: 0) == 0)

      // The same number comes again, for something else.
      try world.create(5, vm: "/vm/other", "running")
      let (other, another) = try await world.start(5, world.spec("other.dscow"))
      #expect(another != device)
      #expect(world.directories() == ["5-51712", "5-51712+1"])
      #expect(try await world.worker(other) != worker)
      try await world.destroy(other)
      try await eventually("the other is gone") { world.directories() == ["5-51712"] }
      #expect(try await world.state(new) == .ready)

      try await world.destroy(new)
      try await world.isAllGone()
      let again = try world.attach(9, spec)
      try await world.add(again)
      let last = try await world.wire(of: again)
      #expect(try last.read(4096, at: 0) == filled(8))
    }
  }

  @Test("By the device-mapper it is the same, and the device is flushed before the answer")
  func mapped() async throws {
    try await inWorld(hasMapper: true) { world in
      let (old, new, device) = try await world.migrate(world.spec("g.dscow"))
      #expect(try SmallFile.read(world.mapper + "/flushed") == device.path)
      try await world.destroy(old)
      try await eventually("one is left") { try await world.status().map(\.domain) == [6] }
      #expect(World.names(world.mapper).contains("5-51712"))
      try await world.destroy(new)
      try await eventually("all is gone") {
        !World.names(world.mapper).contains("5-51712") && world.directories().isEmpty
      }
    }
  }

  @Test("A migration that fails leaves the disk to the old domain")
  func failedMigration() async throws {
    try await inWorld { world in
      let (old, new, _) = try await world.migrate(world.spec("g.dscow"))
      // The source is resumed while its copy, which never ran, is there.
      try world.play(5, "running")
      try await Task.sleep(for: .milliseconds(1500))
      #expect(try await world.state(old) == .ready, "nothing is held for one that is paused")
      try await world.destroy(new)
      try await eventually("one is left") { try await world.status().map(\.domain) == [5] }
      let status = try #require(try await world.status(5).first)
      #expect(status.state == .ready)
      #expect(status.users == nil)
      #expect(status.identity == nil)
      #expect(try await world.write(old, filled(1)) == 0)
      try await world.destroy(old)
      try await world.isAllGone()
    }
  }

  @Test("Beside a domain that runs, that may run or that is another VM nobody gets its disk")
  func refused() async throws {
    try await inWorld { world in
      let (spec, store) = (world.spec("g.dscow"), world.folder.file("g.dscow"))
      try world.create(5, "running")
      let (old, _) = try await world.start(5, spec)
      func sentence(_ spec: String, vm: String = "/vm/7c1d", writable: Bool = true) async throws
        -> String
      {
        try world.create(6, vm: vm, "paused")
        let new = try world.attach(6, spec, writable: writable)
        let sentence = try await world.addFailure(new)
        try await world.destroy(new)
        return sentence
      }
      let same = "this is the same VM (UUID 7c1d); destroy one of them"
      #expect(
        try await sentence(spec)
          == "store \(store) is in use by domain 5 (xvda), which is running: \(same)")
      // One that is paused may run at any time.
      try world.play(5, "paused")
      #expect(try await sentence(spec).contains("which is running: \(same)"))
      try world.play(5, "shutdown")
      let other = "store \(store) is in use by domain 5 (xvda): detach it there first"
      #expect(try await sentence(spec, vm: "/vm/other").hasPrefix(other))
      #expect(try await sentence(world.spec("g.dscow", options: "?force=yes")).hasPrefix(other))
      #expect(try await sentence(spec, writable: false).hasPrefix(other))
      #expect(try await world.status().filter { $0.domain == 5 }.first?.users == nil)

      // Nobody can be asked.
      try #require(rename(world.xen, world.xen + ".away") == 0)
      try world.toolstack.createDomain(6, name: "guest6")
      try world.toolstack.write("/local/domain/6/vm", "/vm/7c1d")
      let new = try world.attach(6, spec)
      let unknown = try await world.addFailure(new)
      #expect(
        unknown.hasPrefix(
          "store \(store) is in use by domain 5 (xvda), and whether that is running cannot be found"
        ),
        "\(unknown)")
      #expect(unknown.hasSuffix(same))
      try #require(rename(world.xen + ".away", world.xen) == 0)
      try world.detach(new)
      #expect(try await world.state(old) == .ready)
      #expect(try await world.write(old, filled(1)) == 0)
    }
  }

  @Test("A stub domain joins its guest's disk at once, and the other way round")
  func stubDomainJoins() async throws {
    try await inWorld { world in
      let spec = world.spec("g.dscow")
      try world.create(5, "paused")
      let (guest, device) = try await world.start(5, spec)
      try world.create(6, vm: "/vm/stub", target: 5, "running")
      try world.setBusy(device, true)
      let (stub, same) = try await world.start(6, spec)
      #expect(same == device)
      try world.play(5, "running")
      try await Task.sleep(for: .milliseconds(1500))
      #expect(try await world.state(guest) == .ready, "both run, and are one")

      // The two migrate: first the guest's new domain, then its stub domain.
      try world.setBusy(device, false)
      try world.play(5, "shutdown")
      try world.create(7, "paused")
      let (newGuest, third) = try await world.start(7, spec)
      try world.create(8, vm: "/vm/stub2", target: 7, "running")
      let (newStub, fourth) = try await world.start(8, spec)
      #expect([third, fourth] == [device, device])
      #expect(
        try await world.status(8).first?.users == ["5-51712", "6-51712", "7-51712", "8-51712"])
      for disk in [guest, stub] { try await world.destroy(disk) }
      try await eventually("two are left") { try await world.status().map(\.domain) == [7, 8] }
      #expect(try await world.state(newStub) == .ready)
      for disk in [newGuest, newStub] { try await world.destroy(disk) }
      try await world.isAllGone()
    }
  }

  @Test("A guest and its stub domain that start at the same time get one disk")
  func together() async throws {
    try await inWorld { world in
      try await world.makeStore("g.dscow")
      let spec = world.spec("g.dscow")
      try world.create(5, "paused")
      try world.create(6, vm: "/vm/stub", target: 5, "running")
      let (guest, stub) = (try world.attach(5, spec), try world.attach(6, spec))
      async let first = world.add(guest)
      async let second = world.add(stub)
      let devices = try await [first, second]
      #expect(devices[0] == devices[1])
      #expect(try await world.workers().count == 1)
    }
  }

  @Test(
    "The old domain's last write is over before `add` is answered, on a store that is slow",
    .enabled(if: hasStrace, "strace makes writes slow"))
  func drained() async throws {
    try await inWorld { world in
      try await world.makeStore("g.dscow")
      try world.useWorkers(
        "exec strace -D -f -o /dev/null -e trace=pwrite64,pwritev"
          + " -e inject=pwrite64,pwritev:delay_enter=700000")
      let spec = world.spec("g.dscow")
      try world.create(5, "running")
      let (old, device) = try await world.start(5, spec)
      try world.setBusy(device, true)
      let write = Answer {
        let wire = try await world.wire(of: old)
        let code = try wire.write(filled(1), at: 0)
        try world.setBusy(device, false)
        return code
      }
      // The guest is suspended with the write under way.
      let new = try world.suspend(spec)
      let added = Answer { try await world.add(new) }
      while added.now == nil {
        try await Task.sleep(for: .milliseconds(5))
        #expect(write.now != nil || added.now == nil, "answered before the write was")
        try #require(try await world.status(6).first?.state != .failed)
      }
      #expect(write.now == 0)
      #expect(added.now == device)
      // What the new one writes over it stays.
      #expect(try await world.write(old, filled(2)) == 0)
      try await world.destroy(old)
      let wire = try await world.wire(of: new)
      #expect(try wire.read(4096, at: 0) == filled(2))
    }
  }

  @Test("While a request is under way nobody joins; then the old one goes on")
  func notQuiet() async throws {
    try await inWorld { world in
      let spec = world.spec("g.dscow")
      try world.create(5, "running")
      let (old, device) = try await world.start(5, spec)
      try world.setBusy(device, true)
      let new = try world.suspend(spec)
      let sentence = try await world.addFailure(new)
      #expect(
        sentence.contains("the same VM, whose last requests were not finished within 20 seconds"),
        "\(sentence)")
      try await world.destroy(new)
      try world.setBusy(device, false)
      try world.play(5, "running")
      #expect(try await world.state(old) == .ready)
      #expect(try await world.write(old, filled(1)) == 0)
    }
  }

  @Test("The daemon is killed while two domains share a disk, and when one has left it")
  func daemonKilled() async throws {
    try await inWorld { world in
      let (old, new, device) = try await world.migrate(world.spec("g.dscow"))
      let worker = try await world.worker(new)
      try world.play(6, "running")
      func restart() async throws {
        try await world.stopDaemon(SIGKILL)
        try await world.startDaemon()
      }
      try await restart()
      for disk in [old, new] {
        try await eventually("it is served") { try await world.state(disk) == .ready }
        #expect(try await world.worker(disk) == worker)
      }
      #expect(try await world.status(6).first?.users == ["5-51712", "6-51712"])
      // A script that lost its daemon asks again.
      #expect(try await world.add(new, boots: false).path == device.path)

      try await world.destroy(old)
      try await eventually("one is left") { try await world.status().map(\.domain) == [6] }
      try await restart()
      try await eventually("it is served") { try await world.state(new) == .ready }
      #expect(try await world.status().map(\.domain) == [6])
      #expect(try await world.worker(new) == worker)
      #expect(world.directories() == ["5-51712"])

      // A worker that dies is replaced for whoever is there.
      kill(worker, SIGKILL)
      try await eventually("there is another worker") {
        try await world.status(6).first?.worker.map { $0 != worker } == true
      }
      // One that goes while no daemon is there.
      try await world.stopDaemon(SIGKILL)
      try world.detach(new)
      try world.toolstack.destroyDomain(6)
      try world.play(6, nil)
      try await world.startDaemon()
      try await eventually("everything is gone") {
        let workers = try await world.workers()
        return workers.isEmpty && world.directories().isEmpty
      }
    }
  }

  @Test("Two domains that run from one disk are held, over a daemon's death, until one is gone")
  func held() async throws {
    try await inWorld { world in
      let store = world.folder.file("g.dscow")
      let (old, new, _) = try await world.migrate(world.spec("g.dscow"))
      try world.play(6, "running")
      try world.play(5, "running")
      let sentence =
        "domains 5 (xvda) and 6 (xvda) run both from store \(store): all requests wait until one of"
        + " them is destroyed or paused"
      try await eventually("it is held") {
        let status = try await world.status(6).first
        return status?.error?.contains(sentence) == true && status?.worker == nil
      }
      try await eventually("the log says so") {
        try SmallFile.read(world.folder.file("daemon.log")).contains(sentence)
      }
      try await world.stopDaemon(SIGKILL)
      try await world.startDaemon()
      try await Task.sleep(for: .milliseconds(1500))
      #expect(try await world.workers().isEmpty, "it is held still")
      try await world.destroy(old)
      try await eventually("it goes on") { try await world.state(new) == .ready }
      #expect(try await world.write(new, filled(3)) == 0)
    }
  }

  @Test("A device of the device-mapper is suspended as long")
  func heldMapped() async throws {
    try await inWorld(hasMapper: true) { world in
      let (old, new, _) = try await world.migrate(world.spec("g.dscow"))
      try world.play(6, "running")
      try world.play(5, "running")
      let mark = world.mapper + "/5-51712.held"
      try await eventually("it is held") { access(mark, F_OK) == 0 }
      try await eventually("it is told") { try world.node(old, "state") == "degraded" }
      try world.play(6, "running paused")
      try await eventually("it goes on") { access(mark, F_OK) != 0 }
      try await eventually("it is told") { try world.node(new, "state") == "ready" }
      // Both go while it is held.
      try world.play(6, "running")
      try await eventually("it is held") { access(mark, F_OK) == 0 }
      for disk in [old, new] { try await world.destroy(disk) }
      try await eventually("all is gone") {
        !World.names(world.mapper).contains { $0.hasPrefix("5-51712") }
          && world.directories().isEmpty
      }
    }
  }

  @Test("A store that is missing at a restore is not made, whoever had it")
  func storeMissingAtRestore() async throws {
    try await inWorld { world in
      let spec = world.spec("g.dscow")
      try world.create(5, "running")
      let (old, _) = try await world.start(5, spec)
      try await world.destroy(old)
      try await world.isGone(old)
      try #require(unlink(world.folder.file("g.dscow")) == 0)
      try world.create(6, "paused")
      let new = try world.attach(6, spec)
      let sentence = try await world.addFailure(new, boots: false)
      #expect(
        sentence.contains("it is created only for a domain that xl boots, which is not known"),
        "\(sentence)")
      #expect(access(world.folder.file("g.dscow"), F_OK) != 0)
    }
  }

  @Test("In a driver domain nobody joins")
  func driverDomain() async throws {
    try await inWorld(driver: 7) { world in
      try await world.makeStore("g.dscow")
      let (spec, store) = (world.spec("g.dscow"), world.folder.file("g.dscow"))
      try world.create(5, "shutdown")
      let old = try world.attach(5, spec)
      try await world.add(old, boots: false)
      try world.create(6, "paused")
      let new = try world.attach(6, spec)
      let sentence = try await world.addFailure(new, boots: false)
      #expect(
        sentence.hasPrefix(
          "store \(store) is in use by domain 5 (xvda): in a driver domain nothing tells whether"),
        "\(sentence)")
      #expect(try await world.state(old) == .ready)
    }
  }
}
