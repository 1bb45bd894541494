// SPDX-License-Identifier: Apache-2.0
// The one error of everything that asks the kernel for something: what was asked, of
// what, and the errno that came back.

import Glibc

/// A system call that failed.
public struct IOError: Error, Sendable, Equatable, CustomStringConvertible {
  /// The errno, greater than zero.
  public let code: Int32
  /// What was tried, as a verb: "read", "open", "flush".
  public let operation: String
  /// What it was tried on: a path, a device, a name of a store. May be empty.
  public let subject: String

  /// An error with a given errno.
  public init(_ code: Int32, _ operation: String, _ subject: String = "") {
    self.code = code
    self.operation = operation
    self.subject = subject
  }

  /// The errno of the call that has just failed on this thread.
  public static func last(_ operation: String, _ subject: String = "") -> IOError {
    IOError(errno, operation, subject)
  }

  /// "cannot OPERATION SUBJECT: REASON".
  public var description: String {
    let what = subject.isEmpty ? operation : "\(operation) \(subject)"
    return "cannot \(what): \(reason)"
  }

  /// The system's words for the errno. Source: strerror(3).
  public var reason: String { String(cString: strerror(code)) }
}
