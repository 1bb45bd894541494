// The image formats that a worker knows by name, and opening or making an image in stores
// that somebody else has opened.

public import ImageFormats
public import Posix

/// What is wanted of an image.
public struct ImageRequest: Sendable, Equatable {
  /// Whether the image shall be made, in a store that is new and empty.
  public var create = false
  /// For a new image: bytes of a block; nil: the format's own choice.
  public var blockSize: UInt32?
  /// For a new image: the base as it shall stand in the header.
  public var basePath: String?
  /// Whether the disk is only read.
  public var readOnly = false
  /// Whether a base that has changed is accepted and noted anew.
  public var force = false
  /// Whether the kernel holds the locks of the files already, for a device that lives.
  public var isLocked = false

  /// A request to open an image that exists.
  public init() {}
}

/// A format by its name.
public enum FormatName: String, Sendable, CaseIterable {
  /// The project's own.
  case dscow

  /// Looks a name up. Throws `unknown-format` with the names that there are.
  public init(named name: String) throws(WorkerError) {
    guard let known = FormatName(rawValue: name) else {
      let names = Self.allCases.map(\.rawValue).joined(separator: ", ")
      throw WorkerError("unknown-format", "format '\(name)' is unknown: this dmu-xen has \(names)")
    }
    self = known
  }

  /// The base that an existing image names; nil when it needs none.
  public func basePath(of store: any ByteStore) throws(ImageError) -> String? {
    switch self {
    case .dscow: try Dscow.header(of: store).header.base?.path
    }
  }

  /// Makes the image when that is asked for and has not been done by a worker before this
  /// one, then opens it.
  public func open(
    store: any ByteStore, base: (any ByteStore)?, _ request: ImageRequest
  ) throws(ImageError) -> any ImageFormat {
    switch self {
    case .dscow:
      if request.create { try createDscow(store, base, request) }
      return try Dscow.open(
        store: store, base: base, writable: !request.readOnly, force: request.force)
    }
  }

  private func createDscow(
    _ store: any ByteStore, _ base: (any ByteStore)?, _ request: ImageRequest
  ) throws(ImageError) {
    if store.size > 0 {
      do throws(ImageError) {
        _ = try Dscow.header(of: store)
        return
      } catch {
        // Not made yet, or only in part: `create` refuses what is not its own.
        guard error.code == .notThisFormat || error.code == .corrupt else { throw error }
      }
    }
    try Dscow.create(
      store: store, base: base, baseName: request.basePath ?? "",
      blockSize: request.blockSize ?? Dscow.defaultBlockSize)
  }
}

/// A disk cannot be served: why, for programs and for people.
public struct WorkerError: Error, Sendable, Equatable, CustomStringConvertible {
  /// One of `ImageError.Code`, or "io", "unknown-format", "protocol", "base-refused",
  /// "in-use", "usage".
  public let code: String
  /// One sentence without a final stop.
  public let message: String

  /// An error from its parts.
  public init(_ code: String, _ message: String) {
    self.code = code
    self.message = message
  }

  /// A failed system call.
  public init(_ error: IOError) {
    self.init("io", error.description)
  }

  /// Something wrong with an image.
  public init(_ error: ImageError) {
    self.init(error.code.rawValue, error.message)
  }

  /// The message.
  public var description: String { message }
}

/// Does something with the system; its failure is the worker's.
func system<R: ~Copyable>(_ body: () throws(IOError) -> R) throws(WorkerError) -> R {
  do throws(IOError) { return try body() } catch { throw WorkerError(error) }
}

/// Does something with an image; its failure is the worker's.
func imaging<R>(_ body: () throws(ImageError) -> R) throws(WorkerError) -> R {
  do throws(ImageError) { return try body() } catch { throw WorkerError(error) }
}
