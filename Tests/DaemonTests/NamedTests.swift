// SPDX-License-Identifier: Apache-2.0
// Named disks: attached and detached by an admin, used by guests as phy:/dev/dmu/NAME.

import BlockIO
import Fakes
import Glibc
import SystemIO
import Testing
import TestSupport

@testable import Daemon

extension World {
  /// What `dmu-xen attach` asks.
  @discardableResult
  func attachNamed(
    _ name: String, _ spec: String, readOnly: Bool = false, create: Bool = false,
    owner: String? = nil
  ) async throws -> ControlReply.Device {
    var request = ControlRequest(.attachNamed)
    (request.name, request.spec, request.readOnly) = (name, spec, readOnly)
    (request.create, request.owner) = (create, owner)
    return try #require(try await ask(request).device)
  }

  /// The sentence with which that fails.
  func attachFailure(
    _ name: String, _ spec: String, readOnly: Bool = false, create: Bool = false,
    owner: String? = nil
  ) async throws -> String {
    do {
      let device = try await attachNamed(
        name, spec, readOnly: readOnly, create: create, owner: owner)
      return "attached \(device)"
    } catch let error as DiskFailure { return error.sentence }
  }

  /// `dmu-xen attach`.
  func attachByCommand(_ request: NamedRequest) async throws -> CommandStatus {
    try await command { client in client.attach(request) }
  }

  func detachNamed(_ name: String) async throws {
    var request = ControlRequest(.detachNamed)
    request.name = name
    _ = try await ask(request)
  }

  /// The sentence with which that fails.
  func detachFailure(_ name: String) async throws -> String {
    do { try await detachNamed(name) } catch let error as DiskFailure { return error.sentence }
    return "detached"
  }

  func named(_ name: String) async throws -> DiskStatus? {
    try await status().first { $0.name == name }
  }

  /// What a named disk's link leads to; nil when there is none.
  func link(_ name: String) -> String? { FileUsers.link("\(runDirectory)/dev/\(name)") }

  /// What is left of named disks, and of others, in the run directory.
  func remains() async throws -> [String] {
    directories() + World.names(runDirectory + "/dev") + World.names(runDirectory + "/links")
      + World.names(runDirectory + "/named") + logs()
      + (try await workers()).map { "worker \($0)" }
  }

  /// A guest that has a device by Xen's own script.
  func use(_ device: ControlReply.Device, by domain: Int) throws -> FakeDisk {
    var disk = FakeDisk(domain: domain, params: "/dev/dmu/data")
    disk.script = "/etc/xen/scripts/block"
    disk.backendDomain = driver ?? 0
    try toolstack.createDomain(domain, name: "guest\(domain)")
    try toolstack.attach(disk)
    try toolstack.backendWaits(disk)
    try toolstack.write(disk.backend + "/physical-device", device.number)
    return disk
  }
}

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct NamedTests {
  private let block = [UInt8](repeating: 0x5A, count: 4096)

  @Test("A named disk comes, is served, and goes with everything; its store stays")
  func life() async throws {
    try await inWorld { world in
      let spec = world.spec("d.dscow")
      let device = try await world.attachNamed("data", spec, create: true)
      #expect(device.path == world.runDirectory + "/dev/data")
      #expect(world.link("data") == "/stand-in/nbd0")
      let status = try #require(try await world.named("data"))
      #expect(status.state == .ready)
      #expect(status.domain == nil && status.vdev == nil && status.number == nil)
      #expect(status.link == device.path)
      #expect(status.device == "/stand-in/nbd0")
      #expect(try await world.ask(ControlRequest(.status, domain: "data")).disks?.count == 1)
      #expect(
        try await world.ask(ControlRequest(.status, domain: "/dev/dmu/data")).disks?.count == 1)
      do {
        let wire = try world.wire()
        #expect(try wire.write(block, at: 8192) == 0)
      }
      try await world.detachNamed("data")
      #expect(try await world.remains() == [])
      #expect(try world.devices == 0)
      #expect(try await world.status().isEmpty)
      // What was never flushed is in the store all the same.
      try await world.attachNamed("other", spec)
      #expect(try world.wire().read(4096, at: 8192) == block)
      try await world.detachNamed("other")
    }
  }

  @Test("The same by the device-mapper: the device is flushed, and removed")
  func mapped() async throws {
    try await inWorld(hasMapper: true) { world in
      try await world.attachNamed("data", world.spec("d.dscow"), create: true)
      let name = world.folder.file("d.dscow")
      #expect(
        try SmallFile.read(world.mapper + "/data") == "LIVE \(name) ro:\(world.folder.file("base"))"
      )
      let status = try #require(try await world.named("data"))
      #expect(status.transport == .dm)
      #expect(status.device == "/stand-in/dmu-data")
      #expect(world.link("data") == status.kernelDevice)
      try await world.detachNamed("data")
      #expect(try await world.remains() == [])
      #expect(World.names(world.mapper) == ["flushed"])
    }
  }

  @Test("What udev is to know of the link is there before the device, and says what may be probed")
  func marks() async throws {
    try await inWorld { world in
      var request = ControlRequest(.attachNamed)
      (request.name, request.spec) = ("data", world.spec("d.dscow"))
      (request.create, request.probe) = (true, true)
      _ = try await world.ask(request)
      let files = world.runDirectory + "/links"
      #expect(World.names(files) == ["dmu-data", "dmu-xen data"])
      for file in World.names(files) {
        #expect(
          try SmallFile.read("\(files)/\(file)") == "DMU_XEN_NAME=data\nDMU_XEN_PROBE=1\n")
      }
    }
  }

  @Test("A store is created only when the admin says so, not by the spec or the configuration")
  func creation() async throws {
    try await inWorld { world in
      for options in ["", "?create=yes"] {
        let why = try await world.attachFailure("data", world.spec("d.dscow", options: options))
        #expect(why.contains("created only with 'dmu-xen attach --create'"), "\(why)")
      }
      let never = try await world.attachFailure(
        "data", world.spec("d.dscow", options: "?create=no"), create: true)
      #expect(never.contains("its spec forbids to create one"), "\(never)")
      let readOnly = try await world.attachFailure(
        "data", world.spec("d.dscow"), readOnly: true, create: true)
      #expect(readOnly.contains("none is made for a disk that is read only"), "\(readOnly)")
      let nowhere = try await world.attachFailure(
        "data", "dmu:dscow:/nowhere/d.dscow:\(world.folder.file("base"))", create: true)
      #expect(nowhere.contains("its directory does not exist"), "\(nowhere)")
      #expect(access(world.folder.file("d.dscow"), F_OK) != 0)
      // The name is free again, and what failed is remembered until it goes well.
      #expect(try await world.remains() == [])
      try await eventually("it is remembered") {
        try await world.named("data")?.note == "its attach failed"
      }
      try await world.attachNamed("data", world.spec("d.dscow"), create: true)
      #expect(try await world.status().count == 1)
    }
  }

  @Test("Names and specs that are none, and owners, are refused")
  func malformed() async throws {
    try await inWorld { world in
      for name in ["", "5", "5-51712", "dmu-x", "a/b", "a b", ".x", "ä"] {
        let why = try await world.attachFailure(name, world.spec("d.dscow"))
        #expect(why.contains("is no name for a disk"), "\(name): \(why)")
      }
      let spec = try await world.attachFailure("data", "dscow:/x")
      #expect(spec.contains("dmu:"), "\(spec)")
      let owner = try await world.attachFailure("data", world.spec("d.dscow"), owner: "me")
      #expect(owner.contains("is no UUID of an owner"), "\(owner)")
      #expect(try await world.detachFailure("data").contains("there is no named disk 'data'"))
      #expect(try await world.remains() == [])
    }
  }

  @Test("A name that is taken: the same again is no error, anything else is refused")
  func taken() async throws {
    try await inWorld { world in
      let owner = "8C7E6AC0-4B2B-4B5C-9F6E-0A4C4D1F2E3B"
      let spec = world.spec("d.dscow")
      let first = try await world.attachNamed("data", spec, create: true, owner: owner)
      let worker = try await world.named("data")?.worker
      #expect(try await world.attachNamed("data", spec, owner: owner.lowercased()) == first)
      #expect(try await world.named("data")?.worker == worker)
      #expect(try await world.named("data")?.owner == owner.lowercased())
      let other = try await world.attachFailure("data", world.spec("e.dscow"), create: true)
      #expect(other.contains("the name data is taken by a disk of owner"), "\(other)")
      #expect(other.contains(spec))
      for why in [
        try await world.attachFailure("data", spec),
        try await world.attachFailure("data", spec, readOnly: true, owner: owner),
      ] { #expect(why.contains("is taken"), "\(why)") }
      #expect(access(world.folder.file("e.dscow"), F_OK) != 0)
      // Something that is no link has the place of another.
      try #require(mkdir(world.runDirectory + "/dev/lab", 0o700) == 0)
      let node = try await world.attachFailure("lab", world.spec("e.dscow"), create: true)
      #expect(node.contains("is something else than a link"), "\(node)")
    }
  }

  @Test("A store is a guest's or a named disk's, whoever comes first")
  func sharedStore() async throws {
    try await inWorld { world in
      let guest = try world.attach(5, world.spec("g.dscow"))
      try await world.add(guest)
      let why = try await world.attachFailure("data", world.spec("g.dscow"))
      #expect(why.contains("in use by domain 5 (xvda)"), "\(why)")
      try await world.attachNamed("data", world.spec("d.dscow"), create: true)
      let second = try world.attach(6, world.spec("d.dscow"))
      let no = try await world.addFailure(second)
      #expect(no.contains("in use by the named disk data"), "\(no)")
      let third = try await world.attachFailure("more", world.spec("d.dscow"))
      #expect(third.contains("in use by the named disk data"), "\(third)")
      // As a base, too.
      let base = try await world.attachFailure(
        "more", "dmu:dscow:\(world.folder.file("e.dscow")):\(world.folder.file("d.dscow"))",
        create: true)
      #expect(base.contains("in use as the store of the named disk data"), "\(base)")
      // Read only it may be had more than once.
      try await world.detachNamed("data")
      try await world.attachNamed("one", world.spec("d.dscow"), readOnly: true)
      try await world.attachNamed("two", world.spec("d.dscow"), readOnly: true)
      #expect(try await world.named("two")?.readOnly == true)
    }
  }

  @Test("A named disk waits for a guest that is going with its store")
  func waits() async throws {
    try await inWorld { world in
      let guest = try world.attach(5, world.spec("g.dscow"))
      try await world.add(guest)
      let worker = try await world.worker(guest)
      kill(worker, SIGSTOP)
      try world.toolstack.beginDetach(guest)
      async let device = world.attachNamed("data", world.spec("g.dscow"))
      try await eventually("it waits") {
        try await world.named("data")?.error?.contains("waiting for domain 5 (xvda)") == true
      }
      try world.toolstack.backendCloses(guest)
      try world.toolstack.finishDetach(guest)
      kill(worker, SIGCONT)
      _ = try await device
      #expect(!isAlive(worker))
    }
  }

  @Test("A disk that guests use is not detached, and those are named; afterwards it is")
  func inUse() async throws {
    for hasMapper in [false, true] {
      try await inWorld(hasMapper: hasMapper) { world in
        try await world.makeStore("d.dscow")
        let device = try await world.attachNamed(
          "data", world.spec("d.dscow"), readOnly: !hasMapper)
        let worker = try await world.named("data")?.worker
        let (one, two) = (try world.use(device, by: 5), try world.use(device, by: 6))
        let why = try await world.detachFailure("data")
        #expect(
          why.contains("/dev/data is open by domains 5 (xvda) and 6 (xvda)"), "\(why)")
        #expect(why.contains("xl block-detach"))
        try world.detach(one)
        #expect(try await world.detachFailure("data").contains("open by domain 6 (xvda)"))
        // Nothing has changed for it.
        #expect(try await world.named("data")?.state == .ready)
        #expect(try await world.named("data")?.worker == worker)
        // A domain that is gone uses nothing, whatever is left of it.
        try world.toolstack.destroyDomain(6)
        #expect(two.domain == 6)
        if hasMapper {
          try world.file("mapper/data.open", [])
          let open = try await world.detachFailure("data")
          #expect(open.contains("is open by something of this host"), "\(open)")
          #expect(unlink(world.mapper + "/data.open") == 0)
        }
        try await world.detachNamed("data")
        #expect(try await world.remains() == [])
      }
    }
  }

  @Test("A worker that is killed is replaced; `clear`, metrics and `log` know the disk by its name")
  func killed() async throws {
    try await inWorld { world in
      try await world.attachNamed("data", world.spec("d.dscow"), create: true)
      do {
        let wire = try world.wire()
        #expect(try wire.write(block, at: 16384) == 0)
      }
      let first = try #require(try await world.named("data")?.worker)
      kill(first, SIGKILL)
      try await eventually("another worker serves") {
        let status = try await world.named("data")
        return status?.state == .ready && status?.worker != first
      }
      #expect(try world.wire().read(4096, at: 16384) == block)
      #expect(world.link("data") == "/stand-in/nbd0")
      let cleared = try await world.ask(ControlRequest(.clear, target: "data")).disks
      #expect(cleared?.map(\.name) == ["data"])
      let metrics = try await world.ask(ControlRequest(.metrics)).disks ?? []
      let text = MetricsText.render(metrics, .prometheus)
      #expect(text.contains("dmu_disk_state{domain=\"-\",disk=\"data\",state=\"ready\"} 1"))
      #expect(
        try SmallFile.read(world.folder.file("daemon.log")).contains(" disk=data "))
    }
  }

  @Test("A daemon that ends, or is killed, leaves the disk; the next one keeps worker and link")
  func adopted() async throws {
    for hasMapper in [false, true] {
      try await inWorld(hasMapper: hasMapper) { world in
        try await world.attachNamed("data", world.spec("d.dscow"), create: true)
        let worker = try #require(try await world.named("data")?.worker)
        for signal in [SIGTERM, SIGKILL] {
          try await world.stopDaemon(signal)
          #expect(isAlive(worker))
          if signal == SIGKILL { #expect(unlink(world.runDirectory + "/dev/data") == 0) }
          try await world.startDaemon()
          try await eventually("it is taken over") {
            try await world.named("data")?.state == .ready
          }
          #expect(try await world.named("data")?.worker == worker)
          #expect(world.link("data") != nil, "and has its link")
        }
        #expect(try await world.named("data")?.transport == (hasMapper ? .dm : .nbd))
        kill(worker, SIGKILL)
        try await eventually("another worker serves") {
          let status = try await world.named("data")
          return status?.state == .ready && status?.worker != worker
        }
        try await world.detachNamed("data")
        #expect(try await world.remains() == [])
      }
    }
  }

  @Test("A daemon that dies while it detaches, or attaches: the next one goes on with that")
  func interrupted() async throws {
    try await inWorld(["worker.stop-timeout": "2"], hasMapper: true) { world in
      try await world.attachNamed("data", world.spec("d.dscow"), create: true)
      try world.file("mapper/flush-hangs", [])
      let why = try await world.detachFailure("data")
      #expect(why.contains("disk data is not detached yet: the device"), "\(why)")
      #expect(
        try await world.attachFailure("data", world.spec("d.dscow")).contains("being detached"))
      try await world.stopDaemon(SIGKILL)
      #expect(unlink(world.mapper + "/flush-hangs") == 0)
      // One that was wanted, and not yet there.
      let wish = NamedWish(params: world.spec("d.dscow"))
      try world.file("run/named/more.wish", Array(wish.text.utf8))
      try world.file("run/named/5.wish", Array(wish.text.utf8))
      try world.file("run/named/odd.wish", [0xFF, 0xFE, 10])
      try await world.startDaemon()
      try await eventually("the one is gone, the other there") {
        let status = try await world.status()
        return status.map(\.name) == ["more"] && status.first?.state == .ready
      }
      #expect(World.names(world.mapper) == ["flushed", "more"])
      let log = try SmallFile.read(world.folder.file("daemon.log"))
      #expect(log.contains("this is no wish for a named disk"))
    }
  }

  @Test("A disk that was promised and cannot be served stays failed, until it can, or is detached")
  func failedLater() async throws {
    try await inWorld(daemon: false) { world in
      try #require(mkdir(world.runDirectory, 0o711) == 0)
      try #require(mkdir(world.runDirectory + "/named", 0o700) == 0)
      for name in ["data", "more"] {
        let wish = NamedWish(params: world.spec("\(name).dscow"))
        try world.file("run/named/\(name).wish", Array(wish.text.utf8))
      }
      try await world.startDaemon()
      for name in ["data", "more"] {
        try await eventually("\(name) has failed") {
          let status = try await world.named(name)
          return status?.state == .failed && status?.error?.contains("does not exist") == true
        }
      }
      try await world.makeStore("data.dscow")
      _ = try await world.ask(ControlRequest(.reload))
      try await eventually("it is served") { try await world.named("data")?.state == .ready }
      try await world.detachNamed("more")
      #expect(try await world.status().map(\.name) == ["data"])
    }
  }

  @Test("xenstored loses its memory, or the run directory is wiped: named disks stay")
  func amnesia() async throws {
    try await inWorld { world in
      try await world.attachNamed("data", world.spec("d.dscow"), create: true)
      let worker = try await world.named("data")?.worker
      try world.xenstored.restart(keepingData: false)
      try await eventually("the daemon is back") {
        try FakeToolstack(world.xenstored).read("/local/domain/0/dmu-xen/state") == "running"
      }
      try await Task.sleep(for: .milliseconds(300))
      #expect(try await world.named("data")?.worker == worker)
      try await world.run("/bin/rm", "-rf", world.runDirectory)
      try await eventually("it is written again") {
        World.names(world.runDirectory + "/named") == ["data.wish"]
          && World.names(world.runDirectory + "/links").count == 2
      }
      try await eventually("the daemon listens again") {
        access(world.socket, F_OK) == 0
      }
      #expect(try await world.named("data")?.worker == worker)
      try await world.detachNamed("data")
      #expect(try await world.status().isEmpty)
    }
  }

  @Test("Kept over a reboot: files in disks.d say what is attached when the host has booted")
  func persistent() async throws {
    try await inWorld { world in
      let files = DiskFiles(configurationPath: world.configurationPath)
      #expect(files.folder == world.folder.file("dmu-xen/disks.d"))
      var request = NamedRequest("data", world.spec("d.dscow"))
      (request.create, request.isPersistent) = (true, true)
      request.owner = "8c7e6ac0-4b2b-4b5c-9f6e-0a4c4d1f2e3b"
      #expect(try await world.attachByCommand(request) == .done)
      #expect(try await world.attachByCommand(request) == .done, "and again")
      var other = NamedRequest("passing", world.spec("e.dscow"))
      other.create = true
      #expect(try await world.attachByCommand(other) == .done)
      #expect(World.names(files.folder) == ["data.toml"])
      // One that fails is not kept.
      var bad = NamedRequest("bad", world.spec("none.dscow"))
      bad.isPersistent = true
      #expect(try await world.attachByCommand(bad) == .failed)
      #expect(World.names(files.folder) == ["data.toml"])
      // The host goes down and comes up.
      try await world.stopDaemon(SIGKILL)
      for pid in try await world.workers() { kill(pid, SIGKILL) }
      try await world.run("/bin/rm", "-rf", world.runDirectory)
      try world.file("dmu-xen/disks.d/broken.toml", Array("spec = 5\n".utf8))
      try world.file("dmu-xen/disks.d/5.toml", Array("spec = \"dmu:raw:/x\"\n".utf8))
      try await world.startDaemon()
      #expect(try await world.status().isEmpty)
      #expect(try await world.command { $0.attachAll() } == .failed, "two make no sense")
      let status = try #require(try await world.named("data"))
      #expect(status.state == .ready)
      #expect(status.owner == request.owner)
      #expect(try await world.status().count == 1)
      for name in ["broken", "5"] { #expect(unlink("\(files.folder)/\(name).toml") == 0) }
      #expect(try await world.command { $0.attachAll() } == .done)
      #expect(try await world.attachByCommand(NamedRequest("data", nil)) == .done)
      #expect(try await world.attachByCommand(NamedRequest("passing", nil)) == .noDisk)
      #expect(try await world.command { $0.detachNamed("data") } == .done)
      #expect(World.names(files.folder) == [])
      #expect(try await world.command { $0.detachNamed("data") } == .noDisk)
      #expect(try await world.remains() == [])
    }
  }

  @Test("A file of a disk that is in use stays, and one of a disk that is not attached goes")
  func persistentDetach() async throws {
    try await inWorld { world in
      let files = DiskFiles(configurationPath: world.configurationPath)
      var request = NamedRequest("data", world.spec("d.dscow"))
      (request.create, request.isPersistent) = (true, true)
      #expect(try await world.attachByCommand(request) == .done)
      let device = try await world.attachNamed("data", world.spec("d.dscow"))
      let guest = try world.use(device, by: 5)
      #expect(try await world.command { $0.detachNamed("data") } == .failed)
      #expect(World.names(files.folder) == ["data.toml"])
      try world.detach(guest)
      try await world.detachNamed("data")
      #expect(World.names(files.folder) == ["data.toml"], "the daemon knows nothing of it")
      #expect(try await world.command { $0.detachNamed("/dev/dmu/data") } == .done)
      #expect(World.names(files.folder) == [])
    }
  }

  // MARK: - Values

  @Test("Names of disks, and what is none; a disk is a vbd or a name and never both")
  func names() {
    for good in ["a", "web-root", "A.b_c+d-9", String(repeating: "x", count: 63)] {
      #expect(DiskName(good)?.description == good)
      #expect(DiskID(good)?.name?.description == good)
      #expect(DiskName(path: "/dev/dmu/" + good)?.description == good)
    }
    for bad in [
      "", "9a", "-a", "a/b", "a b", "a:b", "a%", "ä", "a\n", "dmu-5-51712",
      String(repeating: "x", count: 64), "@", "[", "`", "{",
    ] { #expect(DiskName(bad) == nil, "\(bad)") }
    #expect(DiskName(path: "/dev/mapper/a") == nil)
    #expect(DiskID("5-51712") == DiskID(domain: 5, device: 51712))
    #expect(DiskID("5-x") == nil)
    #expect(DiskID(domain: 99, device: 1) < DiskID("a") ?? DiskID(domain: 0, device: 0))
    #expect(OwnerID("8C7E6AC0-4B2B-4B5C-9F6E-0A4C4D1F2E3B")?.description.first == "8")
    for bad in [
      "", "8c7e6ac0", "8c7e6ac0-4b2b-4b5c-9f6e-0a4c4d1f2e3", "gc7e6ac0-4b2b-4b5c-9f6e-0a4c4d1f2e3b",
    ] {
      #expect(OwnerID(bad) == nil, "\(bad)")
    }
  }

  @Test("Wishes and files of disks say the same when they are read again")
  func texts() throws {
    var wish = NamedWish(params: "dmu:dscow?block-size=64k:/a \"b\"\\c%3A:/dev/vg/x")
    var all = [wish]
    (wish.readOnly, wish.isProbed) = (true, true)
    wish.owner = OwnerID("8c7e6ac0-4b2b-4b5c-9f6e-0a4c4d1f2e3b")
    all.append(wish)
    for wish in all {
      #expect(NamedWish(wish.text) == wish)
      #expect(try DiskFiles.parse(DiskFiles.text(wish), file: "f") == wish)
    }
    #expect(NamedWish("readonly=1\n") == nil)
    for (text, why) in [
      ("", "f: spec: the key is missing"),
      ("spec = \"dmu:raw\"\n", "f line 1: spec: "),
      (
        "# x\nspec = \"dmu:raw:/x\"\nread-only = \"yes\"\n",
        "f line 3: read-only: the value must be true"
      ),
      ("spec = \"dmu:raw:/x\"\nowner = \"me\"\n", "f line 2: owner: the value must be a UUID"),
      ("spec = \"dmu:raw:/x\"\nprob = true\n", "f line 2: prob: there is no such key"),
      ("spec = dmu:raw:/x\n", "f line 1: the value dmu:raw:/x has no quotes"),
    ] {
      do throws(ConfigurationError) {
        Issue.record("\(text) is read as \(try DiskFiles.parse(text, file: "f"))")
      } catch { #expect("\(error)".hasPrefix(why), "\(error)") }
    }
  }

  @Test("Sentences and tables tell named disks from guests'")
  func sentences() {
    let (guest, disk) = (DiskID(domain: 5, device: 51712), DiskID("data"))
    #expect(guest.words == "domain 5 (xvda)")
    #expect(disk?.words == "the named disk data")
    guard let disk else { return }
    var status = DiskStatus(disk, vdev: nil, state: .degraded, since: 0)
    status.error = "one read failed"
    status.link = "/dev/dmu/data"
    #expect(status.isMeant(by: "data") && status.isMeant(by: "/dev/dmu/data"))
    #expect(!status.isMeant(by: "5") && !status.isMeant(by: "-"))
    let lines = StatusTable.render([status]).split(separator: "\n")
    #expect(lines[1].hasPrefix("-       data"))
    #expect(lines[1].contains("/dev/dmu/data"))
    #expect(lines[2] == "data: one read failed")
    let rates = DiskRates.between([status], [status], seconds: 1)
    #expect(RatesTable.render(rates).contains("-       data"))
    #expect(CompletionWords.words(of: .named, in: [status]) == ["data"])
    #expect(CompletionWords.words(of: .disk, in: [status]) == ["data"])
  }
}
