// SPDX-License-Identifier: Apache-2.0
/// What a trial found that ought not to be.
package struct TrialBroken: Error, CustomStringConvertible {
  /// In words, with the place in the suite where there is one.
  package let description: String

  /// From its words.
  package init(_ description: String) { self.description = description }
}

/// Throws unless what holds.
func expect(
  _ holds: Bool, _ what: @autoclosure () -> String = "", file: String = #fileID, line: Int = #line
) throws(TrialBroken) {
  guard !holds else { return }
  throw TrialBroken("\(file):\(line): \(what())")
}
