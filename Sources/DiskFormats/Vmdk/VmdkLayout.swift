// SPDX-License-Identifier: Apache-2.0
// What a VMDK image is made of: its descriptor, wherever that stands, and the files of its
// extents. The image's store is either text alone, or a sparse extent with the text in it.

package import BlockIO
import SystemIO

/// An image that has been looked at, and whose extents are not open yet.
package struct VmdkLayout: Sendable {
  /// The descriptor; made up where the store is a sparse extent without one.
  package internal(set) var descriptor: VmdkDescriptor
  /// The header, when the store is itself the only extent.
  package let header: VmdkHeader?
  /// Where the descriptor stands in the store, and how many bytes there are for it; nil when
  /// it was made up.
  let place: (offset: UInt64, count: UInt64)?

  /// Length of the disk in bytes.
  package var size: UInt64 { header.map { $0.capacity * 512 } ?? descriptor.size }
  /// The files of the extents that have one, in the disk's order: what `Vmdk.open` wants
  /// beside the store. Relative ones are meant from the image's folder.
  package var extentPaths: [String] {
    header != nil ? [] : descriptor.extents.filter { $0.kind != .zero }.map(\.path)
  }

  /// Whether bytes at the start of a store are a VMDK image's.
  package static func isMagic(_ bytes: [UInt8]) -> Bool {
    VmdkHeader.isMagic(bytes) || VmdkDescriptor.isDescriptor(bytes)
  }

  /// Looks at a store.
  ///
  /// - Throws: `notThisFormat`, `unsupported`, `corrupt` or `io`.
  package static func read(from store: any ByteStore) throws(ImageError) -> VmdkLayout {
    let start = try io { () throws(IOError) in try store.read(at: 0, count: 512) }
    guard isMagic(start) else {
      throw ImageError(.notThisFormat, "store \(store.name): no VMDK image")
    }
    do throws(ImageError) {
      guard VmdkHeader.isMagic(start) else { return try text(in: store) }
      return try embedded(in: store, try VmdkHeader.read(from: store))
    } catch {
      guard !error.message.hasPrefix("store ") else { throw error }
      throw ImageError(error.code, "store \(store.name): \(error.message)", cause: error.cause)
    }
  }

  private static func text(in store: any ByteStore) throws(ImageError) -> VmdkLayout {
    let size = store.size
    guard size <= UInt64(VmdkDescriptor.mostBytes) else {
      throw ImageError(.corrupt, "a descriptor of \(size) bytes; there may be 1 MiB")
    }
    let bytes = try io { () throws(IOError) in try store.read(at: 0, count: Int(size)) }
    let descriptor = try VmdkDescriptor(bytes)
    guard !descriptor.createType.isEmpty else {
      throw ImageError(.corrupt, "its descriptor lacks createType")
    }
    return VmdkLayout(
      descriptor: descriptor, header: nil,
      place: (0, UInt64(VmdkDescriptor.mostBytes)))
  }

  private static func embedded(
    in store: any ByteStore, _ header: VmdkHeader
  ) throws(ImageError) -> VmdkLayout {
    let (offset, count) = (header.descriptorOffset * 512, header.descriptorSectors * 512)
    guard offset > 0, count > 0 else {
      var descriptor = VmdkDescriptor(
        contentID: VmdkDescriptor.noParent, createType: "monolithicSparse")
      descriptor.extents = [
        VmdkExtentLine(isWritable: true, sectors: header.capacity, kind: .sparse, path: "")
      ]
      return VmdkLayout(descriptor: descriptor, header: header, place: nil)
    }
    let bytes = try io { () throws(IOError) in try store.read(at: offset, count: Int(count)) }
    var descriptor = try VmdkDescriptor(bytes)
    if descriptor.createType.isEmpty { descriptor.createType = "monolithicSparse" }
    guard descriptor.extents.count == 1, descriptor.extents[0].kind == .sparse else {
      throw ImageError(.corrupt, "a descriptor in a sparse extent has to name that one alone")
    }
    return VmdkLayout(descriptor: descriptor, header: header, place: (offset, count))
  }

  /// Gives the image another content ID, durably: whoever has it as its base shall notice.
  /// `contentID`: this one instead of a random one.
  func renewContentID(
    in store: any ByteStore, to contentID: UInt32? = nil
  ) throws(ImageError) {
    // An extent without a descriptor has no ID, and some descriptors have none.
    guard place != nil, !descriptor.contentIDDigits.isEmpty else { return }
    let digits = contentID.map {
      Array(VmdkDescriptor.digits($0).suffix(descriptor.contentIDDigits.count).utf8)
    }
    try put(digits ?? descriptor.nextContentID(), at: descriptor.contentIDDigits, in: store)
  }

  /// Has the image remember this content ID of its base, durably.
  func adopt(parentContentID: UInt32, in store: any ByteStore) throws(ImageError) {
    guard descriptor.parentContentID != parentContentID else { return }
    try checkRoom(parentContentID: parentContentID, in: store)
    let digits = VmdkDescriptor.digits(parentContentID).suffix(descriptor.parentDigits.count)
    try put(Array(digits.utf8), at: descriptor.parentDigits, in: store)
  }

  /// Throws `unsupported` when a content ID does not fit where the base's stands.
  func checkRoom(parentContentID: UInt32, in store: any ByteStore) throws(ImageError) {
    let digits = VmdkDescriptor.digits(parentContentID)
    let count = descriptor.parentDigits.count
    guard count >= 8 - digits.prefix(while: { $0 == "0" }).count, count <= 8 else {
      throw ImageError(
        .unsupported, "store \(store.name): its descriptor has no room for parentCID=\(digits)")
    }
  }

  private func put(
    _ digits: [UInt8], at range: Range<Int>, in store: any ByteStore
  ) throws(ImageError) {
    guard let place else { return }
    try io { () throws(IOError) in
      try store.write(digits, at: place.offset + UInt64(range.lowerBound))
      try store.flush()
    }
  }
}
