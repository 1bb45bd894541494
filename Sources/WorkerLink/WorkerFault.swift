// SPDX-License-Identifier: Apache-2.0
// The kinds of failure for which a worker serves no disk. Their words go over the link, and into the
// worker's log.

/// Why a disk cannot be served, for programs.
package enum WorkerFault: String, Sendable, Equatable, CaseIterable {
  /// The store is no image of the format that it is said to be.
  case notThisFormat = "not-this-format"
  /// A version or feature of the image that this program does not know.
  case unsupported
  /// The image contradicts itself.
  case corrupt
  /// The base is not the one that the store was made from.
  case baseChanged = "base-changed"
  /// The image needs a base and was given none.
  case baseMissing = "base-missing"
  /// A size, a block size or an option that makes no sense.
  case badRequest = "bad-request"
  /// The store was changed since its pending log was written.
  case pendingStale = "pending-stale"
  /// The pending log cannot be read.
  case pendingDamaged = "pending-damaged"
  /// A file, a device or the system has failed.
  case io
  /// No format has this name.
  case unknownFormat = "unknown-format"
  /// A plugin cannot be loaded.
  case plugin
  /// What the image names may not be opened.
  case baseRefused = "base-refused"
  /// The device has another size or other blocks than the image.
  case size
  /// Somebody else has the place where the disk shall appear.
  case inUse = "in-use"
  /// There is no cage for the worker.
  case cage
  /// A wish that cannot be fulfilled.
  case usage
  /// The other end of the link does not keep to it.
  case offLink = "protocol"
  /// The worker has ended, and has said why.
  case ended
  /// One that this version does not know.
  case other

  /// From the word in a report.
  package init(word: String) { self = WorkerFault(rawValue: word) ?? .other }
}
