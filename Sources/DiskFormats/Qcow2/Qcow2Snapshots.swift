// SPDX-License-Identifier: Apache-2.0
// Internal snapshots: read, never changed. Their clusters are shared with the disk, which
// therefore copies them before it writes.
// Source: the qcow2 specification, section "Snapshots".

import BlockIO
import SystemIO

/// An internal snapshot of a qcow2 image.
package struct Qcow2Snapshot: Sendable, Equatable {
  /// The unique name that programs use.
  package var id: String
  /// The name that people use.
  package var name: String
  /// When it was taken, in seconds since 1970.
  package var seconds: UInt32
  /// Bytes of the machine's state that lie behind the disk's.
  package var stateSize: UInt64
  /// Length of the disk in bytes, as it was then.
  package var diskSize: UInt64
  var l1Offset: UInt64
  var l1Size: UInt32
}

/// The snapshot table of a header, read entry by entry with every length checked.
struct Qcow2SnapshotTable {
  /// All entries together are no longer than this.
  private static let most: UInt64 = 64 << 20
  let snapshots: [Qcow2Snapshot]
  /// Bytes that the table takes.
  let length: UInt64

  init(_ store: any ByteStore, _ header: Qcow2Header) throws(ImageError) {
    var snapshots: [Qcow2Snapshot] = []
    var offset = header.snapshotsOffset
    for number in 0..<header.snapshotCount {
      let start = offset
      let fixed = try io { () throws(IOError) in try store.read(at: start, count: 40) }
      let idCount = Int(fixed.big(UInt16.self, at: 12))
      let nameCount = Int(fixed.big(UInt16.self, at: 14))
      let extraCount = Int(fixed.big(UInt32.self, at: 36))
      guard extraCount <= 1024 else {
        throw ImageError(.corrupt, "\(store.name): snapshot \(number) has \(extraCount) bytes more")
      }
      let rest = try io { () throws(IOError) in
        try store.read(at: start + 40, count: extraCount + idCount + nameCount)
      }
      let l1Offset = fixed.big(UInt64.self, at: 0)
      let l1Size = fixed.big(UInt32.self, at: 8)
      let size = extraCount >= 16 ? rest.big(UInt64.self, at: 8) : header.size
      guard l1Offset % header.clusterSize == 0, l1Offset < 1 << 56,
        UInt64(l1Size) <= Qcow2Header.mostL1Entries, size <= 1 << 61
      else {
        throw ImageError(
          .corrupt, "\(store.name): snapshot \(number) has its L1 table at \(l1Offset)")
      }
      let short = fixed.big(UInt32.self, at: 32)
      snapshots.append(
        Qcow2Snapshot(
          id: text(rest[extraCount..<(extraCount + idCount)]),
          name: text(rest[(extraCount + idCount)...]), seconds: fixed.big(UInt32.self, at: 16),
          stateSize: extraCount >= 8 ? rest.big(UInt64.self, at: 0) : UInt64(short),
          diskSize: size / 512 * 512, l1Offset: l1Offset, l1Size: l1Size))
      offset += (UInt64(40 + rest.count) + 7) / 8 * 8
      guard offset - header.snapshotsOffset <= Self.most else {
        throw ImageError(.corrupt, "\(store.name): the snapshot table is longer than 64 MiB")
      }
    }
    self.snapshots = snapshots
    length = header.snapshotCount == 0 ? 0 : offset - header.snapshotsOffset
  }
}
