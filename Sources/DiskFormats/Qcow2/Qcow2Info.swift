// SPDX-License-Identifier: Apache-2.0
// A qcow2 image in words.

package import BlockIO

extension Qcow2 {
  /// What there is to say of an image, without its base or data file.
  ///
  /// - Throws: what `Qcow2Header.read(from:)` throws.
  package static func info(of store: any ByteStore) throws(ImageError) -> ImageInfo {
    let header = try Qcow2Header.read(from: store)
    var details: [(name: String, value: String)] = [
      ("compat", header.version == 2 ? "0.10" : "1.1"),
      ("compression type", "\(header.compression)"),
      ("refcount bits", "\(1 << header.refcountOrder)"),
    ]
    if header.version >= 3 {
      let lazy = header.compatible & Qcow2Header.Compatible.lazyRefcounts != 0
      let corrupt = header.incompatible & Qcow2Header.Incompatible.corrupt != 0
      let dirty = header.incompatible & Qcow2Header.Incompatible.dirty != 0
      details.append(("lazy refcounts", "\(lazy)"))
      details.append(("corrupt", "\(corrupt)"))
      details.append(("extended l2", "\(header.hasSubclusters)"))
      if dirty { details.append(("closed", "no: refcounts will be counted anew")) }
    }
    if header.hasDataFile {
      let raw = header.autoclear & Qcow2Header.Autoclear.rawDataFile != 0
      details.append(("data file", header.dataFilePath ?? "(not named)"))
      details.append(("data file raw", "\(raw)"))
    }
    for snapshot in try Qcow2SnapshotTable(store, header).snapshots {
      details.append(("snapshot \(snapshot.id)", "\(snapshot.name), \(snapshot.diskSize) bytes"))
    }
    for bitmap in try Qcow2Bitmaps.read(store, header) {
      let isGood =
        !bitmap.inUse && header.autoclear & Qcow2Header.Autoclear.bitmaps != 0
      let state = isGood ? "consistent" : "in use: may miss changes"
      details.append(("bitmap \(bitmap.name)", "granularity \(bitmap.granularity), \(state)"))
    }
    return ImageInfo(
      format: "qcow2", size: header.diskSize, clusterSize: header.clusterSize,
      basePath: header.basePath, baseFormat: header.baseFormat, details: details)
  }
}
