// SPDX-License-Identifier: Apache-2.0
// Disks whose stores and bases hooks attach, with real workers and a fake hook
// (Tests/Fixtures/hooks/fake); and hooks that are told of events.

import BlockIO
import Fakes
import Glibc
import SystemIO
import Testing
import TestSupport

@testable import Daemon

extension World {
  /// Where the configuration's folder is, and the fake storage.
  var home: String { folder.file("dmu-xen") }

  /// Installs the fake hook under a scheme.
  func installHook(_ scheme: String = "fake") throws {
    let source = #filePath.replacing("DaemonTests/SourceTests.swift", with: "Fixtures/hooks/fake")
    for path in [home, home + "/hooks", home + "/hooks/events.d"] { mkdir(path, 0o755) }
    try file("dmu-xen/hooks/\(scheme)", Array(try TextFile.read(source).utf8))
    try #require(chmod(home + "/hooks/" + scheme, 0o755) == 0)
  }

  /// Has the hook run these lines for a verb.
  func behave(_ verb: String, _ lines: String) throws {
    try file("dmu-xen/behave-\(verb)", Array("\(lines)\n".utf8))
  }

  func misbehaveNoMore(_ verb: String) { unlink(home + "/behave-" + verb) }

  /// A base and a store over it, as storage of the fake hook. Answers the spec.
  func makeStorage(_ store: String, base: String = "base") async throws -> String {
    if access(home + "/" + base, F_OK) != 0 {
      try file("dmu-xen/" + base, [UInt8](repeating: 0xB5, count: 1 << 20))
    }
    try await run("dscow_tool", "-c", home + "/" + store, home + "/" + base)
    return "dmu:dscow:fake//\(store):fake//\(base)"
  }

  /// What the hook was asked, without the lines of `check`.
  func hookCalls() throws -> [String] {
    guard access(home + "/calls", F_OK) == 0 else { return [] }
    return try TextFile.read(home + "/calls").split(separator: "\n").map { String($0) }
  }

  /// What the fake storage has attached.
  var attachedStorage: [String] {
    World.names(home).filter { $0.hasPrefix("attached-") }.map { String($0.dropFirst(9)) }
  }

  /// What the daemon remembers of sources, and of hooks that run.
  var sourceRecords: [String] {
    World.names(runDirectory + "/sources") + World.names(runDirectory + "/hooks")
  }

  func isDetached(within limit: Duration = .seconds(20)) async throws {
    try await eventually("nothing is attached", within: limit) {
      attachedStorage.isEmpty && sourceRecords.isEmpty
    }
  }

  /// Has a hook for events write what it is told, and do this besides.
  func recordEvents(_ lines: String = "", _ name: String = "10-record") throws {
    let path = try file(
      "dmu-xen/hooks/events.d/\(name)",
      Array("#!/bin/sh\n\(lines)\ncat >>'\(home)/events'\n".utf8))
    try #require(chmod(path, 0o755) == 0)
  }

  func toldEvents() throws -> [DiskEvent] {
    guard access(home + "/events", F_OK) == 0 else { return [] }
    return try TextFile.read(home + "/events").split(separator: "\n").map {
      try ControlLine.decode(DiskEvent.self, Array($0.utf8))
    }
  }
}

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct SourceTests {
  /// A world with the fake hook.
  private func inHookWorld(
    _ settings: [String: String] = [:], _ body: (World) async throws -> Void
  ) async throws {
    try await inWorld(settings) { world in
      try world.installHook()
      try await body(world)
    }
  }

  @Test("A store and a base come by their hook, are told of, and go with the disk")
  func life() async throws {
    try await inHookWorld { world in
      let spec = try await world.makeStorage("store")
      try world.file("dmu-xen/shared-base", [])
      let disk = try world.attach(5, spec)
      try await world.add(disk)
      let status = try #require(try await world.status(5).first)
      #expect(status.state == .ready)
      #expect(status.store == "fake//store" && status.base == "fake//base")
      #expect(
        status.sources == [
          AttachedPath(source: "fake//base", path: world.home + "/base", shared: true),
          AttachedPath(source: "fake//store", path: world.home + "/store", shared: false),
        ])
      #expect(
        try world.hookCalls() == ["attach base ro 5-51712 base", "attach store rw 5-51712 store"])
      #expect(try await world.wire(of: disk).read(512, at: 0).allSatisfy { $0 == 0xB5 })
      try world.detach(disk)
      try await world.isDetached()
      #expect(
        try world.hookCalls().dropFirst(2).sorted()
          == ["detach base 5-51712 -", "detach store 5-51712 -"])
      try await eventually("it is forgotten") { try await world.status().isEmpty }
    }
  }

  @Test("A base that disks share is attached once, and detached when the last has gone")
  func shared() async throws {
    try await inHookWorld { world in
      var disks: [FakeDisk] = []
      for domain in 5...7 {
        disks.append(try world.attach(domain, try await world.makeStorage("store\(domain)")))
      }
      try await withThrowingTaskGroup(of: Void.self) { group in
        for disk in disks { group.addTask { try await world.add(disk) } }
        try await group.waitForAll()
      }
      #expect(try world.hookCalls().count { $0.hasPrefix("attach base") } == 1)
      for disk in disks.dropLast() {
        try world.detach(disk)
        try await eventually("its store is detached") {
          !world.attachedStorage.contains("store\(disk.domain)")
        }
      }
      #expect(world.attachedStorage == ["base", "store7"])
      #expect(try !world.hookCalls().contains { $0.hasPrefix("detach base") })
      try world.detach(disks[2])
      try await world.isDetached()
      #expect(try world.hookCalls().count { $0.hasPrefix("detach base") } == 1)
    }
  }

  @Test("A daemon that starts anew knows what is attached: no hook runs twice, and all is detached")
  func takeOver() async throws {
    try await inHookWorld { world in
      let disk = try world.attach(5, try await world.makeStorage("store"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      for death in 0..<2 {
        try await world.stopDaemon(SIGKILL)
        if death == 1 { kill(worker, SIGKILL) }
        try await world.startDaemon()
        try await eventually("it is served") { try await world.state(disk) == .ready }
      }
      #expect(try await world.status(5).first?.sources?.count == 2)
      #expect(try world.hookCalls().count == 2)
      try await world.stopDaemon(SIGKILL)
      try world.detach(disk)
      #expect(world.attachedStorage.count == 2)
      try await world.startDaemon()
      try await world.isDetached()
    }
  }

  @Test("A daemon that is killed between attach and open detaches later")
  func killedBetween() async throws {
    try await inHookWorld { world in
      let spec = try await world.makeStorage("store")
      // It has attached, and has not said so yet.
      try world.behave(
        "attach", ": >\"$home/attached-$rest\"; echo $$ >\"$home/pid\"; exec sleep 60")
      let disk = try world.attach(5, spec)
      try await eventually("the hook has attached") { access(world.home + "/pid", F_OK) == 0 }
      try await world.stopDaemon(SIGKILL)
      let pid = try #require(Int32(try TextFile.read(world.home + "/pid").trimmingNewline))
      #expect(isAlive(pid))
      #expect(world.attachedStorage == ["base"])
      try world.detach(disk)
      try await world.startDaemon()
      try await world.isDetached()
      try await eventually("the former run has ended") { !isAlive(pid) }
      #expect(try world.hookCalls() == ["attach base ro 5-51712 base", "detach base 5-51712 -"])
    }
  }

  @Test("A hook that fails: the disk is refused with its last line, and nothing is left")
  func failure() async throws {
    try await inHookWorld { world in
      let spec = try await world.makeStorage("store")
      let hook = world.home + "/hooks/fake"
      let gone = try world.attach(5, spec.replacing("fake//store", with: "fake//nothing"))
      #expect(
        try await world.addFailure(gone)
          == "source fake//nothing cannot be attached: hook fake: there is no storage nothing: see to"
          + " it; '\(hook) check nothing' may say more")
      try await world.isDetached()
      try world.behave("attach", "exit 7")
      let silent = try world.attach(6, spec)
      #expect(
        try await world.addFailure(silent).contains(
          "hook fake: it ended with exit status 7 and said nothing: see to it"))
      for output in ["Volume is active", "$home/nothing", "$home/base nonsense", "", "$home/hooks"]
      {
        try world.behave("attach", "printf '%s\\n' \(output); exit 0")
        let disk = try world.attach(7, spec)
        let said = try await world.addFailure(disk)
        #expect(said.hasPrefix("source fake//base cannot be had, since the hook \(hook) makes no"))
        #expect(said.hasSuffix(": correct the hook, see dmu-hooks(7)"))
        try world.detach(disk)
      }
      try await world.isDetached()
      world.misbehaveNoMore("attach")
      #expect(try await world.status().allSatisfy { $0.state == .failed })
      let disk = try world.attach(8, spec)
      try await world.add(disk)
    }
  }

  @Test("A hook that hangs holds up its own disk only, and is killed at its deadline")
  func deadline() async throws {
    try await inHookWorld(["hooks.timeout": "6"]) { world in
      let spec = try await world.makeStorage("store")
      try world.behave("attach", "[ $rest != base ] || { sleep 300 & wait; }")
      let slow = try world.attach(5, spec)
      async let sentence = world.addFailure(slow)
      try await eventually("the hook hangs") { try world.hookCalls().count == 1 }
      let disk = try world.attach(6, world.spec("plain.dscow"))
      try await world.add(disk)
      #expect(try await world.state(slow) == .starting)
      #expect(
        try await world.status(5).first?.error == "the hook fake attaches the base")
      let said = try await sentence
      #expect(said.contains("fake did not end within 6 seconds, or wrote too much, and was killed"))
      #expect(said.contains("raise hooks.timeout"))
      try await world.isDetached()
    }
  }

  @Test("A source that cannot be detached is tried again, told of, and known to the next daemon")
  func stuck() async throws {
    try await inHookWorld { world in
      let disk = try world.attach(5, try await world.makeStorage("store"))
      try await world.add(disk)
      try world.behave("detach", "[ $rest != store ] || { echo 'it is busy' >&2; exit 1; }")
      try world.detach(disk)
      try await eventually("the base is detached") { world.attachedStorage == ["store"] }
      var leftovers: [Leftover] = []
      try await eventually("it is told") {
        leftovers = try await world.ask(ControlRequest(.leftovers)).leftovers ?? []
        return !leftovers.isEmpty
      }
      #expect(leftovers.map(\.name) == ["source fake//store"])
      #expect(leftovers[0].what.contains("hook fake: it is busy"))
      try await world.stopDaemon(SIGKILL)
      try await world.startDaemon()
      try await eventually("the next daemon tries it") {
        try await world.ask(ControlRequest(.leftovers)).leftovers?.isEmpty == false
      }
      world.misbehaveNoMore("detach")
      try await world.isDetached(within: .seconds(40))
    }
  }

  @Test("A source that is only read is not written to, and is attached anew for who writes to it")
  func upgrade() async throws {
    try await inHookWorld { world in
      let spec = try await world.makeStorage("store")
      let reader = try world.attach(5, spec, writable: false)
      try await world.add(reader)
      let writer = try world.attach(6, spec)
      #expect(
        try await world.addFailure(writer)
          == "source fake//store is attached for reading only, since domain 5 (xvda) has it so:"
          + " detach it there first")
      try world.detach(writer)
      try world.detach(reader)
      try await world.isGone(reader)
      let again = try world.attach(7, spec)
      try await world.add(again)
      #expect(try world.hookCalls().last == "attach store rw 7-51712 store")
    }
  }

  @Test("A log that is kept for a store keeps its source attached")
  func keptLog() async throws {
    try await inHookWorld { world in
      let spec = try await world.makeStorage("store")
      let disk = try world.attach(5, spec)
      try await world.add(disk)
      #expect(try await world.wire(of: disk).write([UInt8](repeating: 1, count: 4096), at: 0) == 0)
      // No worker can commit what that one has left.
      try world.useWorkers(instead: "exit 1")
      kill(try await world.worker(disk), SIGKILL)
      try world.detach(disk)
      try await eventually("the log is kept") { try world.announcedPending() == "1" }
      try await eventually("the disk has gone") { world.directories().isEmpty }
      try await world.stopDaemon(SIGKILL)
      try await world.startDaemon()
      #expect(try !world.hookCalls().contains { $0.hasPrefix("detach store") })
      #expect(world.attachedStorage.contains("store"))
      try world.useWorkers()
      // The daemon itself may be at it, still with the worker that fails.
      try await eventually("the log is committed") {
        _ = try await world.ask(ControlRequest(.recover, store: world.home + "/store"))
        return world.logs().isEmpty
      }
      try await world.isDetached()
    }
  }

  @Test("Unknown schemes, and hooks that are not root's", .enabled(if: geteuid() == 0))
  func refused() async throws {
    try await inHookWorld { world in
      let disk = try world.attach(5, "dmu:raw:fakes//x")
      #expect(
        try await world.addFailure(disk)
          == "source fakes//x cannot be had: there is no hook \(world.home)/hooks/fakes (did you mean"
          + " 'fake'?): install it, or correct the spec")
      #expect(chown(world.home + "/hooks/fake", 1000, 0) == 0)
      let other = try world.attach(6, try await world.makeStorage("store"))
      #expect(try await world.addFailure(other).contains("(its owner is user 1000)"))
      #expect(try world.hookCalls().isEmpty && world.sourceRecords.isEmpty)
    }
  }

  @Test("spec check and the doctor ask the hook")
  func check() async throws {
    try await inHookWorld { world in
      let spec = try await world.makeStorage("store")
      let path = world.configurationPath
      func verdict(_ text: String) async throws -> CommandStatus {
        try await blocking { SpecCommand.check(text, configurationPath: path) }
      }
      #expect(try await verdict(spec) == .done)
      #expect(try await verdict(spec.replacing("//base", with: "//gone")) == .failed)
      #expect(try await verdict("dmu:raw:none//x") == .failed)
      #expect(try world.hookCalls().allSatisfy { $0.hasPrefix("check ") })
      let source = try #require(Source("fake//store"))
      let doctor = Doctor(configurationPath: path, socket: nil)
      #expect(
        doctor.check([source]).map(\.text) == [
          "ok       source fake//store (the storage is there)\n"
        ])
      #expect(
        doctor.sources().map(\.text) == [
          "ok       the hooks in \(world.home)/hooks (fake)\n"
        ])
    }
  }

  // MARK: - Events

  @Test("Hooks are told what happens to a disk, in its order")
  func events() async throws {
    try await inHookWorld { world in
      try world.recordEvents("sleep 0.2")
      let spec = try await world.makeStorage("store")
      let disk = try world.attach(5, spec)
      let device = try await world.add(disk)
      try world.detach(disk)
      let failing = try world.attach(6, "dmu:raw:/nothing")
      _ = try await world.addFailure(failing)
      try await eventually("all are told") { try world.toldEvents().count == 3 }
      let told = try world.toldEvents()
      let own = told.filter { $0.disk == "5-51712" }
      #expect(own.map(\.event) == [.attached, .detached])
      #expect(own[0].device == device.path && own[0].spec == spec && own[0].vdev == "xvda")
      #expect(own[0].domain == 5 && own[0].domainName == "guest5" && own[0].format == "dscow")
      #expect(own.allSatisfy { $0.store == "fake//store" && $0.base == "fake//base" })
      let failure = try #require(told.first { $0.event == .failed })
      #expect(failure.disk == "6-51712" && failure.error?.contains("/nothing") == true)
    }
  }

  @Test("A hook that fails, hangs or is not root's harms no disk, and the others are told")
  func eventsFail() async throws {
    try await inHookWorld(["hooks.timeout": "1"]) { world in
      try world.recordEvents("exit 1", "10-fails")
      try world.recordEvents("exec sleep 60", "20-hangs")
      try world.recordEvents("", "30-foreign")
      #expect(chmod(world.home + "/hooks/events.d/30-foreign", 0o777) == 0)
      try world.recordEvents("", "90-record")
      let disk = try world.attach(5, world.spec("g.dscow"))
      try await world.add(disk)
      try world.detach(disk)
      try await world.isGone(disk)
      try await eventually("both are told") { try world.toldEvents().count == 2 }
      #expect(try world.toldEvents().map(\.event) == [.attached, .detached])
      let log = try SmallFile.read(world.folder.file("daemon.log"))
      for words in ["10-fails", "exit status 1", "20-hangs", "took longer than 1 seconds", "0777"] {
        #expect(log.contains(words), "\(words)")
      }
    }
  }
}
