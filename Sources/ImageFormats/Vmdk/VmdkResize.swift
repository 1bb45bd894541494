// Changing the length of a VMDK disk: of its last extent. Nothing may be pending; no target may
// serve the disk.
//
// A sparse extent that needs more tables gets both directories anew, with all the tables that
// are missing, at the end of its file; that is flushed, and then one sector, its header, names
// them and the new length at once. The descriptor comes last when the disk grows and first
// when it shrinks: what counts is the header in an image of one file, else the descriptor, and
// an extent may be longer than it says. What lies past the end is taken out of tables last.

import Posix

extension Vmdk {
  /// Gives the disk another length, rounded up to 512. Only the last extent changes.
  ///
  /// - Throws: `badRequest` when it cannot be that long or has uncommitted placements; `io`.
  public func resize(to newSize: UInt64) throws(ImageError) {
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
    guard newSize != old else { return }
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
      let part = sparse[index]
      // A power cut may have left what an earlier shrinking meant to take out.
      if grows { try shrink(part, to: UInt64(last.sectors.count)) }
      try grow(index, to: sectors)
      if !grows { try shrink(part, to: sectors) }
      change(self)
    }
    guard grows else { return }
    try putDescriptor(sectors)
    if case .sparse = last.kind { try hide(from: old, on: store) }
  }

  /// Writes the descriptor with another length of the last extent.
  private func putDescriptor(_ sectors: UInt64) throws(ImageError) {
    guard let place = layout.place else { return }
    let count = layout.header == nil ? store.size : place.count
    let old = try io { () throws(IOError) in try store.read(at: place.offset, count: Int(count)) }
    var lines = text(old.prefix { $0 != 0 }).split(
      separator: "\n", omittingEmptySubsequences: false
    ).map(String.init)
    guard let line = lines.lastIndex(where: { $0.hasPrefix("RW ") || $0.hasPrefix("RDONLY ") })
    else { throw ImageError(.corrupt, "\(store.name): its descriptor has no extents") }
    var words = lines[line].split(separator: " ", maxSplits: 2).map(String.init)
    words[1] = "\(sectors)"
    lines[line] = words.joined(separator: " ")
    var bytes = Array(lines.joined(separator: "\n").utf8)
    guard bytes.count <= place.count else {
      throw ImageError(.badRequest, "\(store.name): its descriptor has no room for the length")
    }
    let length = UInt64(bytes.count)
    if layout.header != nil { bytes += [UInt8](repeating: 0, count: old.count - bytes.count) }
    try io { () throws(IOError) in
      try store.write(bytes, at: place.offset)
      if layout.header == nil { try store.resize(to: length) }
      try store.flush()
    }
  }

  /// Takes entries past the end out of both copies of the tables.
  private func shrink(_ part: Sparse, to sectors: UInt64) throws(ImageError) {
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

  /// Gives a sparse extent another capacity, and tables for all of it.
  private func grow(_ index: Int, to sectors: UInt64) throws(ImageError) {
    let part = sparse[index]
    var header = part.header
    header.capacity = sectors
    guard header.tables <= VmdkHeader.mostTables else {
      throw ImageError(.badRequest, "\(sectors) sectors are too many for one extent")
    }
    if header.tables > part.header.tables {
      header.directoryOffset = try directory(header, part, index, copy: false)
      if part.header.redundantOffset > 0 {
        header.redundantOffset = try directory(header, part, index, copy: true)
      }
    }
    let final = header
    try io { () throws(IOError) in
      try part.store.flush()
      var bytes = try part.store.read(at: 0, count: 512)
      bytes.put(final.capacity, at: 12)
      bytes.put(final.redundantOffset, at: 48)
      bytes.put(final.directoryOffset, at: 56)
      try part.store.write(bytes, at: 0)
      try part.store.flush()
    }
    cache.dropAll()
    sparse[index] = Sparse(
      header: final, store: part.store, base: part.base, device: part.device,
      end: sparse[index].end)
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
