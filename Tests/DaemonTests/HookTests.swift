// SPDX-License-Identifier: Apache-2.0
// Hooks by themselves: what they may print, who may own them, and how they are run and ended.

import Glibc
import SystemIO
import Testing
import TestSupport

@testable import Daemon

@Suite struct HookTests {
  private let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  /// A hook that runs these lines.
  private func hook(_ lines: String, _ name: String = "hook", mode: mode_t = 0o755) throws -> String
  {
    let path = folder.file(name)
    try TextFile.replace(path, with: "#!/bin/sh\n\(lines)\n")
    try #require(chmod(path, mode) == 0)
    return path
  }

  private func run(
    _ program: String, _ arguments: [String] = [], input: String? = nil,
    deadline: Duration = .seconds(20)
  ) throws -> HookOutcome {
    var call = HookCall(
      program: program, arguments: arguments, deadline: deadline, files: folder.file("run"))
    call.environment = ["DMU_DISK": "5-51712"]
    call.input = input
    return try ProcessHooks(asService: false).run(call)
  }

  @Test("What a hook prints: a path, and whether it is shared")
  func output() throws {
    #expect(try AttachedSource("/dev/vg/lv\n").path == "/dev/vg/lv")
    #expect(try !AttachedSource("/dev/vg/lv\nlocal\n").isShared)
    let shared = try AttachedSource("\n  /dev/rbd0 \n\nshared\n")
    #expect(shared.path == "/dev/rbd0" && shared.isShared)
    for (text, line) in [
      ("", ""), ("\n \n", ""), ("dev/x\n", "dev/x"), ("/dev/x\nnonsense\n", "nonsense"),
      ("Logical volume active\n/dev/x\n", "Logical volume active"), ("/a\u{7}b\n", "/a\u{7}b"),
    ] {
      #expect(throws: AttachedSource.Senseless(line: line)) { try AttachedSource(text) }
    }
  }

  @Test("A record is read as it was written")
  func record() throws {
    let source = try #require(Source("lvm//vg/a b%"))
    var record = SourceRecord(source, isWritable: true, disk: DiskID(domain: 5, device: 51712))
    #expect(SourceRecord(record.text) == record)
    record.attached = try AttachedSource("/dev/x=y\nshared")
    #expect(SourceRecord(record.text) == record)
    for text in ["", "source=x\ndisk=5-51712\n", "source=a//b\n", "nonsense"] {
      #expect(SourceRecord(text) == nil)
    }
  }

  @Test("A hook has its arguments, variables, input, and a session of its own")
  func runs() throws {
    let program = try hook(
      #"cat; echo "$1|$2|$DMU_DISK|${HOME-none}"; echo one >&2; echo two >&2; exit 3"#)
    let outcome = try run(program, ["attach", "a b"], input: "told\n")
    #expect(outcome.status == .exited(3))
    #expect(outcome.output == "told\nattach|a b|5-51712|none\n")
    #expect(outcome.complaints == ["one", "two"])
    #expect(!outcome.isGood)
    #expect(World.names(folder.path) == ["hook"], "its files are gone")
  }

  @Test("What a hook leaves running keeps nobody waiting")
  func background() throws {
    let program = try hook("sleep 60 & echo $! >'\(folder.file("pid"))'; echo /dev/x")
    let begin = ContinuousClock.now
    let outcome = try run(program)
    #expect(outcome.isGood && outcome.output == "/dev/x\n")
    #expect(ContinuousClock.now - begin < .seconds(20))
    let pid = try #require(Int32(try TextFile.read(folder.file("pid")).trimmingNewline))
    #expect(isAlive(pid))
    kill(pid, SIGKILL)
  }

  @Test("A hook that takes too long is killed with what it has started")
  func overdue() async throws {
    let program = try hook(
      "echo early; sleep 60 & echo $! >'\(folder.file("pid"))'; echo late >&2; wait")
    let outcome = try run(program, deadline: .milliseconds(300))
    #expect(outcome.status == nil && !outcome.isGood)
    #expect(outcome.output == "early\n" && outcome.complaints == ["late"])
    let pid = try #require(Int32(try TextFile.read(folder.file("pid")).trimmingNewline))
    try await eventually("its child has ended") { !isAlive(pid) }
    #expect(!World.names(folder.path).contains { $0.hasPrefix("run") })
  }

  @Test("A hook that writes without end is killed")
  func flood() throws {
    let outcome = try run(
      try hook("while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done"))
    #expect(outcome.status == nil)
  }

  @Test("A run that an earlier daemon has left is ended before the next")
  func former() async throws {
    let program = try hook("echo $$ >'\(folder.file("pid"))'; exec sleep 60", "long")
    let out = try Descriptor(
      path: folder.file("run.out"), flags: O_WRONLY | O_CREAT | O_APPEND, mode: 0o600)
    var command = Command(program)
    command.newSession = true
    command.descriptors = [1: out.raw]
    let process = try command.start()
    try await eventually("it runs") { access(folder.file("pid"), F_OK) == 0 }
    #expect(try run(try hook("echo /dev/x")).output == "/dev/x\n")
    #expect(try process.wait(milliseconds: 5000) == .signalled(SIGKILL))
  }

  @Test("Only root's hooks are run, which nobody else may change", .enabled(if: geteuid() == 0))
  func owners() throws {
    let hooks = HookFolder(configurationPath: folder.file("etc.toml"))
    #expect(hooks.path == folder.file("etc/hooks"))
    let source = try #require(Source("fake//x"))
    func refusal() -> String {
      do { return "run: \(try hooks.program(for: source))" } catch { return error.sentence }
    }
    try #require(mkdir(folder.file("etc"), 0o755) == 0 && mkdir(hooks.path, 0o755) == 0)
    let program = hooks.path("fake")
    #expect(
      refusal() == "source fake//x cannot be had: there is no hook \(program): install it, or"
        + " correct the spec")
    _ = try hook("exit 0", "etc/hooks/fakes")
    #expect(refusal().contains("there is no hook \(program) (did you mean 'fakes'?)"))
    _ = try hook("exit 0", "etc/hooks/fake")
    #expect(refusal() == "run: \(program)")
    #expect(chmod(program, 0o775) == 0)
    #expect(
      refusal() == "\(program) may be changed by others than root (its mode is 0775), so that no"
        + " hook of it is run: chmod go-w \(program)")
    #expect(chmod(program, 0o755) == 0 && chown(program, 1000, 0) == 0)
    #expect(refusal().contains("(its owner is user 1000)"))
    #expect(chown(program, 0, 0) == 0 && chmod(program, 0o644) == 0)
    #expect(refusal().hasPrefix("the hook \(program) is not a program"))
    #expect(chmod(program, 0o755) == 0 && chmod(hooks.path, 0o777) == 0)
    #expect(refusal().hasPrefix("\(hooks.path) may be changed by others than root"))
  }
}
