// SPDX-License-Identifier: Apache-2.0
// The words of a command line that is still being typed.

extension [String] {
  /// The word after the last of these options; nil when there is none.
  package func value(after options: String...) -> String? {
    guard let place = dropLast().lastIndex(where: options.contains) else { return nil }
    return self[place + 1]
  }
}
