// SPDX-License-Identifier: Apache-2.0
// The image formats that a worker knows by name, and what is wanted of an image.

public import ImageFormats
public import Posix
public import Target
public import WorkerLink

/// What is wanted of an image.
public struct ImageRequest: Sendable, Equatable {
  /// Whether the image shall be made, in a store that is new and empty.
  public var create = false
  /// For a new image: bytes of a block; nil: the format's own choice.
  public var blockSize: UInt32?
  /// The base, in place of the one that the image names; in a new image also as it shall
  /// stand in the header.
  public var basePath: String?
  /// The base's format, whatever the image says of it.
  public var baseFormat: FormatName?
  /// How many images there may be in a row.
  public var depth = ImageChain.usualDepth
  /// Whether the disk is only read.
  public var readOnly = false
  /// Whether a base that has changed is accepted and noted anew.
  public var force = false

  /// A request to open an image that exists.
  public init() {}
}

/// A format by its name: every kind of image that the library knows, and "vhd" for what QEMU
/// calls vpc.
public struct FormatName: Sendable, Equatable {
  /// The kind of image.
  public let kind: ImageKind

  /// The names of all formats.
  public static let all = ImageKind.allCases.map { FormatName($0).name }.sorted()

  /// A format by its kind.
  public init(_ kind: ImageKind) {
    self.kind = kind
  }

  /// Looks a name up. Throws `unknown-format` with the names that there are.
  public init(named name: String) throws(WorkerError) {
    guard let kind = Self.kind(name) else { throw Self.unknown(name) }
    self.kind = kind
  }

  static func kind(_ name: String) -> ImageKind? {
    name == "vhd" ? .vhd : ImageKind(rawValue: name)
  }

  /// `remark` follows the names that there are.
  static func unknown(_ name: String, _ remark: String = "") -> WorkerError {
    let names = Self.all.joined(separator: ", ")
    return WorkerError(
      .unknownFormat, "format '\(name)' is unknown: this dmu-xen has \(names)\(remark)")
  }

  /// The name that people give it.
  public var name: String { kind == .vhd ? "vhd" : kind.rawValue }
}

/// A disk cannot be served: why, for programs and for people.
public struct WorkerError: Error, Sendable, Equatable, CustomStringConvertible {
  /// The kind.
  public let fault: WorkerFault
  /// One sentence without a final stop.
  public let message: String

  /// An error from its parts.
  public init(_ fault: WorkerFault, _ message: String) {
    self.fault = fault
    self.message = message
  }

  /// A failed system call.
  public init(_ error: IOError) {
    self.init(.io, error.description)
  }

  /// Something wrong with an image.
  public init(_ error: ImageError) {
    self.init(WorkerFault(error.code), error.message)
  }

  /// A pending log that cannot be taken over.
  public init(_ error: PendingLogError) {
    self.init(error.isForeign ? .pendingStale : .pendingDamaged, error.description)
  }

  /// The message.
  public var description: String { message }
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
