// SPDX-License-Identifier: Apache-2.0
// Disks of other formats, whose images name further files: what the configuration allows, and
// that it is remembered by the next worker and the next daemon.

import BlockIO
import Daemon
import Fakes
import Glibc
import SystemIO
import Testing
import TestSupport

private let hasQemu = access("/usr/bin/qemu-img", X_OK) == 0

@Suite("Chains of images", .serialized, .enabled(if: Programs.arePresent && hasQemu))
struct ChainTests {
  private func qemu(_ world: World, _ arguments: String...) async throws {
    let status = try await blocking {
      try Command("/usr/bin/qemu-img", arguments).start().wait(milliseconds: 60_000)
    }
    #expect(status == .exited(0), "\(arguments)")
  }

  /// A store over two images over the common base, and its spec.
  private func chain(_ world: World) async throws -> String {
    let (base, one, two, store) = (
      world.folder.file("base"), world.folder.file("one.qcow2"), world.folder.file("two.qcow2"),
      world.folder.file("store.qcow2")
    )
    try await qemu(world, "convert", "-c", "-f", "raw", "-O", "qcow2", base, one)
    try await qemu(
      world, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "one.qcow2", two)
    try await qemu(
      world, "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "two.qcow2", store)
    return "dmu:qcow2:\(store)"
  }

  private var allowed: String { "base.directories" }

  @Test("A chain is served, and taken over by other workers and other daemons")
  func life() async throws {
    try await inWorld { world in
      try world.configure([allowed: "[\"\(world.folder.path)\"]"])
      #expect(try await world.command { $0.reload() } == .done)
      let disk = try world.attach(5, try await chain(world))
      try await world.add(disk)
      #expect(try await world.status(5).first?.format == "qcow2")
      #expect(try await world.status(5).first?.base == world.folder.file("two.qcow2"))
      #expect(try await world.status(5).first?.size == 1 << 20)
      // Another worker, by a daemon whose configuration allows none of it any more.
      try world.configure([:])
      #expect(try await world.command { $0.reload() } == .done)
      for round in 0..<3 {
        let before = try await world.worker(disk)
        if round < 2 {
          // The same worker, another daemon; then both are gone.
          try await world.stopDaemon(round == 0 ? SIGTERM : SIGKILL)
          if round == 1 { kill(before, SIGKILL) }
          try await world.startDaemon()
        } else {
          kill(before, SIGKILL)
        }
        try await eventually("it serves, round \(round)") {
          let now = try await world.status(5).first
          return now?.state == .ready && (now?.worker == before) == (round == 0)
        }
        #expect(try await world.status(5).first?.base == world.folder.file("two.qcow2"))
      }
      // All of it is locked: nobody may write to any of it.
      for name in ["one.qcow2", "two.qcow2", "store.qcow2"] {
        let file = try FileStore(path: world.folder.file(name), writable: true)
        #expect(throws: IOError.self) { try file.lock(exclusive: true) }
      }
      try world.detach(disk)
      try await eventually("it is gone") { world.directories().isEmpty }
      for name in ["one.qcow2", "two.qcow2", "store.qcow2"] {
        let file = try FileStore(path: world.folder.file(name), writable: true)
        try file.lock(exclusive: true)
      }
    }
  }

  @Test("What is not allowed is refused with a sentence")
  func refusals() async throws {
    try await inWorld { world in
      let spec = try await chain(world)
      func said(_ domain: Int, _ spec: String) async throws -> String {
        let disk = try world.attach(domain, spec)
        let sentence = try await world.addFailure(disk)
        // As the script says it; else a reload would try this disk again.
        try world.toolstack.write(disk.backend + "/hotplug-status", "error")
        try await eventually("it is forgotten") { try await world.isQuiet() }
        return sentence
      }
      let two = world.folder.file("two.qcow2")
      #expect(
        try await said(5, spec)
          .contains("names base \(two), which the configuration does not allow"))
      // The base of the spec needs no leave, the one under it does.
      let one = world.folder.file("one.qcow2")
      #expect(
        try await said(6, "\(spec):\(two)")
          .contains("names base \(one), which the configuration does not allow"))
      try world.configure([
        allowed: "[\"\(world.folder.path)\"]", "base.chain-depth": "2",
      ])
      #expect(try await world.command { $0.reload() } == .done)
      #expect(try await said(7, spec).contains("names more than 2 images in a row"))
      let made = "dmu:vhd:\(world.folder.file("none.vhd")):\(two)"
      #expect(try await said(8, made).contains("stores of format vhd are not created here"))
      let data = world.folder.file("data")
      let split = world.folder.file("split.qcow2")
      try await qemu(
        world, "create", "-q", "-f", "qcow2", "-o", "data_file=\(data)", split, "1M")
      #expect(
        try await said(9, "dmu:qcow2:\(split)")
          .contains("names \(data) as its data-file, which the configuration does not allow"))
    }
  }

  @Test("A store of qcow2 is made over a base that is an image")
  func made() async throws {
    try await inWorld([allowed: "[\"/\"]"]) { world in
      _ = try await chain(world)
      let store = world.folder.file("new.qcow2")
      let disk = try world.attach(
        5, "dmu:qcow2?block-size=4K&base-format=qcow2:\(store):\(world.folder.file("two.qcow2"))")
      try await world.add(disk)
      #expect(try await world.status(5).first?.blockSize == 4096)
      try world.detach(disk)
      try await eventually("it is gone") { world.directories().isEmpty }
      try await qemu(world, "check", "-q", "-f", "qcow2", store)
      try await qemu(
        world, "compare", "-f", "qcow2", "-F", "raw", store, world.folder.file("base"))
      // And a dscow store over the same, which has to be told what its base is.
      let other = world.folder.file("new.dscow")
      let two = world.folder.file("two.qcow2")
      let guess = try world.attach(6, "dmu:dscow:\(other):\(two)")
      let said = try await world.addFailure(guess)
      #expect(said.contains("nobody says that it is one"), "\(said)")
      let told = try world.attach(7, "dmu:dscow?base-format=qcow2:\(other):\(two)")
      try await world.add(told)
      #expect(try await world.status(7).first?.size == 1 << 20)
    }
  }
}
