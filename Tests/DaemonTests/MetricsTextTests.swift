// SPDX-License-Identifier: Apache-2.0
// Metrics as text, rates and their table, without a daemon.

import Glibc
import SystemIO
import Testing
import TestSupport

@testable import Daemon

@Suite struct MetricsTextTests {
  private static func disk(
    _ domain: Int, _ name: String?, vdev: String = "xvda", number: Int = 51712,
    state: PublicState = .ready, since: Int64 = 1
  ) -> DiskStatus {
    var disk = DiskStatus(
      domain: domain, vdev: vdev, number: number, state: state, since: since)
    disk.domainName = name
    (disk.reads, disk.writes, disk.flushes, disk.faults) = (7, 5, 3, 2)
    var latencies = LatencyHistogram()
    for latency in [9_000, 10_000, 10_001, 3_000_000, 20_000_000_000] as [UInt64] {
      latencies.add(latency)
    }
    var activity = DiskActivity()
    (activity.bytesRead, activity.bytesWritten, activity.discards) = (28672, 20480, 0)
    (activity.reading, activity.restarts) = (250_000, 1)
    activity.latency = DiskLatency(latencies)
    disk.activity = activity
    return disk
  }

  /// A line for each sample, without its value.
  private static func series(_ text: String) -> [Substring] {
    text.split(separator: "\n").filter { !$0.hasPrefix("#") }
      .map { $0[..<($0.lastIndex(of: " ") ?? $0.endIndex)] }
  }

  @Test("Counters, gauges and histograms as Prometheus reads them")
  func text() {
    let text = MetricsText.render([Self.disk(5, "web")], .prometheus)
    let web = "domain=\"web\",disk=\"xvda\""
    for line in [
      "# TYPE dmu_disk_requests_total counter",
      "dmu_disk_requests_total{\(web),op=\"read\"} 7",
      "dmu_disk_bytes_total{\(web),op=\"write\"} 20480",
      "dmu_disk_request_seconds_total{\(web),op=\"read\"} 0.00025",
      "dmu_disk_state{\(web),state=\"ready\"} 1", "dmu_disk_state{\(web),state=\"failed\"} 0",
      "dmu_disk_restarts_total{\(web)} 1",
      "# TYPE dmu_disk_latency_seconds histogram",
      "dmu_disk_latency_seconds_bucket{\(web),le=\"0.00001\"} 2",
      "dmu_disk_latency_seconds_bucket{\(web),le=\"0.000025\"} 3",
      "dmu_disk_latency_seconds_bucket{\(web),le=\"10.0\"} 4",
      "dmu_disk_latency_seconds_bucket{\(web),le=\"+Inf\"} 5",
      "dmu_disk_latency_seconds_sum{\(web)} 20.003029001",
      "dmu_disk_latency_seconds_count{\(web)} 5",
      "dmu_pending_stores 0",
    ] { #expect(text.contains("\n\(line)\n"), "\(line)") }
    #expect(!text.contains("# EOF"))
    let open = MetricsText.render([Self.disk(5, "web")], .openmetrics)
    #expect(open.contains("\n# TYPE dmu_disk_requests counter\n"))
    #expect(open.hasSuffix("\n# EOF\n"))
    #expect(Self.series(open) == Self.series(text))
  }

  @Test("No two samples have the same labels, and no name breaks a line")
  func labels() {
    var kept = Self.disk(0, nil, vdev: "-", number: 0, state: .pending)
    kept.uncommitted = 6
    let text = MetricsText.render(
      [
        Self.disk(5, "web"), Self.disk(7, "web"), Self.disk(7, "web", vdev: "xvdb", number: 51728),
        Self.disk(8, nil), Self.disk(9, "a\"b\\c\nd\u{1B}"), kept, kept,
        Self.disk(5, "web", state: .failed, since: 0),
      ], .prometheus)
    let series = Self.series(text)
    #expect(Set(series).count == series.count)
    #expect(series.contains("dmu_disk_faults_total{domain=\"web\",disk=\"xvda\"}"))
    #expect(series.contains("dmu_disk_faults_total{domain=\"web (5)\",disk=\"xvda\"}"))
    #expect(text.contains("\ndmu_disk_state{domain=\"web (5)\",disk=\"xvda\",state=\"ready\"} 1\n"))
    #expect(series.contains("dmu_disk_faults_total{domain=\"8\",disk=\"xvda\"}"))
    #expect(series.contains("dmu_disk_faults_total{domain=\"a\\\"b\\\\c%0Ad%1B\",disk=\"xvda\"}"))
    #expect(text.contains("\ndmu_pending_stores 2\ndmu_pending_placements") == false)
    #expect(text.contains("\ndmu_pending_stores 2\n") && text.contains("_placements 12\n"))
  }

  @Test("What a worker reports cannot make the sums trap")
  func overflow() throws {
    var disk = Self.disk(5, "web")
    let most = [UInt64](repeating: .max, count: LatencyHistogram.bounds.count + 1)
    disk.activity?.latency = DiskLatency(
      try #require(LatencyHistogram(counts: most, nanoseconds: .max)))
    #expect(MetricsText.render([disk], .openmetrics).contains("_sum{domain=\"web\""))
    _ = DiskRates.between([Self.disk(5, "web")], [disk], seconds: 1)
    disk.activity?.latency?.counts = [1]
    #expect(!MetricsText.render([disk], .prometheus).contains("latency_seconds_sum"))
  }

  @Test(
    "promtool finds nothing wrong",
    .enabled(if: access("/usr/bin/promtool", X_OK) == 0, "Debian's package prometheus is missing"))
  func promtool() async throws {
    let folder = try TemporaryFolder()
    let path = folder.file("metrics")
    try TextFile.replace(
      path,
      with: MetricsText.render([Self.disk(5, "web"), Self.disk(7, "a\"\\\nb")], .prometheus))
    let input = try Descriptor(path: path, flags: O_RDONLY)
    let output = try Descriptor(path: folder.file("said"), flags: O_RDWR | O_CREAT, mode: 0o600)
    var command = Command("/usr/bin/promtool", ["check", "metrics"])
    command.descriptors = [0: input.raw, 1: output.raw, 2: output.raw]
    let process = try command.start()
    #expect(try await blocking { try process.wait(milliseconds: 30_000) } == .exited(0))
    #expect(try TextFile.read(folder.file("said")) == "")
  }

  @Test("Rates are differences over the time, those of a new worker are unknown")
  func rates() throws {
    let before = [Self.disk(5, "web"), Self.disk(6, "db")]
    var now = before
    now[0].reads = 27
    now[0].activity?.bytesWritten = 20480 + 4096
    var latencies = try #require(now[0].activity?.latency?.histogram)
    for _ in 0..<99 { latencies.add(20_000) }
    latencies.add(700_000_000)
    now[0].activity?.latency = DiskLatency(latencies)
    now[1].reads = 1
    now[1].state = .degraded
    now.append(Self.disk(9, nil))
    let rates = DiskRates.between(before, now, seconds: 2)
    #expect(rates.map(\.domain) == [6, 5, 9], "in trouble, busy, new")
    #expect(rates[0].reads == nil && rates[0].writes == 0 && rates[0].latency == nil)
    #expect(rates[1].reads == 10 && rates[1].bytesWritten == 2048)
    #expect(rates[2].reads == nil)
    let mean = try #require(rates[1].latency)
    #expect(abs(mean - 0.007_019_8) < 1e-9)
    let high = try #require(rates[1].latency99)
    #expect(high > 0.00001 && high <= 0.000025, "\(high)")
  }

  @Test("The table fits a terminal of any size")
  func table() throws {
    var before: [DiskStatus] = []
    for domain in 1...20 { before.append(Self.disk(domain, "guest-with-a-long-name-\(domain)")) }
    var now = before
    now[3].reads = 1_000_007
    let rates = DiskRates.between(before, now, seconds: 1)
    let wide = RatesTable.render(rates).split(separator: "\n")
    #expect(wide.count == 21)
    #expect(wide[0].hasPrefix("DOMAIN") && wide[0].hasSuffix("P99"))
    #expect(wide[1].contains("guest-with-a-long-name-4 (4)") && wide[1].contains("1000000"))
    for (width, height) in [(80, 24), (60, 10), (40, 5), (20, 4), (1, 1)] {
      let lines = RatesTable.render(rates, width: width, height: height)
        .split(separator: "\n", omittingEmptySubsequences: false).dropLast()
      #expect(lines.count <= max(height, 3))
      #expect(lines.allSatisfy { $0.count <= width }, "\(width)")
    }
    #expect(RatesTable.render(rates, width: 80, height: 10).hasSuffix("and 13 more\n"))
    #expect(RatesTable.render([]) == "no disks\n")
  }

  @Test("Addresses that only this host reaches, and no others")
  func addresses() {
    #expect(MetricsAddress("/run/m.sock") == .unix("/run/m.sock"))
    #expect(MetricsAddress("127.0.0.1:9817") == .loopback("127.0.0.1", 9817))
    #expect(MetricsAddress("127.3.2.1:1")?.description == "127.3.2.1:1")
    #expect(MetricsAddress("[::1]:65535")?.description == "[::1]:65535")
    for wrong in [
      "", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:+1", "0.0.0.0:9817",
      "10.0.0.1:9817", "128.0.0.1:9817", "[::]:9817", "::1:9817", "localhost:9817", ":9817",
      "9817", "m.sock", "/run/", "/" + String(repeating: "a", count: 107),
    ] { #expect(MetricsAddress(wrong) == nil, "\(wrong)") }
  }
}
