// SPDX-License-Identifier: Apache-2.0
// The version of everything that is made here: the programs, and what `Tests/house` finds with
// another number, the module's package and the manual pages.

/// The project's version.
package enum Version {
  /// As text, three numbers.
  package static let text = "0.1.0"
}
