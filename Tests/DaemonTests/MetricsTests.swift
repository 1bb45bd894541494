// SPDX-License-Identifier: Apache-2.0
// Metrics of a daemon that runs: over its socket, over HTTP, in a file, and as a real Prometheus
// scrapes them. One disk has a real worker by nbd, the other a device of the stand-in.

import Fakes
import Foundation
import Glibc
import SystemIO
import Testing
import TestSupport

@testable import Daemon

/// HTTP by hand: one request, one connection.
private enum Web {
  /// Connects to a port of this host.
  static func connect(_ port: UInt16) throws -> Descriptor {
    let socket = try stream()
    var address = address(port)
    let code = withUnsafePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        Glibc.connect(socket.raw, $0, socklen_t(MemoryLayout<sockaddr_in>.size))
      }
    }
    guard code == 0 else { throw IOError.last("connect to", "port \(port)") }
    return socket
  }

  /// A socket without an address.
  static func stream() throws -> Descriptor {
    let raw = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
    guard raw >= 0 else { throw IOError.last("make a socket") }
    return Descriptor(owning: raw)
  }

  /// A port that nobody listened on a moment ago.
  static func freePort() throws -> UInt16 {
    let socket = try stream()
    var address = address(0)
    var length = socklen_t(MemoryLayout<sockaddr_in>.size)
    let code = withUnsafeMutablePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        bind(socket.raw, $0, length) == 0 ? getsockname(socket.raw, $0, &length) : -1
      }
    }
    guard code == 0 else { throw IOError.last("find a port") }
    return UInt16(bigEndian: address.sin_port)
  }

  private static func address(_ port: UInt16) -> sockaddr_in {
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_port = port.bigEndian
    address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
    return address
  }

  /// The whole answer, its head included.
  static func ask(
    _ socket: consuming Descriptor, _ path: String, method: String = "GET", accept: String = "*/*"
  ) throws -> String {
    let text = "\(method) \(path) HTTP/1.0\r\nHost: localhost\r\nAccept: \(accept)\r\n\r\n"
    let request = Array(text.utf8)
    guard send(socket.raw, request, request.count, Int32(MSG_NOSIGNAL)) == request.count else {
      throw IOError.last("send a request")
    }
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 65536)
    while true {
      var item = pollfd(fd: socket.raw, events: Int16(POLLIN), revents: 0)
      guard poll(&item, 1, 20_000) == 1 else { throw TooLate(description: "no answer: \(path)") }
      let count = recv(socket.raw, &buffer, buffer.count, 0)
      guard count > 0 else { return String(decoding: bytes, as: UTF8.self) }
      bytes += buffer[..<count]
    }
  }
}

/// Prometheus, with a configuration of the test's.
private struct Prometheus {
  static let program = "/usr/bin/prometheus"
  let port: UInt16
  private let process: ProcessHandle

  init(scraping target: UInt16, in folder: TemporaryFolder) throws {
    port = try Web.freePort()
    let configuration = folder.file("prometheus.yml")
    try TextFile.replace(
      configuration,
      with: """
        global: {scrape_interval: 500ms, scrape_timeout: 500ms}
        scrape_configs: [{job_name: dmu, static_configs: [{targets: ["127.0.0.1:\(target)"]}]}]

        """)
    let log = try Descriptor(
      path: folder.file("prometheus.log"), flags: O_WRONLY | O_CREAT, mode: 0o600)
    var command = Command(
      Self.program,
      [
        "--config.file=\(configuration)", "--storage.tsdb.path=\(folder.file("tsdb"))",
        "--web.listen-address=127.0.0.1:\(port)",
      ], environment: ["PATH=/usr/bin:/bin", "GOMAXPROCS=1"])
    command.descriptors = [1: log.raw, 2: log.raw]
    process = try command.start()
  }

  func end() async throws {
    try process.send(SIGKILL)
    let process = process
    _ = try await blocking { try process.wait(milliseconds: 10_000) }
  }

  private struct Answer: Decodable {
    struct Content: Decodable {
      struct Series: Decodable {
        var metric: [String: String]
        var value: [Value]
      }
      /// A time as a number, or a value as text.
      enum Value: Decodable {
        case time(Double)
        case text(String)

        init(from decoder: any Decoder) throws {
          let container = try decoder.singleValueContainer()
          // What is no text is a number: the next line tells what is neither.
          self =
            if let text = try? container.decode(String.self) { .text(text) } else {
              .time(try container.decode(Double.self))
            }
        }
      }
      var result: [Series]
    }
    var status: String
    var error: String?
    var data: Content?
  }

  /// What a query returns now: labels and a number each. Throws what Prometheus has against it.
  func query(_ text: String) async throws -> [(labels: [String: String], value: Double)] {
    let code = text.utf8.map { byte in
      let digits = String(byte, radix: 16)
      return "%" + (digits.count == 1 ? "0" : "") + digits
    }.joined()
    let port = port
    let answer = try await blocking {
      try Web.ask(try Web.connect(port), "/api/v1/query?query=\(code)")
    }
    let body = try #require(answer.range(of: "\r\n\r\n")).upperBound
    let decoded = try JSONDecoder().decode(Answer.self, from: Data(answer[body...].utf8))
    guard decoded.status == "success", let data = decoded.data else {
      throw TooLate(description: "\(text): \(decoded.error ?? answer)")
    }
    return data.result.compactMap { series in
      guard case .text(let value)? = series.value.last, let number = Double(value) else {
        return nil
      }
      return (series.metric, number)
    }
  }

  /// Whether it answers at all by now.
  func isUp() async -> Bool {
    do { return try await !query("up").isEmpty } catch { return false }
  }
}

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct MetricsTests {
  private static let root = #filePath.replacing("Tests/DaemonTests/MetricsTests.swift", with: "")

  /// What a dashboard draws, with its variables as Grafana puts them in.
  private func dashboard() throws -> [(panel: String, query: String)] {
    struct Dashboard: Decodable {
      struct Panel: Decodable {
        struct Target: Decodable { var expr: String }
        var title: String
        var targets: [Target]
      }
      var panels: [Panel]
    }
    let text = try TextFile.read(Self.root + "etc/grafana/dmu-xen.json")
    let dashboard = try JSONDecoder().decode(Dashboard.self, from: Data(text.utf8))
    return dashboard.panels.flatMap { panel in
      panel.targets.map { target in
        let query = target.expr.replacing("$__rate_interval", with: "10s")
          .replacing("$domain", with: ".*").replacing("$disk", with: ".*")
        return (panel.title, query)
      }
    }
  }

  /// A disk by nbd with a real worker, and one by the stand-in of the module, in a world with both.
  private func attachBoth(_ world: World) async throws -> (nbd: FakeDisk, dm: FakeDisk) {
    try world.useWorkers(
      instead: "exec '\(Programs.directory)/cowd' \"$@\" 2>>'\(world.workerLog)'")
    let nbd = try world.attach(5, world.spec("g5.dscow", options: "?transport=nbd"))
    try await world.add(nbd)
    try world.useWorkers()
    let dm = try world.attach(6, world.spec("g6.dscow"))
    try await world.add(dm)
    return (nbd, dm)
  }

  /// Reads, writes and flushes on the one; for the other, the kernel's counts go on.
  private func load(_ world: World, _ round: Int) async throws {
    let folder = world.mapper
    let wire = try world.wire()
    try await blocking {
      for block in 0..<4 {
        let code = try wire.write([UInt8](repeating: 7, count: 4096), at: UInt64(block) << 16)
        guard code == 0 else { throw TooLate(description: "a write failed: \(code)") }
        _ = try wire.read(4096, at: UInt64(block) << 16)
      }
      guard try wire.flush() == 0 else { throw TooLate(description: "a flush failed") }
      let counts = [0, round * 8] + [Int](repeating: 0, count: LatencyHistogram.bounds.count - 1)
      let histogram = counts.map { "\($0)" }.joined(separator: ":")
      try TextFile.replace(
        folder + "/6-51712.measured",
        with: "0+2048 \(round * 8) 0 64 \(round * 160000) 0 0 0 0 0 0 0 0 0 \(histogram)\n")
    }
  }

  @Test("Metrics, top and log by the commands, and a file that is replaced whole")
  func commands() async throws {
    try await inWorld(hasMapper: true) { world in
      let (_, dm) = try await attachBoth(world)
      try await load(world, 1)
      let disks = try await world.ask(ControlRequest(.metrics)).disks ?? []
      #expect(disks.map(\.transport) == [.nbd, .dm])
      let worker = try #require(disks[0].activity)
      #expect(worker.bytesWritten == 4 * 4096 && worker.bytesRead == 4 * 4096)
      #expect(worker.latency?.histogram?.count == 8)
      #expect(worker.flushLatency?.histogram?.count == 1)
      let (reading, writing) = (worker.reading ?? 0, worker.writing ?? 0)
      #expect(reading > 0 && writing > 0)
      #expect(worker.latency?.nanoseconds == reading + writing)
      #expect(disks[1].activity?.latency?.histogram?.count == 8)
      #expect(disks[1].activity?.flushLatency == nil)
      let status = try await world.status()
      #expect(status.allSatisfy { $0.activity == nil }, "status asks the kernel for nothing")
      // A worker that took the place of another counts anew.
      #expect(kill(try await world.worker(dm), SIGKILL) == 0)
      try await eventually("the worker is replaced") {
        try await world.ask(ControlRequest(.metrics)).disks?[1].activity?.restarts == 1
      }
      let path = world.folder.file("dmu.prom")
      #expect(try await world.command { $0.metrics(.prometheus, output: path) } == .done)
      let text = try TextFile.read(path)
      #expect(text.contains("dmu_disk_restarts_total{domain=\"guest6\",disk=\"xvda\"} 1\n"))
      #expect(World.names(world.folder.path).allSatisfy { !$0.hasPrefix("dmu.prom.") })
      #expect(try await world.command { $0.metrics(.prometheus, output: "/nowhere/x") } == .failed)
      let top = try await output(world, ["top", "--once", "--interval", "1"])
      #expect(top.contains("guest5 (5)") && top.contains("P99"), "\(top)")
      let json = try await output(world, ["top", "--once", "--json", "--interval", "1", "guest6"])
      let rates = try JSONDecoder().decode([DiskRates].self, from: Data(json.utf8))
      #expect(rates.map(\.domain) == [6])
      // Nobody measures for a disk that is gone.
      try world.detach(dm)
      try await eventually("the mark is gone") { World.names(world.mapper) == ["flushed"] }
    }
  }

  @Test("The kernel measures for as long as somebody asks, and not what an earlier daemon began")
  func endOfMeasuring() async throws {
    let settings = ["metrics.measuring-time": "2", "daemon.look-interval": "1"]
    try await inWorld(settings, hasMapper: true) { world in
      try await world.add(world.attach(6, world.spec("g6.dscow")))
      let mark = "6-51712.measured"
      func isMeasured() -> Bool { World.names(world.mapper).contains(mark) }
      let start = ContinuousClock.now
      while ContinuousClock.now - start < .seconds(4) {
        _ = try await world.ask(ControlRequest(.metrics))
        #expect(isMeasured())
        try await Task.sleep(for: .milliseconds(200))
      }
      try await eventually("the measuring ends") { !isMeasured() }
      // By a daemon that was killed.
      _ = try await world.ask(ControlRequest(.metrics))
      #expect(isMeasured())
      try await world.stopDaemon(SIGKILL)
      try await world.startDaemon()
      #expect(isMeasured())
      try await eventually("the measuring ends again") { !isMeasured() }
    }
  }

  /// What a command of dmu-xen prints, with `path` before the usual one.
  private func output(
    _ world: World, _ arguments: [String], path: String = "", expecting: Int32 = 0
  ) async throws -> String {
    let file = world.folder.file("output")
    let out = try Descriptor(path: file, flags: O_RDWR | O_CREAT | O_TRUNC, mode: 0o600)
    var command = Command(
      Programs.directory + "/dmu-xen", arguments + ["--socket", world.socket],
      environment: ["PATH=\(path)"])
    command.descriptors = [1: out.raw, 2: out.raw]
    let process = try command.start()
    let status = try await blocking { try process.wait(milliseconds: 30_000) }
    #expect(status == .exited(expecting), "\(arguments)")
    return try TextFile.read(file)
  }

  @Test("log hands the journal's own program a pattern for the disk")
  func log() async throws {
    try await inWorld { world in
      try await world.add(try world.attach(5, world.spec("g5.dscow")))
      try await world.add(try world.attach(5, world.spec("g5b.dscow"), name: "xvdb"))
      let folder = world.folder.path
      let program = try world.file(
        "journalctl", Array("#!/bin/sh\nprintf '%s\\n' \"$@\"\n".utf8))
      try #require(chmod(program, 0o755) == 0)
      let unit = "--unit=dmu-xend.service\n"
      #expect(
        try await output(world, ["log", "guest5:xvda"], path: folder)
          == unit + "--grep= disk=(5-51712)( |$)\n--boot\n")
      #expect(
        try await output(world, ["log", "guest5", "-f", "--since", "today"], path: folder)
          == unit + "--grep= disk=(5-51712|5-51728)( |$)\n--since=today\n--follow\n--no-tail\n")
      let gone = try await output(world, ["log", "nobody"], path: folder, expecting: 3)
      #expect(gone.hasPrefix("there is no disk 'nobody'"))
      let none = try await output(world, ["log", "5-51712"], path: "/nowhere", expecting: 1)
      #expect(none.contains("cannot start journalctl"))
      // What the daemon and its worker write is what the pattern finds.
      for log in [world.folder.file("daemon.log"), world.workerLog] {
        let lines = try TextFile.readRepairing(log).split(separator: "\n")
        let mine = lines.filter { $0.contains(#/ disk=5-51712( |$)/#) }
        #expect(!mine.isEmpty, "\(log)")
      }
      try await world.stopDaemon()
      #expect(
        try await output(world, ["log", "5-51712"], path: folder)
          == unit + "--grep= disk=(5-51712)( |$)\n--boot\n")
      #expect(
        try await output(world, ["log", "guest5"], path: folder, expecting: 2)
          .contains("name the disk by its numbers"))
      try await world.startDaemon()
    }
  }

  @Test("The endpoint serves both formats on a Unix socket, and nothing else")
  func endpoint() async throws {
    let folder = try TemporaryFolder()
    let path = folder.file("metrics.sock")
    try await inWorld(["metrics.listen": "\"\(path)\""]) { world in
      @Sendable func ask(
        _ uri: String, method: String = "GET", accept: String = "*/*"
      ) async throws -> String {
        try await blocking {
          try Web.ask(
            try UnixSocket.connect(to: path, kind: .stream), uri, method: method, accept: accept)
        }
      }
      try await eventually("it listens") { access(path, F_OK) == 0 }
      var status = stat()
      #expect(stat(path, &status) == 0 && status.st_mode & 0o777 == 0o660)
      let text = try await ask("/metrics")
      #expect(text.hasPrefix("HTTP/1.0 200 OK\r\n"))
      #expect(text.contains("text/plain; version=0.0.4") && !text.contains("# EOF"))
      let open = try await ask(
        "/metrics?x=1", accept: "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
      #expect(open.contains("application/openmetrics-text") && open.hasSuffix("# EOF\n"))
      let head = try await ask("/metrics", method: "HEAD")
      #expect(head.hasPrefix("HTTP/1.0 200") && head.hasSuffix("\r\n\r\n"))
      #expect(try await ask("/").hasPrefix("HTTP/1.0 404"))
      #expect(try await ask("/metrics", method: "POST").hasPrefix("HTTP/1.0 405"))
      // What is no HTTP is answered or cut off, and more than so many wait at the door in vain.
      #expect(!(try await ask("x y z\r\n\r\n")).hasPrefix("HTTP/1.0 200"))
      let idle = try (0..<40).map { _ in
        PassedDescriptor(try UnixSocket.connect(to: path, kind: .stream))
      }
      #expect(try await world.status().isEmpty, "the daemon does its work")
      withExtendedLifetime(idle) {}
    }
    #expect(access(path, F_OK) != 0, "the socket goes with the daemon")
  }

  @Test("A daemon that cannot listen for metrics says so and serves its disks")
  func taken() async throws {
    let (port, holder) = try Self.held()
    try await inWorld(["metrics.listen": "\"127.0.0.1:\(port)\""]) { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      #expect(try await world.state(disk) == .ready)
      let log = try TextFile.read(world.folder.file("daemon.log"))
      #expect(log.contains("metrics cannot be served"), "\(log)")
      #expect(log.contains("give another port in metrics.listen"))
    }
    withExtendedLifetime(holder) {}
  }

  /// A port that somebody listens on.
  private static func held() throws -> (UInt16, Server) {
    let server = try Server()
    return (server.port, server)
  }

  private final class Server {
    let port: UInt16
    private let socket: Descriptor

    init() throws {
      socket = try Web.stream()
      guard listen(socket.raw, 1) == 0 else { throw IOError.last("listen") }
      var address = sockaddr_in()
      var length = socklen_t(MemoryLayout<sockaddr_in>.size)
      let raw = socket.raw
      let code = withUnsafeMutablePointer(to: &address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { getsockname(raw, $0, &length) }
      }
      guard code == 0 else { throw IOError.last("name a socket") }
      port = UInt16(bigEndian: address.sin_port)
    }
  }

  @Test(
    "A real Prometheus scrapes both ways to the kernel, and every query of the dashboard has data",
    .enabled(
      if: access(Prometheus.program, X_OK) == 0, "Debian's package prometheus is missing"),
    .timeLimit(.minutes(2)))
  func prometheus() async throws {
    let port = try Web.freePort()
    try await inWorld(["metrics.listen": "\"127.0.0.1:\(port)\""], hasMapper: true) { world in
      _ = try await attachBoth(world)
      let prometheus = try Prometheus(scraping: port, in: world.folder)
      do {
        try await scrape(world, prometheus)
      } catch {
        print(try TextFile.readRepairing(world.folder.file("prometheus.log")).suffix(4000))
        try await prometheus.end()
        throw error
      }
      try await prometheus.end()
    }
  }

  private func scrape(_ world: World, _ prometheus: Prometheus) async throws {
    try await eventually("Prometheus answers", within: .seconds(40)) { await prometheus.isUp() }
    var round = 0
    var missing = try dashboard()
    #expect(missing.count > 10)
    // A rate wants two scrapes with load between them.
    try await eventually("data for \(missing.map(\.panel))", within: .seconds(40)) {
      round += 1
      try await load(world, round)
      try await Task.sleep(for: .milliseconds(300))
      var left: [(panel: String, query: String)] = []
      for one in missing {
        let found = try await prometheus.query(one.query)
        if !found.contains(where: { $0.value.isFinite }) { left.append(one) }
      }
      missing = left
      return missing.isEmpty
    }
    for transport in ["nbd", "dm"] {
      let quantile = try await prometheus.query(
        "histogram_quantile(0.99, sum by (domain, disk, le) "
          + "(rate(dmu_disk_latency_seconds_bucket[10s]))) * on (domain, disk) group_left "
          + "dmu_disk_info{transport=\"\(transport)\"}")
      #expect(quantile.count == 1 && (quantile.first?.value ?? 0) > 0, "\(transport)")
    }
    #expect(try await prometheus.query("up{job=\"dmu\"}").first?.value == 1)
    let types = try await prometheus.query("dmu_disk_state == 1")
    #expect(types.map { $0.labels["state"] } == ["ready", "ready"])
  }
}
