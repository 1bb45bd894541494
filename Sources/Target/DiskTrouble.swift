// SPDX-License-Identifier: Apache-2.0
// What has gone wrong on a disk, kept as facts. How the disk is follows from them, so that one
// of them can end without hiding another.

import DiskModel
import Glibc

/// The failures of a disk's backing devices, flushes and commits.
package struct DiskTrouble {
  /// Failed operations of one backing device.
  struct Device {
    var name: String
    var reads: UInt64 = 0
    var writes: UInt64 = 0
    /// The errno of the last one.
    var last: Int32 = 0
  }

  /// What is said while a failed flush stands.
  package static let flushReason =
    "a flush of the store has failed, so writes may be lost: see to the store, then run"
    + " 'dmu-xen clear'"

  /// The errno of a failed flush, which stands until an admin acts.
  var flushFailed: Int32 = 0
  /// Why flushes have failed, and what to do.
  var flushReason = DiskTrouble.flushReason
  /// The errno of a commit that failed short of that, until one succeeds.
  var commitFailed: Int32 = 0
  /// The errno of the last write that found no space, until one finds some.
  var space: Int32 = 0
  /// Since when that is so, in milliseconds of the monotonic clock.
  var spaceSince: Int64 = 0
  /// Waiting has come to its limit: writes without space fail.
  var spaceExpired = false
  /// Whether writes wait for space rather than fail.
  var waits = false
  private(set) var devices: [UInt16: Device] = [:]
  /// When a device failed last, in milliseconds of the monotonic clock.
  private(set) var lastError: Int64 = 0

  /// Milliseconds of the monotonic clock.
  package static func now() -> Int64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Int64(time.tv_sec) * 1000 + Int64(time.tv_nsec) / 1_000_000
  }

  /// A device has failed.
  mutating func count(
    _ device: UInt16, _ name: @autoclosure () -> String, isRead: Bool, _ code: Int32
  ) {
    var found = devices[device] ?? Device(name: name())
    if isRead { found.reads += 1 } else { found.writes += 1 }
    found.last = code
    devices[device] = found
    lastError = Self.now()
  }

  /// A write has found no space.
  mutating func noteShortage(_ code: Int32) {
    if space == 0 { spaceSince = Self.now() }
    space = code
  }

  /// A write has found space again.
  mutating func endShortage() {
    space = 0
    spaceExpired = false
    if SpacePolicy.isShortage(commitFailed) { commitFailed = 0 }
  }

  /// An admin has acted: what has failed is history. What waits for space goes on waiting.
  mutating func clear() {
    flushFailed = 0
    if !SpacePolicy.isShortage(commitFailed) { commitFailed = 0 }
    devices = [:]
  }

  /// Forgets the errors of devices when there has been none for so many seconds; 0: never.
  mutating func settle(after quiet: UInt32) {
    guard quiet > 0, !devices.isEmpty, Self.now() - lastError >= Int64(quiet) * 1000 else { return }
    devices = [:]
  }

  /// Whether time alone may change the health.
  var isPassing: Bool { space != 0 || !devices.isEmpty }

  /// How the disk is: a flush that failed before everything else, then a guest that waits.
  var health: DiskHealth {
    if flushFailed != 0 { return .degraded(flushFailed, flushReason) }
    if space != 0 {
      return .noSpace(space, isWaiting: waits && !spaceExpired)
    }
    if SpacePolicy.isShortage(commitFailed) { return .noSpace(commitFailed, isWaiting: waits) }
    if let failed = devices.values.min(by: { $0.name < $1.name }) {
      let words = devices.values.sorted { $0.name < $1.name }.map { device in
        "\(device.reads) reads and \(device.writes) writes of \(device.name) have failed, the last"
          + " with '\(String(cString: strerror(device.last)))'"
      }
      return .degraded(failed.last, words.joined(separator: "; "))
    }
    if commitFailed != 0 {
      return .degraded(commitFailed, "the store's metadata cannot be committed")
    }
    return .ready
  }
}
