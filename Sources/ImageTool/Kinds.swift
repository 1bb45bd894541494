// What differs from format to format, in one place: making, describing, checking and resizing
// an image, and the words for what a format cannot do.

import Glibc
import ImageFormats
import Posix

/// An image that shall be made.
struct NewImage {
  var kind: ImageKind
  /// Length of the disk in bytes.
  var size: UInt64
  /// The base's path as the image shall say it, its kind, its file, and the disk in that.
  var base: (path: String, kind: ImageKind, file: any ByteStore, disk: any ByteStore)?
  var options: ImageOptions
}

/// The formats side by side.
enum Kinds {
  /// Makes an image in a store, whatever that holds. `open` makes other files that it needs.
  static func create(
    _ image: NewImage, in store: FileStore, dataFile open: (String) throws(ImageError) -> FileStore
  ) throws(ImageError) {
    var options = image.options
    switch image.kind {
    case .raw:
      let much = try options.preallocation() ?? .off
      try options.checkAllUsed()
      try refuseBase(image)
      try createRaw(store, image.size, much)
    case .qcow2:
      var qcow2 = try options.qcow2()
      try options.checkAllUsed()
      qcow2.base = image.base.map { ($0.path, $0.kind.rawValue) }
      let data = try qcow2.dataFile.map { path throws(ImageError) in try open(path) }
      try Qcow2.create(store: store, size: image.size, options: qcow2, dataFile: data)
    case .dscow:
      let blockSize = try options.bytes("block_size") ?? UInt64(Dscow.defaultBlockSize)
      try options.checkAllUsed()
      try Dscow.create(
        store: store, base: image.base?.disk, baseName: image.base?.path ?? "",
        blockSize: UInt32(clamping: blockSize), size: image.size, overwrite: true)
    case .vhd:
      let kinds: [(String, VhdKind)] = [("dynamic", .dynamic), ("fixed", .fixed)]
      let kind = try options.word("subformat", kinds) ?? .dynamic
      let blockSize = try options.bytes("block_size") ?? 2 << 20
      try options.checkAllUsed()
      try createVhd(image, in: store, kind, blockSize)
    }
  }

  private static func refuseBase(_ image: NewImage) throws(ImageError) {
    guard image.base == nil else {
      throw ImageError(
        .badRequest, "a \(image.kind.rawValue) image has no base: use qcow2, dscow or vpc")
    }
  }

  private static func createRaw(
    _ store: FileStore, _ size: UInt64, _ much: Preallocation
  ) throws(ImageError) {
    guard much != .metadata else {
      throw ImageError(
        .badRequest, "preallocation=metadata: a raw image has none: use off, falloc or full")
    }
    try toolIO { () throws(IOError) in
      try store.resize(to: 0)
      try store.resize(to: size)
      switch much {
      case .off, .metadata:
        if store.isBlockDevice { return }
      case .falloc: try store.allocate(at: 0, count: size)
      case .full:
        let zeroes = [UInt8](repeating: 0, count: 1 << 20)
        var offset: UInt64 = 0
        while offset < size {
          let count = Int(min(UInt64(zeroes.count), size - offset))
          try store.write([UInt8](zeroes[..<count]), at: offset)
          offset += UInt64(count)
        }
      }
    }
  }

  private static func createVhd(
    _ image: NewImage, in store: FileStore, _ kind: VhdKind, _ blockSize: UInt64
  ) throws(ImageError) {
    var random = SystemRandomNumberGenerator()
    let uuid = (0..<16).map { _ in UInt8.random(in: 0...255, using: &random) }
    var parent: (path: String, uuid: [UInt8])?
    if let base = image.base {
      guard kind == .dynamic else {
        throw ImageError(.badRequest, "subformat=fixed: a fixed image has no base")
      }
      let none = [UInt8](repeating: 0, count: 16)
      let own = base.kind == .vhd ? try VhdHeader.read(from: base.file).uuid : none
      parent = (base.path, own)
    }
    // Seconds since the year 2000. Source: the VHD specification, "Timestamp".
    let seconds = UInt32(clamping: max(0, time(nil) - 946_684_800))
    try Vhd.create(
      store: store, size: image.size, kind: parent == nil ? kind : .differencing,
      blockSize: blockSize, uuid: uuid, timestamp: seconds, base: parent)
  }

  /// What there is to say of an image.
  static func info(_ store: FileStore, _ kind: ImageKind) throws(ImageError) -> ImageInfo {
    switch kind {
    case .raw:
      return ImageInfo(
        format: kind.rawValue, size: (store.size + 511) / 512 * 512, clusterSize: 0,
        basePath: nil, baseFormat: nil, details: [])
    case .qcow2: return try Qcow2.info(of: store)
    case .dscow:
      let (header, copies) = try Dscow.header(of: store)
      let allocated = try Dscow.countBits(store, header)
      var details = [
        ("first block", "\(header.firstBlock)"), ("blocks", "\(header.blocks)"),
        ("allocated blocks", "\(allocated)"), ("header copies", DscowTool.describe(copies)),
      ]
      if header.isCommitting { details.append(("commit", "under way: commit it again")) }
      return ImageInfo(
        format: kind.rawValue, size: header.size, clusterSize: UInt64(header.blockSize),
        basePath: header.base?.path, baseFormat: nil, details: details)
    case .vhd:
      let header = try VhdHeader.read(from: store)
      return ImageInfo(
        format: kind.rawValue, size: header.size,
        clusterSize: header.kind == .fixed ? 0 : header.tableBlock, basePath: header.basePath,
        baseFormat: nil, details: [("subformat", "\(header.kind)")])
    }
  }

  /// The internal snapshots of an image.
  static func snapshots(
    _ store: FileStore, _ kind: ImageKind
  ) throws(ImageError) -> [Qcow2Snapshot] {
    switch kind {
    case .qcow2: try Qcow2.snapshots(of: store)
    case .raw, .dscow, .vhd: []
    }
  }

  /// Checks an image, and mends it as far as is asked; nil when the format has nothing to check.
  static func check(
    _ store: FileStore, _ kind: ImageKind, repair: Repair?
  ) throws(ImageError) -> CheckReport? {
    switch kind {
    case .raw: return nil
    case .qcow2:
      guard let repair else { return try Qcow2.check(store: store) }
      return try Qcow2.repair(store: store, repair)
    case .dscow: return try Dscow.report(store: store, repair: repair)
    case .vhd:
      guard repair == nil else {
        throw ImageError(
          .unsupported, "\(store.name): a vpc image cannot be repaired: convert what can be read")
      }
      return try Vhd.check(store: store)
    }
  }

  /// Gives a disk another length.
  static func resize(
    _ store: any ByteStore, _ kind: ImageKind, to size: UInt64,
    resolve: ImageChain.Resolver = ImageSource.resolver(writableData: true)
  ) throws(ImageError) {
    func base() throws(ImageError) -> (any ByteStore)? {
      try LayerChain.below(store, kind: kind, resolve: resolve)?.flat()
    }
    switch kind {
    case .raw:
      guard (store as? FileStore)?.isBlockDevice != true else {
        throw ImageError(.unsupported, "\(store.name) is a device: resize it with its own tools")
      }
      try toolIO { () throws(IOError) in
        try store.resize(to: size)
        try store.flush()
      }
    case .dscow: try Dscow.resize(store: store, base: try base(), to: size)
    case .qcow2:
      let names = try ImageLayer.names(in: store, kind: kind)
      let data = try LayerChain.dataFile(of: store, names, resolve)
      try Qcow2.open(store: store, base: try base(), dataFile: data, writable: true)
        .resize(to: size)
    case .vhd:
      throw ImageError(
        .unsupported, "\(store.name): a vpc image cannot be resized: convert it to another format")
    }
  }
}

/// Runs system calls, turning their error into one of images.
func toolIO<Result>(_ body: () throws(IOError) -> Result) throws(ImageError) -> Result {
  do throws(IOError) { return try body() } catch { throw ImageError(error) }
}

// MARK: Bases

extension Kinds {
  /// Throws `unsupported` when an image cannot give up what it has.
  static func checkCommit(
    _ store: any ByteStore, _ kind: ImageKind, keep: Bool
  ) throws(ImageError) {
    switch kind {
    case .dscow, .qcow2: return
    case .raw, .vhd:
      guard !keep else { return }
      throw ImageError(
        .unsupported,
        "\(store.name): a \(kind.rawValue) image cannot be emptied: commit it with -d")
    }
  }

  /// The base is about to be written.
  static func beginCommit(_ store: any ByteStore, _ kind: ImageKind) throws(ImageError) {
    if kind == .dscow { try Dscow.beginCommit(of: store) }
  }

  /// The base has everything, durably: empties the image, unless `keep`.
  static func endCommit(
    _ store: any ByteStore, _ kind: ImageKind, dataFile: (any ByteStore)?, base: any ByteStore,
    keep: Bool
  ) throws(ImageError) {
    switch kind {
    case .raw, .vhd: return
    case .dscow: try Dscow.endCommit(of: store, base: base, emptying: !keep)
    case .qcow2:
      guard !keep else { return }
      try Qcow2.open(store: store, base: base, dataFile: dataFile, writable: true).empty()
    }
  }

  /// Throws `unsupported` when an image cannot name another base.
  static func checkRebase(_ store: any ByteStore, _ kind: ImageKind) throws(ImageError) {
    switch kind {
    case .dscow, .qcow2: return
    case .raw, .vhd:
      throw ImageError(
        .unsupported,
        "\(store.name): a \(kind.rawValue) image cannot be given another base: convert it with -B")
    }
  }

  /// Has an image name another base, or none.
  static func rename(
    base: (path: String, kind: ImageKind, disk: any ByteStore)?, of store: any ByteStore,
    _ kind: ImageKind, format: String?
  ) throws(ImageError) {
    switch kind {
    case .dscow: try Dscow.rename(base: base?.disk, path: base?.path, of: store)
    case .qcow2:
      try Qcow2.rename(base: base.map { ($0.path, format ?? $0.kind.rawValue) }, of: store)
    case .raw, .vhd: try checkRebase(store, kind)
    }
  }
}
