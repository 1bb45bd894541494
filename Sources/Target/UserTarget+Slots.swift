// SPDX-License-Identifier: Apache-2.0
// Slots: taking and freeing them, the order of requests, waiting and going on.

import Glibc
import Posix

extension UserTarget {
  /// Steps whatever is ready.
  func drain() {
    guard requests.beginSteps() else { return }
    while let index = requests.nextReady() { step(index) }
  }

  // MARK: Waiting for space

  /// Whether time may change something: to be told of by `tick` every second.
  package var wantsTicks: Bool { trouble.isPassing }

  /// A second has passed: one of the requests that wait for space tries again, or all fail when
  /// they have waited too long. After `quiet` seconds without one, errors are forgotten.
  package func tick(quiet: UInt32) {
    trouble.settle(after: quiet)
    if trouble.space != 0, space.timeout > 0, !trouble.spaceExpired,
      DiskTrouble.now() - trouble.spaceSince >= Int64(space.timeout) * 1000
    {
      trouble.spaceExpired = true
      endWaiting(ENOSPC)
    }
    refreshHealth()
    guard let index = requests.wakeFirst(.space) else { return }
    requests[index].pointee.isProbe = true
    drain()
  }

  /// There is space: whoever waits for some goes on.
  func spaceFound() {
    trouble.endShortage()
    refreshHealth()
    requests.wake(.space)
  }

  /// Fails whatever waits for space with an errno.
  package func endWaiting(_ code: Int32) {
    requests.fail(waitingFor: .space, code)
    drain()
  }

  // MARK: The end

  /// A request has been served, or has failed with an errno.
  func finish(_ index: Int, _ code: Int32) {
    requests.leave(index)
    if code == 0, requests[index].pointee.isForced {
      requests.awaitFlush(index)
      rounds.join(index)
      startRound()
      return
    }
    complete(index, code)
  }

  /// Tells the owner and frees the slot.
  func complete(_ index: Int, _ code: Int32) {
    let owner = requests[index].pointee.owner
    let tag = requests[index].pointee.tag
    requests.free(index)
    if code != 0 { counted.errors += 1 }
    if owner >= 0 {
      owners[Int(owner)]?.completed(tag: tag, code: code)
    } else {
      rounds.tell(tag, code)
    }
  }
}
