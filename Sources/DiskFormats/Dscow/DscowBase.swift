// SPDX-License-Identifier: Apache-2.0
// How a store knows its base again: length, modification time where there is one, and a
// checksum of samples. The samples catch what keeps length and time: a device, or a file
// that was restored with its times.

package import BlockIO
package import SystemIO

extension Dscow {
  /// How many samples of the base are taken, and how many bytes each has.
  private static let samples: UInt64 = 64
  private static let sampleSize: UInt64 = 4096

  /// CRC-32C of the base: of 64 pieces of 4096 bytes spread evenly from its start to its
  /// end, or of all of it when it is no longer than they are.
  package static func fingerprint(of base: any ByteStore) throws(IOError) -> UInt32 {
    let size = base.size
    var sum = CRC32C()
    if size <= samples * sampleSize {
      let bytes = try base.read(at: 0, count: Int(size))
      bytes.withUnsafeBytes { sum.update($0) }
      return sum.value
    }
    let last = size - sampleSize
    for index in 0..<samples {
      // Whole multiples first: last * index could overflow for a base of 2^58 bytes.
      let step = last / (samples - 1)
      let offset = index == samples - 1 ? last : step * index
      let bytes = try base.read(at: offset, count: Int(sampleSize))
      bytes.withUnsafeBytes { sum.update($0) }
    }
    return sum.value
  }

  /// CRC-32C of those samples that lie in blocks which the store does not have: a commit into
  /// the base leaves them as they are. `size` is the base's, as the store knows it.
  static func untouched(
    _ store: any ByteStore, _ header: DscowHeader, _ base: any ByteStore, size: UInt64
  ) throws(ImageError) -> UInt32 {
    var bitmap = DscowBitmap(store: store, header: header)
    var sum = CRC32C()
    let unit = UInt64(header.blockSize)
    let last = size - min(size, sampleSize)
    for index in 0..<samples {
      let offset = index == samples - 1 ? last : last / (samples - 1) * index
      let count = min(sampleSize, size - offset)
      guard count > 0, (offset + count - 1) / unit < header.blocks else { continue }
      var isTaken = false
      for block in (offset / unit)...((offset + count - 1) / unit) {
        if try bitmap.run(from: block, limit: 1).isSet { isTaken = true }
      }
      guard !isTaken else { continue }
      let bytes = try io { () throws(IOError) in try base.read(at: offset, count: Int(count)) }
      bytes.withUnsafeBytes { sum.update($0) }
    }
    return sum.value
  }

  /// What identifies a base now, and will after a power cut: the file's time is written out
  /// with everything else first.
  static func stamp(
    durably base: any ByteStore, path: String
  ) throws(ImageError) -> DscowBase {
    let file = base.image ?? base
    try io { () throws(IOError) in try file.flushAll() }
    return try stamp(base, path: path)
  }

  /// What identifies a base now.
  static func stamp(
    _ base: any ByteStore, path: String
  ) throws(ImageError) -> DscowBase {
    let count = path.utf8.count
    guard count > 0, count <= DscowHeader.longestPath, !path.utf8.contains(0) else {
      throw ImageError(
        .badRequest,
        "the base's path has \(count) bytes, a dscow store holds 1 to "
          + "\(DscowHeader.longestPath): use a shorter path")
    }
    return try io { () throws(IOError) in
      let identity = try base.identity()
      return DscowBase(
        path: path, size: identity.size, modified: identity.modified,
        fingerprint: try fingerprint(of: base))
    }
  }

  /// What differs between a base and the one a store was made from, in words; nil when
  /// nothing does.
  static func difference(_ old: DscowBase, _ new: DscowBase) -> String? {
    if old.size != new.size { return "its size was \(old.size) and is \(new.size) bytes" }
    if old.modified != 0, new.modified != 0, old.modified != new.modified {
      return "it was modified \(old.modified < new.modified ? "later" : "earlier")"
    }
    return old.fingerprint != new.fingerprint ? "its contents differ" : nil
  }

  /// Whether two byte stores are the same file or device.
  package static func same(
    _ one: any ByteStore, _ other: any ByteStore
  ) throws(ImageError) -> Bool {
    let (one, other) = (one.underlying, other.underlying)
    if one === other { return true }
    guard let one = one.file, let other = other.file else { return false }
    return try io { () throws(IOError) in try one.isSameFile(as: other) }
  }
}
