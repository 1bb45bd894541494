// SPDX-License-Identifier: Apache-2.0
// libvirt's hook, with what libvirt gives it: domains' XML, and the operations of a start, an end and
// of a libvirtd that is started anew. libvirt itself is not part of these.

import Fakes
import Glibc
import SystemIO
import Testing
import TestSupport

@testable import Daemon

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct LibvirtTests {
  static let uuid = "8c7e6ac0-4b2b-4b5c-9f6e-0a4c4d1f2e3b"

  /// A domain as libvirt writes it.
  static func domain(_ disks: String, uuid: String = uuid) -> String {
    """
    <domain type='xen' id='5'>
      <name>web</name>
      <uuid>\(uuid)</uuid>
      <metadata>
        <other:thing xmlns:other="urn:other"><other:disk name="no" spec="dmu:/no"/></other:thing>
        <dmu:disks xmlns:dmu="urn:dmu-xen:libvirt:1">
          \(disks)
        </dmu:disks>
      </metadata>
      <devices>
        <disk type="block" device="disk"><source dev="/dev/dmu/web-root"/><target dev="xvda"/></disk>
      </devices>
    </domain>
    """
  }

  private func disk(_ name: String, _ spec: String) -> String {
    "<dmu:disk name=\"\(name)\" spec=\"\(spec)\"/>"
  }

  /// What the hook does for an operation.
  private func hook(
    _ world: World, _ operation: String, _ xml: String
  ) async throws -> CommandStatus {
    let path = world.folder.file("domain.xml")
    try TextFile.replace(path, with: xml)
    return try await world.command { client in
      guard let file = try? Descriptor(path: path, flags: O_RDONLY) else { return .noDisk }
      return client.libvirt(operation, descriptor: file.raw, patience: .seconds(1))
    }
  }

  /// The disks that are attached; a failure is shown besides.
  private func names(_ world: World) async throws -> [String] {
    try await world.status().filter { $0.state == .ready }.compactMap(\.name).sorted()
  }

  @Test("A domain's disks come with it, and go with it")
  func life() async throws {
    try await inWorld { world in
      for name in ["a", "b"] {
        try await world.attachNamed(name, world.spec("\(name).dscow"), create: true)
        try await world.detachNamed(name)
      }
      let xml = Self.domain(
        disk("web-root", world.spec("a.dscow")) + disk("web-data", world.spec("b.dscow")))
      #expect(try await hook(world, "prepare", xml) == .done)
      #expect(try await names(world) == ["web-data", "web-root"])
      #expect(try await world.named("web-root")?.owner == Self.uuid)
      // A restart of the domain from a managed save, say.
      #expect(try await hook(world, "prepare", xml) == .done)
      for operation in ["start", "started", "reconnect", "migrate", "stopped"] {
        #expect(try await hook(world, operation, xml) == .done)
      }
      #expect(try await names(world) == ["web-data", "web-root"])
      // One more, which the XML does not name: it was attached to the running domain.
      try await world.attachNamed("more", world.spec("c.dscow"), create: true, owner: Self.uuid)
      try await world.attachNamed("others", world.spec("d.dscow"), create: true)
      #expect(try await hook(world, "release", xml) == .done)
      #expect(try await names(world) == ["others"])
    }
  }

  @Test("libvirtd gives a running domain up: what it has open stays")
  func reconnect() async throws {
    try await inWorld { world in
      let device = try await world.attachNamed(
        "web-root", world.spec("a.dscow"), create: true, owner: Self.uuid)
      try await world.attachNamed(
        "web-data", world.spec("b.dscow"), create: true, owner: Self.uuid)
      let user = try world.use(device, by: 5)
      let xml = Self.domain(disk("web-root", world.spec("a.dscow")))
      #expect(try await hook(world, "release", xml) == .done)
      #expect(try await names(world) == ["web-root"])
      #expect(try await world.named("web-root")?.state == .ready)
      try world.toolstack.destroyDomain(user.domain)
      #expect(try await hook(world, "release", xml) == .done)
      #expect(try await names(world) == [])
    }
  }

  @Test("Of disks of which one fails none is left, and the domain does not start")
  func failure() async throws {
    try await inWorld { world in
      try await world.attachNamed("kept", world.spec("k.dscow"), create: true, owner: Self.uuid)
      try await world.attachNamed("a", world.spec("a.dscow"), create: true)
      try await world.detachNamed("a")
      let xml = Self.domain(
        disk("kept", world.spec("k.dscow")) + disk("web-root", world.spec("a.dscow"))
          + disk("web-data", world.spec("missing.dscow")))
      #expect(try await hook(world, "prepare", xml) == .failed)
      #expect(try await names(world) == ["kept"])
      // Nothing is created: the hook does not know a boot from a restore.
      #expect(access(world.folder.file("missing.dscow"), F_OK) != 0)
    }
  }

  @Test("A disk of another owner, and one with another spec, are refused")
  func others() async throws {
    try await inWorld { world in
      try await world.attachNamed("web-root", world.spec("a.dscow"), create: true)
      let xml = Self.domain(disk("web-root", world.spec("a.dscow")))
      #expect(try await hook(world, "prepare", xml) == .failed)
      #expect(try await hook(world, "release", xml) == .done)
      #expect(try await names(world) == ["web-root"])
    }
  }

  static let wrongTexts = [
    "", "<domain>", "<domain><uuid>web</uuid></domain>",
    domain("<dmu:disk name='a'/>"), domain("<dmu:disk name='a' spec='x' readonly='perhaps'/>"),
    domain("<dmu:disk name='a/b' spec='dmu:dscow:/a:/b'/>"),
    domain("<dmu:disk name='a' spec='phy:/a'/>"),
    "<!DOCTYPE a [<!ENTITY b 'c'>]>" + domain(""),
  ]

  @Test("XML that is wrong fails a start, and nothing else")
  func wrong() async throws {
    try await inWorld { world in
      for xml in Self.wrongTexts {
        let start = try await hook(world, "prepare", xml)
        #expect(start == .failed, "\(xml)")
        let end = try await hook(world, "release", xml)
        #expect(end == .done, "\(xml)")
      }
      #expect(try await names(world) == [])
    }
  }

  @Test("What a domain's XML says of disks")
  func reading() throws {
    let folder = try TemporaryFolder()
    func read(_ xml: String) throws -> LibvirtDisks {
      let path = folder.file("domain.xml")
      try TextFile.replace(path, with: xml)
      let file = try Descriptor(path: path, flags: O_RDONLY)
      return try LibvirtDisks(descriptor: file.raw)
    }
    #expect(try read(Self.domain("")).disks == [])
    let read1 = try read(
      Self.domain(
        "<dmu:disk name='a' spec='dmu:dscow:/s&amp;t:/b'></dmu:disk><!-- c -->"
          + "<dmu:disk readonly='yes' spec='dmu:/r' name='r'/><disk name='no' spec='dmu:/no'/>"
          + "<dmu:more><dmu:disk name='no' spec='dmu:/no'/></dmu:more>"))
    #expect(
      read1
        == LibvirtDisks(
          uuid: Self.uuid,
          disks: [
            .init(name: "a", spec: "dmu:dscow:/s&t:/b", readOnly: false),
            .init(name: "r", spec: "dmu:/r", readOnly: true),
          ]))
    // By what the prefix stands for, not by the prefix.
    let other = Self.domain("<dmu:disk name='a' spec='dmu:/a'/>")
      .replacing("dmu:disk", with: "x:disk").replacing("xmlns:dmu", with: "xmlns:x")
    #expect(try read(other).disks.map(\.name) == ["a"])
    #expect(try read(other.replacing("libvirt:1", with: "libvirt:2")).disks == [])
  }
}
