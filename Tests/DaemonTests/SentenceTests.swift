// SPDX-License-Identifier: Apache-2.0
// Every failure that an admin can meet, in the words in which xl will print it: one line
// that names the thing, the reason and the remedy.

import Daemon
import Fakes
import Glibc
import Testing
import TestSupport

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct SentenceTests {
  private func sentence(
    _ world: World, _ params: String, domain: Int = 5
  ) async throws -> String {
    let disk = try world.attach(domain, params)
    let sentence = try await world.addFailure(disk)
    #expect(!sentence.contains("\n"))
    #expect(world.directories().allSatisfy { !$0.hasPrefix("\(domain)-") }, "nothing is left")
    return sentence
  }

  @Test("dmu-xend is not running")
  func noDaemon() async throws {
    try await inWorld(daemon: false) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      #expect(
        try await world.addFailure(disk)
          == "dmu-xend is not running: start it (systemctl start dmu-xend)")
    }
  }

  @Test("Store missing, directory missing, base missing")
  func missing() async throws {
    try await inWorld { world in
      let store = world.folder.file("g.dscow")
      let said1 = try await sentence(world, "dmu:dscow:\(store)")
      #expect(
        said1
          == "store \(store) does not exist and the spec names no base to create it from:"
          + " correct the path, or add ':BASE' to the spec")
      let base = world.folder.file("nothing")
      let said2 = try await sentence(world, "dmu:dscow:\(store):\(base)")
      #expect(
        said2
          == "base \(base) does not exist: correct the path or bring the base back")
      #expect(access(store, F_OK) != 0, "no store is made for a base that is not there")
      let deep = world.folder.file("no/g.dscow")
      let said3 = try await sentence(world, "dmu:dscow:\(deep):\(world.folder.file("base"))")
      #expect(
        said3
          .hasPrefix("store \(deep) does not exist and cannot be created"))
    }
  }

  @Test("The base has changed; force accepts it")
  func changed() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g.dscow"))
      try await world.add(disk)
      try world.detach(disk)
      try await eventually("it is gone") { world.directories().isEmpty }
      try world.file("base", [UInt8](repeating: 0xC6, count: 2 << 20))
      let base = world.folder.file("base")
      let said = try await sentence(world, world.spec("g.dscow"), domain: 6)
      #expect(
        said.hasPrefix(
          "base \(base) has changed since store \(world.folder.file("g.dscow")) was made from it"),
        "\(said)")
      #expect(said.contains("?force=yes"))
      let forced = try world.attach(7, world.spec("g.dscow", options: "?force=yes"))
      try await world.add(forced)
      #expect(try await world.state(forced) == .ready)
    }
  }

  @Test("The store is in use: by another domain, by another program, as a base")
  func inUse() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g.dscow"), name: "xvdb")
      try await world.add(disk)
      let store = world.folder.file("g.dscow")
      let said4 = try await sentence(world, world.spec("g.dscow"), domain: 6)
      #expect(
        said4
          == "store \(store) is in use by domain 5 (xvdb): detach it there first, or give this"
          + " disk a store of its own")
      let said5 = try await sentence(world, world.spec("h.dscow", base: "g.dscow"), domain: 7)
      #expect(
        said5
          .hasPrefix("base \(store) is in use as the store of domain 5 (xvdb)"))
      let said6 = try await sentence(world, world.spec("base", base: nil), domain: 8)
      #expect(
        said6
          .hasPrefix("store \(world.folder.file("base")) is in use by domain 5 (xvdb) as a base"))
    }
  }

  @Test("Format unknown, option unknown, option bad")
  func format() async throws {
    try await inWorld { world in
      let said7 = try await sentence(world, "dmu:foo:\(world.folder.file("g"))")
      #expect(said7.hasPrefix("format 'foo' is unknown: this dmu-xen has dscow, "))
      let said8 = try await sentence(world, "dmu:dscwo:/g")
      #expect(
        said8.hasPrefix("format 'dscwo' is unknown: ") && said8.hasSuffix("(did you mean 'dscow'?)")
      )
      let said9 = try await sentence(world, world.spec("g", options: "?blocksize=4K"))
      #expect(
        said9
          .hasPrefix(
            "option 'blocksize' is unknown: format dscow has block-size, base-format,"
              + " base-directory, create, force, transport"))
      let said10 = try await sentence(world, world.spec("g", options: "?block-size=5K"))
      #expect(
        said10
          == "option 'block-size' cannot be '5K': give a power of two from 4K to 4M")
    }
  }

  @Test("The spec is malformed")
  func malformed() async throws {
    try await inWorld { world in
      let said11 = try await sentence(world, "dmu:dscow:relative:/b")
      #expect(
        said11
          == "spec 'dmu:dscow:relative:/b' is malformed: store 'relative' is not an absolute path:"
          + " write dmu:FORMAT[?OPTION=VALUE]:STORE[:BASE]")
    }
  }

  @Test("Not an image, not a file")
  func notAnImage() async throws {
    try await inWorld { world in
      let store = try world.file("g", [UInt8](repeating: 1, count: 70_000))
      let said = try await sentence(world, "dmu:dscow:\(store):\(world.folder.file("base"))")
      #expect(said.hasPrefix("store \(store) cannot be used: "), "\(said)")
      let folder = try await sentence(world, "dmu:dscow:\(world.folder.path):/b", domain: 6)
      #expect(folder.contains("does not exist"), "\(folder)")
    }
  }

  @Test("A base that only the image names is used when the configuration allows it")
  func baseFromImage() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g.dscow"))
      try await world.add(disk)
      try world.detach(disk)
      try await eventually("it is gone") { world.directories().isEmpty }
      let base = world.folder.file("base")
      let said = try await sentence(world, world.spec("g.dscow", base: nil), domain: 6)
      #expect(
        said.contains("names base \(base), which the configuration does not allow"), "\(said)")
      #expect(said.contains("base.directories in \(world.configurationPath)"), "\(said)")

      // As the script says it; else the reload would try this disk again.
      let refused = FakeDisk(domain: 6, params: "")
      try world.toolstack.write(refused.backend + "/hotplug-status", "error")
      try await eventually("it is forgotten") { try await world.isQuiet() }
      try world.configure(["base.directories": "[\"\(world.folder.path)\"]"])
      #expect(try await world.command { $0.reload() } == .done)
      let again = try world.attach(7, world.spec("g.dscow", base: nil))
      try await world.add(again)
      #expect(try await world.status(7).first?.base == base)
      // It stays known across a restart, and locked.
      try await world.stopDaemon()
      kill(try World.pids(world.runDirectory + "/disks")[0], SIGKILL)
      try await world.startDaemon()
      try await eventually("it serves") { try await world.state(again) == .ready }
      #expect(try await world.status(7).first?.base == base)
    }
  }

  @Test("A worker that never gets ready, one that cannot be started, one that ends at once")
  func workers() async throws {
    try await inWorld(["worker.ready-timeout": "1"]) { world in
      func program(_ text: String) async throws {
        let path = try world.file("worker.sh", Array("#!/bin/sh\n\(text)\n".utf8))
        #expect(chmod(path, 0o755) == 0)
        try world.configure([
          "worker.program": "\"\(path)\"", "worker.ready-timeout": "1",
        ])
        #expect(try await world.command { $0.reload() } == .done)
      }
      try await program("exec sleep 1000")
      let said12 = try await sentence(world, world.spec("a.dscow"))
      #expect(
        said12
          == "the worker was not ready within 1 seconds: look at its log, or raise"
          + " worker.ready-timeout")
      #expect(access(world.folder.file("a.dscow"), F_OK) != 0, "what was made has gone again")
      try await program("exit 3")
      let said13 = try await sentence(world, world.spec("b.dscow"), domain: 6)
      #expect(
        said13
          == "the worker was lost while it started (it ended with exit status 3): look at its log")
      try world.configure(["worker.program": "\"/nowhere/cowd\""])
      #expect(try await world.command { $0.reload() } == .done)
      let said14 = try await sentence(world, world.spec("c.dscow"), domain: 7)
      #expect(
        said14
          .hasPrefix("the worker cannot be started: cannot start /nowhere/cowd: No such file"))
    }
  }
}
