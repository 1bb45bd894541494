// SPDX-License-Identifier: Apache-2.0
import Glibc
import SystemIO
import Testing
import TestSupport
import WorkerLink

@Suite("The worker link") struct LinkTests {
  private static let start: StartOrder = {
    var start = StartOrder(disk: "3-51712", format: "dscow")
    start.create = true
    start.blockSize = 4096
    start.storePath = "/a b/100%\nodd=.dscow"
    start.basePath = "/dev/vg/bäse"
    start.readOnly = true
    start.force = true
    start.baseFormat = "qcow2"
    start.depth = 7
    return start
  }()

  @Test(arguments: [
    WorkerOrder.start(start), .start(StartOrder(disk: "", format: "")), .file,
    .refuseFile(reason: "not allowed"), .attach, .status, .ping, .descriptors(index: 0),
    .descriptors(index: 7), .stop,
  ]) func ordersComeBackAsTheyWent(_ order: WorkerOrder) throws {
    #expect(try WorkerOrder(LinkMessage(decoding: order.message.encoded())) == order)
  }

  @Test(arguments: [
    WorkerReport.ready(report), .status(report), .detached, .alive, .stopping,
    .needFile(FileNeed(role: "data-file", path: "/x y", writable: true)),
    .descriptors(files: 0, file: nil),
    .descriptors(files: 3, file: FileNeed(role: "base", path: "b", writable: false)),
    .failed(.baseChanged, message: "base X has changed"),
    .event(.noSpace, error: "full"), .refused(order: "dance", message: "unknown"),
  ]) func reportsComeBackAsTheyWent(_ report: WorkerReport) throws {
    #expect(try WorkerReport(LinkMessage(decoding: report.message.encoded())) == report)
  }

  private static let report: DiskReport = {
    var report = DiskReport()
    report.hindrance = "is strange"
    report.parts = [
      DiskPart(.store, isWritable: true, isDirect: false, growth: 1 << 30),
      DiskPart(.file(1), isWritable: true), DiskPart(.base, isWritable: false),
    ]
    report.size = 1 << 40
    report.blockSize = 65536
    report.basePath = "/b"
    report.error = "100 % full"
    report.state = .noSpace
    var times = ReportedTimes()
    (times.bytesRead, times.flushing) = (4096, .max)
    times.latencies.add(3_000_000)
    report.times = times
    return report
  }()

  /// Another version's worker may know kinds that this one does not.
  @Test func aFailureOfAnUnknownKindIsOne() throws {
    let message = LinkMessage("failed", ["code": "moonstruck", "message": "m"])
    #expect(try WorkerReport(message) == .failed(.other, message: "m"))
    for fault in WorkerFault.allCases {
      #expect(WorkerFault(word: fault.rawValue) == fault)
    }
  }

  @Test(arguments: [
    "", "start", "\n", "Start\n", "start\nx\n", "start\nx=1\nx=2\n", "start\nx=%\n",
    "start\nx=%0\n", "start\nx=%zz\n", "start\nx=%ff\n", "start\nx=\u{1}\n", "start\n=1\n",
    "a\u{0}\n", "start\n\n", String(repeating: "a", count: 33) + "\n",
    "x\n" + (0..<65).map { "k\($0)=\n" }.joined(),
  ]) func whatIsNoMessageIsRefused(_ text: String) {
    #expect(throws: LinkFault.self) { try LinkMessage(decoding: Array(text.utf8)) }
  }

  @Test(arguments: [
    "dance\n", "start\n", "start\ndisk=1\n", "start\ndisk=1\nformat=f\ncreate=2\n",
    "start\ndisk=1\nformat=f\nblock-size=-1\n", "start\ndisk=1\nformat=f\nblock-size=99999999999\n",
  ]) func ordersThatMakeNoSenseAreRefused(_ text: String) {
    #expect(throws: LinkFault.self) { try WorkerOrder(LinkMessage(decoding: Array(text.utf8))) }
  }

  @Test func liesInAReportAreRefused() throws {
    for (field, value) in [
      ("size", "511"), ("size", "18446744073709551104"), ("block-size", "0"),
      ("block-size", "513"), ("state", "splendid"), ("attached", "maybe"), ("pid", "x"),
      ("latencies", ""), ("latencies", "1,2"), ("bytes-read", "-1"),
      ("flush-latencies", "0" + String(repeating: ",x", count: 19)),
      ("parts", (0..<16).map { "file-\($0):w:0" }.joined(separator: ",")),
    ] {
      var message = WorkerReport.status(Self.report).message
      message.fields[field] = value
      #expect(throws: LinkFault.badField(verb: "status", field: field)) {
        try WorkerReport(message)
      }
    }
  }

  @Test func aNumberOfFilesThatIsNoneIsRefused() throws {
    for files in ["-1", "-9223372036854775808", "9223372036854775808", "x"] {
      #expect(throws: LinkFault.badField(verb: "descriptors", field: "files")) {
        try WorkerReport(LinkMessage("descriptors", ["files": files]))
      }
    }
  }

  /// A seeded storm of damaged messages: each is decoded or refused.
  @Test func damageNeverTraps() throws {
    var random = SeededRandom(announcedAs: "damaged link messages")
    let messages = [WorkerOrder.start(Self.start).message, WorkerReport.ready(Self.report).message]
    let good = try messages.map { try $0.encoded() }
    var refused = 0
    for _ in 0..<20_000 {
      var bytes = good.randomElement(using: &random)!
      for _ in 0..<Int.random(in: 1...4, using: &random) {
        bytes[Int.random(in: bytes.indices, using: &random)] = .random(in: 0...255, using: &random)
      }
      if Bool.random(using: &random) {
        bytes.removeLast(.random(in: 0..<bytes.count, using: &random))
      }
      do throws(LinkFault) {
        let message = try LinkMessage(decoding: bytes)
        // One that is understood says the same when it is said again.
        #expect(try LinkMessage(decoding: message.encoded()) == message)
        _ = try WorkerOrder(message)
      } catch { refused += 1 }
    }
    #expect(refused > 1000)
  }

  @Test func descriptorsTravelByRole() throws {
    let pair = try UnixSocket.pair(.packets)
    let daemon = LinkConnection(pair.first)
    let worker = LinkConnection(pair.second)
    let folder = try TemporaryFolder()
    let files = try ["s", "b", "p"].map {
      PassedDescriptor(
        try Descriptor(path: folder.file($0), flags: O_RDWR | O_CREAT, mode: 0o600))
    }
    defer { withExtendedLifetime(files) {} }
    let raws = files.compactMap(\.raw)
    try daemon.send(
      .start(Self.start), lending: [.store: raws[0], .base: raws[1], .pending: raws[2]])
    guard case .message(let message, let descriptors) = try worker.receive() else {
      Issue.record("no message")
      return
    }
    #expect(try WorkerOrder(message) == .start(Self.start))
    #expect(descriptors.roles == [.store, .base, .pending])
    for (role, raw) in zip([LinkRole.store, .base, .pending], raws) {
      var sent = stat()
      var received = stat()
      let taken = try #require(descriptors.raw(role))
      #expect(fstat(raw, &sent) == 0 && fstat(taken, &received) == 0)
      #expect(sent.st_ino == received.st_ino)
    }
    #expect(descriptors.raw(.nbd) == nil)
  }

  @Test func rolesThatDoNotFitAreRefusedAndTheLinkLives() throws {
    let pair = try UnixSocket.pair(.packets)
    let worker = LinkConnection(pair.second)
    for (text, count) in [
      ("start\nroles=store\n", 0), ("start\n", 1), ("start\nroles=store,store\n", 2),
      ("start\nroles=lamp\n", 1), ("start\nroles=store,base\n", 1), ("start\nroles=\n", 0),
    ] {
      try PacketSocket.send(
        Array(text.utf8), descriptors: Array(repeating: 0, count: count), to: pair.first.raw)
      #expect(throws: LinkError.self) { try worker.receive() }
    }
    try PacketSocket.send(Array(repeating: 65, count: 20000), to: pair.first.raw)
    #expect(throws: LinkError.fault(.tooLarge)) { try worker.receive() }
    try PacketSocket.send(Array("status\n".utf8), to: pair.first.raw)
    guard case .message(LinkMessage("status"), _) = try worker.receive(milliseconds: 100) else {
      Issue.record("the link did not live on")
      return
    }
  }

  @Test func aPeerThatDoesNotReadIsNoticed() throws {
    let pair = try UnixSocket.pair(.packets)
    let daemon = LinkConnection(pair.first)
    #expect(throws: LinkError.io(IOError(EAGAIN, "send a packet"))) {
      while true { try daemon.send(.refuseFile(reason: String(repeating: "x", count: 8000))) }
    }
    let other = pair.second.raw
    #expect(other >= 0)
  }
}
