// SPDX-License-Identifier: Apache-2.0
// The block script itself, run as libxl runs it, under the helpers of Xen's own scripts and
// with xenstore's own tools.

import Daemon
import Fakes
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite(
  .serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"),
  .enabled(
    if: access("/etc/xen/scripts/block-common.sh", R_OK) == 0
      && access("/usr/bin/xenstore-write", X_OK) == 0 && access("/var/log/xen", W_OK) == 0,
    "Xen's scripts and xenstore's tools have to be installed, and their log has to be writable"))
struct ScriptTests {
  /// Runs `block-dmu ACTION` for a disk, under a process whose command line is `toolstack`: its
  /// exit status.
  private func run(
    _ world: World, _ action: String, _ disk: FakeDisk,
    toolstack: [String] = ["xl", "-v", "create", "guest.cfg"]
  ) async throws -> SystemIO.ExitStatus? {
    let scripts = world.folder.file("scripts")
    let programs = world.folder.file("bin")
    if mkdir(scripts, 0o755) == 0 {
      for name in World.names("/etc/xen/scripts") {
        #expect(symlink("/etc/xen/scripts/\(name)", "\(scripts)/\(name)") == 0)
      }
      let source = #filePath.replacing(
        "Tests/DaemonTests/ScriptTests.swift", with: "hotplug/block-dmu")
      unlink("\(scripts)/block-dmu")
      #expect(symlink(source, "\(scripts)/block-dmu") == 0)
      #expect(mkdir(programs, 0o755) == 0)
      // dmu-xen as installed, but for the place of the socket.
      let wrapper = try world.file(
        "bin/dmu-xen",
        Array(
          "#!/bin/sh\nexec '\(Programs.directory)/dmu-xen' \"$@\" --socket '\(world.socket)'\n".utf8
        )
      )
      #expect(chmod(wrapper, 0o755) == 0)
    }
    // The toolstack is a shell by another name, and its command a script for that shell, which
    // waits for the block script as libxl does.
    let place = world.folder.file("toolstack")
    _ = mkdir(place, 0o755)
    for word in toolstack.dropFirst() where !word.hasPrefix("-") {
      try world.file(
        "toolstack/\(word)",
        Array("'\(scripts)/block-dmu' \(action)\nexit $?\n".utf8))
    }
    unlink(place + "/" + toolstack[0])
    #expect(symlink("/bin/bash", place + "/" + toolstack[0]) == 0)
    var command = Command(
      "/usr/bin/env", ["-C", place, "./" + toolstack[0]] + toolstack.dropFirst(),
      environment: [
        "PATH=\(programs):/usr/bin:/bin", "XENSTORED_PATH=\(world.xenstored.socketPath)",
        "XENBUS_PATH=\(disk.relativeBackend)", "XENBUS_TYPE=vbd", "XENBUS_BASE_PATH=backend",
        "script=\(scripts)/block-dmu",
      ])
    let null = try Descriptor(path: "/dev/null", flags: O_RDWR)
    command.descriptors = [0: null.raw, 1: null.raw, 2: null.raw]
    let process = try command.start()
    return try await blocking { try process.wait(milliseconds: 60_000) }
  }

  @Test("add writes the device and says connected; remove is done, twice as well")
  func addRemove() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      #expect(try await run(world, "add", disk) == .exited(0))
      #expect(try world.toolstack.read(disk.backend + "/physical-device") == "2b:0")
      #expect(
        try world.toolstack.read(disk.backend + "/physical-device-path") == "/stand-in/nbd0")
      #expect(try world.toolstack.read(disk.backend + "/hotplug-status") == "connected")
      #expect(try world.toolstack.read(disk.backend + "/hotplug-error") == nil)
      try world.toolstack.beginDetach(disk)
      try world.toolstack.backendCloses(disk)
      #expect(try await run(world, "remove", disk) == .exited(0))
      #expect(try await run(world, "remove", disk) == .exited(0))
      try world.toolstack.finishDetach(disk)
      try await eventually("it is gone") { world.directories().isEmpty }
    }
  }

  @Test("Failures reach hotplug-error as the daemon's sentence, and the leftovers keep nothing")
  func failures() async throws {
    try await inWorld { world in
      let store = world.folder.file("back\\slash")
      let disk = try world.attach(5, "dmu:dscow:\(store)")
      #expect(try await run(world, "add", disk) == .exited(1))
      #expect(
        try world.toolstack.read(disk.backend + "/hotplug-error")
          == "store \(store) does not exist and the spec names no base to create it from: correct"
          + " the path, or add ':BASE' to the spec")
      #expect(try world.toolstack.read(disk.backend + "/hotplug-status") == "error")
      #expect(try world.toolstack.read(disk.backend + "/physical-device") == nil)
      try await eventually("it is forgotten") { try await world.isQuiet() }
      #expect(try await run(world, "remove", disk) == .exited(0))
    }
  }

  @Test("Without a daemon add says so, and remove is done all the same")
  func noDaemon() async throws {
    try await inWorld(daemon: false) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      let start = ContinuousClock.now
      #expect(try await run(world, "add", disk) == .exited(1))
      #expect(.now - start < .seconds(30), "well before libxl's 40 s")
      #expect(
        try world.toolstack.read(disk.backend + "/hotplug-error")
          == "dmu-xend is not running: start it (systemctl start dmu-xend) and attach the disk"
          + " again")
      #expect(try await run(world, "remove", disk) == .exited(0))
    }
  }

  @Test("add waits for a daemon that is just being started, and for one that is started again")
  func patience() async throws {
    try await inWorld(daemon: false) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      async let status = run(world, "add", disk)
      try await Task.sleep(for: .seconds(1))
      try await world.startDaemon()
      #expect(try await status == .exited(0))
    }
  }

  @Test("A store is made for a domain that xl boots, and for no other")
  func boots() async throws {
    try await inWorld { world in
      let boots = [
        ["xl", "create", "g"], ["xl", "-v", "cr", "g"], ["xl", "block-attach", "5"],
        ["dmu-xl", "block-a", "5"],
      ]
      let others = [
        ["xl", "restore", "g"], ["xl", "-v", "migrate-receive"], ["xl", "devd"],
        ["xl", "res", "g"],
        ["libvirtd", "create"],
      ]
      for (index, words) in (boots + others).enumerated() {
        let store = world.folder.file("s\(index)")
        let disk = try world.attach(10 + index, world.spec("s\(index)"))
        // The event alone must not make it, however long the script takes.
        try await eventually("the disk waits for the script") {
          try await world.status(disk.domain).first?.error?.contains("waiting for the block script")
            == true
        }
        #expect(access(store, F_OK) != 0)
        let isBoot = index < boots.count
        #expect(
          try await run(world, "add", disk, toolstack: words) == .exited(isBoot ? 0 : 1),
          "\(words)")
        #expect((access(store, F_OK) == 0) == isBoot, "\(words)")
        if isBoot { continue }
        let base = world.folder.file("base")
        #expect(
          try world.toolstack.read(disk.backend + "/hotplug-error")
            == "store \(store) does not exist, and it is created only for a domain that xl boots,"
            + " which is not known of this one (it may be restored or migrated): bring it back (is"
            + " its file system mounted?), or make an empty one with"
            + " 'dscow_tool -c \(store) \(base)'")
      }
    }
  }
}
