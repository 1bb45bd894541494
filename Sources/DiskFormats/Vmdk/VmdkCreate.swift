// SPDX-License-Identifier: Apache-2.0
// Making a VMDK image.
//
// Order of creation: what was there is made unreadable and that is flushed; extents are laid
// out and flushed; then the descriptor is written, and in an image of one file its header last.
// All grain tables are made at once, as QEMU and VMware make them: neither adds any later.

package import BlockIO
import SystemIO

/// The kinds of VMDK image that can be made, by VMware's and QEMU's names.
package enum VmdkSubformat: String, Sendable, CaseIterable {
  /// Grains in one file, with the descriptor in it.
  case monolithicSparse
  /// A descriptor, and a file of the disk's bytes.
  case monolithicFlat
  /// A descriptor, and files of grains of 2 GiB of the disk each.
  case twoGbMaxExtentSparse
  /// A descriptor, and files of 2 GiB of the disk's bytes each.
  case twoGbMaxExtentFlat
  /// Compressed grains, written once from start to end: see `VmdkStreamWriter`.
  case streamOptimized

  var isFlat: Bool { self == .monolithicFlat || self == .twoGbMaxExtentFlat }
}

/// What a new VMDK image shall be like.
package struct VmdkOptions: Sendable {
  /// The kind.
  package var subformat: VmdkSubformat = .monolithicSparse
  /// The base's path and its content ID, from `Vmdk.contentID(of:)`.
  package var base: (path: String, contentID: UInt32)?
  /// The image's own name, without folders: extents are named after it.
  package var name = "disk.vmdk"
  /// The adapter that the disk is meant for: `ide`, `lsilogic`, `buslogic` or `legacyESX`.
  package var adapter = "ide"

  /// The usual.
  package init() {}

  /// The names of the files that `Vmdk.create` wants beside the store, for a disk's length in
  /// bytes, in the image's folder.
  package func extentNames(size: UInt64) -> [String] {
    let stem = name.hasSuffix(".vmdk") ? String(name.dropLast(5)) : name
    switch subformat {
    case .monolithicSparse, .streamOptimized: return []
    case .monolithicFlat: return [stem + "-flat.vmdk"]
    case .twoGbMaxExtentSparse, .twoGbMaxExtentFlat:
      let letter = subformat.isFlat ? "f" : "s"
      let count = min(
        (size + VmdkOptions.extentBytes - 1) / VmdkOptions.extentBytes,
        UInt64(VmdkDescriptor.mostExtents) + 1)
      return (1...max(1, Int(count))).map { number in
        let digits = "\(number)"
        return "\(stem)-\(letter)\(String(repeating: "0", count: max(0, 3 - digits.count)))"
          + "\(digits).vmdk"
      }
    }
  }

  static let extentBytes: UInt64 = 2 << 30

  /// The descriptor of a disk.
  func descriptor(size: UInt64) throws(ImageError) -> VmdkDescriptor {
    let names = extentNames(size: size)
    guard size > 0, size <= 1 << 50, names.count <= VmdkDescriptor.mostExtents else {
      throw ImageError(.badRequest, "\(size) bytes are too many or none for a VMDK disk")
    }
    guard !name.isEmpty, !name.contains("\""), !name.contains("\n"), name.utf8.count <= 255,
      ["ide", "lsilogic", "buslogic", "legacyESX"].contains(adapter)
    else { throw ImageError(.badRequest, "the name '\(name)' or the adapter '\(adapter)'") }
    var descriptor = VmdkDescriptor(
      contentID: .random(in: 0x1000_0000..<0xFFFF_FFFE), createType: subformat.rawValue)
    if let base {
      guard !base.path.isEmpty, base.path.utf8.count <= VmdkDescriptor.longestPath,
        !base.path.contains("\""), !base.path.contains("\n"), !subformat.isFlat,
        subformat != .streamOptimized
      else {
        throw ImageError(
          .badRequest,
          "the base '\(base.path)': a path of 1 to 1023 bytes without quotation "
            + "marks, and only for sparse images")
      }
      descriptor.basePath = base.path
      descriptor.parentContentID = base.contentID
    }
    var left = size / 512
    for name in names.isEmpty ? [name] : names {
      let most = names.count > 1 ? Self.extentBytes / 512 : left
      descriptor.extents.append(
        VmdkExtentLine(
          isWritable: true, sectors: min(left, most), kind: subformat.isFlat ? .flat : .sparse,
          path: name))
      left -= min(left, most)
    }
    let isIDE = adapter == "ide"
    let (heads, sectors): (UInt64, UInt64) = isIDE ? (16, 63) : (255, 63)
    let cylinders = min(size / 512 / heads / sectors, isIDE ? 16383 : 65535)
    descriptor.otherLines = [
      "ddb.virtualHWVersion = \"4\"", "ddb.geometry.cylinders = \"\(cylinders)\"",
      "ddb.geometry.heads = \"\(heads)\"", "ddb.geometry.sectors = \"\(sectors)\"",
      "ddb.adapterType = \"\(adapter)\"",
    ]
    return descriptor
  }
}

extension Vmdk {
  static let descriptorSectors: UInt64 = 20

  /// Makes an image.
  ///
  /// - Parameters:
  ///   - store: written to and flushed; whatever it holds is lost.
  ///   - size: length of the disk in bytes; is rounded up to 512.
  ///   - extents: the files that `options.extentNames(size:)` names, in that order; whatever
  ///     they hold is lost.
  /// - Throws: `badRequest`, or `io` when a store fails.
  @discardableResult
  package static func create(
    store: any ByteStore, size: UInt64, options: VmdkOptions = VmdkOptions(),
    extents: [any ByteStore] = []
  ) throws(ImageError) -> VmdkDescriptor {
    let descriptor = try options.descriptor(size: roundedUp(size, to: 512) ?? .max)
    guard extents.count == options.extentNames(size: descriptor.size).count else {
      throw ImageError(.badRequest, "\(extents.count) files for the extents of a VMDK image")
    }
    try io { () throws(IOError) in
      try store.zero(at: 0, count: 512)
      try store.flush()
      try store.resize(to: 0)
    }
    if options.subformat == .streamOptimized {
      try VmdkStreamWriter(store: store, descriptor: descriptor).finish()
      return descriptor
    }
    for (line, file) in zip(descriptor.extents, extents) {
      try io { () throws(IOError) in
        try file.resize(to: 0)
        if line.kind == .flat {
          try file.resize(to: line.sectors * 512)
          try file.zero(at: 0, count: line.sectors * 512)
        }
      }
      if line.kind == .sparse {
        try layOut(VmdkHeader(capacity: line.sectors), in: file, descriptor: nil)
      }
      try io { () throws(IOError) in try file.flush() }
    }
    guard extents.isEmpty else {
      try io { () throws(IOError) in
        try store.write(descriptor.encoded(), at: 0)
        try store.flush()
      }
      return descriptor
    }
    try layOut(VmdkHeader(capacity: descriptor.size / 512), in: store, descriptor: descriptor)
    return descriptor
  }

  /// Writes an empty sparse extent: header, descriptor, both directories with their tables.
  private static func layOut(
    _ header: VmdkHeader, in store: any ByteStore, descriptor: VmdkDescriptor?
  ) throws(ImageError) {
    guard header.tables <= VmdkHeader.mostTables else {
      throw ImageError(.badRequest, "\(header.capacity) sectors are too many for one extent")
    }
    var header = header
    let text = descriptor?.encoded() ?? []
    if !text.isEmpty {
      header.descriptorOffset = 1
      header.descriptorSectors = max(descriptorSectors, (UInt64(text.count) + 511) / 512)
    }
    let tableSectors = header.tableEntries * 4 / 512
    let directory = (header.tables * 4 + 511) / 512
    header.redundantOffset = 1 + header.descriptorSectors
    header.directoryOffset = header.redundantOffset + directory + header.tables * tableSectors
    let end = header.directoryOffset + directory + header.tables * tableSectors
    header.overhead = (end + header.grain - 1) / header.grain * header.grain
    let final = header
    try io { () throws(IOError) in
      try store.resize(to: final.overhead * 512)
      try store.zero(at: 0, count: final.overhead * 512)
      for start in [final.redundantOffset, final.directoryOffset] {
        let first = start + directory
        var bytes = [UInt8](repeating: 0, count: Int(directory * 512))
        for table in 0..<final.tables {
          bytes.put(UInt32(first + table * tableSectors), at: Int(table) * 4)
        }
        try store.write(bytes, at: start * 512)
      }
      if !text.isEmpty { try store.write(text, at: 512) }
      try store.flush()
      try store.write(final.encoded(), at: 0)
      try store.flush()
    }
  }

  /// The content ID of an image: what an image over it has to remember.
  ///
  /// - Throws: what `VmdkLayout.read(from:)` throws.
  package static func contentID(of store: any ByteStore) throws(ImageError) -> UInt32 {
    try VmdkLayout.read(from: store).descriptor.contentID
  }

  /// The content ID that a base is given while its overlay is committed into it: the overlay
  /// knows it again when that is broken off.
  ///
  /// - Throws: what `VmdkLayout.read(from:)` throws; `unsupported` when the overlay's descriptor
  ///   has no room for it.
  package static func beginCommit(
    of store: any ByteStore, into base: any ByteStore
  ) throws(ImageError) -> UInt32 {
    let below = try VmdkLayout.read(from: base)
    var layout = try VmdkLayout.read(from: store)
    if below.descriptor.contentID == below.descriptor.successor(forCommitOf: layout.descriptor) {
      // Such a commit was broken off before the overlay took that in.
      try layout.adopt(parentContentID: below.descriptor.contentID, in: store)
      layout = try VmdkLayout.read(from: store)
    }
    let next = below.descriptor.successor(forCommitOf: layout.descriptor)
    try layout.checkRoom(parentContentID: next, in: store)
    return next
  }

  /// Takes a base that its own overlay has written for the one that the overlay stands on.
  ///
  /// - Parameter store: the overlay, open for writing.
  /// - Throws: what `VmdkLayout.read(from:)` throws; `unsupported` when the new content ID does
  ///   not fit where the old one stands.
  package static func adopt(
    base: any ByteStore, of store: any ByteStore
  ) throws(ImageError) {
    try VmdkLayout.read(from: store).adopt(parentContentID: contentID(of: base), in: store)
  }
}
