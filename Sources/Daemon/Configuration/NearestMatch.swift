// SPDX-License-Identifier: Apache-2.0
// "Did you mean ...?" for names that nobody knows.

/// Finds the known name that a mistyped one was probably meant to be.
package enum NearestMatch {
  /// The nearest known name, if one is near enough: a third of its letters may be wrong.
  package static func find(_ name: String, among known: [String]) -> String? {
    let near = known.map { (name: $0, distance: distance(name, $0)) }
      .min { $0.distance < $1.distance }
    guard let near, near.distance <= max(1, near.name.count / 3) else { return nil }
    return near.name
  }

  /// " (did you mean 'x'?)", or nothing.
  package static func hint(for name: String, among known: [String]) -> String {
    find(name, among: known).map { " (did you mean '\($0)'?)" } ?? ""
  }

  /// How many letters have to be put in, taken out or changed; two letters that changed
  /// places count once.
  static func distance(_ one: String, _ other: String) -> Int {
    let a = Array(one.lowercased())
    let b = Array(other.lowercased())
    guard !a.isEmpty, !b.isEmpty else { return max(a.count, b.count) }
    var before: [Int] = []
    var last = Array(0...b.count)
    for i in 1...a.count {
      var row = [i]
      for j in 1...b.count {
        var best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1))
        if i > 1, j > 1, a[i - 1] == b[j - 2], a[i - 2] == b[j - 1] {
          best = min(best, before[j - 2] + 1)
        }
        row.append(best)
      }
      before = last
      last = row
    }
    return last[b.count]
  }
}
