// SPDX-License-Identifier: Apache-2.0
// What status says of a disk: the values of one line of the table, and of the JSON.

internal import SystemIO

/// A disk as status shows it. Fields that are not known are absent from the JSON.
package struct DiskStatus: Codable, Sendable, Hashable, DiskNaming {
  /// The name of a named disk. Such a disk has no domain, no vdev and no number.
  package var name: String?
  /// The virtual machine that a named disk belongs to, if its attach said so.
  package var owner: String?
  /// Path of the link to a named disk's device.
  package var link: String?
  /// The domain that sees the disk.
  package var domain: Int?
  /// The domain's name.
  package var domainName: String?
  /// The disk's name in the domain.
  package var vdev: String?
  /// The disk's number in the domain.
  package var number: Int?
  /// The image format.
  package var format: String?
  /// Path of the store, or its source.
  package var store: String?
  /// Path of the base, or its source.
  package var base: String?
  /// The vbds that use the disk, this one included, as "5-51712"; only when they are several.
  package var users: [String]?
  /// Where the disk was started for another vbd: that one, "5-51712" or "5-51712+1". The disk's device,
  /// worker and log lines are called so.
  package var identity: String?
  /// What hooks have attached for it.
  package var sources: [AttachedPath]?
  /// Paths of the files that its images name, as they were allowed.
  package var files: [String]?
  /// Path of the block device.
  package var device: String?
  /// The same by the kernel's own name for it.
  package var kernelDevice: String?
  /// By which way the kernel reaches it.
  package var transport: DeviceKind?
  /// Length of the disk in bytes.
  package var size: UInt64?
  /// Bytes of the blocks that have a place in the store.
  package var allocated: UInt64?
  /// Bytes of a block.
  package var blockSize: UInt32?
  /// Whether the guest may only read.
  package var readOnly: Bool
  /// Where the disk stands.
  package var state: PublicState
  /// Why it is not ready, or not wholly.
  package var error: String?
  /// What else there is to know, one line.
  package var note: String?
  /// Process id of the worker.
  package var worker: Int32?
  /// Unix time of the last change of state.
  package var since: Int64
  /// Placements that are not durable yet.
  package var uncommitted: UInt64?
  /// Read requests since the worker started, or its device was made.
  package var reads: UInt64?
  /// Write requests since then.
  package var writes: UInt64?
  /// Flush requests since then.
  package var flushes: UInt64?
  /// Questions to the format since the worker started.
  package var faults: UInt64?
  /// Resident memory of the worker in bytes.
  package var memory: UInt64?
  /// Restarts of the worker within the window that counts.
  package var restarts: Int
  /// What else was counted and measured; only where metrics are asked for.
  package var activity: DiskActivity?

  /// A status of a disk of which little is known.
  package init(
    domain: Int, vdev: String, number: Int, state: PublicState, since: Int64,
    readOnly: Bool = false, restarts: Int = 0
  ) {
    self.domain = domain
    self.vdev = vdev
    self.number = number
    self.state = state
    self.since = since
    self.readOnly = readOnly
    self.restarts = restarts
  }

  /// The same of a disk of either kind.
  init(
    _ id: DiskID, vdev: String?, state: PublicState, since: Int64, readOnly: Bool = false,
    restarts: Int = 0
  ) {
    switch id {
    case .vbd(let vbd), .again(let vbd, _):
      (domain, number, self.vdev) = (vbd.domain, vbd.device, vdev ?? vbd.vdev)
    case .named(let name): self.name = "\(name)"
    }
    self.state = state
    self.since = since
    self.readOnly = readOnly
    self.restarts = restarts
  }

  /// Which disk it is of.
  package var id: DiskID {
    if let name = name.flatMap({ DiskName($0) }) { return .named(name) }
    return DiskID(domain: domain ?? 0, device: number ?? 0)
  }

  /// For sentences: "disk xvda of domain web (5)", "named disk data".
  var words: String {
    name.map { "named disk \($0)" } ?? "disk \(label) of domain \(domainWords)"
  }

  /// What dmu-xen's commands call it.
  var target: String { name ?? "\(domain ?? 0):\(label)" }
}

/// A source that a hook has attached, as status shows it.
package struct AttachedPath: Codable, Sendable, Hashable {
  /// "lvm//vg/lv".
  package var source: String
  /// Path of its block device or file.
  package var path: String
  /// Whether other hosts can open it.
  package var shared: Bool
}

/// What says of which disk something is: a vbd's domain and name in it, or its own name.
protocol DiskNaming {
  var name: String? { get }
  var domain: Int? { get }
  var domainName: String? { get }
  var vdev: String? { get }
}

extension DiskNaming {
  /// The disk's domain, for tables: "web (5)", "5", "-" for a named disk.
  var domainWords: String {
    guard let domain else { return "-" }
    return domainName.map { "\(ForeignText.shown($0)) (\(domain))" } ?? "\(domain)"
  }

  /// The disk's name in its domain, or its own.
  var label: String { ForeignText.shown(vdev ?? name ?? "-") }
}
