// SPDX-License-Identifier: Apache-2.0
// The one error of this room: what is wrong with which image, and what to do about it.

package import SystemIO

/// Something is wrong with an image, or with what was asked of it.
package struct ImageError: Error, Sendable, CustomStringConvertible {
  /// What kind of trouble; messages are for people, this is for programs.
  package enum Code: String, Sendable {
    /// Not an image of this format.
    case notThisFormat = "not-this-format"
    /// A version or feature that this program does not know.
    case unsupported
    /// A header or table that contradicts itself or its store.
    case corrupt
    /// The base is not the one that the store was made from.
    case baseChanged = "base-changed"
    /// The image needs a base and was given none.
    case baseMissing = "base-missing"
    /// A request that makes no sense: size, block size, option.
    case badRequest = "bad-request"
    /// Placements that are not committed rest on a store that was changed since.
    case stale = "pending-stale"
    /// The store or base failed; see `cause`.
    case io
  }

  /// The kind.
  package let code: Code
  /// One sentence without a final stop: the thing, the reason and, where there is one, the remedy.
  package let message: String
  /// The failed system call behind it.
  package let cause: IOError?

  /// An error from its parts.
  package init(_ code: Code, _ message: String, cause: IOError? = nil) {
    self.code = code
    self.message = message
    self.cause = cause
  }

  /// A failed system call as an error of this room.
  package init(_ error: IOError) {
    self.init(.io, error.description, cause: error)
  }

  /// The message.
  package var description: String { message }
}
