// SPDX-License-Identifier: Apache-2.0
// How making something durable fails. Which of the two it was decides what may be believed from
// then on, so it is a type, and no word of a message.

/// Why what was to become durable has not.
package import SystemIO
package enum CommitFailure: Error, Sendable, Equatable, CustomStringConvertible {
  /// A step on the way: what was not written is still known, and may be written again.
  case write(IOError)
  /// A flush: what it was to make durable may be gone, and no later flush says so again.
  case flush(IOError)

  /// What the system said.
  package var error: IOError {
    switch self {
    case .write(let error), .flush(let error): error
    }
  }

  /// The errno of a flush that failed; 0 when none did.
  package var flushCode: Int32 {
    if case .flush(let error) = self { error.code } else { 0 }
  }

  /// The error's sentence.
  package var description: String { error.description }
}
