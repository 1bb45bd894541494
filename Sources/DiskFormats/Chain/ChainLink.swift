// SPDX-License-Identifier: Apache-2.0
// One image of a chain that has been found: its header is read and the files with its data are
// open; what is under it is not looked at.

package import BlockIO
import Glibc
import SystemIO

/// A path that stands in an image.
package struct NamedFile: Sendable, Equatable {
  /// What a file is to an image.
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

/// An image, found by its store, and not open as an image yet.
package struct ChainLink {
  /// The file or device.
  package let store: any ByteStore
  /// Which format it has, and whether somebody said so.
  package let decision: FormatDecision
  /// What its header says of other files.
  package let names: ImageNames
  /// The files that hold its data where that is not the store, in the order of `names.files`.
  package let files: [any ByteStore]
  /// Its format.
  package var kind: ImageKind { decision.kind }

  /// Reads the header of an image and opens the files with its data. No extent may be the image,
  /// one of the stores `above`, or another extent.
  ///
  /// - Throws: what the format throws of the header; `baseMissing`, `corrupt`; `unsupported` for
  ///   an image that may name no file; what `resolve` throws.
  package init(
    _ store: any ByteStore, _ decision: FormatDecision, above: [any ByteStore] = [],
    resolve: Chain.Resolver
  ) throws(ImageError) {
    self.store = store
    self.decision = decision
    names = try decision.kind.format.names(in: store)
    var files: [any ByteStore] = []
    for named in names.files {
      guard let path = named.path else {
        throw ImageError(.baseMissing, "store \(store.name) does not name its data file")
      }
      try decision.checkMayName(path, store)
      let file = try resolve(NamedFile(role: named.role, path: path, from: store.name))
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
    self.files = files
  }

  /// Opens the base that the image names, by the first of its paths that leads somewhere; nil
  /// when it names none.
  func openBase(_ resolve: Chain.Resolver) throws(ImageError) -> (any ByteStore)? {
    guard let first = names.base else { return nil }
    try decision.checkMayName(first, store)
    var failure: ImageError?
    for path in [first] + names.otherBases {
      do throws(ImageError) {
        return try resolve(NamedFile(role: .base, path: path, from: store.name))
      } catch {
        // The first one is the one to be told of.
        guard error.cause?.code == ENOENT else { throw failure ?? error }
        failure = failure ?? error
      }
    }
    throw failure ?? ImageError(.baseMissing, "store \(store.name) names no base")
  }

  /// What the image is opened with, over the disk of its base.
  package func parts(over base: (any ByteStore)?) -> ImageParts {
    var parts = ImageParts(store)
    parts.files = files
    parts.base = base
    return parts
  }

  /// Opens the image by itself.
  ///
  /// - Parameters:
  ///   - below: the disk under it, for what the image does by sectors, and to be known again.
  ///   - snapshot: the internal snapshot to open instead of the disk, by id or name.
  /// - Throws: what the format throws; `baseChanged` where the image can tell.
  package func layer(
    over below: (any ByteStore)?, writable: Bool = false, snapshot: String? = nil
  ) throws(ImageError) -> ImageLayer {
    var parts = parts(over: below)
    parts.writable = writable
    parts.snapshot = snapshot
    return try ImageLayer(parts, kind: kind)
  }
}
