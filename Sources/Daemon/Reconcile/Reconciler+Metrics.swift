// SPDX-License-Identifier: Apache-2.0
// Metrics: status, and the latencies of disks that the kernel serves. Those cost each request a
// little, so the kernel measures only while somebody asks.

internal import LinuxBlock
internal import Logging

extension Reconciler {
  /// As `status`, with what was measured.
  func metrics(domain: String?) async throws(DiskFailure) -> [DiskStatus] {
    measuredAt = scheduler.now
    // Of a disk that several use, once: as the last one's.
    var seen: Set<DiskID> = []
    var disks = try await status(domain: domain, isDetailed: true).reversed().filter { status in
      guard status.users != nil, let disk = row(of: status)?.served else { return true }
      return seen.insert(disk.id).inserted
    }
    disks.reverse()
    for index in disks.indices where disks[index].transport == .dm {
      guard let disk = row(of: disks[index])?.served, disk.device?.kind == .dm else { continue }
      let id = disk.id
      let mapper = mapper
      do throws(DeviceMapperError) {
        let latencies = try await mapping.run { () throws(DeviceMapperError) in
          try mapper.latencies(id)
        }
        disks[index].activity?.latency = DiskLatency(latencies)
      } catch {
        // A device that has just gone has none.
        log(for: disk).info("no latencies", metadata: ["error": "\(error)"])
      }
    }
    return disks
  }

  /// The disk that a status is of, or what has joined one.
  private func row(of status: DiskStatus) -> Disk? {
    table[status.id.vbd.map { self.id(of: $0) } ?? status.id]
  }

  /// Ends the measuring when nobody has asked for long, also what an earlier daemon began.
  func endMeasuring() async {
    guard let last = measuredAt, last + configuration.measuringTime < scheduler.now else { return }
    measuredAt = nil
    let mapper = mapper
    for disk in Array(table.values) where disk.device?.kind == .dm {
      let id = disk.id
      do throws(DeviceMapperError) {
        try await mapping.run { () throws(DeviceMapperError) in try mapper.stopLatencies(id) }
      } catch {
        log(for: disk).info("latencies are measured on", metadata: ["error": "\(error)"])
      }
    }
  }
}
