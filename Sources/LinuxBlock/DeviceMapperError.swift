// SPDX-License-Identifier: Apache-2.0
// The one error of everything asked of the device-mapper.

import Glibc

/// The kernel refused something.
package struct DeviceMapperError: Error, Sendable, Equatable, CustomStringConvertible {
  /// The errno, greater than zero.
  package let code: Int32
  /// What was tried, as a verb: "create", "load a table for".
  package let operation: String
  /// The device, or what else it was tried on.
  package let subject: String
  /// What the kernel's log says of it, when it says anything.
  package let explanation: String?

  /// An error from its parts.
  package init(
    _ code: Int32, _ operation: String, _ subject: String, explanation: String? = nil
  ) {
    self.code = code
    self.operation = operation
    self.subject = subject
    self.explanation = explanation
  }

  /// "cannot OPERATION SUBJECT: EXPLANATION (REASON)".
  package var description: String {
    let reason = String(cString: strerror(code))
    let why = explanation.map { "\($0) (\(reason))" } ?? reason
    return "cannot \(operation) \(subject): \(why)"
  }
}
