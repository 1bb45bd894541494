// SPDX-License-Identifier: Apache-2.0
// Metrics as text, in either of two formats that differ in little:
//
//   prometheus   text format 0.0.4: what node_exporter's textfile collector and promtool read
//   openmetrics  OpenMetrics 1.0: a counter's family is named without its "_total", and "# EOF" ends
//                the text, so that a reader knows that it has all of it
//
// Everything is taken from one look at all disks: the text is made from values that were counted
// elsewhere, so a library for programs that count by themselves would have nothing to do here.
// Sources: prometheus.io "Exposition formats"; the OpenMetrics specification 1.0.
//
// Invariant: no two samples have one name and the same labels.

internal import SystemIO

/// The format of metrics.
package enum MetricsFormat: String, Sendable, CaseIterable {
  /// Prometheus' text format.
  case prometheus
  /// OpenMetrics.
  case openmetrics

  /// What HTTP calls it.
  var contentType: String {
    switch self {
    case .prometheus: "text/plain; version=0.0.4; charset=utf-8"
    case .openmetrics: "application/openmetrics-text; version=1.0.0; charset=utf-8"
    }
  }
}

/// Renders metrics of all disks.
package enum MetricsText {
  /// The whole text.
  package static func render(_ statuses: [DiskStatus], _ format: MetricsFormat) -> String {
    var text = MetricsWriter(format)
    let disks = MetricsText.disks(statuses)
    text.family("dmu_build_info", .gauge, "The version of dmu-xend, as a label; always 1.")
    text.sample("dmu_build_info", ["version": Version.text], 1)
    writeStates(disks, &text)
    writeRequests(disks, &text)
    writeLatencies(disks, &text)
    let kept = statuses.filter { $0.state == .pending }
    text.family(
      "dmu_pending_stores", .gauge, "Stores without a disk whose pending log holds writes.")
    text.sample("dmu_pending_stores", [:], UInt64(kept.count))
    text.family("dmu_pending_placements", .gauge, "Placements in the pending logs of such stores.")
    text.sample("dmu_pending_placements", [:], kept.reduce(0) { $0 &+ ($1.uncommitted ?? 0) })
    return text.finished
  }

  /// A disk and the labels that tell it from every other.
  private struct Labelled {
    var status: DiskStatus
    var labels: [String: String]
  }

  /// The disks, without logs that have none, each under labels of its own: the domain's name, or
  /// its number if it has none, and the disk's name in it; "-" and the name for a named disk. A name that two domains have (one of
  /// them is going) stands for the newer one, and is followed by its number for the other.
  private static func disks(_ statuses: [DiskStatus]) -> [Labelled] {
    var newest: [String: Int] = [:]
    let disks = statuses.filter { $0.state.isOfDisk }
    for disk in disks {
      if let name = disk.domainName { newest[name] = max(newest[name] ?? 0, disk.domain ?? 0) }
    }
    var found: [[String: String]: DiskStatus] = [:]
    for disk in disks {
      var domain = disk.domain.map { "\($0)" } ?? "-"
      if let name = disk.domainName {
        domain = newest[name] == disk.domain ? ForeignText.shown(name) : disk.domainWords
      }
      let labels = ["domain": domain, "disk": disk.label]
      // An attach that failed may stand beside the same disk's next one.
      if let other = found[labels], other.since > disk.since { continue }
      found[labels] = disk
    }
    return found.map { Labelled(status: $1, labels: $0) }
      .sorted { $0.status.id < $1.status.id }
  }

  private static func writeStates(_ disks: [Labelled], _ text: inout MetricsWriter) {
    text.family("dmu_disk_info", .gauge, "What a disk is, as labels; always 1.")
    for disk in disks {
      let status = disk.status
      let more = [
        "domid": status.domain.map { "\($0)" } ?? "", "format": status.format ?? "",
        "transport": status.transport?.rawValue ?? "", "device": status.device ?? "",
        "mode": status.readOnly ? "ro" : "rw",
      ]
      text.sample("dmu_disk_info", disk.labels.merging(more) { $1 }, 1)
    }
    text.family("dmu_disk_state", .gauge, "1 for the state in which the disk is, 0 for others.")
    for disk in disks {
      for state in PublicState.allCases where state.isOfDisk {
        text.sample(
          "dmu_disk_state", disk.labels.merging(["state": state.rawValue]) { $1 },
          disk.status.state == state ? 1 : 0)
      }
    }
    func gauge(_ name: String, _ help: String, _ value: (DiskStatus) -> UInt64?) {
      text.family(name, .gauge, help)
      for disk in disks {
        if let value = value(disk.status) { text.sample(name, disk.labels, value) }
      }
    }
    gauge("dmu_disk_state_timestamp_seconds", "Unix time of the last change of state.") {
      UInt64(max(0, $0.since))
    }
    gauge("dmu_disk_size_bytes", "Length of the disk.", \.size)
    gauge("dmu_disk_allocated_bytes", "Blocks that have a place in the store.", \.allocated)
    gauge(
      "dmu_disk_uncommitted_placements", "Placements of blocks that are not durable yet.",
      \.uncommitted)
    gauge("dmu_disk_worker_memory_bytes", "Resident memory of the disk's worker.", \.memory)
  }

  private static func writeRequests(_ disks: [Labelled], _ text: inout MetricsWriter) {
    func counters(
      _ name: String, _ help: String, _ values: (DiskStatus) -> [(op: String, UInt64?)],
      isNanoseconds: Bool = false
    ) {
      text.family(name, .counter, help)
      for disk in disks {
        for (op, value) in values(disk.status) {
          guard let value else { continue }
          let labels = disk.labels.merging(op.isEmpty ? [:] : ["op": op]) { $1 }
          if isNanoseconds {
            text.seconds(name, labels, value)
          } else {
            text.sample(name, labels, value)
          }
        }
      }
    }
    counters("dmu_disk_requests_total", "Requests of the guest.") {
      [
        ("read", $0.reads), ("write", $0.writes), ("flush", $0.flushes),
        ("discard", $0.activity?.discards),
      ]
    }
    counters("dmu_disk_bytes_total", "Bytes that requests read and wrote.") {
      [("read", $0.activity?.bytesRead), ("write", $0.activity?.bytesWritten)]
    }
    counters(
      "dmu_disk_request_seconds_total", "Time that requests took, added up.",
      {
        let activity = $0.activity
        return [
          ("read", activity?.reading), ("write", activity?.writing), ("flush", activity?.flushing),
          ("discard", activity?.discarding),
        ]
      }, isNanoseconds: true)
    counters("dmu_disk_faults_total", "Questions to the image format.") { [("", $0.faults)] }
    counters("dmu_disk_restarts_total", "Workers that took the place of another.") {
      [("", $0.activity?.restarts)]
    }
  }

  private static func writeLatencies(_ disks: [Labelled], _ text: inout MetricsWriter) {
    func histogram(_ name: String, _ help: String, _ value: (DiskActivity) -> DiskLatency?) {
      text.family(name, .histogram, help)
      for disk in disks {
        if let histogram = disk.status.activity.flatMap(value)?.histogram {
          text.histogram(name, disk.labels, histogram)
        }
      }
    }
    histogram(
      "dmu_disk_latency_seconds", "How long reads, writes and discards took.", \.latency)
    histogram(
      "dmu_disk_flush_latency_seconds", "How long flushes took; only of disks by nbd.",
      \.flushLatency)
  }
}

/// Puts samples into lines.
private struct MetricsWriter {
  enum Kind: String { case gauge, counter, histogram }

  private let format: MetricsFormat
  private var text = ""

  init(_ format: MetricsFormat) { self.format = format }

  /// The text, with its end.
  var finished: String { format == .openmetrics ? text + "# EOF\n" : text }

  /// What the samples that follow have in common.
  mutating func family(_ name: String, _ kind: Kind, _ help: String) {
    var family = name
    if kind == .counter, format == .openmetrics, name.hasSuffix("_total") {
      family.removeLast("_total".count)
    }
    text += "# HELP \(family) \(help)\n# TYPE \(family) \(kind.rawValue)\n"
  }

  mutating func sample(_ name: String, _ labels: [String: String], _ value: UInt64) {
    line(name, labels, "\(value)")
  }

  /// A time in nanoseconds as seconds, without rounding.
  mutating func seconds(_ name: String, _ labels: [String: String], _ nanoseconds: UInt64) {
    line(name, labels, Self.seconds(nanoseconds))
  }

  mutating func histogram(
    _ name: String, _ labels: [String: String], _ histogram: LatencyHistogram
  ) {
    var below: UInt64 = 0
    for (bound, count) in zip(LatencyHistogram.bounds, histogram.counts) {
      below &+= count
      bucket(name, labels, Self.seconds(bound), below)
    }
    bucket(name, labels, "+Inf", histogram.count)
    seconds(name + "_sum", labels, histogram.nanoseconds)
    sample(name + "_count", labels, histogram.count)
  }

  private mutating func bucket(
    _ name: String, _ labels: [String: String], _ bound: String, _ count: UInt64
  ) {
    sample(name + "_bucket", labels.merging(["le": bound]) { $1 }, count)
  }

  private mutating func line(_ name: String, _ labels: [String: String], _ value: String) {
    text += name
    if !labels.isEmpty {
      // The order of labels means nothing; this is the one in which people look for a disk.
      let first = ["domain", "disk"]
      let keys =
        first.filter { labels[$0] != nil } + labels.keys.filter { !first.contains($0) }.sorted()
      let pairs = keys.map { "\($0)=\"\(Self.escaped(labels[$0] ?? ""))\"" }
      text += "{\(pairs.joined(separator: ","))}"
    }
    text += " \(value)\n"
  }

  private static func escaped(_ text: String) -> String {
    text.replacing("\\", with: "\\\\").replacing("\"", with: "\\\"").replacing("\n", with: "\\n")
  }

  /// "0.00025", "1.0".
  private static func seconds(_ nanoseconds: UInt64) -> String {
    let digits = String(nanoseconds % 1_000_000_000)
    var fraction = String(repeating: "0", count: 9 - digits.utf8.count) + digits
    while fraction.utf8.count > 1, fraction.hasSuffix("0") { fraction.removeLast() }
    return "\(nanoseconds / 1_000_000_000).\(fraction)"
  }
}
