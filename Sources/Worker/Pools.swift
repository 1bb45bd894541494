// SPDX-License-Identifier: Apache-2.0
// Room for first writes that the target has in advance, where a format cannot say beforehand where
// a block goes.
//
// Invariants:
// - The target has two pools at most: one that is being used, and one that follows it. It may have
//   used more of them than it has told of, never less.
// - What was given to it stays the target's until it tells of it, or ends with this worker.

import DiskFormats
import DiskModel

/// The pools that a target has, as far as it has told.
struct Pools {
  /// Whether the format makes any.
  var isOn = false
  /// Whether one is about to be made.
  var isWanted = false
  /// Whether there was no room for one: a first write has to be asked for before the next is tried.
  var isMissing = false
  private var given: [Pool] = []
  private var left: UInt32 = 0

  /// Whether the target should have another one: less than half of the last is left.
  var wantsMore: Bool {
    isOn && !isWanted && !isMissing && given.count < 2 && left * 2 <= given.last?.count ?? 0
  }

  /// The target has another one.
  mutating func add(_ pool: Pool) {
    given.append(pool)
    left += pool.count
  }

  /// A place has been used.
  mutating func use() {
    guard left > 0 else { return }
    left -= 1
    if left == given.dropFirst().first?.count ?? 0 { given.removeFirst() }
  }
}

extension Worker {
  /// Has the target given another pool if it should have one.
  func wantPool() {
    guard pools.wantsMore else { return }
    pools.isWanted = true
    enqueue(.pool)
  }

  /// Makes a pool and gives it to the target; as `take`.
  func givePool() -> Bool {
    let pool: Pool?
    do throws(ImageError) {
      guard let made = try gate.ask({ () throws(ImageError) in try format.pool() }) else {
        return false
      }
      pool = made
    } catch {
      // The next first write is asked for; who waits there for space is told of it.
      log(.debug, "no room for first writes in advance", ["error": "\(error)"])
      pools.isWanted = false
      pools.isMissing = true
      return true
    }
    pools.isWanted = false
    guard let pool else {
      pools.isOn = false
      return true
    }
    do throws(AnswerRefusal) {
      try target.pool(pool)
      pools.add(pool)
    } catch {
      // Then it asks, as it does without.
      log(.info, "first writes are asked for", ["refusal": "\(error)"])
      pools.isOn = false
    }
    return true
  }
}

extension Fault {
  /// Whether it says of a placement that the target has made or taken, and asks nothing.
  var isNewsOfPlacement: Bool {
    switch self {
    case .placed, .marked: true
    default: false
    }
  }
}
