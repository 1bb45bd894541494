// SPDX-License-Identifier: Apache-2.0

import Glibc

/// Random numbers that know their seed and say it, so that a test's run can be replayed.
package struct SeededRandom: RandomNumberGenerator, Sendable {
  /// What replays this run.
  package let seed: UInt64
  private var generator: SplitMix64

  /// Starts the sequence of a seed.
  package init(seed: UInt64) {
    self.seed = seed
    generator = SplitMix64(seed: seed)
  }

  /// Starts from `DMU_SEED` if that is set, else from chance, and prints the seed with `name`.
  package init(announcedAs name: String) {
    let given = getenv("DMU_SEED").flatMap { UInt64(String(cString: $0)) }
    self.init(seed: given ?? UInt64.random(in: 0...UInt64.max))
    print("\(name): seed \(seed) (DMU_SEED=\(seed) replays it)")
  }

  /// The next 64 bits.
  package mutating func next() -> UInt64 {
    generator.next()
  }
}
