// SPDX-License-Identifier: Apache-2.0
// What status says of a disk: the values of one line of the table, and of the JSON.

/// A disk as status shows it. Fields that are not known are absent from the JSON.
public struct DiskStatus: Codable, Sendable, Hashable {
  /// The domain that sees the disk.
  public var domain: Int
  /// The domain's name.
  public var domainName: String?
  /// The disk's name in the domain.
  public var vdev: String
  /// The disk's number in the domain.
  public var number: Int
  /// The image format.
  public var format: String?
  /// Path of the store.
  public var store: String?
  /// Path of the base.
  public var base: String?
  /// Paths of the files that its images name, as they were allowed.
  public var files: [String]?
  /// Path of the block device.
  public var device: String?
  /// The same by the kernel's own name for it.
  public var kernelDevice: String?
  /// By which way the kernel reaches it.
  public var transport: DeviceKind?
  /// Length of the disk in bytes.
  public var size: UInt64?
  /// Bytes of the blocks that have a place in the store.
  public var allocated: UInt64?
  /// Bytes of a block.
  public var blockSize: UInt32?
  /// Whether the guest may only read.
  public var readOnly: Bool
  /// Where the disk stands.
  public var state: PublicState
  /// Why it is not ready, or not wholly.
  public var error: String?
  /// What else there is to know, one line.
  public var note: String?
  /// Process id of the worker.
  public var worker: Int32?
  /// Unix time of the last change of state.
  public var since: Int64
  /// Placements that are not durable yet.
  public var uncommitted: UInt64?
  /// Read requests since the worker started, or its device was made.
  public var reads: UInt64?
  /// Write requests since then.
  public var writes: UInt64?
  /// Flush requests since then.
  public var flushes: UInt64?
  /// Questions to the format since the worker started.
  public var faults: UInt64?
  /// Resident memory of the worker in bytes.
  public var memory: UInt64?
  /// Restarts of the worker within the window that counts.
  public var restarts: Int
  /// What else was counted and measured; only where metrics are asked for.
  public var activity: DiskActivity?

  /// A status of a disk of which little is known.
  public init(
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
