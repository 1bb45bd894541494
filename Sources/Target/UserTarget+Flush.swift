// SPDX-License-Identifier: Apache-2.0
// What the rounds of flushes need done, and what comes of them.

import Glibc
import Posix

extension UserTarget {
  /// What is said while a failed flush stands.
  package static let flushReason =
    "a flush of the store has failed, so writes may be lost: see to the store, then run"
    + " 'dmu-xen clear'"

  /// A flush of the worker's own, with the errno of its end, 0 for success.
  package func flush(_ done: @escaping (Int32) -> Void) {
    let tag = rounds.tag(done)
    if let code = submitFlush(TargetRequest(.flush, tag: tag), -1) { rounds.tell(tag, code) }
  }

  func submitFlush(_ request: TargetRequest, _ owner: Int32) -> Int32? {
    if log.flushFailed != 0 { return EIO }
    if rounds.isClean(recorded: recordedMark) { return 0 }
    guard let index = requests.admitFlush(request, owner: owner) else { return ENOMEM }
    rounds.join(index)
    startRound()
    drain()
    return nil
  }

  /// Starts a round of flushes if one is wanted.
  func startRound() {
    guard rounds.wantsRound else { return }
    var unwritten = 0
    for position in 0..<locks.count {
      let mark = requests[Int(locks[position].slot)].pointee.placement.mark
      if mark != 0, mark <= recordedMark { unwritten += 1 }
    }
    settle(rounds.start(recorded: recordedMark, unwritten: unwritten))
  }

  /// If a round has ended: ends its flushes, and begins the next one.
  func settle(_ end: FlushRounds.End?) {
    guard let end else { return }
    if end.code != 0 || trouble.commitFailed != 0 {
      if let code = end.commit { trouble.commitFailed = code }
      refreshHealth()
    }
    for index in end.slots { complete(Int(index), end.code) }
    if end.code == 0 {
      requests.wake(.room)
    } else {
      requests.fail(waitingFor: .room, end.code)
    }
    startRound()
  }

  /// A flush in a commit plan has failed.
  func flushFailed(_ code: Int32) {
    log.failFlush(code)
    refreshHealth()
  }
}
