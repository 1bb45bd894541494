// SPDX-License-Identifier: Apache-2.0
// The hooks rbd and zfs, run against stand-ins for the commands `rbd` and `zfs` (Tests/Fixtures/hooks),
// which remember in a folder what was done. The other hooks run against the real thing in the Xen lab.

import Glibc
import SystemIO
import Testing
import TestSupport

@testable import Daemon

@Suite struct InstalledHookTests {
  private let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  private static let root = #filePath.replacing(
    "Tests/DaemonTests/InstalledHookTests.swift", with: "")

  /// Runs a hook of the sources, with the stand-ins first in its PATH.
  private func hook(_ scheme: String, _ arguments: String...) throws -> HookOutcome {
    var call = HookCall(
      program: Self.root + "hotplug/hooks/" + scheme, arguments: arguments,
      deadline: .seconds(30), files: folder.file("run"))
    call.environment = [
      "PATH": "\(Self.root)Tests/Fixtures/hooks/commands:/usr/bin:/bin",
      "DMU_HOOK_FUNCTIONS": Self.root + "hotplug/hook-functions",
      "DMU_HOOK_MARKS": folder.file("marks"), "DMU_HOOK_ZVOLS": folder.file("zvol"),
      "STAND_IN": folder.path,
    ]
    return try ProcessHooks(asService: false).run(call)
  }

  private func lines(_ name: String) throws -> [String] {
    guard access(folder.file(name), F_OK) == 0 else { return [] }
    return try TextFile.read(folder.file(name)).split(separator: "\n").map { String($0) }
  }

  @Test("rbd: mapped once, for reading or writing, and unmapped if it was the hook that mapped it")
  func rbd() throws {
    try TextFile.replace(folder.file("images"), with: "vms/web\nvms/ns/web\nvms/web@before\n")
    let first = try hook("rbd", "attach", "vms/web", "rw")
    #expect(first.output == "/dev/rbd0\nshared\n" && first.isGood, "\(first)")
    #expect(try hook("rbd", "attach", "vms/web", "rw").output == "/dev/rbd0\nshared\n")
    #expect(try hook("rbd", "attach", "vms/web@before", "ro").output == "/dev/rbd1\nshared\n")
    #expect(try hook("rbd", "attach", "vms/ns/web", "rw").output == "/dev/rbd2\nshared\n")
    #expect(
      try lines("calls") == [
        "map vms/web", "map --read-only vms/web@before", "map vms/ns/web",
      ])
    #expect(try hook("rbd", "check", "vms/web").output == "image, /dev/rbd0\n")
    for image in ["vms/web", "vms/web", "vms/ns/web", "vms/web@before"] {
      #expect(try hook("rbd", "detach", image).isGood)
    }
    #expect(
      try lines("calls").dropFirst(3) == ["unmap /dev/rbd0", "unmap /dev/rbd2", "unmap /dev/rbd1"])
    #expect(try lines("mapped").isEmpty && World.names(folder.file("marks/rbd")).isEmpty)
    let gone = try hook("rbd", "attach", "vms/gone", "rw")
    #expect(
      !gone.isGood && gone.complaints == ["rbd: no image vms/gone", "rbd cannot map vms/gone"])
    #expect(try hook("rbd", "detach", "vms/gone").isGood, "after an attach that failed")
    // What somebody else has mapped stays.
    try TextFile.replace(folder.file("mapped"), with: "7 vms  web - /dev/rbd7\n")
    #expect(try hook("rbd", "attach", "vms/web", "rw").output.hasPrefix("/dev/rbd7\n"))
    #expect(try hook("rbd", "detach", "vms/web").isGood)
    #expect(try lines("mapped").count == 1)
  }

  @Test("zfs: a volume is there already; a snapshot's device is shown, and hidden again")
  func zfs() throws {
    try #require(mkdir(folder.file("zvol"), 0o755) == 0)
    try #require(mkdir(folder.file("zvol/tank"), 0o755) == 0)
    try TextFile.replace(folder.file("volumes"), with: "tank/web volume\ntank/home filesystem\n")
    for name in ["zd0", "zd16"] { try TextFile.replace(folder.file(name), with: "") }
    try #require(symlink(folder.file("zd0"), folder.file("zvol/tank/web")) == 0)
    let volume = try hook("zfs", "attach", "tank/web", "rw")
    #expect(volume.output == "\(folder.file("zd0"))\nlocal\n", "\(volume)")
    #expect(try hook("zfs", "detach", "tank/web").isGood)
    #expect(try lines("calls").isEmpty)
    let snapshot = try hook("zfs", "attach", "tank/web@a", "ro")
    #expect(snapshot.output == "\(folder.file("zd16"))\nlocal\n", "\(snapshot)")
    #expect(try hook("zfs", "attach", "tank/web@a", "ro").isGood)
    #expect(try hook("zfs", "detach", "tank/web@a").isGood)
    #expect(try lines("calls") == ["set snapdev=visible tank/web", "inherit snapdev tank/web"])
    #expect(
      try hook("zfs", "attach", "tank/web@a", "rw").complaints
        == ["the snapshot tank/web@a cannot be written to: clone it"])
    #expect(
      try hook("zfs", "attach", "tank/home", "rw").complaints
        == ["tank/home is a filesystem, and no volume"])
    #expect(
      try hook("zfs", "check", "tank/gone").complaints.last
        == "there is no volume tank/gone in an imported pool")
    #expect(try hook("zfs", "check", "tank/web").output == "volume of 1G\n")
  }

  @Test("Every hook refuses what it cannot understand, in one line")
  func refusals() throws {
    for scheme in ["lvm", "nbd", "iscsi", "drbd", "rbd", "zfs"] {
      for arguments in [["attach"], ["attack", "x"], ["attach", "-x", "rw"], ["detach", ""]] {
        var call = HookCall(
          program: Self.root + "hotplug/hooks/" + scheme, arguments: arguments,
          deadline: .seconds(30), files: folder.file("run"))
        call.environment = ["DMU_HOOK_FUNCTIONS": Self.root + "hotplug/hook-functions"]
        let outcome = try ProcessHooks(asService: false).run(call)
        #expect(
          !outcome.isGood && outcome.output.isEmpty && outcome.complaints.count == 1, "\(scheme)")
      }
      // Without its command.
      let outcome = try hook(scheme, "check", "a")
      #expect(!outcome.isGood && outcome.output.isEmpty && !outcome.complaints.isEmpty, "\(scheme)")
    }
  }
}
