// SPDX-License-Identifier: Apache-2.0
// Opening an image with everything under it: its data file, its base, the base of that, and so
// on, of whatever formats. Paths that stand in images are not opened here: whoever calls is
// asked for each, and may refuse.

import Glibc
package import Posix

/// The formats that are built in, by the names that images and `qemu-img` give them.
package enum ImageKind: String, Sendable, CaseIterable {
  /// A file or device as it is.
  case raw
  /// The project's own.
  case dscow
  /// Version 1 of qcow.
  case qcow
  /// Versions 2 and 3 of qcow.
  case qcow2
  /// VHD, which QEMU calls vpc.
  case vhd = "vpc"
  /// VMware's.
  case vmdk

  /// The names by which a format may be given: the raw values, and `vhd` for `vpc`.
  package static var names: [String] { (allCases.map(\.rawValue) + ["vhd"]).sorted() }
}

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
  /// - Throws: what the formats throw; `corrupt` for a loop or too long a chain.
  package static func open(
    _ store: any ByteStore, kind: ImageKind? = nil, baseKind: ImageKind? = nil,
    writable: Bool, depth: Int = usualDepth, force: Bool = false, snapshot: String? = nil,
    contentID: UInt32? = nil, resolve: Resolver
  ) throws(ImageError) -> any ImageFormat {
    let how = How(
      writable: writable, force: force, snapshot: snapshot, contentID: contentID,
      baseKind: baseKind)
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
  }

  /// A base with everything under it as a flat byte store: what an image is made over.
  ///
  /// - Parameters:
  ///   - kind: its format; nil to look at its first bytes.
  ///   - store: the image above it.
  /// - Throws: as `open`.
  package static func base(
    _ base: any ByteStore, kind: ImageKind? = nil, of store: any ByteStore,
    depth: Int = usualDepth, resolve: Resolver
  ) throws(ImageError) -> any ByteStore {
    try flat(base, FormatStatement(kind), above: [store], depth: depth, resolve: resolve)
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
    let decision = try FormatDecision.decide(statement, of: store)
    let names = try ImageLayer.names(in: store, kind: decision.kind)
    func base() throws(ImageError) -> (any ByteStore)? {
      guard let below = try openBase(of: store, names, decision, resolve) else { return nil }
      return try flat(
        below, FormatStatement(how.baseKind, named: names.baseFormat), above: above + [store],
        depth: depth, resolve: resolve)
    }
    switch decision.kind {
    case .raw: return (try Raw(store: store, writable: how.writable), nil)
    case .dscow:
      let base = try base()
      return (
        try Dscow.open(store: store, base: base, writable: how.writable, force: how.force), base
      )
    case .qcow:
      let base = try base()
      return (try Qcow.open(store: store, base: base, writable: how.writable), base)
    case .vhd:
      let base = try base()
      return (try Vhd.open(store: store, base: base, writable: how.writable), base)
    case .vmdk:
      let layout = try VmdkLayout.read(from: store)
      let extents = try extents(of: store, layout, decision, above: above, resolve)
      let base = try base()
      let image = try Vmdk.open(
        store: store, extents: extents, base: base, writable: how.writable,
        contentID: how.contentID)
      return (image, base)
    case .qcow2:
      let data = try dataFile(of: store, names, decision, resolve)
      let base = try base()
      return (
        try Qcow2.open(
          store: store, base: base, dataFile: data, writable: how.writable,
          snapshot: how.snapshot),
        base
      )
    }
  }

  /// Opens the base that an image names, by the first of its paths that leads somewhere; nil
  /// when it names none.
  static func openBase(
    of store: any ByteStore, _ names: ImageLayer.Names, _ decision: FormatDecision,
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

  /// The files of a VMDK image's extents. None may be the image, one above it, or another
  /// extent.
  static func extents(
    of store: any ByteStore, _ layout: VmdkLayout, _ decision: FormatDecision,
    above: [any ByteStore], _ resolve: Resolver
  ) throws(ImageError) -> [any ByteStore] {
    var extents: [any ByteStore] = []
    var isFlat: [Bool] = []
    for line in layout.descriptor.extents where layout.header == nil && line.kind != .zero {
      try decision.checkMayName(line.path, store)
      let file = try resolve(Request(role: .extent, path: line.path, from: store.name))
      let flat = line.kind == .flat || line.kind == .vmfs
      for other in above + [store] {
        guard try !Dscow.same(other, file) else {
          throw ImageError(.corrupt, "store \(store.name): its extent \(line.path) is itself")
        }
      }
      // Flat extents may be parts of one file.
      for (other, otherIsFlat) in zip(extents, isFlat) where !(flat && otherIsFlat) {
        guard try !Dscow.same(other, file) else {
          throw ImageError(.corrupt, "store \(store.name): two extents are \(line.path)")
        }
      }
      extents.append(file)
      isFlat.append(flat)
    }
    return extents
  }

  static func dataFile(
    of store: any ByteStore, _ names: ImageLayer.Names, _ decision: FormatDecision,
    _ resolve: Resolver
  ) throws(ImageError) -> (any ByteStore)? {
    guard names.hasDataFile else { return nil }
    guard let path = names.dataFile else {
      throw ImageError(.baseMissing, "store \(store.name) does not name its data file")
    }
    try decision.checkMayName(path, store)
    return try resolve(Request(role: .dataFile, path: path, from: store.name))
  }

  /// A base as a flat byte store.
  private static func flat(
    _ store: any ByteStore, _ statement: FormatStatement, above: [any ByteStore], depth: Int,
    resolve: Resolver
  ) throws(ImageError) -> any ByteStore {
    for upper in above {
      guard try !Dscow.same(upper, store) else {
        throw ImageError(.corrupt, "store \(store.name) is, through others, its own base")
      }
    }
    guard try FormatDecision.decide(statement, of: store).kind != .raw else { return store }
    let opened = try open(store, statement, How(), above: above, depth: depth, resolve: resolve)
    return ImageStore(alone: opened.image, store: store, base: opened.base)
  }
}
