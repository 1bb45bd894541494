// Opening an image with everything under it: its data file, its base, the base of that, and so
// on, of whatever formats. Paths that stand in images are not opened here: whoever calls is
// asked for each, and may refuse.

public import Posix

/// The formats that are built in, by the names that images and `qemu-img` give them.
public enum ImageKind: String, Sendable, CaseIterable {
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

  /// What a store's first bytes say it is; `raw` for everything else.
  public static func probe(_ store: any ByteStore) throws(ImageError) -> ImageKind {
    let bytes = try io { () throws(IOError) in try store.read(at: 0, count: 8192) }
    if Qcow2Header.isMagic(bytes) { return .qcow2 }
    if QcowHeader.isMagic(bytes) { return .qcow }
    if VmdkLayout.isMagic(bytes) { return .vmdk }
    let size = DscowHeader.copySize
    do throws(ImageError) {
      _ = try DscowHeader.choose(
        [UInt8](bytes[..<size]), [UInt8](bytes[size...]), writable: false)
      return .dscow
    } catch {
      guard error.code == .notThisFormat else { return .dscow }
    }
    return try VhdHeader.footer(of: store) == nil ? .raw : .vhd
  }
}

/// Opens images with what is under them.
public enum ImageChain {
  /// A path that stands in an image.
  public struct Request: Sendable, Equatable {
    /// What it is for.
    public enum Role: String, Sendable {
      /// The image under the image.
      case base
      /// The file that holds the image's data.
      case dataFile = "data-file"
      /// A file that holds a part of the image's data.
      case extent
    }
    /// What it is for.
    public var role: Role
    /// The path as it stands in the image; a relative one is meant from the image's folder.
    public var path: String
    /// The store that names it.
    public var from: String
    /// Whether the image that names it is one only by the look of its first bytes: nobody
    /// said so, and a guest that had it as a raw disk could have written them. Whoever
    /// answers should refuse.
    public var isGuessed = false
  }

  /// Answers requests for paths.
  public typealias Resolver = (Request) throws(ImageError) -> any ByteStore

  /// So many images in a row unless asked otherwise.
  public static let usualDepth = 32

  /// Opens an image and everything under it.
  ///
  /// - Parameters:
  ///   - kind: the format; nil to look at the first bytes, which is not safe for a store that
  ///     a guest could write as a raw disk.
  ///   - baseKind: the format of the image's base, whatever the image says of it.
  ///   - depth: how many images there may be in a row.
  ///   - force: take a base that has changed, where the format notices that.
  ///   - resolve: opens paths for reading (a data file of a writable image: for writing).
  /// - Throws: what the formats throw; `corrupt` for a loop or too long a chain.
  public static func open(
    _ store: any ByteStore, kind: ImageKind? = nil, baseKind: ImageKind? = nil,
    writable: Bool, depth: Int = usualDepth, force: Bool = false, snapshot: String? = nil,
    resolve: Resolver
  ) throws(ImageError) -> any ImageFormat {
    try open(
      store, kind, baseKind, writable: writable, force: force, snapshot: snapshot, above: [],
      depth: depth, resolve: resolve
    ).image
  }

  /// A base with everything under it as a flat byte store: what an image is made over.
  ///
  /// - Parameters:
  ///   - kind: its format; nil to look at its first bytes.
  ///   - store: the image above it.
  /// - Throws: as `open`.
  public static func base(
    _ base: any ByteStore, kind: ImageKind? = nil, of store: any ByteStore,
    depth: Int = usualDepth, resolve: Resolver
  ) throws(ImageError) -> any ByteStore {
    try flat(base, kind?.rawValue, above: [store], depth: depth, resolve: resolve)
  }

  /// An image that is open, and the base it was opened with.
  private typealias Opened = (image: any ImageFormat, base: (any ByteStore)?)

  private static func open(
    _ store: any ByteStore, _ kind: ImageKind?, _ baseKind: ImageKind?, writable: Bool,
    force: Bool, snapshot: String?, above: [any ByteStore], depth: Int, resolve: Resolver
  ) throws(ImageError) -> Opened {
    guard above.count < depth else {
      throw ImageError(
        .unsupported, "more than \(depth) images in a row, down to \(store.name): merge some")
    }
    func base(
      _ path: String?, _ format: String?, identity: [UInt8]? = nil
    ) throws(ImageError) -> (any ByteStore)? {
      guard let path else { return nil }
      let below = try resolve(Request(role: .base, path: path, from: store.name))
      return try flat(
        below, baseKind?.rawValue ?? format, identity: identity, above: above + [store],
        depth: depth, resolve: resolve)
    }
    let known: ImageKind
    if let kind { known = kind } else { known = try .probe(store) }
    switch known {
    case .raw: return (try Raw(store: store, writable: writable), nil)
    case .dscow:
      let header = try Dscow.header(of: store).header
      let base = try base(header.base?.path, nil)
      return (try Dscow.open(store: store, base: base, writable: writable, force: force), base)
    case .qcow:
      let base = try base(try QcowHeader.read(from: store).basePath, nil)
      return (try Qcow.open(store: store, base: base, writable: writable), base)
    case .vhd:
      let header = try VhdHeader.read(from: store)
      let base = try base(header.basePath, nil, identity: header.baseUUID)
      return (try Vhd.open(store: store, base: base, writable: writable), base)
    case .vmdk:
      let layout = try VmdkLayout.read(from: store)
      let extents = try extents(of: store, layout, above: above, resolve)
      let base = try base(layout.descriptor.basePath, ImageKind.vmdk.rawValue)
      let image = try Vmdk.open(store: store, extents: extents, base: base, writable: writable)
      return (image, base)
    case .qcow2:
      let header = try Qcow2Header.read(from: store)
      let data = try dataFile(store, header, resolve)
      let base = try base(header.basePath, header.baseFormat)
      return (
        try Qcow2.open(
          store: store, base: base, dataFile: data, writable: writable, snapshot: snapshot),
        base
      )
    }
  }

  /// The files of a VMDK image's extents. None may be the image, one above it, or another
  /// extent.
  static func extents(
    of store: any ByteStore, _ layout: VmdkLayout, above: [any ByteStore], _ resolve: Resolver
  ) throws(ImageError) -> [any ByteStore] {
    var extents: [any ByteStore] = []
    var isFlat: [Bool] = []
    for line in layout.descriptor.extents where layout.header == nil && line.kind != .zero {
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

  private static func dataFile(
    _ store: any ByteStore, _ header: Qcow2Header, _ resolve: Resolver
  ) throws(ImageError) -> (any ByteStore)? {
    guard header.hasDataFile else { return nil }
    guard let path = header.dataFilePath else {
      throw ImageError(.baseMissing, "store \(store.name) does not name its data file")
    }
    return try resolve(Request(role: .dataFile, path: path, from: store.name))
  }

  /// A base as a flat byte store. `identity` is what a VHD must bear to be known for certain.
  private static func flat(
    _ store: any ByteStore, _ format: String?, identity: [UInt8]? = nil,
    above: [any ByteStore], depth: Int, resolve: Resolver
  ) throws(ImageError) -> any ByteStore {
    for upper in above {
      guard try !Dscow.same(upper, store) else {
        throw ImageError(.corrupt, "store \(store.name) is, through others, its own base")
      }
    }
    let known = try kind(named: format, of: store)
    guard known != .raw else { return store }
    var isGuessed = format == nil
    if isGuessed, known == .vhd, let identity, identity.contains(where: { $0 != 0 }) {
      isGuessed = try VhdHeader.read(from: store).uuid != identity
    }
    let opened = try open(
      store, known, nil, writable: false, force: false, snapshot: nil, above: above,
      depth: depth
    ) { request throws(ImageError) in
      var request = request
      request.isGuessed = request.isGuessed || isGuessed
      return try resolve(request)
    }
    return ImageStore(alone: opened.image, store: store, base: opened.base)
  }

  /// The kind of a base by the name that an image gives it, or else by its first bytes.
  ///
  /// - Throws: `unsupported` for a name that is not known; `io`.
  public static func kind(
    named format: String?, of store: any ByteStore
  ) throws(ImageError) -> ImageKind {
    guard let format else { return try .probe(store) }
    // What only says where the bytes come from is raw.
    if format == "file" || format == "host_device" { return .raw }
    guard let kind = ImageKind(rawValue: format) else {
      throw ImageError(.unsupported, "base \(store.name) is of format '\(format)'")
    }
    return kind
  }
}
