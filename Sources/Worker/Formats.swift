// SPDX-License-Identifier: Apache-2.0
// The image formats that a worker knows by name, and what is wanted of an image.

package import DiskFormats
package import SystemIO
package import Target
package import WorkerLink

/// What is wanted of an image.
package struct ImageRequest: Sendable, Equatable {
  /// Whether the image shall be made, in a store that is new and empty.
  package var create = false
  /// For a new image: bytes of a block; nil: the format's own choice.
  package var blockSize: UInt32?
  /// The base, in place of the one that the image names; in a new image also as it shall
  /// stand in the header.
  package var basePath: String?
  /// The base's format, whatever the image says of it.
  package var baseFormat: FormatName?
  /// How many images there may be in a row.
  package var depth = Chain.usualDepth
  /// Whether the disk is only read.
  package var readOnly = false
  /// Whether a base that has changed is accepted and noted anew.
  package var force = false

  /// A request to open an image that exists.
  package init() {}
}

/// A format by the name that specs give it: every one that the library knows.
package struct FormatName: Sendable, Equatable {
  /// The kind of image.
  package let kind: ImageKind

  /// The names of all formats.
  package static let all = FormatList.all.kinds.map { FormatName($0).name }.sorted()

  /// A format by its kind.
  package init(_ kind: ImageKind) {
    self.kind = kind
  }

  /// Looks a name up. Throws `unknown-format` with the names that there are.
  package init(named name: String) throws(WorkerError) {
    guard let kind = Self.kind(name) else { throw Self.unknown(name) }
    self.kind = kind
  }

  static func kind(_ name: String) -> ImageKind? { FormatList.all.named(name) }

  /// `remark` follows the names that there are.
  static func unknown(_ name: String, _ remark: String = "") -> WorkerError {
    let names = Self.all.joined(separator: ", ")
    return WorkerError(
      .unknownFormat, "format '\(name)' is unknown: this dmu-xen has \(names)\(remark)")
  }

  /// The name that people give it.
  package var name: String { kind.format.specName }
}

/// A disk cannot be served: why, for programs and for people.
package struct WorkerError: Error, Sendable, Equatable, CustomStringConvertible {
  /// The kind.
  package let fault: WorkerFault
  /// One sentence without a final stop.
  package let message: String

  /// An error from its parts.
  package init(_ fault: WorkerFault, _ message: String) {
    self.fault = fault
    self.message = message
  }

  /// A failed system call.
  package init(_ error: IOError) {
    self.init(.io, error.description)
  }

  /// Something wrong with an image.
  package init(_ error: ImageError) {
    self.init(WorkerFault(error.code), error.message)
  }

  /// A pending log that cannot be taken over.
  package init(_ error: PendingLogError) {
    self.init(error.isForeign ? .pendingStale : .pendingDamaged, error.description)
  }

  /// The message.
  package var description: String { message }
}

extension WorkerFault {
  /// What is wrong with an image.
  init(_ code: ImageError.Code) {
    switch code {
    case .notThisFormat: self = .notThisFormat
    case .unsupported: self = .unsupported
    case .corrupt: self = .corrupt
    case .baseChanged: self = .baseChanged
    case .baseMissing: self = .baseMissing
    case .badRequest: self = .badRequest
    case .stale: self = .pendingStale
    case .io: self = .io
    }
  }
}

/// Does something with the system; its failure is the worker's.
func system<R: ~Copyable>(_ body: () throws(IOError) -> R) throws(WorkerError) -> R {
  do throws(IOError) { return try body() } catch { throw WorkerError(error) }
}

/// Does something with an image; its failure is the worker's.
func imaging<R>(_ body: () throws(ImageError) -> R) throws(WorkerError) -> R {
  do throws(ImageError) { return try body() } catch { throw WorkerError(error) }
}
