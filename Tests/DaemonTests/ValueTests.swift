// SPDX-License-Identifier: Apache-2.0
// The parts of the daemon that touch nothing: names, decisions, waiting times, texts.

import Glibc
import Logging
import SystemIO
import Testing
import TestSupport
import WorkerLink

@testable import Daemon

@Suite struct ValueTests {
  private let wanted = WantedDisk(params: "dmu:dscow:/a", readOnly: false, going: false)
  private let failure = DiskFailure(.io, "no")

  @Test("Disks are named as in xenstore and in the guest")
  func names() {
    let disk = VBD(domain: 5, device: 51712)
    #expect(VBD(path: "backend/vbd/5/51712") == disk)
    #expect(VBD(path: "/local/domain/0/backend/vbd/5/51712/state") == disk)
    for bad in [
      "backend/vbd/5", "backend/vbd", "backend/vif/5/0", "vbd/5/51712", "backend/vbd/05/1",
      "backend/vbd/-5/1", "backend/vbd/5/+1", "backend/vbd/5/x", "backend/vbd/99999999999/1",
    ] { #expect(VBD(path: bad) == nil, "\(bad)") }
    #expect(DiskID("5-51712")?.vbd?.backendPath == "backend/vbd/5/51712")
    #expect(DiskID("5-") == nil)
    #expect(DiskID("5-1-2") == nil)
    let again = DiskID("5-51712+2")
    #expect(again == .again(disk, 2))
    #expect(again?.description == "5-51712+2")
    #expect(again?.vbd == disk)
    for bad in ["5-51712+", "5-51712+0", "5-51712+01", "5-51712+-1", "5-51712+1+1", "+1"] {
      #expect(DiskID(bad) == nil, "\(bad)")
    }
    let sorted: [DiskID] = [
      .vbd(disk), .again(disk, 1), .again(disk, 2), DiskID(domain: 6, device: 1),
    ]
    for one in sorted.indices {
      for other in sorted.indices { #expect((sorted[one] < sorted[other]) == (one < other)) }
    }
    let vdevs = [
      51712: "xvda", 51713: "xvda1", 51728: "xvdb", 51952: "xvdp", 768: "hda", 769: "hda1",
      832: "hdb", 5632: "hdc", 2048: "sda", 2064: "sdb", 7: "7",
      1 << 28 | 16 << 8: "xvdq", 1 << 28 | 26 << 8 | 3: "xvdaa3",
    ]
    for (number, name) in vdevs { #expect(VBD(domain: 1, device: number).vdev == name) }
  }

  @Test("The step that follows from where a disk is and what is wanted")
  func steps() {
    let now = ContinuousClock.now
    func step(_ phase: DiskPhase, _ wanted: WantedDisk?, gone: Bool = false) -> DiskStep {
      phase.step(wanted: wanted, holderGone: gone, now: now)
    }
    var going = wanted
    going.going = true
    let holder = DiskID(domain: 1, device: 2)
    #expect(step(.idle, nil) == .forget)
    #expect(step(.idle, wanted) == .start)
    #expect(step(.idle, going) == .none)
    #expect(step(.waiting(holder: holder), nil) == .forget)
    #expect(step(.waiting(holder: holder), wanted) == .none)
    #expect(step(.waiting(holder: holder), wanted, gone: true) == .start)
    #expect(step(.waiting(holder: holder), going, gone: true) == .none)
    #expect(step(.serving(nil), wanted) == .none)
    #expect(step(.serving(nil), going) == .none)
    #expect(step(.serving(nil), nil) == .stop)
    #expect(step(.restarting(at: now), wanted) == .restart)
    #expect(step(.restarting(at: now + .seconds(1)), wanted) == .wait(until: now + .seconds(1)))
    #expect(step(.restarting(at: now), nil) == .stop)
    #expect(step(.failed(failure, attached: false), wanted) == .none)
    #expect(step(.failed(failure, attached: false), nil) == .forget)
    #expect(step(.failed(failure, attached: true), nil) == .stop)
    #expect(step(.starting, nil) == .none)
    #expect(step(.stopping(nil), wanted) == .none)
    let later = now + .seconds(1)
    #expect(step(.stopping(.init(failure, retry: now)), nil) == .stop)
    #expect(step(.stopping(.init(failure, retry: now)), wanted) == .stop, "first it has to go")
    #expect(step(.stopping(.init(failure, retry: later)), nil) == .wait(until: later))
    #expect(step(.asking(store: "/s"), wanted) == .none)
    #expect(step(.asking(store: "/s"), nil) == .forget)
    #expect(step(.joined(holder), wanted) == .none)
    #expect(step(.joined(holder), going) == .none)
    #expect(step(.joined(holder), nil) == .leave)
  }

  @Test("Everybody is told the same states, and the reason")
  func publicStates() {
    #expect(DiskPhase.serving(nil).publicState == .ready)
    let trouble = DiskPhase.Trouble(state: .noSpace, error: "full")
    #expect(DiskPhase.serving(trouble).publicState == .noSpace)
    #expect(DiskPhase.serving(trouble).error == "full")
    #expect(DiskPhase.failed(failure, attached: true).error == "no")
    #expect(DiskPhase.restarting(at: .now).publicState == .starting)
    let failed = DiskPhase.restarting(at: .now, why: "no base", hasFailed: true)
    #expect(failed.publicState == .failed)
    #expect(failed.error == "no base (it is tried again)")
    #expect(
      PublicState.allCases.map(\.rawValue)
        == [
          "starting", "ready", "degraded", "no-space", "failed", "stopping", "inactive", "pending",
        ])
  }

  @Test("Restarts come later and later, and end")
  func backOff() {
    var backOff = BackOff(limit: 7, window: .seconds(60))
    var now = ContinuousClock.now
    var delays: [Duration?] = []
    for _ in 0..<8 {
      let delay = backOff.next(at: now)
      delays.append(delay)
      now += (delay ?? .zero) + .milliseconds(10)
    }
    #expect(
      delays == [
        .zero, .milliseconds(100), .milliseconds(200), .milliseconds(500), .seconds(1),
        .seconds(2), .seconds(2), nil,
      ])
    #expect(backOff.next(at: now + .seconds(61)) == .zero, "what is long ago does not count")
    backOff.reset()
    #expect(backOff.recent(at: now) == 0)
    var none = BackOff(limit: 0, window: .seconds(1))
    #expect(none.next(at: now) == nil)
  }

  @Test("State files are read back, and anything else is not one")
  func records() throws {
    let record = DiskRecord(
      params: "dmu:dscow:/a%3A:/b", readOnly: true, vdev: "xvda",
      files: [
        AllowedFile(
          need: FileNeed(role: "base", path: "/x=y\u{E4} %", writable: false), path: "/z z",
          identity: FileIdentity("f-801-4c2")),
        AllowedFile(need: FileNeed(role: "extent", path: "a", writable: true), path: "/a"),
      ],
      worker: 5, workerStart: 6,
      device: DeviceNode(index: 1, path: "/dev/nbd1", major: 43, minor: 32), since: 7)
    #expect(DiskRecord(record.text) == record)
    var mapped = record
    mapped.device = DeviceNode(
      kind: .dm, index: 3, path: "/dev/mapper/dmu-5-51712", major: 253, minor: 3)
    #expect(DiskRecord(mapped.text) == mapped)
    var known = record
    known.identities = DiskIdentities(
      store: FileIdentity("b-fd00"), base: FileIdentity("f-1-2"), log: FileIdentity("f-19-3"))
    known.isComplete = true
    #expect(DiskRecord(known.text) == known)
    known.users = [VBD(domain: 5, device: 51712), VBD(domain: 6, device: 51712)]
    known.isHeld = true
    #expect(DiskRecord(known.text) == known)
    #expect(DiskRecord(record.text + "users=5-51712%20x\n") == nil)
    for text in ["f-801-4c2", "b-fd00"] { #expect(FileIdentity(text)?.text == text) }
    for text in ["", "f", "f-1", "f-1-2-3", "b-1-2", "b-x", "c-1", "f--1-2"] {
      #expect(FileIdentity(text) == nil, "\(text)")
    }
    let old = record.text.replacing("device-kind=nbd\n", with: "")
    #expect(DiskRecord(old) == record, "the record of a daemon that knew nbd only")
    #expect(DiskRecord("") == nil)
    #expect(DiskRecord("worker=1") == nil)
    let bytes = Array(record.text.utf8)
    for length in 0..<bytes.count {
      _ = DiskRecord(String(decoding: bytes[..<length], as: UTF8.self))
    }
  }

  @Test("What an image names is opened only where it may be, and can be shown and remembered")
  func naming() throws {
    let folder = try TemporaryFolder()
    for name in ["a", "b\nc"] {
      _ = try Descriptor(path: folder.file(name), flags: O_RDWR | O_CREAT, mode: 0o600)
    }
    // A plain name that leads to another.
    #expect(symlink(folder.file("b\nc"), folder.file("link")) == 0)
    var configuration = Configuration()
    configuration.baseDirectories = [folder.path]
    configuration.chainDepth = 3
    let policy = NamingPolicy(configuration, file: "f")
    let spec = Spec(format: "qcow2", store: folder.file("store"))
    func allowed(_ role: String, _ path: String, writable: Bool = false) -> AllowedFile? {
      let need = FileNeed(role: role, path: path, writable: writable)
      do { return try policy.resolve(need, of: spec, unless: nil) } catch { return nil }
    }
    let found = try #require(allowed("base", "a"))
    #expect(found.path == folder.file("a"), "relative to the store's folder")
    #expect(allowed("extent", folder.file("a")) != nil)
    #expect(allowed("base", "/etc/passwd") == nil)
    #expect(allowed("base", "../../../etc/passwd") == nil)
    #expect(allowed("data-file", "a", writable: true) == nil, "that is for store.directories")
    #expect(allowed("base", "b\nc") == nil && allowed("base", "link") == nil)
    #expect(allowed("a b", "a") == nil && allowed("", "a") == nil)
    // The spec's own directory, in place of the host's; not for what the disk writes to.
    let elsewhere = NamingPolicy(configuration, file: "f")
    func ruled(_ directory: String, _ role: String) -> Bool {
      let spec = Spec(
        format: "qcow2", options: [Spec.Option(name: "base-directory", value: directory)],
        store: folder.file("store"))
      let need = FileNeed(role: role, path: "a", writable: false)
      do {
        return try elsewhere.resolve(need, of: spec, unless: nil).path == folder.file("a")
      } catch { return false }
    }
    #expect(ruled(folder.path, "base") && !ruled("/usr", "base") && !ruled("/usr", "extent"))
    #expect(throws: DiskFailure.self) {
      try policy.check(found.need, after: [found], isComplete: true, of: spec)
    }
    try policy.check(found.need, after: [found], of: spec)
    #expect(throws: DiskFailure.self) {
      try policy.check(found.need, after: [found, found], of: spec)
    }
    let extent = AllowedFile(need: FileNeed(role: "extent", path: "x", writable: true), path: "/x")
    let many = Array(repeating: extent, count: NamingPolicy.mostFiles)
    try policy.check(extent.need, after: Array(many.dropLast()), of: spec)
    #expect(throws: DiskFailure.self) { try policy.check(extent.need, after: many, of: spec) }
  }

  @Test("The table of status")
  func table() {
    var one = DiskStatus(domain: 5, vdev: "xvda", number: 51712, state: .ready, since: 0)
    one.domainName = "web"
    one.format = "dscow"
    one.store = "/s"
    one.base = "/b"
    one.device = "/dev/nbd0"
    one.transport = .nbd
    one.note = "served by nbd, since its image grows"
    one.size = 10 << 30
    one.allocated = 3 << 19
    one.worker = 77
    var two = DiskStatus(domain: 12, vdev: "xvdb", number: 51728, state: .failed, since: 0)
    two.error = "base /b does not exist: correct the path"
    let since = StatusTable.time(0)
    #expect(
      StatusTable.render([one, two]) == """
        DOMAIN   VDEV  FORMAT  STORE  BASE  DEVICE     VIA  SIZE  ALLOCATED  STATE   WORKER  SINCE
        web (5)  xvda  dscow   /s     /b    /dev/nbd0  nbd   10G       1.5M  ready   77      \(since)
        12       xvdb  -       -      -     -          -       -          -  failed  -       \(since)
        web (5) xvda: served by nbd, since its image grows
        12 xvdb: base /b does not exist: correct the path

        """)
    #expect(StatusTable.render([]) == "no disks\n")
  }

  @Test("Numbers of bytes")
  func bytes() {
    let shown: [(UInt64, String)] = [
      (0, "0"), (1023, "1023"), (1024, "1K"), (1536, "1.5K"), (65536, "64K"),
      (1 << 40, "1T"), (1_000_000_000, "954M"), (UInt64.max, "16E"),
    ]
    for (number, text) in shown { #expect(ByteCount.short(number) == text) }
    #expect(ByteCount.parse("64K") == 65536)
    #expect(ByteCount.parse("1m") == 1 << 20)
    for bad in ["", "K", "4X", "-4K", "4 K", "99999999999999999999", "18446744073709551615T"] {
      #expect(ByteCount.parse(bad) == nil, "\(bad)")
    }
  }

  @Test("Lines of the log stay one line, and their facts can be told apart")
  func log() {
    #expect(JournalLog.render("ready", ["b": "2", "a": "x y"]) == "ready a=\"x y\" b=2")
    #expect(JournalLog.render("a\nb", ["k": "\"q\\\""]) == "a%0Ab k=\"\\\"q\\\\\\\"\"")
    #expect(JournalLog.render("m", ["e": ""]) == "m e=\"\"")
  }

  @Test("A base from an image: only below the allowed directories, links resolved")
  func allowed() {
    #expect(Images.allowed("/etc/passwd", in: []) == nil)
    #expect(Images.allowed("/etc/passwd", in: ["/usr"]) == nil)
    #expect(Images.allowed("/etc/passwd", in: ["/etc"]) == "/etc/passwd")
    #expect(Images.allowed("/etc/passwd", in: ["/"]) == "/etc/passwd")
    #expect(Images.allowed("/usr/../etc/passwd", in: ["/usr"]) == nil)
    #expect(Images.allowed("/etc", in: ["/etc"]) == nil, "the directory itself is no base")
    #expect(Images.allowed("etc/passwd", in: ["/"]) == nil)
    #expect(Images.allowed("/proc/self/root/etc/passwd", in: ["/proc"]) == nil)
    #expect(Images.allowed("/etc/nothing-here", in: ["/etc"]) == "/etc/nothing-here")
    #expect(Images.allowed("/etc/../nothing-here", in: ["/etc"]) == nil)
  }
}
