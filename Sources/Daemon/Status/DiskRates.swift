// SPDX-License-Identifier: Apache-2.0
// What a disk does now: two looks at its counters, and the time between them.

import SystemIO

/// Rates of a disk over an interval. What is not known is absent: a disk whose worker was replaced
/// meanwhile begins to count anew.
package struct DiskRates: Codable, Sendable, Hashable, DiskNaming {
  /// The name of a named disk, which has neither domain nor vdev.
  package var name: String?
  /// The domain that sees the disk.
  package var domain: Int?
  /// The domain's name.
  package var domainName: String?
  /// The disk's name in the domain.
  package var vdev: String?
  /// By which way the kernel reaches it.
  package var transport: DeviceKind?
  /// Where the disk stands.
  package var state: PublicState
  /// Read requests in a second.
  package var reads: Double?
  /// Write requests.
  package var writes: Double?
  /// Flush requests.
  package var flushes: Double?
  /// Bytes read in a second.
  package var bytesRead: Double?
  /// Bytes written.
  package var bytesWritten: Double?
  /// Mean latency of reads, writes and discards in seconds; absent without any.
  package var latency: Double?
  /// The latency in seconds that 99 of 100 of them stayed below.
  package var latency99: Double?

  /// The rates of each disk of `now` since `before`, `seconds` apart; those in trouble first, then
  /// the busiest.
  package static func between(
    _ before: [DiskStatus], _ now: [DiskStatus], seconds: Double
  ) -> [DiskRates] {
    let former = Dictionary(before.map { ($0.id, $0) }) { $1 }
    return now.filter { $0.state.isOfDisk }.sorted { $0.id < $1.id }
      .map { DiskRates(former[$0.id], $0, seconds: seconds) }
      .enumerated().sorted { one, other in
        let (first, second) = (one.element.isWell, other.element.isWell)
        if first != second { return second }
        let (some, more) = (one.element.operations, other.element.operations)
        return some != more ? some > more : one.offset < other.offset
      }.map(\.element)
  }

  private init(_ before: DiskStatus?, _ now: DiskStatus, seconds: Double) {
    (domain, domainName, vdev, name) = (now.domain, now.domainName, now.vdev, now.name)
    (transport, state) = (now.transport, now.state)
    guard let before else { return }
    func rate(_ value: (DiskStatus) -> UInt64?) -> Double? {
      guard let old = value(before), let new = value(now), new >= old else { return nil }
      return Double(new - old) / seconds
    }
    (reads, writes, flushes) = (rate(\.reads), rate(\.writes), rate(\.flushes))
    (bytesRead, bytesWritten) = (rate(\.activity?.bytesRead), rate(\.activity?.bytesWritten))
    guard let old = before.activity?.latency?.histogram,
      let new = now.activity?.latency?.histogram, let difference = new.since(old),
      difference.count > 0
    else { return }
    latency = Double(difference.nanoseconds) / Double(difference.count) / 1e9
    latency99 = difference.quantile(0.99).map { $0 / 1e9 }
  }

  private var isWell: Bool { state == .ready }
  private var operations: Double { (reads ?? 0) + (writes ?? 0) + (flushes ?? 0) }
}
