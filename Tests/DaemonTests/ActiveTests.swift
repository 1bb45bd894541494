// SPDX-License-Identifier: Apache-2.0
// Named disks that are only kept by their names: deactivated and activated.

import Glibc
import Testing
import TestSupport

@testable import Daemon

extension World {
  func activate(_ name: String) async throws -> ControlReply.Device {
    var request = ControlRequest(.activate)
    request.name = name
    return try #require(try await ask(request).device)
  }

  /// The sentence with which that fails.
  func activateFailure(_ name: String) async throws -> String {
    do { return "active: \(try await activate(name))" } catch let error as DiskFailure {
      return error.sentence
    }
  }

  func deactivate(_ name: String) async throws {
    var request = ControlRequest(.deactivate)
    request.name = name
    _ = try await ask(request)
  }

  /// The sentence with which that fails.
  func deactivateFailure(_ name: String) async throws -> String {
    do { try await deactivate(name) } catch let error as DiskFailure { return error.sentence }
    return "inactive"
  }
}

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct ActiveTests {
  private let block = [UInt8](repeating: 0x5A, count: 4096)
  private let owner = "8c7e6ac0-4b2b-4b5c-9f6e-0a4c4d1f2e3b"

  @Test(
    "An inactive disk is a name and nothing else, and comes back as it was",
    arguments: [false, true])
  func life(hasMapper: Bool) async throws {
    try await inWorld(hasMapper: hasMapper) { world in
      let spec = world.spec("d.dscow")
      let device = try await world.attachNamed("data", spec, create: true, owner: owner)
      if !hasMapper { #expect(try world.wire().write(block, at: 8192) == 0) }
      try await world.deactivate("data")
      let status = try #require(try await world.named("data"))
      #expect(status.state == .inactive)
      #expect(status.store == world.folder.file("d.dscow") && status.format == "dscow")
      #expect(status.base == world.folder.file("base") && status.owner == owner)
      #expect(status.link == nil && status.device == nil && status.worker == nil)
      #expect(status.error == nil)
      #expect(try await world.remains() == ["data.wish"])
      #expect(try world.devices == 0)
      #expect(World.names(world.mapper).filter { $0 != "flushed" } == [])
      #expect(try await world.ask(ControlRequest(.status, domain: "data")).disks == [status])
      try await world.deactivate("data")
      // Nobody has the store locked.
      if !hasMapper {
        try await world.run("dscow_tool", "check", "--repair", world.folder.file("d.dscow"))
      }
      #expect(try await world.activate("data") == device)
      #expect(try await world.named("data")?.state == .ready)
      #expect(try await world.activate("data") == device, "and again")
      if !hasMapper { #expect(try world.wire().read(4096, at: 8192) == block) }
      try await world.deactivate("data")
      try await world.detachNamed("data")
      #expect(try await world.remains() == [])
      #expect(try await world.status().isEmpty)
      for why in [
        try await world.activateFailure("data"), try await world.deactivateFailure("data"),
      ] { #expect(why.contains("there is no named disk 'data'"), "\(why)") }
    }
  }

  @Test("The store of an inactive disk may be another's; then it is not activated, and says why")
  func storeOfAnother() async throws {
    try await inWorld { world in
      let spec = world.spec("d.dscow")
      try await world.attachNamed("data", spec, create: true)
      try await world.deactivate("data")
      try await world.attachNamed("other", spec)
      let why = try await world.activateFailure("data")
      #expect(why.contains("in use by the named disk other"), "\(why)")
      try await eventually("it is inactive, with the reason") {
        let status = try await world.named("data")
        return status?.state == .inactive && status?.error == why
      }
      #expect(try await world.named("other")?.state == .ready)
      // Its name is taken all the same.
      let taken = try await world.attachFailure("data", world.spec("e.dscow"), create: true)
      #expect(taken.contains("the name data is taken"), "\(taken)")
      try await world.detachNamed("other")
      // The same attach once more activates it.
      _ = try await world.attachNamed("data", spec)
      #expect(try await world.named("data")?.state == .ready)
      #expect(try await world.named("data")?.error == nil)
      #expect(try await world.status().count == 1, "no failure is left")
    }
  }

  @Test("A name whose disk has failed is free for an inactive one")
  func afterFailure() async throws {
    try await inWorld(daemon: false) { world in
      try #require(mkdir(world.runDirectory, 0o711) == 0)
      try #require(mkdir(world.runDirectory + "/named", 0o700) == 0)
      let wish = NamedWish(params: world.spec("none.dscow"))
      try world.file("run/named/data.wish", Array(wish.text.utf8))
      try await world.startDaemon()
      try await eventually("it has failed") { try await world.named("data")?.state == .failed }
      var request = ControlRequest(.attachNamed)
      (request.name, request.spec) = ("data", world.spec("d.dscow"))
      request.inactive = true
      _ = try await world.ask(request)
      try await eventually("the other is inactive") {
        let status = try await world.named("data")
        return status?.state == .inactive && status?.store == world.folder.file("d.dscow")
      }
      #expect(try await world.status().map(\.error) == [nil])
      #expect(try await world.remains() == ["data.wish"])
    }
  }

  @Test("A store that has gone is not created, and the disk stays inactive")
  func storeMissing() async throws {
    try await inWorld { world in
      try await world.attachNamed(
        "data", world.spec("d.dscow", options: "?create=yes"), create: true)
      try await world.deactivate("data")
      #expect(unlink(world.folder.file("d.dscow")) == 0)
      let why = try await world.activateFailure("data")
      #expect(why.contains("created only with 'dmu-xen attach --create'"), "\(why)")
      try await eventually("it is inactive") { try await world.named("data")?.state == .inactive }
      #expect(try await world.remains() == ["data.wish"])
    }
  }

  @Test("A disk that a guest uses is not deactivated", arguments: [false, true])
  func inUse(hasMapper: Bool) async throws {
    try await inWorld(hasMapper: hasMapper) { world in
      let device = try await world.attachNamed("data", world.spec("d.dscow"), create: true)
      let worker = try await world.named("data")?.worker
      let guest = try world.use(device, by: 5)
      let why = try await world.deactivateFailure("data")
      #expect(why.contains("is open by domain 5 (xvda)"), "\(why)")
      #expect(try await world.named("data")?.state == .ready)
      #expect(try await world.named("data")?.worker == worker)
      try world.detach(guest)
      try await world.deactivate("data")
      #expect(try await world.remains() == ["data.wish"])
    }
  }

  @Test("A daemon that ends, or dies within a deactivation, leaves the disk inactive")
  func daemons() async throws {
    try await inWorld(["worker.stop-timeout": "2"], hasMapper: true) { world in
      try await world.attachNamed("data", world.spec("d.dscow"), create: true)
      try await world.deactivate("data")
      let since = try await world.named("data")?.since
      try await world.stopDaemon(SIGKILL)
      try await world.startDaemon()
      #expect(try await world.named("data")?.state == .inactive)
      #expect(try await world.named("data")?.since == since)
      _ = try await world.activate("data")
      try world.file("mapper/flush-hangs", [])
      let why = try await world.deactivateFailure("data")
      #expect(why.contains("disk data is not deactivated yet: the device"), "\(why)")
      #expect(try await world.named("data")?.state == .stopping)
      #expect(try await world.activateFailure("data").contains("being detached"))
      try await world.stopDaemon(SIGKILL)
      #expect(unlink(world.mapper + "/flush-hangs") == 0)
      try await world.startDaemon()
      try await eventually("it is inactive") { try await world.named("data")?.state == .inactive }
      #expect(try await world.remains() == ["data.wish"])
      #expect(World.names(world.mapper) == ["flushed"])
    }
  }

  @Test("Over a reboot: the file of a disk says whether it is active, and the commands change that")
  func persistent() async throws {
    try await inWorld { world in
      let files = DiskFiles(configurationPath: world.configurationPath)
      func reboot() async throws {
        try await world.stopDaemon(SIGKILL)
        for pid in try await world.workers() { kill(pid, SIGKILL) }
        try await world.run("/bin/rm", "-rf", world.runDirectory)
        try await world.startDaemon()
        #expect(try await world.command { $0.attachAll() } == .done)
      }
      try await world.makeStore("d.dscow")
      var request = NamedRequest("data", world.spec("d.dscow"))
      (request.isPersistent, request.isInactive) = (true, true)
      #expect(try await world.attachByCommand(request) == .done)
      #expect(try await world.attachByCommand(request) == .done, "and again")
      #expect(try await world.named("data")?.state == .inactive)
      try await reboot()
      #expect(try await world.named("data")?.state == .inactive)
      #expect(try await world.command { $0.activate("data") } == .done)
      #expect(try await world.attachByCommand(request) == .done, "it is known, and stays active")
      #expect(try await world.named("data")?.state == .ready)
      #expect(try files.load(#require(DiskName("data")))?.isActive == false)
      #expect(try await world.command { $0.activate("data") } == .done)
      try await reboot()
      #expect(try await world.named("data")?.state == .ready)
      #expect(try await world.command { $0.deactivate("/dev/dmu/data") } == .done)
      try await reboot()
      #expect(try await world.named("data")?.state == .inactive)
      #expect(try await world.command { $0.detachNamed("data") } == .done)
      #expect(World.names(files.folder) == [])
      #expect(try await world.command { $0.activate("data") } == .noDisk)
      #expect(try await world.command { $0.deactivate("data") } == .noDisk)
    }
  }

  @Test("A file by hand keeps its words")
  func files() throws {
    let text = "# mine\nspec = \"dmu:raw:/active\"\n# active = 5\n"
    let inactive = DiskFiles.text(text, isActive: false)
    #expect(inactive == text + "active = false\n")
    #expect(DiskFiles.text(inactive, isActive: false) == inactive)
    #expect(DiskFiles.text(inactive, isActive: true) == text)
    #expect(
      DiskFiles.text("active=false\nspec = \"dmu:raw:/x\"", isActive: true)
        == "spec = \"dmu:raw:/x\"\n")
    #expect(try DiskFiles.parse(inactive, file: "f").isActive == false)
    #expect(try DiskFiles.parse(text + "active = true\n", file: "f").isActive)
    #expect(throws: ConfigurationError.self) {
      try DiskFiles.parse(text + "active = 1\n", file: "f")
    }
  }

  @Test("Wishes say the same when they are read again, and what is inactive is no disk")
  func values() {
    var wish = NamedWish(params: "dmu:raw:/x", readOnly: true)
    #expect(wish.wanted != nil)
    let active = wish
    wish.inactiveSince = 1_800_000_000
    #expect(NamedWish(wish.text) == wish)
    #expect(wish.wanted == nil)
    #expect(wish.isOfSameDisk(as: active) && wish != active)
    let disk = DiskStatus(.named(DiskName("data")!), vdev: nil, state: .inactive, since: 0)
    #expect(DiskRates.between([disk], [disk], seconds: 1).isEmpty)
    #expect(!MetricsText.render([disk], .prometheus).contains("disk=\"data\""))
    #expect(CompletionWords.words(of: .named, in: [disk]) == ["data"])
    #expect(StatusTable.render([disk]).contains("inactive"))
  }
}
