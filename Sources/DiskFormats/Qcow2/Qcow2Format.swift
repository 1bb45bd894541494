// SPDX-License-Identifier: Apache-2.0
// qcow2 among the formats.

package import BlockIO
import SystemIO

extension ImageKind {
  /// Versions 2 and 3 of qcow.
  package static let qcow2 = ImageKind(Qcow2Format.self)
}

/// Versions 2 and 3 of qcow.
package enum Qcow2Format: DiskFormat {
  private static let switches = ["on", "off"]

  package static let name = "qcow2"
  package static let canWrite = true
  package static let options: [ImageOptions.Known] = [
    ("compat", ["v2", "v3"]), ("cluster_size", []), ("compression_type", ["zlib", "zstd"]),
    ("data_file", []), ("data_file_raw", switches), ("extended_l2", switches),
    ("lazy_refcounts", switches),
    ("preallocation", ["off", "metadata", "falloc", "full"]), ("refcount_bits", []),
  ]
  package static let canCompress = true
  package static let makesStores = true
  package static let canRebase = true
  package static let keepsBaseNameOnly = true
  package static let canEmpty = true

  package static func isBeginning(_ bytes: [UInt8]) -> Bool { Qcow2Header.isMagic(bytes) }

  package static func names(in store: any ByteStore) throws(ImageError) -> ImageNames {
    let header = try Qcow2Header.read(from: store)
    var names = ImageNames(base: header.basePath, baseFormat: header.baseFormat)
    if header.hasDataFile {
      names.files = [ImageNames.File(role: .dataFile, path: header.dataFilePath)]
    }
    return names
  }

  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    try Qcow2.info(of: store)
  }

  package static func snapshots(
    of store: any ByteStore
  ) throws(ImageError) -> [Qcow2Snapshot] { try Qcow2.snapshots(of: store) }

  package static func open(_ parts: ImageParts) throws(ImageError) -> any ImageFormat {
    try Qcow2.open(
      store: parts.store, base: parts.base, dataFile: parts.files.first,
      writable: parts.writable, snapshot: parts.snapshot)
  }

  package static func open(
    alone parts: ImageParts, over under: any ByteStore
  ) throws(ImageError) -> any ImageFormat {
    try Qcow2.open(
      alone: parts.store, over: under, dataFile: parts.files.first, writable: parts.writable,
      snapshot: parts.snapshot)
  }

  /// What a new image shall be like, by its options and its base. Throws `badRequest`.
  package static func options(of image: NewImage) throws(ImageError) -> Qcow2Options {
    var given = image.options
    var options = Qcow2Options()
    let versions: [(String, UInt32)] = [("0.10", 2), ("v2", 2), ("1.1", 3), ("v3", 3)]
    if let version = try given.word("compat", versions) { options.version = version }
    if let size = try given.bytes("cluster_size") { options.clusterSize = size }
    if let bits = try given.bytes("refcount_bits") { options.refcountBits = UInt32(clamping: bits) }
    if let lazy = try given.flag("lazy_refcounts") { options.lazyRefcounts = lazy }
    if let extended = try given.flag("extended_l2") { options.extendedL2 = extended }
    let kinds: [(String, Qcow2Compression)] = [("zlib", .zlib), ("zstd", .zstd)]
    if let type = try given.word("compression_type", kinds) { options.compression = type }
    if let much = try given.preallocation() { options.preallocation = much }
    options.dataFile = given.take("data_file")
    if let raw = try given.flag("data_file_raw") { options.dataFileRaw = raw }
    try given.checkAllUsed()
    options.base = image.base.map { ($0.path, $0.kind.name) }
    return options
  }

  package static func create(
    _ image: NewImage, in store: FileStore, open: (String) throws(ImageError) -> FileStore
  ) throws(ImageError) {
    let options = try options(of: image)
    let data = try options.dataFile.map { path throws(ImageError) in try open(path) }
    try Qcow2.create(store: store, size: image.size, options: options, dataFile: data)
  }

  package static func make(_ new: NewStore) throws(ImageError) {
    let store = new.store
    let head = try io { () throws(IOError) in try store.read(at: 0, count: 512) }
    guard head.allSatisfy({ $0 == 0 }) else {
      throw ImageError(.badRequest, "\(store.name) is not empty: choose another store")
    }
    var options = Qcow2Options()
    if let size = new.blockSize { options.clusterSize = UInt64(size) }
    // What is only guessed is not written down.
    let decision = try FormatDecision.decide(FormatStatement(new.baseKind), of: new.baseFile)
    guard !decision.isGuessed else {
      throw ImageError(
        .badRequest,
        "base \(new.basePath) begins like an image of format \(decision.kind), and nobody says "
          + "that it is one: give base-format=\(decision.kind), or base-format=raw")
    }
    options.base = (new.basePath, decision.kind.name)
    try Qcow2.create(store: store, size: new.base.size, options: options)
  }

  package static func check(
    _ store: any ByteStore, files: [any ByteStore], repair: Repair?
  ) throws(ImageError) -> CheckReport? {
    guard let repair else { return try Qcow2.check(store: store) }
    return try Qcow2.repair(store: store, repair)
  }

  package static func rename(
    base: NamedBase?, of store: any ByteStore
  ) throws(ImageError) { try Qcow2.rename(base: base.map { ($0.path, $0.format) }, of: store) }

  package static func endCommit(_ parts: ImageParts, emptying: Bool) throws(ImageError) {
    guard emptying else { return }
    try Qcow2.open(
      store: parts.store, base: parts.base, dataFile: parts.files.first, writable: true
    ).empty()
  }
}
