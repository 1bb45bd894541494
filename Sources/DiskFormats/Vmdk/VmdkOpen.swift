// SPDX-License-Identifier: Apache-2.0
// Opening a VMDK image: its extents become devices and tables of grains.

package import BlockIO
import SystemIO

/// The extents of an image, open, and how the disk is cut into blocks.
struct VmdkParts {
  let layout: VmdkLayout
  let store: any ByteStore
  /// Every file with a part of the disk in it.
  let stores: [any ByteStore]
  private(set) var primary: any ByteStore
  /// Devices from number 2 on.
  private(set) var own: [any ByteStore] = []
  private(set) var pieces: [Vmdk.Piece] = []
  private(set) var sparse: [Vmdk.Sparse] = []
  /// Length of a block in sectors.
  private(set) var blockSectors: UInt64 = 128

  init(
    _ store: any ByteStore, _ layout: VmdkLayout, _ extents: [any ByteStore]
  ) throws(ImageError) {
    self.store = store
    self.layout = layout
    stores = layout.header == nil ? extents : [store]
    guard stores.count == max(layout.extentPaths.count, layout.header == nil ? 0 : 1) else {
      throw ImageError(
        .badRequest,
        "store \(store.name) has \(layout.extentPaths.count) extents with files, "
          + "and \(extents.count) were given")
    }
    primary = stores.first ?? store
    try addPieces()
    try choosePrimary()
    try cut()
  }

  /// One piece for each extent, in which numbers are still those of `stores`.
  private mutating func addPieces() throws(ImageError) {
    var start: UInt64 = 0
    var number = 0
    for line in layout.descriptor.extents {
      let sectors = layout.header?.capacity ?? line.sectors
      var piece = Vmdk.Piece(
        sectors: start..<(start + sectors), kind: .zero, isWritable: line.isWritable)
      start += sectors
      switch line.kind {
      case .zero: break
      case .flat, .vmfs:
        piece.kind = .flat(device: UInt16(number), sector: line.offset)
        number += 1
      case .sparse, .vmfsSparse:
        let file = stores[number]
        let header: VmdkHeader
        if let own = layout.header { header = own } else { header = try .read(from: file) }
        guard header.capacity >= sectors else {
          throw ImageError(
            .corrupt,
            "store \(file.name): its capacity is \(header.capacity) sectors, and the "
              + "descriptor gives it \(sectors)")
        }
        piece.kind = .sparse(sparse.count)
        guard header.directoryOffset * 512 + header.tables * 4 <= file.size else {
          throw ImageError(
            .corrupt,
            "store \(file.name): cut short: its \(file.size) bytes end before its grain directory")
        }
        sparse.append(
          Vmdk.Sparse(
            header: header, store: file, base: 0, device: UInt16(number),
            end: try Self.end(of: file, header), limit: file.size))
        number += 1
      }
      pieces.append(piece)
    }
  }

  /// Where the next grain goes: at the end of a file; behind what is in use of a device, whose
  /// end means nothing.
  private static func end(
    of file: any ByteStore, _ header: VmdkHeader
  ) throws(ImageError) -> UInt64 {
    let unit = max(header.grain * 512, 4096)
    var end = file.size
    if file.isFixedSize {
      end = 0
      let tableSize = header.tableEntries * 4
      let cache = MetadataCache(file)
      for start in [header.directoryOffset, header.redundantOffset] where start > 0 {
        end = max(end, start * 512 + header.tables * 4)
        for index in 0..<header.tables {
          let table = UInt64(try cache.little(UInt32.self, at: start * 512 + index * 4)) * 512
          guard table > 0 else { continue }
          end = max(end, table + tableSize)
          guard start == header.directoryOffset, table + tableSize <= file.size else { continue }
          for item in 0..<header.tableEntries {
            let grain = UInt64(try cache.little(UInt32.self, at: table + item * 4))
            if grain > 1 { end = max(end, (grain + header.grain) * 512) }
          }
        }
      }
      end = max(end, header.overhead * 512, header.leastGrain * 512)
    }
    return (end + unit - 1) / unit * unit
  }

  /// Throws `corrupt` when a flat extent's file is shorter than the descriptor says.
  func checkLengths() throws(ImageError) {
    for piece in pieces {
      guard case .flat(let device, let sector) = piece.kind else { continue }
      let file = device == 0 ? primary : own[Int(device) - 2]
      let needed = (sector + UInt64(piece.sectors.count)) * 512
      guard file.size >= needed else {
        throw ImageError(
          .corrupt,
          "store \(file.name): cut short: it has \(file.size) bytes, and the extent in it ends at "
            + "byte \(needed)")
      }
    }
  }

  /// Numbers the devices.
  private mutating func choosePrimary() throws(ImageError) {
    if sparse.count == 1 { primary = sparse[0].store }
    if sparse.count > 1 { primary = VmdkJoinedStore(sparse.map(\.store), name: store.name) }
    for index in sparse.indices {
      let old = sparse[index]
      var device: UInt16 = 0
      if old.header.isCompressed {
        device = UInt16(2 + own.count)
        own.append(CompressedStore(old.store, old.header))
      }
      let base = sparse.count == 1 ? 0 : UInt64(index) << (VmdkJoinedStore.bits - 9)
      sparse[index] = Vmdk.Sparse(
        header: old.header, store: old.store, base: base, device: device, end: old.end,
        limit: old.limit)
    }
    for index in pieces.indices {
      guard case .flat(let number, let sector) = pieces[index].kind else { continue }
      let file = stores[Int(number)]
      if file === primary {
        pieces[index].kind = .flat(device: 0, sector: sector)
      } else {
        pieces[index].kind = .flat(device: UInt16(2 + own.count), sector: sector)
        own.append(file)
      }
    }
  }

  /// Chooses blocks that no border between extents and no grain is cut by.
  private mutating func cut() throws(ImageError) {
    if let grain = sparse.map(\.header.grain).min() { blockSectors = grain }
    for piece in pieces {
      let (start, end) = (piece.sectors.lowerBound, piece.sectors.upperBound)
      if start > 0 { blockSectors = min(blockSectors, 1 << UInt64(start.trailingZeroBitCount)) }
      // A flat extent that its file goes on behind must not be reached over.
      guard case .flat(let device, let sector) = piece.kind else { continue }
      let file = device == 0 ? primary : own[Int(device) - 2]
      if file.size / 512 > sector + end - start {
        blockSectors = min(blockSectors, 1 << UInt64(end.trailingZeroBitCount))
      }
    }
  }

  /// Why the image cannot be written, in words; nil when it can.
  var obstacle: String? {
    for part in sparse {
      if part.header.isCompressed { return "its grains are compressed" }
      if part.header.isESX { return "it is of ESX's sparse kind" }
      if part.header.grain != blockSectors {
        return "its extents do not meet at borders of grains of one length"
      }
    }
    return nil
  }
}

extension Vmdk {
  /// Opens an image as a disk.
  ///
  /// - Parameters:
  ///   - extents: the files that `VmdkLayout.extentPaths` names, in that order.
  ///   - base: the base that the descriptor names, as `ImageStore`.
  ///   - writable: the image is then given another content ID at once.
  ///   - contentID: this one, not a random one.
  /// - Throws: what `VmdkLayout.read(from:)` throws; `baseMissing`, `baseChanged`,
  ///   `badRequest`; `unsupported` for writing to a stream-optimized or ESX image.
  package static func open(
    store: any ByteStore, extents: [any ByteStore] = [], base: (any ByteStore)? = nil,
    writable: Bool, contentID: UInt32? = nil
  ) throws(ImageError) -> Vmdk {
    let path = try VmdkLayout.read(from: store).descriptor.basePath
    if let path, base == nil {
      throw ImageError(.baseMissing, "store \(store.name) needs its base \(path): give it")
    }
    return try open(
      alone: store, extents: extents, over: base, path == nil ? nil : base, writable: writable,
      contentID: contentID)
  }

  /// Opens an image over `under`, whatever it says of a base; `base` is the one to know again.
  static func open(
    alone store: any ByteStore, extents: [any ByteStore], over base: (any ByteStore)?,
    _ under: (any ByteStore)?, writable: Bool, contentID: UInt32? = nil
  ) throws(ImageError) -> Vmdk {
    let layout = try VmdkLayout.read(from: store)
    let parts = try VmdkParts(store, layout, extents)
    try parts.checkLengths()
    var broken: UInt32?
    if layout.descriptor.basePath != nil, let base { broken = try check(base, of: store, layout) }
    if writable {
      guard store.isWritable, parts.stores.allSatisfy(\.isWritable) else {
        throw ImageError(.badRequest, "\(store.name) is open for reading only")
      }
      if let obstacle = parts.obstacle {
        throw ImageError(
          .unsupported, "store \(store.name) can only be read, since \(obstacle): convert it")
      }
      // By its old content ID it would no longer be known whose commit was broken off.
      if let broken { try layout.adopt(parentContentID: broken, in: store) }
      try layout.renewContentID(in: store, to: contentID)
    }
    return try Vmdk(parts, base: under, writable: writable)
  }

  /// Throws `baseChanged` when a base's content ID is not the one that the image remembers.
  ///
  /// - Returns: the base's content ID when it has another one from a commit of this very image
  ///   that was broken off: wherever the base may have changed the image has the data itself.
  private static func check(
    _ base: any ByteStore, of store: any ByteStore, _ layout: VmdkLayout
  ) throws(ImageError) -> UInt32? {
    guard let image = base.image else {
      throw ImageError(
        .baseChanged, "base \(base.name) of store \(store.name) is no VMDK image: put it back")
    }
    let start = try io { () throws(IOError) in try image.read(at: 0, count: 512) }
    guard VmdkLayout.isMagic(start) else {
      throw ImageError(
        .baseChanged, "base \(base.name) of store \(store.name) is no VMDK image: put it back")
    }
    let below = try VmdkLayout.read(from: image).descriptor
    let found = below.contentID
    if found == layout.descriptor.parentContentID { return nil }
    guard found == below.successor(forCommitOf: layout.descriptor) else {
      throw ImageError(
        .baseChanged,
        "base \(base.name) has changed since store \(store.name) was made from it: its CID is "
          + "\(VmdkDescriptor.digits(found)), not "
          + "\(VmdkDescriptor.digits(layout.descriptor.parentContentID)): put the old base back")
    }
    return found
  }
}
