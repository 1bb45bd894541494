// The choices that seeded tests make most.

extension SeededRandom {
  /// A number below a bound greater than 0, near enough evenly for tests.
  public mutating func below(_ bound: Int) -> Int {
    Int(next() % UInt64(bound))
  }

  /// True in `percent` of 100 cases.
  public mutating func chance(_ percent: Int) -> Bool {
    below(100) < percent
  }
}
