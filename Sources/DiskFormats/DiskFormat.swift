// SPDX-License-Identifier: Apache-2.0
// What an image format is. Everything that has to tell one format from another looks it up in the
// list `FormatList` and asks it; nothing else switches over formats.
//
// A format is a type without values: a folder here, with a type that conforms to `DiskFormat`, and
// a line in the list. Required are a name, a description of an image, and a way to open one.
// Everything else is a capability that a format has only if it says so: what it leaves out is
// refused, in words that are the same for all formats. So a format that is only read is one file.
//
// An image that is open is an `ImageFormat`. The path of a request goes to that alone: nothing in
// this file is asked once a disk is served.

package import BlockIO

/// A format of disk images.
package protocol DiskFormat: SendableMetatype {
  // MARK: Names

  /// The name that images and `qemu-img` give it.
  static var name: String { get }
  /// The name that specs give it, where that is another. Commands take both.
  static var specName: String { get }
  /// The words by which an image may say that its base has this format.
  static var baseWords: [String] { get }
  /// How a person makes a store of it, where there is none, as the end of a sentence.
  static func howToMake(_ path: String) -> String

  // MARK: Probing

  /// Whether the first bytes of a store, 32 KiB and more, are those of an image.
  static func isBeginning(_ bytes: [UInt8]) -> Bool
  /// Whether a store that begins like no image is one by what stands elsewhere in it.
  ///
  /// - Throws: `corrupt` for an image whose mark is damaged; `io`.
  static func isImage(_ store: any ByteStore) throws(ImageError) -> Bool

  // MARK: Headers

  /// What the header of an image says of other files.
  ///
  /// - Throws: `notThisFormat`, `unsupported`, `corrupt`, `io`.
  static func names(in store: any ByteStore) throws(ImageError) -> ImageNames
  /// An image in words, without its base and files. Throws as `names`.
  static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo
  /// The internal snapshots of an image. Throws as `names`.
  static func snapshots(of store: any ByteStore) throws(ImageError) -> [Qcow2Snapshot]

  // MARK: Opening

  /// Whether images can be opened for writing.
  static var canWrite: Bool { get }
  /// Opens an image as a disk. Is not asked for writing without `canWrite`.
  ///
  /// - Throws: as `names`; `baseMissing`, `baseChanged`, `badRequest`.
  static func open(_ parts: ImageParts) throws(ImageError) -> any ImageFormat
  /// Opens an image over `under` whatever it says of a base: an extent in device 1 is then one
  /// that the image does not have. `parts.base` is what is below, to be known again.
  static func open(
    alone parts: ImageParts, over under: any ByteStore
  ) throws(ImageError) -> any ImageFormat

  // MARK: Making

  /// The options that a new image may be given, beside those that all formats have.
  static var options: [ImageOptions.Known] { get }
  /// Whether a base is named by its path from the root on, since others than the person who
  /// makes the image open it.
  static var wantsAbsoluteBase: Bool { get }
  /// Whether the clusters of a new image can be compressed.
  static var canCompress: Bool { get }
  /// Makes an image in a store, whatever that holds. `open` makes other files that it needs, by
  /// paths from the image's folder.
  static func create(
    _ image: NewImage, in store: FileStore, open: (String) throws(ImageError) -> FileStore
  ) throws(ImageError)
  /// Whether a worker makes stores for new disks.
  static var makesStores: Bool { get }
  /// Makes a store for a new disk; one that holds something else is refused.
  static func make(_ new: NewStore) throws(ImageError)

  // MARK: Maintenance

  /// Whether a check looks into the files of `ImageNames.files`.
  static var checksFiles: Bool { get }
  /// Checks an image, and mends it as far as is asked; nil when there is nothing to check.
  static func check(
    _ store: any ByteStore, files: [any ByteStore], repair: Repair?
  ) throws(ImageError) -> CheckReport?
  /// Gives the disk of an image, opened with `parts` for writing, another length.
  static func resize(_ parts: ImageParts, to size: UInt64) throws(ImageError)

  // MARK: Bases

  /// Whether an image can name another base, or none.
  static var canRebase: Bool { get }
  /// Whether an image keeps nothing of its base but the name: a base that is not there yet can
  /// be named.
  static var keepsBaseNameOnly: Bool { get }
  /// Has an image name another base, or none.
  static func rename(base: NamedBase?, of store: any ByteStore) throws(ImageError)
  /// Whether an image can be emptied when its base has everything.
  static var canEmpty: Bool { get }
  /// The base is about to be written. `base` is the disk in it.
  static func beginCommit(of store: any ByteStore, into base: any ByteStore) throws(ImageError)
  /// Nothing of the base was written.
  static func cancelCommit(of store: any ByteStore) throws(ImageError)
  /// What the base, a file, shall bear so that this image knows it again when its commit is
  /// broken off; nil where nothing of it does.
  static func nextContentID(
    of base: any ByteStore, for store: any ByteStore
  ) throws(ImageError) -> UInt32?
  /// The base, a file that is open for writing, tells so in a way that images over it notice:
  /// this one goes on.
  static func adopt(base: any ByteStore, of store: any ByteStore) throws(ImageError)
  /// The base has everything, durably. `parts.base` is the disk in it. Empties the image if
  /// that is asked for, which it is not without `canEmpty`.
  static func endCommit(_ parts: ImageParts, emptying: Bool) throws(ImageError)
}

// MARK: - What a format is asked with

/// What an image's header says of other files.
package struct ImageNames: Sendable, Equatable {
  /// A file that holds data of the image.
  package struct File: Sendable, Equatable {
    /// What it is to the image.
    package var role: NamedFile.Role
    /// Its path, as it stands in the header; nil when the header leaves it out.
    package var path: String?
    /// Whether others like it may be the same file.
    package var isShared = false
  }

  /// The base's path, as it stands there.
  package var base: String?
  /// Other paths of it, in the order in which they are tried.
  package var otherBases: [String] = []
  /// The base's format by name.
  package var baseFormat: String?
  /// The files that hold the image's data where that is not the store, in the disk's order.
  package var files: [File] = []

  /// Names of nothing, or of a base.
  package init(base: String? = nil, baseFormat: String? = nil) {
    self.base = base
    self.baseFormat = baseFormat
  }
}

/// What an image is opened with.
package struct ImageParts {
  /// The file or device.
  package var store: any ByteStore
  /// The files of `ImageNames.files`, in that order.
  package var files: [any ByteStore] = []
  /// The disk under the image, when the header names a base.
  package var base: (any ByteStore)?
  /// Whether it shall be written.
  package var writable = false
  /// Whether to take a base that has changed, where the format notices that.
  package var force = false
  /// The internal snapshot to open in place of the disk, by id or name.
  package var snapshot: String?
  /// What the image shall bear instead of a random number, where opening it for writing renews
  /// that (VMDK).
  package var contentID: UInt32?

  /// An image that lies in one store.
  package init(_ store: any ByteStore) { self.store = store }
}

/// A base as an image shall name it.
package struct NamedBase {
  /// Its path.
  package var path: String
  /// Its format by name, where the image says that; nil for none.
  package var format: String?
  /// The disk in it; nil where only the name is there yet.
  package var disk: (any ByteStore)?

  /// A base from its parts.
  package init(path: String, format: String?, disk: (any ByteStore)? = nil) {
    self.path = path
    self.format = format
    self.disk = disk
  }
}

/// A store that a worker shall make.
package struct NewStore {
  /// The file or device.
  package var store: any ByteStore
  /// The base's path, as the store shall say it.
  package var basePath: String
  /// The base's file.
  package var baseFile: any ByteStore
  /// The base's format, if that was stated.
  package var baseKind: ImageKind?
  /// The disk in the base.
  package var base: any ByteStore
  /// Bytes of a block; nil: the format's own choice.
  package var blockSize: UInt32?

  /// A store from its parts.
  package init(
    _ store: any ByteStore, basePath: String, baseFile: any ByteStore, baseKind: ImageKind?,
    base: any ByteStore, blockSize: UInt32?
  ) {
    self.store = store
    self.basePath = basePath
    self.baseFile = baseFile
    self.baseKind = baseKind
    self.base = base
    self.blockSize = blockSize
  }
}

// MARK: - What a format need not say

extension DiskFormat {
  /// As images name it.
  package static var specName: String { name }
  /// Its name.
  package static var baseWords: [String] { [name] }
  /// By QEMU's tool, which is what people have.
  package static func howToMake(_ path: String) -> String {
    "make it with 'qemu-img create -f \(name)'"
  }

  /// It is not known by its first bytes.
  package static func isBeginning(_ bytes: [UInt8]) -> Bool { false }
  /// It is not known by anything else.
  package static func isImage(_ store: any ByteStore) throws(ImageError) -> Bool { false }

  /// It names no files.
  package static func names(in store: any ByteStore) throws(ImageError) -> ImageNames {
    ImageNames()
  }
  /// It has none.
  package static func snapshots(
    of store: any ByteStore
  ) throws(ImageError) -> [Qcow2Snapshot] { [] }

  /// It is only read.
  package static var canWrite: Bool { false }
  /// As a disk: an image without a base has nothing to leave to one.
  package static func open(
    alone parts: ImageParts, over under: any ByteStore
  ) throws(ImageError) -> any ImageFormat { try open(parts) }

  /// It has none.
  package static var options: [ImageOptions.Known] { [] }
  /// As the person who makes the image names it.
  package static var wantsAbsoluteBase: Bool { false }
  /// They cannot.
  package static var canCompress: Bool { false }
  /// Throws `unsupported`.
  package static func create(
    _ image: NewImage, in store: FileStore, open: (String) throws(ImageError) -> FileStore
  ) throws(ImageError) {
    throw ImageError(
      .unsupported, "\(store.name): images of format \(name) are not made here: choose another")
  }
  /// It makes none.
  package static var makesStores: Bool { false }
  /// Throws `badRequest`.
  package static func make(_ new: NewStore) throws(ImageError) {
    throw ImageError(
      .badRequest, "\(new.store.name): stores of format \(name) are not made here")
  }

  /// It does not.
  package static var checksFiles: Bool { false }
  /// There is nothing to check.
  package static func check(
    _ store: any ByteStore, files: [any ByteStore], repair: Repair?
  ) throws(ImageError) -> CheckReport? { nil }
  /// As the open image does it; throws `unsupported` where that cannot.
  package static func resize(_ parts: ImageParts, to size: UInt64) throws(ImageError) {
    try opened(parts).resize(to: size)
  }

  /// It cannot.
  package static var canRebase: Bool { false }
  /// It keeps more, or nothing.
  package static var keepsBaseNameOnly: Bool { false }
  /// Throws `unsupported`.
  package static func rename(
    base: NamedBase?, of store: any ByteStore
  ) throws(ImageError) { try checkCanRebase(store) }
  /// It cannot.
  package static var canEmpty: Bool { false }
  /// Nothing has to be noted.
  package static func beginCommit(
    of store: any ByteStore, into base: any ByteStore
  ) throws(ImageError) {}
  /// Nothing was noted.
  package static func cancelCommit(of store: any ByteStore) throws(ImageError) {}
  /// None.
  package static func nextContentID(
    of base: any ByteStore, for store: any ByteStore
  ) throws(ImageError) -> UInt32? { nil }
  /// It remembers nothing of the base that a write would change.
  package static func adopt(base: any ByteStore, of store: any ByteStore) throws(ImageError) {}
  /// It stays as it is.
  package static func endCommit(_ parts: ImageParts, emptying: Bool) throws(ImageError) {}
}

// MARK: - What is the same for all formats

extension DiskFormat {
  /// Opens an image as a disk, or over `under` alone. Throws `unsupported` for writing in a
  /// format that is only read, and what `open` throws.
  static func opened(
    _ parts: ImageParts, over under: (any ByteStore)? = nil
  ) throws(ImageError) -> any ImageFormat {
    guard canWrite || !parts.writable else {
      throw ImageError(
        .unsupported,
        "store \(parts.store.name): images of format \(name) can only be read here: convert it")
    }
    guard let under else { return try open(parts) }
    return try open(alone: parts, over: under)
  }

  /// Throws `unsupported` when an image cannot name another base.
  package static func checkCanRebase(_ store: any ByteStore) throws(ImageError) {
    guard !canRebase else { return }
    throw ImageError(
      .unsupported,
      "\(store.name): a \(name) image cannot be given another base: convert it with -B")
  }

  /// Throws `unsupported` when an image cannot give up what it has.
  package static func checkCanEmpty(_ store: any ByteStore) throws(ImageError) {
    guard !canEmpty else { return }
    throw ImageError(
      .unsupported, "\(store.name): a \(name) image cannot be emptied: commit it with -d")
  }

  /// Throws `unsupported` for an image with internal snapshots: what they have not of their own
  /// they show of the base. `what` would be done to it.
  package static func refuseSnapshots(
    _ store: any ByteStore, _ what: String
  ) throws(ImageError) {
    guard try !snapshots(of: store).isEmpty else { return }
    throw ImageError(
      .unsupported,
      "\(store.name) has internal snapshots, which would show something else were it \(what): "
        + "delete them with qemu-img snapshot -d, or convert it")
  }

  /// Whether an image has been made in a store, for one that may have been left half made.
  ///
  /// - Throws: as `names`, save for what is no image, or not a whole one.
  package static func isMade(_ store: any ByteStore) throws(ImageError) -> Bool {
    guard store.size > 0 else { return false }
    do throws(ImageError) {
      _ = try names(in: store)
      return true
    } catch {
      // Not made yet, or only in part: making refuses what is not its own.
      guard error.code == .notThisFormat || error.code == .corrupt else { throw error }
      return false
    }
  }
}
