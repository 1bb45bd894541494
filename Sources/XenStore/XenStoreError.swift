// SPDX-License-Identifier: Apache-2.0

import Glibc

/// What a request to xenstore failed of: the operation, the path, the reason and the remedy.
package struct XenStoreError: Error, Equatable, Sendable {
  /// The kind of failure, for a caller that acts on it.
  package enum Code: Equatable, Sendable {
    /// There is no such node.
    case notFound
    /// This domain may not do this with the node.
    case accessDenied
    /// The path cannot name a node; nothing was sent.
    case invalidPath
    /// The value is not what was asked for (not UTF-8, not a list of permissions).
    case invalidValue
    /// Path and value do not fit into one message of 4096 bytes; nothing was written.
    case tooLarge
    /// xenstored's quota or memory is exhausted.
    case quotaExceeded
    /// A transaction met a competing writer each time, as often as it was tried.
    case conflict
    /// xenstored did not answer in time. Whether a change took effect is unknown.
    case timedOut
    /// There is no connection, or it broke. Whether a change took effect is unknown.
    case disconnected
    /// The client was closed.
    case closed
    /// Anything else that xenstored or the system refused.
    case refused(errno: Int32)
  }

  /// The kind of failure.
  package let code: Code
  /// What was tried: `read`, `write`, `list` and so on.
  package let operation: String
  /// The node, as the caller named it; nil if the request has none.
  package let path: String?
  /// The reason.
  package let message: String
  /// What a person may do about it.
  package let remedy: String

  init(
    _ code: Code, _ operation: String, _ path: String?, _ message: String, remedy: String
  ) {
    self.code = code
    self.operation = operation
    self.path = path
    self.message = message
    self.remedy = remedy
  }
}

extension XenStoreError: CustomStringConvertible {
  /// One line for a log: what, where, why, and what to do.
  package var description: String {
    // A path that is refused for its length need not fill the log.
    let place = path.map { path in
      path.utf8.count <= 200
        ? " \(path.debugDescription)" : " \(String(path.prefix(200)).debugDescription)..."
    }
    return "xenstore \(operation)\(place ?? ""): \(message); \(remedy)"
  }
}

extension XenStoreError {
  /// The error for an errno that libxenstore left behind.
  init(errno number: Int32, _ operation: String, _ path: String?) {
    let (code, message, remedy): (Code, String, String) =
      switch number {
      case ENOENT:
        (.notFound, "no such node", "check that the domain or device still exists")
      case EACCES, EPERM, EROFS:
        (.accessDenied, "permission denied", "the node's owner or domain 0 must grant access")
      case ENOSPC, ENOMEM, EDQUOT:
        (.quotaExceeded, "xenstored's quota or memory is exhausted", "raise xenstored's quotas")
      case E2BIG, ENAMETOOLONG:
        (.tooLarge, "the request does not fit into one message", "shorten the path or the value")
      case EAGAIN:
        (.conflict, "a competing change came in between", "try again")
      case EPIPE, EBADF, ENOTCONN, ECONNRESET, ECONNREFUSED, ECONNABORTED:
        (.disconnected, "the connection to xenstored broke", Self.checkService)
      case EINVAL:
        (
          .refused(errno: number), "xenstored finds the path or the request invalid",
          "check the path, also its length"
        )
      default:
        (.refused(errno: number), "\(String(cString: strerror(number)))", Self.checkService)
      }
    self.init(code, operation, path, message, remedy: remedy)
  }

  static let checkService = "check that xenstored runs"

  static func timedOut(_ operation: String, _ path: String?, after limit: Duration) -> Self {
    Self(
      .timedOut, operation, path, "no answer within \(limit)",
      remedy: "check that xenstored is not stopped or overloaded")
  }

  static func disconnected(_ operation: String, _ path: String?, because reason: String) -> Self {
    Self(.disconnected, operation, path, reason, remedy: checkService)
  }

  static func closed(_ operation: String, _ path: String?) -> Self {
    Self(
      .closed, operation, path, "the client has been closed",
      remedy: "make no requests after close()")
  }
}
