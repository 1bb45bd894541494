// SPDX-License-Identifier: Apache-2.0
// Changing the length of a VMDK disk: of its last extent. Nothing may be pending; no target may
// serve the disk.
//
// A sparse extent that needs more tables gets both directories anew, with all the tables that
// are missing, at the end of its file; that is flushed, and then one sector, its header, names
// them. Then what would show of a base past the old end is hidden by grains. Then the header
// says the length, and the descriptor last: what counts is the header in an image of one file,
// else the descriptor, and an extent may be longer than it says. A kill before that leaves the
// old length, and the same change can be done again. When the disk shrinks the descriptor comes
// first, then the header, and what lies past the end is taken out of tables last.

import BlockIO
import SystemIO

extension Vmdk {
  /// Gives the disk another length, rounded up to 512. Only the last extent changes.
  ///
  /// - Throws: `badRequest` when it cannot be that long or has uncommitted placements; `io`.
  package func resize(to newSize: UInt64) throws(ImageError) {
    guard isWritable, pending.isEmpty, let last = pieces.last else {
      throw ImageError(.badRequest, "\(store.name) is in use or open for reading only")
    }
    guard let newSize = roundedUp(newSize, to: 512), newSize / 512 > last.sectors.lowerBound,
      newSize <= 1 << 50
    else {
      throw ImageError(
        .badRequest,
        "\(store.name): its last extent begins at byte "
          + "\(last.sectors.lowerBound * 512), so the disk cannot have \(newSize): convert it")
    }
    let sectors = newSize / 512 - last.sectors.lowerBound
    let limit = VmdkOptions.extentBytes / 512
    guard !layout.descriptor.createType.hasPrefix("twoGbMax") || sectors <= limit else {
      throw ImageError(
        .badRequest, "\(store.name): an extent of this kind has 2 GiB at most: convert it")
    }
    let old = size
    guard newSize != old else {
      // An earlier change may have been broken off before the descriptor said so.
      guard layout.header != nil, layout.descriptor.extents.last?.sectors != sectors else { return }
      return try putDescriptor(sectors)
    }
    let grows = newSize > old
    if grows { try zeroTail(from: old) } else { try putDescriptor(sectors) }
    let from = pieces.count - 1
    let change: (Vmdk) -> Void = { image in
      image.pieces[from].sectors = last.sectors.lowerBound..<(newSize / 512)
      image.size = newSize
    }
    switch last.kind {
    case .zero: change(self)
    case .flat(let device, let sector):
      let file = devices?[Int(device)] ?? store
      try io { () throws(IOError) in
        try file.resize(to: (sector + sectors) * 512)
        try file.flush()
      }
      change(self)
    case .sparse(let index):
      // A power cut may have left what an earlier change meant to take out.
      if grows { try clear(sparse[index], from: UInt64(last.sectors.count)) }
      if grows { try growTables(index, for: sectors) }
      change(self)
      if grows { try hide(from: old, on: store) }
      try putCapacity(index, sectors)
      if !grows { try clear(sparse[index], from: sectors) }
    }
    if grows { try putDescriptor(sectors) }
  }

  /// Writes the descriptor with another length of the last extent.
  private func putDescriptor(_ sectors: UInt64) throws(ImageError) {
    guard let place = layout.place else { return }
    let count = layout.header == nil ? store.size : place.count
    let old = try io { () throws(IOError) in try store.read(at: place.offset, count: Int(count)) }
    let text = Array(old.prefix { $0 != 0 })
    guard let digits = VmdkDescriptor.lastExtentDigits(in: text) else {
      throw ImageError(.corrupt, "\(store.name): its descriptor has no extents")
    }
    var bytes = text
    bytes.replaceSubrange(digits, with: Array("\(sectors)".utf8))
    guard bytes.count <= place.count else {
      throw ImageError(.badRequest, "\(store.name): its descriptor has no room for the length")
    }
    // Never shorter than it was: one write then does all of it.
    let rest = layout.header == nil ? text.count : old.count
    let filler: UInt8 = layout.header == nil ? 10 : 0
    bytes += [UInt8](repeating: filler, count: max(0, rest - bytes.count))
    let new = bytes
    try io { () throws(IOError) in
      try store.write(new, at: place.offset)
      try store.flush()
    }
  }

  /// Takes entries past the end out of both copies of the tables.
  private func clear(_ part: Sparse, from sectors: UInt64) throws(ImageError) {
    let header = part.header
    let first = (sectors + header.grain - 1) / header.grain
    for table
      in (first / header.tableEntries)..<max(
        first / header.tableEntries, header.tables)
    {
      let start = max(first, table * header.tableEntries)
      for copy in header.redundantOffset == 0 ? [false] : [false, true] {
        let directory = directoryEntry(start, part, copy: copy)
        guard let place = try self.table(entry: directory, part) else { continue }
        let item = start % header.tableEntries
        let count = Int((header.tableEntries - item) * 4)
        try io { () throws(IOError) in
          try primary.write([UInt8](repeating: 0, count: count), at: place + item * 4)
        }
      }
    }
    try io { () throws(IOError) in try primary.flush() }
    cache.dropAll()
  }

  /// Gives a sparse extent tables for another capacity, which its header does not say yet.
  private func growTables(_ index: Int, for sectors: UInt64) throws(ImageError) {
    let part = sparse[index]
    var header = part.header
    header.capacity = max(header.capacity, sectors)
    guard header.tables <= VmdkHeader.mostTables else {
      throw ImageError(.badRequest, "\(sectors) sectors are too many for one extent")
    }
    if header.tables > part.header.tables {
      header.directoryOffset = try directory(header, part, index, copy: false)
      if part.header.redundantOffset > 0 {
        header.redundantOffset = try directory(header, part, index, copy: true)
      }
      try put(header, capacity: part.header.capacity, in: part.store)
    }
    replace(index, header)
  }

  /// Has a sparse extent's header say its capacity.
  private func putCapacity(_ index: Int, _ sectors: UInt64) throws(ImageError) {
    var header = sparse[index].header
    header.capacity = sectors
    try put(header, capacity: sectors, in: sparse[index].store)
    replace(index, header)
  }

  private func replace(_ index: Int, _ header: VmdkHeader) {
    let part = sparse[index]
    cache.dropAll()
    sparse[index] = Sparse(
      header: header, store: part.store, base: part.base, device: part.device, end: part.end,
      limit: part.limit)
  }

  /// Changes capacity and directories in one sector.
  private func put(
    _ header: VmdkHeader, capacity: UInt64, in file: any ByteStore
  ) throws(ImageError) {
    try io { () throws(IOError) in
      try file.flush()
      var bytes = try file.read(at: 0, count: 512)
      bytes.put(capacity, at: 12)
      if header.redundantOffset > 0 { bytes.put(header.redundantOffset, at: 48) }
      bytes.put(header.directoryOffset, at: 56)
      try file.write(bytes, at: 0)
      try file.flush()
    }
  }

  /// Writes a longer directory, with new tables behind it; returns its sector.
  private func directory(
    _ header: VmdkHeader, _ part: Sparse, _ index: Int, copy: Bool
  ) throws(ImageError) -> UInt64 {
    let tableSectors = (header.tableEntries * 4 + 511) / 512
    let directorySectors = (header.tables * 4 + 511) / 512
    let fresh = header.tables - part.header.tables
    let count = (directorySectors + fresh * tableSectors) * 512
    let start = try take((count + 4095) / 4096 * 4096, in: index) / 512
    let old = copy ? part.header.redundantOffset : part.header.directoryOffset
    try io { () throws(IOError) in
      try part.store.zero(at: start * 512, count: count)
      let length = Int(part.header.tables * 4)
      var bytes = try part.store.read(at: old * 512, count: length)
      for table in 0..<fresh {
        let sector = start + directorySectors + table * tableSectors
        bytes += [0, 0, 0, 0]
        bytes.put(UInt32(sector), at: length + Int(table) * 4)
      }
      try part.store.write(bytes, at: start * 512)
    }
    return start
  }
}
