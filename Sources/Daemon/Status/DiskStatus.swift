// SPDX-License-Identifier: Apache-2.0
// What status says of a disk: the values of one line of the table, and of the JSON.

/// A disk as status shows it. Fields that are not known are absent from the JSON.
package struct DiskStatus: Codable, Sendable, Hashable {
  /// The domain that sees the disk.
  package var domain: Int
  /// The domain's name.
  package var domainName: String?
  /// The disk's name in the domain.
  package var vdev: String
  /// The disk's number in the domain.
  package var number: Int
  /// The image format.
  package var format: String?
  /// Path of the store.
  package var store: String?
  /// Path of the base.
  package var base: String?
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
}
