// SPDX-License-Identifier: Apache-2.0
// The daemon in a driver domain: a domain without privileges, which reads its own nodes and the
// backend entries that the toolstack has given it, and no other domain's. xenstored is the real
// one, and treats the daemon's connection as that of such a domain.

import Fakes
import SystemIO
import Testing
import TestSupport
import XenStore

@testable import Daemon

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct DriverDomainTests {
  private static let home = "/local/domain/7"

  @Test("A disk lives and goes, and the daemon tells of itself where a driver domain may")
  func life() async throws {
    try await inWorld(driver: 7) { world in
      let toolstack = world.toolstack
      try await eventually("it tells of itself") {
        try toolstack.read(Self.home + "/data/dmu-xen/version") == Version.text
      }
      #expect(try toolstack.read(Self.home + "/dmu-xen/version") == nil)
      try await world.makeStore("g5.dscow")
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk, boots: false)
      try await eventually("it is ready") { try world.node(disk, "state") == "ready" }
      try await eventually("it is counted") {
        try toolstack.read(Self.home + "/data/dmu-xen/disks") == "1"
      }
      let status = try #require(try await world.status(5).first)
      #expect(status.domainName == nil, "the guest's name may not be read there")

      // Its guest pauses, dies, is gone from xenstore: the daemon cannot know, and needs not.
      try toolstack.destroyDomain(5)
      try await world.run("dmu-xen", "status", "--socket", world.socket)
      #expect(try await world.state(disk) == .ready)
      try world.detach(disk)
      try await world.isGone(disk)
      try await eventually("no disk is counted") {
        try toolstack.read(Self.home + "/data/dmu-xen/disks") == "0"
      }
      #expect(try await world.workers().isEmpty)
      #expect(try world.devices == 0)
    }
  }

  @Test("State 6 with online 0 is enough: whoever deletes the entry may be late")
  func closed() async throws {
    try await inWorld(driver: 7) { world in
      try await world.makeStore("g5.dscow")
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk, boots: false)
      try world.toolstack.beginDetach(disk)
      try world.toolstack.backendCloses(disk)
      try await world.isGone(disk)
      #expect(try world.toolstack.read(disk.backend + "/params") != nil)
      try await eventually("its nodes are taken back") { try world.node(disk, "state") == nil }
    }
  }

  @Test("A sentence is cut to what a node has room for there, in whole characters")
  func longSentence() async throws {
    try await inWorld(driver: 7) { world in
      let path =
        "/"
        + Array(repeating: String(repeating: "\u{e4}", count: 100), count: 9)
        .joined(separator: "/")
      let disk = try world.attach(5, "dmu:dscow:\(path)")
      let sentence = try await world.addFailure(disk, boots: false)
      #expect(sentence.utf8.count > XenStoreView.longest)
      try await eventually("it is told") { try world.node(disk, "state") == "failed" }
      let told = try #require(try world.node(disk, "error"))
      #expect(sentence.hasPrefix(told))
      #expect((XenStoreView.longest - 3...XenStoreView.longest).contains(told.utf8.count))
    }
  }

  @Test("Nothing is created there: who asks is not known to boot the guest")
  func noCreation() async throws {
    try await inWorld(driver: 7) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      #expect(
        try await world.addFailure(disk, boots: false).contains("only for a domain that xl boots"))
    }
  }

  @Test("A named disk is not detached while a guest has it, which is known by the entry alone")
  func namedDisk() async throws {
    try await inWorld(driver: 7) { world in
      try await world.makeStore("web.dscow")
      let device = try await world.attachNamed("web", world.spec("web.dscow"))
      let disk = try world.use(device, by: 5)
      #expect(try await world.detachFailure("web").contains("is open by domain 5 (xvda)"))
      try world.detach(disk)
      try await world.detachNamed("web")
      #expect(try await world.remains() == [])
    }
  }

  private static let alone = ["daemon.driver-domain": "\"alone\""]

  @Test("Where no xl devd runs the daemon does its work, from state 2 until the entry is deleted")
  func alone() async throws {
    try await inWorld(Self.alone, driver: 7) { world in
      let toolstack = world.toolstack
      try await world.makeStore("g5.dscow")
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await eventually("the backend has a device") {
        try toolstack.read(disk.backend + "/hotplug-status") == "connected"
      }
      #expect(try toolstack.read(disk.backend + "/physical-device") == "2b:0")
      #expect(try toolstack.read(disk.backend + "/physical-device-path") == "/stand-in/nbd0")
      try toolstack.connect(disk, sectors: 2048)
      let wire = try world.wire()
      #expect(try wire.write([UInt8](repeating: 0x5A, count: 4096), at: 0) == 0)
      try toolstack.beginDetach(disk)
      #expect(try toolstack.read(disk.backend + "/params") != nil, "it has not closed")
      try toolstack.backendCloses(disk)
      try await eventually("its entry is deleted") { try toolstack.backends(of: 7).isEmpty }
      #expect(world.directories().isEmpty, "and not before the disk has gone")
      #expect(try world.devices == 0)
      #expect(try await world.workers().isEmpty)
    }
  }

  @Test("A backend that is late, and one that has a device already, are left alone")
  func aloneStates() async throws {
    try await inWorld(Self.alone, driver: 7) { world in
      let toolstack = world.toolstack
      try await world.makeStore("g5.dscow")
      var disk = FakeDisk(domain: 5, params: world.spec("g5.dscow"))
      disk.backendDomain = 7
      try toolstack.createDomain(5, name: "guest5")
      try toolstack.attach(disk)
      try await eventually("it is ready") { try world.node(disk, "state") == "ready" }
      #expect(try toolstack.read(disk.backend + "/physical-device") == nil, "state 1")
      try toolstack.write(disk.backend + "/physical-device", "fd:9")
      try toolstack.backendWaits(disk)
      try world.detach(disk)
      try await world.isGone(disk)
      #expect(try toolstack.read(disk.backend + "/hotplug-status") == nil)
    }
  }

  @Test("A disk that cannot be served says why in its entry, and the entry goes with the disk")
  func aloneFailure() async throws {
    try await inWorld(Self.alone, driver: 7) { world in
      let toolstack = world.toolstack
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await eventually("it is refused") {
        try toolstack.read(disk.backend + "/hotplug-status") == "error"
      }
      let error = try #require(try toolstack.read(disk.backend + "/hotplug-error"))
      #expect(error.contains("only for a domain that xl boots"), "\(error)")
      try toolstack.beginDetach(disk)
      try toolstack.backendCloses(disk)
      try await eventually("its entry is deleted") { try toolstack.backends(of: 7).isEmpty }
    }
  }

  @Test("An entry that closed while no daemon was there is deleted by the next one")
  func aloneLeftover() async throws {
    try await inWorld(Self.alone, daemon: false, driver: 7) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      let other = try world.attach(6, "/dev/vg/other")
      for disk in [disk, other] {
        try world.toolstack.beginDetach(disk)
        try world.toolstack.backendCloses(disk)
      }
      try await world.startDaemon()
      try await eventually("it is deleted") {
        try world.toolstack.backends(of: 7) == ["6/51712"]
      }
    }
  }

  @Test("In domain 0 the daemon leaves to the toolstack what is the toolstack's")
  func notInDomain0() async throws {
    try await inWorld(Self.alone) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      try await eventually("it is ready") { try world.node(disk, "state") == "ready" }
      #expect(try world.toolstack.read(disk.backend + "/physical-device") == nil)
      try world.toolstack.beginDetach(disk)
      try world.toolstack.backendCloses(disk)
      try await world.isGone(disk)
      #expect(try world.toolstack.read(disk.backend + "/params") != nil)
    }
  }
}
