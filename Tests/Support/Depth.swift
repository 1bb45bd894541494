// SPDX-License-Identifier: Apache-2.0

import Glibc

/// How much of the long tests is done, and from which seed on. By default a test does a little and
/// the same each time; `make soak` does more, with other seeds.
package enum Depth {
  /// How many times a little: `DMU_DEPTH`, 1 unless said otherwise. With 30 the tests of the image
  /// formats try every kind of image and every place.
  package static let factor = max(1, Int(clamping: number("DMU_DEPTH") ?? 1))

  /// The first seed of a row: `DMU_SEED`, 0 unless said otherwise. So a seed that a failure tells
  /// is replayed by it.
  package static let firstSeed = number("DMU_SEED") ?? 0

  private static func number(_ name: String) -> UInt64? {
    guard let text = getenv(name).map({ String(cString: $0) }), !text.isEmpty else { return nil }
    guard let number = UInt64(text) else { preconditionFailure("\(name)=\(text) is no number") }
    return number
  }

  /// A count times the depth.
  package static func times(_ count: Int) -> Int { count * factor }

  /// `count` times the depth of seeds: one after the other, `offset` seeds from the first one on.
  package static func seeds(_ count: Int, offset: UInt64 = 0) -> [UInt64] {
    (0..<UInt64(times(count))).map { firstSeed &+ offset &+ $0 }
  }

  /// `count` times the depth of some items, evenly spread over them; all when that is more.
  package static func some<Item>(_ count: Int, of items: [Item]) -> [Item] {
    let wanted = min(items.count, times(count))
    return (0..<wanted).map { items[$0 * items.count / wanted] }
  }
}
