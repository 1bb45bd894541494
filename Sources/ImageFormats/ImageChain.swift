// SPDX-License-Identifier: Apache-2.0
// Opening an image with everything under it: its data file, its base, the base of that, and so
// on, of whatever formats. Paths that stand in images are not opened here: whoever calls is
// asked for each, and may refuse.

import Glibc
package import Posix

/// Opens images with what is under them.
package enum ImageChain {
  /// A path that stands in an image.
  package struct Request: Sendable, Equatable {
    /// What it is for.
    package enum Role: String, Sendable {
      /// The image under the image.
      case base
      /// The file that holds the image's data.
      case dataFile = "data-file"
      /// A file that holds a part of the image's data.
      case extent
    }
    /// What it is for.
    package var role: Role
    /// The path as it stands in the image; a relative one is meant from the image's folder.
    package var path: String
    /// The store that names it.
    package var from: String

    /// A path, and the store in which it stands.
    package init(role: Role, path: String, from: String) {
      self.role = role
      self.path = path
      self.from = from
    }

    /// The refusal of a path that an untrusted image names.
    package var refusal: ImageError {
      ImageError(
        .badRequest,
        "image \(from) names \(path) as its \(role.rawValue), which --untrusted refuses: if the "
          + "image may use that file, leave out --untrusted")
    }
  }

  /// Answers requests for paths.
  package typealias Resolver = (Request) throws(ImageError) -> any ByteStore

  /// So many images in a row unless asked otherwise.
  package static let usualDepth = 32

  /// Opens an image and everything under it.
  ///
  /// - Parameters:
  ///   - kind: the format; nil to look at the first bytes: the image may then name no file.
  ///   - baseKind: the format of the image's base, whatever the image says of it.
  ///   - depth: how many images there may be in a row.
  ///   - force: take a base that has changed, where the format notices that.
  ///   - resolve: opens paths for reading (a data file of a writable image: for writing).
  ///   - contentID: what the image shall bear instead of a random one, where opening it for
  ///     writing renews that (VMDK).
  ///   - formats: those that there are.
  /// - Throws: what the formats throw; `corrupt` for a loop or too long a chain.
  package static func open(
    _ store: any ByteStore, kind: ImageKind? = nil, baseKind: ImageKind? = nil,
    writable: Bool, depth: Int = usualDepth, force: Bool = false, snapshot: String? = nil,
    contentID: UInt32? = nil, among formats: DiskFormats = .all, resolve: Resolver
  ) throws(ImageError) -> any ImageFormat {
    let how = How(
      writable: writable, force: force, snapshot: snapshot, contentID: contentID,
      baseKind: baseKind, formats: formats)
    return try open(
      store, FormatStatement(kind), how, above: [], depth: depth, resolve: resolve
    ).image
  }

  /// How the image on top is opened; those below are only read.
  private struct How {
    var writable = false
    var force = false
    var snapshot: String?
    var contentID: UInt32?
    var baseKind: ImageKind?
    var formats: DiskFormats
  }

  /// A base with everything under it as a flat byte store: what an image is made over.
  ///
  /// - Parameters:
  ///   - kind: its format; nil to look at its first bytes.
  ///   - store: the image above it.
  /// - Throws: as `open`.
  package static func base(
    _ base: any ByteStore, kind: ImageKind? = nil, of store: any ByteStore,
    depth: Int = usualDepth, among formats: DiskFormats = .all, resolve: Resolver
  ) throws(ImageError) -> any ByteStore {
    try flat(
      base, FormatStatement(kind), formats, above: [store], depth: depth, resolve: resolve)
  }

  /// An image that is open, and the base it was opened with.
  private typealias Opened = (image: any ImageFormat, base: (any ByteStore)?)

  private static func open(
    _ store: any ByteStore, _ statement: FormatStatement, _ how: How, above: [any ByteStore],
    depth: Int, resolve: Resolver
  ) throws(ImageError) -> Opened {
    guard above.count < depth else {
      throw ImageError(
        .unsupported, "more than \(depth) images in a row, down to \(store.name): merge some")
    }
    let decision = try FormatDecision.decide(statement, of: store, among: how.formats)
    var parts = try parts(
      store, decision, baseKind: how.baseKind, how.formats, above: above, depth: depth,
      resolve: resolve)
    parts.writable = how.writable
    parts.force = how.force
    parts.snapshot = how.snapshot
    parts.contentID = how.contentID
    return (try decision.kind.format.opened(parts), parts.base)
  }

  /// Opens what an image names and everything under it, not the image itself. Throws as `open`.
  package static func parts(
    _ store: any ByteStore, _ decision: FormatDecision, baseKind: ImageKind? = nil,
    among formats: DiskFormats = .all, resolve: Resolver
  ) throws(ImageError) -> ImageParts {
    try parts(
      store, decision, baseKind: baseKind, formats, above: [], depth: usualDepth,
      resolve: resolve)
  }

  private static func parts(
    _ store: any ByteStore, _ decision: FormatDecision, baseKind: ImageKind?,
    _ formats: DiskFormats, above: [any ByteStore], depth: Int, resolve: Resolver
  ) throws(ImageError) -> ImageParts {
    let names = try decision.kind.format.names(in: store)
    var parts = ImageParts(store)
    parts.files = try files(of: store, names, decision, above: above, resolve)
    if let below = try openBase(of: store, names, decision, resolve) {
      parts.base = try flat(
        below, FormatStatement(baseKind, named: names.baseFormat), formats,
        above: above + [store], depth: depth, resolve: resolve)
    }
    return parts
  }

  /// Opens the base that an image names, by the first of its paths that leads somewhere; nil
  /// when it names none.
  static func openBase(
    of store: any ByteStore, _ names: ImageNames, _ decision: FormatDecision,
    _ resolve: Resolver
  ) throws(ImageError) -> (any ByteStore)? {
    guard let first = names.base else { return nil }
    try decision.checkMayName(first, store)
    var failure: ImageError?
    for path in [first] + names.otherBases {
      do throws(ImageError) {
        return try resolve(Request(role: .base, path: path, from: store.name))
      } catch {
        // The first one is the one to be told of.
        guard error.cause?.code == ENOENT else { throw failure ?? error }
        failure = failure ?? error
      }
    }
    throw failure ?? ImageError(.baseMissing, "store \(store.name) names no base")
  }

  /// Opens the files that hold an image's data where that is not the store. No extent may be the
  /// image, one above it, or another extent.
  static func files(
    of store: any ByteStore, _ names: ImageNames, _ decision: FormatDecision,
    above: [any ByteStore], _ resolve: Resolver
  ) throws(ImageError) -> [any ByteStore] {
    var files: [any ByteStore] = []
    for named in names.files {
      guard let path = named.path else {
        throw ImageError(.baseMissing, "store \(store.name) does not name its data file")
      }
      try decision.checkMayName(path, store)
      let file = try resolve(Request(role: named.role, path: path, from: store.name))
      for other in above + [store] where named.role == .extent {
        guard try !Dscow.same(other, file) else {
          throw ImageError(.corrupt, "store \(store.name): its extent \(path) is itself")
        }
      }
      for (other, its) in zip(files, names.files) where !(named.isShared && its.isShared) {
        guard try !Dscow.same(other, file) else {
          throw ImageError(.corrupt, "store \(store.name): two extents are \(path)")
        }
      }
      files.append(file)
    }
    return files
  }

  /// A base as a flat byte store.
  private static func flat(
    _ store: any ByteStore, _ statement: FormatStatement, _ formats: DiskFormats,
    above: [any ByteStore], depth: Int, resolve: Resolver
  ) throws(ImageError) -> any ByteStore {
    for upper in above {
      guard try !Dscow.same(upper, store) else {
        throw ImageError(.corrupt, "store \(store.name) is, through others, its own base")
      }
    }
    let decision = try FormatDecision.decide(statement, of: store, among: formats)
    guard decision.kind != .raw else { return store }
    let opened = try open(
      store, statement, How(formats: formats), above: above, depth: depth, resolve: resolve)
    return ImageStore(alone: opened.image, store: store, base: opened.base)
  }
}
