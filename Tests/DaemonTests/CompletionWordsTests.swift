// SPDX-License-Identifier: Apache-2.0
// What shells are offered: the daemon's disks, and specs.

import Foundation
import Testing
import TestSupport

@testable import Daemon

@Suite struct CompletionWordsTests {
  private func disk(
    _ domain: Int, _ name: String?, _ vdev: String, _ state: PublicState = .ready
  ) -> DiskStatus {
    var disk = DiskStatus(domain: domain, vdev: vdev, number: 51712, state: state, since: 0)
    disk.domainName = name
    disk.store = "/srv/\(domain).dscow"
    return disk
  }

  @Test func wordsOfDisks() {
    var gone = disk(9, "dead", "xvda", .failed)
    gone.note = "its attach failed, and the toolstack has given it up"
    let disks = [
      disk(5, "web", "xvda"), disk(5, "web", "xvdb"), disk(6, nil, "xvda"),
      disk(7, "b", "xvda", .failed), gone, disk(4, "c", "xvda", .pending), disk(8, "a\nb", "x"),
    ]
    func words(_ kind: CompletionWords.Kind) -> [String] {
      CompletionWords.words(of: kind, in: disks)
    }
    #expect(words(.domain) == ["web", "5", "6", "b", "7", "dead", "9", "8"])
    #expect(
      words(.disk) == [
        "web", "5", "web:xvda", "5:xvda", "web:xvdb", "5:xvdb", "6", "6:xvda", "b", "7", "b:xvda",
        "7:xvda", "dead", "9", "dead:xvda", "9:xvda", "8", "8:x",
      ])
    #expect(words(.failed) == ["dead", "9", "dead:xvda", "9:xvda"])
    #expect(words(.pending) == ["/srv/4.dscow"])
  }

  @Test("The daemon that the command line names is asked; without one there is nothing")
  func daemon() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g.dscow"))
      try await world.add(disk)
      let words = ["dmu-xen", "status", "-c", world.configurationPath, ""]
      #expect(CompletionWords.offered(.domain, commandLine: words).contains("5"))
      try await world.stopDaemon()
      #expect(CompletionWords.offered(.domain, commandLine: words).isEmpty)
    }
  }

  @Test func specs() throws {
    let folder = try TemporaryFolder()
    for name in ["disk.img", "other.img", "a b", ".hidden"] {
      try Data().write(to: URL(fileURLWithPath: folder.file(name)))
    }
    try FileManager.default.createDirectory(
      atPath: folder.file("inner"), withIntermediateDirectories: true)
    let words = ["dmu-xen", "attach", "-c", folder.file("c.toml"), "x", ""]
    func specs(_ text: String) -> [String] {
      CompletionWords.specs(beginning: text, commandLine: words)
    }
    #expect(specs("") == ["dmu:"])
    #expect(specs("dmu:q") == KnownFormat.all.map { "dmu:\($0.name):" })
    let here = folder.path + "/"
    #expect(
      specs("dmu:raw:" + here).map { $0.dropFirst("dmu:raw:\(here)".count) }
        == ["disk.img", "inner/", "other.img"])
    #expect(specs("dmu:dscow:/x:\(here)d") == ["dmu:dscow:/x:\(here)disk.img"])
    #expect(specs("dmu:dscow:relative") == [])
    #expect(specs("dmu:dscow:/x:/y:/") == [])
    #expect(specs("dmu:raw?") == ["dmu:raw?transport="])
    #expect(specs("dmu:qcow2?create=yes&transport=").contains("dmu:qcow2?create=yes&transport=dm:"))
    #expect(specs("dmu:nothing?") == [])
    try FileManager.default.createDirectory(
      atPath: folder.file("c/hooks/events.d"), withIntermediateDirectories: true)
    for name in ["lvm", "nbd", "nbd.new"] {
      try Data().write(to: URL(fileURLWithPath: folder.file("c/hooks/" + name)))
    }
    #expect(specs("dmu:raw:").suffix(2) == ["dmu:raw:lvm//", "dmu:raw:nbd//"])
    #expect(specs("dmu:raw:/x:n") == ["dmu:raw:/x:nbd//"])
    #expect(specs("dmu:raw:lvm//v") == [])
  }
}
