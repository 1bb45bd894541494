// SPDX-License-Identifier: Apache-2.0
// Naming another base in a qcow2 image, and emptying one whose contents went into its base.
// Nobody may serve the disk.
//
// Order of a renaming: the new path is written where the first cluster has nothing, and
// flushed; then what stands before it, header and extensions, which point to it. Everything
// but a change in the length of the base's format is in the first sector.

package import BlockIO
import SystemIO

extension Qcow2 {
  private static let formatExtension: UInt32 = 0xE279_2ACA

  /// Names another base, or none, and its format. Whether it is the right one is the caller's
  /// to know.
  ///
  /// - Throws: what `Qcow2Header.read(from:)` throws; `badRequest` for a name that does not
  ///   fit; `io`.
  package static func rename(
    base: (path: String, format: String?)?, of store: any ByteStore
  ) throws(ImageError) {
    let header = try Qcow2Header.read(from: store)
    guard header.autoclear & Qcow2Header.Autoclear.rawDataFile == 0 || base == nil else {
      throw ImageError(.badRequest, "store \(store.name) has a raw data file, so no base")
    }
    let old = try io { () throws(IOError) in
      try store.read(at: 0, count: Int(header.clusterSize))
    }
    var bytes = [UInt8](old[..<Int(header.headerLength)])
    if let base, let format = base.format {
      bytes.append(extension: formatExtension, Array(format.utf8))
    }
    for (type, data) in extensions(old, header) where type != formatExtension {
      bytes.append(extension: type, data)
    }
    bytes.append(extension: 0, [])
    let oldPath = Int(old.big(UInt64.self, at: 8))
    let oldEnd = oldPath + Int(old.big(UInt32.self, at: 16))
    let path = Array((base?.path ?? "").utf8)
    guard path.count <= Qcow2Header.longestPath else {
      throw ImageError(
        .badRequest,
        "the base's path is longer than \(Qcow2Header.longestPath) bytes: shorten it")
    }
    // Behind the old path where there is room, so that the old one stays until then.
    var place = max(bytes.count, oldEnd)
    if place + path.count > old.count { place = bytes.count }
    guard place + path.count <= old.count else {
      throw ImageError(
        .badRequest,
        "the base's path and the other names do not fit a cluster of "
          + "\(header.clusterSize) bytes: shorten it")
    }
    bytes.putBig(UInt64(path.isEmpty ? 0 : place), at: 8)
    bytes.putBig(UInt32(path.count), at: 16)
    let head = bytes
    try io { () throws(IOError) in
      if !path.isEmpty {
        try store.write(path, at: UInt64(place))
        try store.flush()
      }
      try store.write(head, at: 0)
      try store.flush()
    }
  }

  /// The extensions of a header that was read, in order.
  private static func extensions(
    _ bytes: [UInt8], _ header: Qcow2Header
  ) -> [(type: UInt32, data: [UInt8])] {
    var found: [(UInt32, [UInt8])] = []
    let base = Int(bytes.big(UInt64.self, at: 8))
    let end = base == 0 ? bytes.count : base
    var offset = Int(header.headerLength)
    // Lengths were checked when the header was read.
    while offset + 8 <= end {
      let type = bytes.big(UInt32.self, at: offset)
      let length = Int(bytes.big(UInt32.self, at: offset + 4))
      guard type != 0, length <= end - offset - 8 else { break }
      found.append((type, [UInt8](bytes[(offset + 8)..<(offset + 8 + length)])))
      offset += 8 + (length + 7) / 8 * 8
    }
    return found
  }

  /// Takes every block out of the image, so that all of the base shows, and gives their space
  /// back. Snapshots keep theirs.
  ///
  /// - Throws: `badRequest` when the image cannot be written or has uncommitted placements;
  ///   `io`.
  package func empty() throws(ImageError) {
    guard isWritable, pending.isEmpty else {
      throw ImageError(.badRequest, "\(store.name) is in use or open for reading only")
    }
    for index in 0..<UInt64(header.l1Size) {
      try clear(table: index, from: index * header.l2Entries, punching: true)
    }
    guard header.hasDataFile else { return }
    try io { () throws(IOError) in
      try data.zero(at: 0, count: data.size)
      try data.flush()
    }
  }
}

extension [UInt8] {
  fileprivate mutating func append(extension type: UInt32, _ data: [UInt8]) {
    appendBig(type)
    appendBig(UInt32(data.count))
    self += data
    pad(to: 8)
  }
}
