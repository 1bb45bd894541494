// SPDX-License-Identifier: Apache-2.0
// How the disk is, and the requests that wait for space.
//
//     enough ──note: no space──────────► short ──foundSpace: a write has its space──► enough
//                                          │ tick, after the policy's time
//                                          ▼
//                              expired: what waits fails, and so do writes that find none
//                                          └──foundSpace──► enough
//
// Invariants:
// - The health follows from the trouble and the policy; it is never set.
// - While the disk is short, one waiting request a second looks whether there is space. When it
//   or any other write finds some, all go on.

import DiskModel
import Glibc

/// What has gone wrong on a disk, and who waits for it to pass. Used from one thread.
final class HealthWatch {
  private let log: PendingLog
  private let requests: RequestTable
  private var trouble = DiskTrouble()
  /// How the disk is.
  private(set) var health = DiskHealth.ready
  /// What becomes of a write that finds no space.
  var space = SpacePolicy(waits: false) {
    didSet {
      trouble.waits = space.waits
      refresh()
    }
  }

  init(_ log: PendingLog, _ requests: RequestTable) {
    self.log = log
    self.requests = requests
    refresh()
  }

  /// Has the health follow from what is known.
  private func refresh() {
    trouble.flushFailed = log.flushFailed
    health = trouble.health
  }

  /// An admin has seen to the store: flushes may succeed again, and errors are forgotten.
  func clear() {
    log.clearFlushFailure()
    trouble.clear()
    refresh()
  }

  /// What became of the flush in which the worker before died.
  func judgeFlush(_ code: Int32) {
    log.judge(code)
    refresh()
  }

  /// A flush of the store in a commit plan has failed.
  func flushFailed(_ code: Int32) {
    log.failFlush(code)
    refresh()
  }

  /// A round of flushes has ended.
  @inline(__always)
  func noteRound(_ end: FlushRounds.End) {
    guard end.code != 0 || trouble.commitFailed != 0 else { return }
    if let code = end.commit { trouble.commitFailed = code }
    refresh()
  }

  /// A device has failed. Whether the request may wait for space.
  func note(_ code: Int32, _ device: UInt16, _ name: @autoclosure () -> String, isRead: Bool)
    -> Bool
  {
    if !isRead, SpacePolicy.isShortage(code) || code == EFBIG {
      trouble.noteShortage(code)
    } else {
      trouble.count(device, name(), isRead: isRead, code)
    }
    refresh()
    return !isRead && space.waits && !trouble.spaceExpired && SpacePolicy.isShortage(code)
  }

  /// Whether the last write that needed space has found none.
  @inline(__always)
  var isShort: Bool { trouble.space != 0 }

  /// There is space: whoever waits for some goes on.
  func foundSpace() {
    trouble.endShortage()
    refresh()
    requests.wake(.space)
  }

  /// Fails, in their next step, those that wait for space.
  func endWaiting(_ code: Int32) {
    requests.fail(waitingFor: .space, code)
  }

  /// Whether time may change something.
  var isPassing: Bool { trouble.isPassing }

  /// A second has passed. True when those that wait for space have waited too long.
  func tick(quiet: UInt32) -> Bool {
    trouble.settle(after: quiet)
    let expires =
      trouble.space != 0 && space.timeout > 0 && !trouble.spaceExpired
      && DiskTrouble.now() - trouble.spaceSince >= Int64(space.timeout) * 1000
    if expires { trouble.spaceExpired = true }
    return expires
  }

  /// The rest of a tick: one of those that wait looks whether there is space.
  func probe() {
    refresh()
    guard let index = requests.wakeFirst(.space) else { return }
    requests[index].pointee.isProbe = true
  }
}
