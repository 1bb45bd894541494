// SPDX-License-Identifier: Apache-2.0
// What the worker has not seen yet: questions and news, in the order in which they came up.

import DiskModel

/// The faults of a target on their way to the worker. Used from one thread.
final class FaultQueue {
  private var faults: [Fault] = []
  private var taken = 0
  private var lastNumber: UInt64 = 0
  /// Questions so far.
  private(set) var asked: UInt64 = 0

  /// A new number for a question, never given before, with the slot that asks in its low bits.
  func number(slot: Int) -> FaultID {
    lastNumber += 1
    return lastNumber << RequestTable.slotBits | UInt64(slot)
  }

  /// Asks the worker.
  func ask(_ question: Fault) {
    asked += 1
    faults.append(question)
  }

  /// Tells the worker, who does not answer.
  func tell(_ news: Fault) {
    faults.append(news)
  }

  /// The next fault that the worker has not seen yet.
  func next() -> Fault? {
    guard taken < faults.count else { return nil }
    let fault = faults[taken]
    taken += 1
    if taken == faults.count {
      faults.removeAll(keepingCapacity: true)
      taken = 0
    }
    return fault
  }
}
