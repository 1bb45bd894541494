// SPDX-License-Identifier: Apache-2.0
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
    case .qcow:
      try options.checkAllUsed()
      try Qcow.create(store: store, size: image.size, base: image.base?.path)
    case .vmdk:
      let vmdk = try vmdkOptions(image, &options, name: store.name)
      try options.checkAllUsed()
      var extents: [any ByteStore] = []
      for name in vmdk.extentNames(size: image.size) { extents.append(try open(name)) }
      try Vmdk.create(store: store, size: image.size, options: vmdk, extents: extents)
    }
  }

  /// The options of a VMDK image; its extents are named after it.
  static func vmdkOptions(
    _ image: NewImage, _ options: inout ImageOptions, name: String
  ) throws(ImageError) -> VmdkOptions {
    var vmdk = VmdkOptions()
    let kinds = VmdkSubformat.allCases.map { ($0.rawValue, $0) }
    if let kind = try options.word("subformat", kinds) { vmdk.subformat = kind }
    if let adapter = options.take("adapter_type") { vmdk.adapter = adapter }
    vmdk.name = name.split(separator: "/").last.map(String.init) ?? name
    if let base = image.base {
      guard base.kind == .vmdk else {
        throw ImageError(
          .badRequest,
          "base \(base.path) is of format \(base.kind.rawValue): that of a vmdk "
            + "image has to be vmdk")
      }
      vmdk.base = (base.path, try Vmdk.contentID(of: base.file))
    }
    return vmdk
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
    if store.isBlockDevice {
      guard size <= store.size else {
        throw ImageError(
          .badRequest,
          "\(store.name) is a device of \(store.size) bytes, \(size) are needed: make it longer")
      }
    }
    try toolIO { () throws(IOError) in
      try store.resize(to: 0)
      try store.resize(to: size)
      switch much {
      case .off, .metadata:
        // Nothing there shall look like the image that the device held.
        if store.isBlockDevice { try store.zero(at: 0, count: min(512, store.size)) }
      case .falloc:
        // A device has its space, and keeps what it held.
        if store.isBlockDevice { try store.zero(at: 0, count: size) }
        try store.allocate(at: 0, count: size)
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
      guard base.kind == .vhd || base.kind == .raw else {
        throw ImageError(
          .badRequest,
          "base \(base.path) is of format \(base.kind.rawValue): that of a VHD image has to be "
            + "vpc or raw, since it can remember no other")
      }
      let none = [UInt8](repeating: 0, count: 16)
      let own = base.kind == .vhd ? try VhdHeader.read(from: base.file).uuid : none
      guard base.kind == .raw || own != none else {
        throw ImageError(
          .badRequest,
          "base \(base.path) has no identity, without which it would be taken for a raw disk: "
            + "convert it first")
      }
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
    case .qcow: return try Qcow.info(of: store)
    case .vhd: return try Vhd.info(of: store)
    case .vmdk: return try Vmdk.info(of: store)
    }
  }

  /// The internal snapshots of an image.
  static func snapshots(
    _ store: FileStore, _ kind: ImageKind
  ) throws(ImageError) -> [Qcow2Snapshot] {
    switch kind {
    case .qcow2: try Qcow2.snapshots(of: store)
    case .raw, .dscow, .vhd, .qcow, .vmdk: []
    }
  }

  /// Checks an image, and mends it as far as is asked; nil when the format has nothing to check.
  /// `untrusted`: no file that it names is opened.
  static func check(
    _ store: FileStore, _ decision: FormatDecision, repair: Repair?, untrusted: Bool
  ) throws(ImageError) -> CheckReport? {
    switch decision.kind {
    case .raw: return nil
    case .qcow2:
      guard let repair else { return try Qcow2.check(store: store) }
      return try Qcow2.repair(store: store, repair)
    case .dscow: return try Dscow.report(store: store, repair: repair)
    case .qcow:
      guard let repair else { return try Qcow.check(store: store) }
      return try Qcow.repair(store: store, repair)
    case .vhd:
      guard let repair else { return try Vhd.check(store: store) }
      return try Vhd.repair(store: store, repair)
    case .vmdk:
      let writing: Set<String> = repair == nil ? [] : [store.name]
      let extents = try LayerChain.files(
        of: store, decision, resolve: ImageSource.resolver(writing: writing, untrusted: untrusted))
      guard let repair else { return try Vmdk.check(store: store, extents: extents) }
      return try Vmdk.repair(store: store, extents: extents, repair)
    }
  }

  /// Gives a disk another length.
  static func resize(
    _ store: any ByteStore, _ decision: FormatDecision, baseKind: ImageKind? = nil,
    to size: UInt64, contentID: UInt32? = nil, resolve: ImageChain.Resolver
  ) throws(ImageError) {
    switch decision.kind {
    case .raw:
      guard (store as? FileStore)?.isBlockDevice != true else {
        throw ImageError(.unsupported, "\(store.name) is a device: resize it with its own tools")
      }
      try toolIO { () throws(IOError) in
        try store.resize(to: size)
        try store.flush()
      }
    case .dscow:
      let base = try LayerChain.below(
        store, decision, baseKind: baseKind, resolve: resolve)?.flat()
      try Dscow.resize(store: store, base: base, to: size)
    case .qcow, .qcow2, .vhd, .vmdk:
      let image = try ImageChain.open(
        store, kind: decision.isGuessed ? nil : decision.kind, baseKind: baseKind,
        writable: true, contentID: contentID, resolve: resolve)
      switch image {
      case let image as Qcow2: try image.resize(to: size)
      case let image as Qcow: try image.resize(to: size)
      case let image as Vhd: try image.resize(to: size)
      case let image as Vmdk: try image.resize(to: size)
      default: preconditionFailure("an image of another kind than was opened")
      }
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
    case .raw, .vhd, .qcow, .vmdk:
      guard !keep else { return }
      throw ImageError(
        .unsupported,
        "\(store.name): a \(kind.rawValue) image cannot be emptied: commit it with -d")
    }
  }

  /// Throws `unsupported` for an image with internal snapshots: what they have not of their own
  /// they show of the base.
  static func refuseSnapshots(
    _ store: any ByteStore, _ kind: ImageKind, _ what: String
  ) throws(ImageError) {
    guard kind == .qcow2, try !Qcow2.snapshots(of: store).isEmpty else { return }
    throw ImageError(
      .unsupported,
      "\(store.name) has internal snapshots, which would show something else were it \(what): "
        + "delete them with qemu-img snapshot -d, or convert it")
  }

  /// The base is about to be written.
  static func beginCommit(
    _ store: any ByteStore, _ kind: ImageKind, base: any ByteStore
  ) throws(ImageError) {
    if kind == .dscow { try Dscow.beginCommit(of: store, base: base) }
  }

  /// Nothing of the base was written.
  static func cancelCommit(_ store: any ByteStore, _ kind: ImageKind) throws(ImageError) {
    if kind == .dscow { try Dscow.cancelCommit(of: store) }
  }

  /// What the base shall bear so that this image knows it again when its commit is broken off.
  static func nextContentID(
    of base: any ByteStore, for store: any ByteStore, _ kind: ImageKind
  ) throws(ImageError) -> UInt32? {
    kind == .vmdk ? try Vmdk.beginCommit(of: store, into: base) : nil
  }

  /// The base, open for writing, tells so in a way that images over it notice: this one goes on.
  static func adopt(
    base: any ByteStore, of store: any ByteStore, _ kind: ImageKind
  ) throws(ImageError) {
    if kind == .vmdk { try Vmdk.adopt(base: base, of: store) }
  }

  /// The base has everything, durably: empties the image, unless `keep`.
  static func endCommit(
    _ store: any ByteStore, _ kind: ImageKind, files: [any ByteStore], base: any ByteStore,
    keep: Bool
  ) throws(ImageError) {
    switch kind {
    case .raw, .vhd, .qcow, .vmdk: return
    case .dscow: try Dscow.endCommit(of: store, base: base, emptying: !keep)
    case .qcow2:
      guard !keep else { return }
      try Qcow2.open(store: store, base: base, dataFile: files.first, writable: true).empty()
    }
  }

  /// Throws `unsupported` when an image cannot name another base.
  static func checkRebase(_ store: any ByteStore, _ kind: ImageKind) throws(ImageError) {
    switch kind {
    case .dscow, .qcow2: return
    case .raw, .vhd, .qcow, .vmdk:
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
    case .raw, .vhd, .qcow, .vmdk: try checkRebase(store, kind)
    }
  }
}
