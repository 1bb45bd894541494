// SPDX-License-Identifier: Apache-2.0
// The users that workers run as: with one for all, a worker that was taken over could stop, kill
// or starve those of other disks.

/// Which disk has which user. Of the reconciler.
struct WorkerUsers {
  private struct Holder { weak var disk: Disk? }
  private var holders: [UInt32: Holder] = [:]
  private var last: UInt32?

  /// The disk's user: the one that it has had, else the next that no other disk has. Those who
  /// have gone come last, since something of them may still be ending. Throws when all are taken.
  mutating func take(_ disk: Disk, _ range: ClosedRange<UInt32>) throws(DiskFailure) -> UInt32 {
    if let user = disk.user, range.contains(user) { return user }
    var user = last.map { range.contains($0) ? $0 : range.upperBound } ?? range.upperBound
    for _ in range {
      user = user == range.upperBound ? range.lowerBound : user + 1
      guard holders[user]?.disk == nil else { continue }
      last = user
      note(disk, user)
      return user
    }
    throw .worker(
      "the worker cannot be started: each of the users \(range.lowerBound) to \(range.upperBound)"
        + " has a disk: widen worker.uids")
  }

  /// A worker of an earlier daemon runs as this user.
  mutating func note(_ disk: Disk, _ user: UInt32) {
    disk.user = user
    holders[user] = Holder(disk: disk)
  }
}
