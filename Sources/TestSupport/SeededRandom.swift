// SPDX-License-Identifier: Apache-2.0

import Glibc

/// Random numbers that a seed replays. Not for secrets.
///
/// *Source:* the SplitMix64 sequence (Steele, Lea and Flood, 2014).
public struct SeededRandom: RandomNumberGenerator, Sendable {
  /// What replays this run.
  public let seed: UInt64
  private var state: UInt64

  /// Starts the sequence of a seed.
  public init(seed: UInt64) {
    self.seed = seed
    state = seed
  }

  /// Starts from `DMU_SEED` if that is set, else from chance, and prints the seed with `name`.
  public init(announcedAs name: String) {
    let given = getenv("DMU_SEED").flatMap { UInt64(String(cString: $0)) }
    self.init(seed: given ?? UInt64.random(in: 0...UInt64.max))
    print("\(name): seed \(seed) (DMU_SEED=\(seed) replays it)")
  }

  /// The next 64 bits.
  public mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ (mixed >> 30)) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ (mixed >> 27)) &* 0x94D0_49BB_1331_11EB
    return mixed ^ (mixed >> 31)
  }
}
