// SPDX-License-Identifier: Apache-2.0
// Where a conversion writes: one kind of target for plain files, one for new qcow2 images, one
// for everything else, which is written as a running disk would be.

import BlockIO
import DiskFormats
import SystemIO

/// A part of a chunk that has to be written: bytes of the buffer, and where they go.
struct ChunkWrite {
  var store: any ByteStore
  var offset: UInt64
  var bytes: UnsafeRawBufferPointer
}

/// A part of the disk on its way.
struct Chunk {
  /// What of it has to be written.
  enum Part {
    /// So many bytes from a byte of the chunk on, a multiple of the target's unit.
    case data(at: Int, count: Int)
    /// The same, to read as zeroes although something else would show.
    case zero(at: Int, count: Int)
    /// One unit, compressed.
    case compressed(at: Int, bytes: UnsafeRawBufferPointer)
  }
  /// Where it begins.
  var start: UInt64
  /// The disk's bytes.
  var bytes: UnsafeRawBufferPointer
  var parts: [Part]
}

/// Where a conversion writes.
protocol ConvertTarget: AnyObject {
  /// Data is told from zeroes in units of so many bytes, a power of two.
  var unit: Int { get }
  /// Whether it has to be told of zeroes, because something else shows where nothing is written.
  var wantsZeroes: Bool { get }
  /// How its units are compressed, if that is asked for.
  var compression: Qcow2Compression { get }
  /// Gives the parts of a chunk places, in the order of the disk and one at a time, and says
  /// what is to be written there, at any time.
  func place(_ chunk: Chunk) throws(ImageError) -> [ChunkWrite]
  /// Makes a range that holds no data read as zeroes; one at a time, in order.
  func zero(at offset: UInt64, count: UInt64) throws(ImageError)
  /// Everything was written.
  func finish(durable: Bool) throws(ImageError)
}

extension ConvertTarget {
  var compression: Qcow2Compression { .zlib }
}

extension Kinds {
  /// What a conversion into a kind of image writes to.
  static func target(
    _ image: NewImage, _ request: ImageTool.ConvertRequest, _ files: TargetFiles
  ) throws(ImageError) -> any ConvertTarget {
    var image = image
    if image.kind == .raw {
      let much = try image.options.preallocation() ?? .off
      try image.options.checkAllUsed()
      return try RawTarget(image, request, files, much)
    }
    if image.kind == .qcow2, !request.intoExisting {
      let options = try Qcow2Format.options(of: image)
      let data = try options.dataFile.map { path throws(ImageError) in
        try files.make(ImageSource.beside(request.target, path))
      }
      return try Qcow2Target(
        image.size, options, files.store, data, isZero: files.isZero, full: request.sparse == 0)
    }
    if image.kind == .vmdk, !request.intoExisting {
      var options = image.options
      let vmdk = try VmdkFormat.options(of: image, &options, name: request.target)
      if vmdk.subformat == .streamOptimized {
        try options.checkAllUsed()
        return StreamTarget(
          try VmdkStreamWriter(
            store: files.store, size: (image.size + 511) / 512 * 512, options: vmdk))
      }
    }
    if !request.intoExisting {
      try image.kind.format.create(image, in: files.store) { path throws(ImageError) in
        try files.make(ImageSource.beside(request.target, path))
      }
    }
    return try WrittenTarget(image, request, files)
  }
}

/// A plain file or a device.
private final class RawTarget: ConvertTarget {
  let unit: Int
  let wantsZeroes: Bool
  private let store: FileStore
  private let size: UInt64

  init(
    _ image: NewImage, _ request: ImageTool.ConvertRequest, _ files: TargetFiles,
    _ much: Preallocation
  ) throws(ImageError) {
    guard image.base == nil, much != .metadata else {
      throw ImageError(
        .badRequest, "a raw image has no base and no preallocation=metadata: use qcow2")
    }
    store = files.store
    size = image.size
    unit = 4096
    wantsZeroes = !files.isZero
    guard store.size >= size || !store.isBlockDevice else {
      throw ImageError(
        .badRequest,
        "\(store.name) is a device of \(store.size) bytes, \(size) are needed: make it longer")
    }
    try toolIO { () throws(IOError) in
      if store.size < size || !request.intoExisting { try store.resize(to: size) }
      if much != .off { try store.allocate(at: 0, count: size) }
    }
  }

  func place(_ chunk: Chunk) throws(ImageError) -> [ChunkWrite] {
    var writes: [ChunkWrite] = []
    for part in chunk.parts {
      switch part {
      case .data(let at, let count):
        let offset = chunk.start + UInt64(at)
        let end = at + Int(min(UInt64(count), size - offset))
        writes.append(
          ChunkWrite(
            store: store, offset: offset,
            bytes: UnsafeRawBufferPointer(rebasing: chunk.bytes[at..<end])))
      case .zero(let at, let count):
        try zero(at: chunk.start + UInt64(at), count: UInt64(count))
      case .compressed: preconditionFailure("nothing is compressed for a plain file")
      }
    }
    return writes
  }

  func zero(at offset: UInt64, count: UInt64) throws(ImageError) {
    try toolIO { () throws(IOError) in
      try store.zero(at: offset, count: min(count, size - offset))
    }
  }

  func finish(durable: Bool) throws(ImageError) {
    if durable { try toolIO { () throws(IOError) in try store.flush() } }
  }
}

/// A qcow2 image that is made.
final class Qcow2Target: ConvertTarget {
  let unit: Int
  let wantsZeroes: Bool
  var compression: Qcow2Compression { builder.header.compression }
  private let builder: Qcow2Builder
  private let laysOut: Bool
  private let fills: FileStore?
  private var done: UInt64 = 0

  /// `isZero`: the store reads as zeroes. `full`: every cluster is placed.
  init(
    _ size: UInt64, _ options: Qcow2Options, _ store: any ByteStore, _ data: (any ByteStore)?,
    isZero: Bool, full: Bool
  ) throws(ImageError) {
    builder = try Qcow2Builder(store, size: size, options: options, dataFile: data)
    unit = Int(builder.header.clusterSize)
    wantsZeroes = options.base != nil
    laysOut = options.preallocation != .off || options.dataFileRaw || full
    let isFilled = options.preallocation == .falloc || options.preallocation == .full || full
    fills = isFilled ? (data ?? store).file : nil
    guard laysOut else { return }
    // A device shows what it held where clusters are placed and not written. A data file that is
    // none is new.
    if let data {
      let disk = builder.header.size
      if data.isFixedSize {
        try toolIO { () throws(IOError) in try data.zero(at: 0, count: disk) }
      }
    } else if !isZero {
      try toolIO { () throws(IOError) in try store.zero(at: 0, count: store.size) }
    }
  }

  /// Gives places to clusters that nobody writes, up to one.
  private func layOut(to cluster: UInt64) throws(ImageError) {
    guard laysOut else { return }
    while done < cluster {
      let (offset, count) = try builder.place(done, count: cluster - done)
      try toolIO { () throws(IOError) in
        try fills?.allocate(at: offset, count: count * UInt64(unit))
      }
      done += count
    }
  }

  func place(_ chunk: Chunk) throws(ImageError) -> [ChunkWrite] {
    var writes: [ChunkWrite] = []
    for part in chunk.parts {
      switch part {
      case .data(let at, let count):
        var first = (chunk.start + UInt64(at)) / UInt64(unit)
        var at = at
        try layOut(to: first)
        let end = first + UInt64(count / unit)
        while first < end {
          let (offset, count) = try builder.place(first, count: end - first)
          let bytes = chunk.bytes[at..<(at + Int(count) * unit)]
          writes.append(
            ChunkWrite(
              store: builder.data, offset: offset, bytes: UnsafeRawBufferPointer(rebasing: bytes)))
          at += bytes.count
          first += count
        }
        done = end
      case .zero(let at, let count):
        try zero(at: chunk.start + UInt64(at), count: UInt64(count))
      case .compressed(let at, let bytes):
        let cluster = (chunk.start + UInt64(at)) / UInt64(unit)
        let offset = try builder.placeCompressed(cluster, bytes: bytes.count)
        if let last = writes.last, last.offset + UInt64(last.bytes.count) == offset,
          last.bytes.baseAddress.map({ $0 + last.bytes.count }) == bytes.baseAddress
        {
          writes[writes.count - 1].bytes = UnsafeRawBufferPointer(
            start: last.bytes.baseAddress, count: last.bytes.count + bytes.count)
        } else {
          writes.append(ChunkWrite(store: builder.data, offset: offset, bytes: bytes))
        }
      }
    }
    return writes
  }

  func zero(at offset: UInt64, count: UInt64) throws(ImageError) {
    let first = offset / UInt64(unit)
    try builder.zero(first, count: (offset + count - 1) / UInt64(unit) + 1 - first)
  }

  func finish(durable: Bool) throws(ImageError) {
    try layOut(to: builder.clusters)
    try builder.finish(durable: durable)
  }
}

/// A stream-optimized VMDK image, which is written from its start to its end.
private final class StreamTarget: ConvertTarget {
  let unit = VmdkStreamWriter.grainBytes
  let wantsZeroes = false
  private let writer: VmdkStreamWriter

  init(_ writer: VmdkStreamWriter) { self.writer = writer }

  func place(_ chunk: Chunk) throws(ImageError) -> [ChunkWrite] {
    for case .data(let start, let count) in chunk.parts {
      for at in stride(from: start, to: start + count, by: unit) {
        let grain = [UInt8](chunk.bytes[at..<(at + unit)])
        guard let bytes = VmdkStreamWriter.compressed(grain) else { continue }
        try writer.append((chunk.start + UInt64(at)) / UInt64(unit), compressed: bytes)
      }
    }
    return []
  }

  func zero(at offset: UInt64, count: UInt64) {}

  func finish(durable: Bool) throws(ImageError) { try writer.finish() }
}

/// An image that is there, or was made empty, and is written as a disk.
private final class WrittenTarget: ConvertTarget {
  let unit: Int
  let wantsZeroes: Bool
  private let writer: ImageWriter
  private let size: UInt64
  private let keep: any ImageFormat

  init(
    _ image: NewImage, _ request: ImageTool.ConvertRequest, _ files: TargetFiles
  ) throws(ImageError) {
    wantsZeroes = image.base != nil || (request.intoExisting && !request.targetIsZero)
    let disk = image.base?.disk
    let chain = try Chain(
      files.store, kind: image.kind, among: request.source.formats
    ) { asked throws(ImageError) in
      // The base is open already, and may be locked.
      if asked.role == .base, let disk, disk.file != nil { return disk }
      let path = ImageSource.beside(asked.from, asked.path)
      if let made = files.made[path] { return made }
      return try ImageSource.resolver(
        writing: [files.store.name], untrusted: request.source.untrusted)(asked)
    }
    let opened = try chain.disk(writable: true)
    guard opened.size >= image.size else {
      throw ImageError(
        .badRequest,
        "\(files.store.name) has a disk of \(opened.size) bytes, \(image.size) are needed")
    }
    keep = opened
    size = opened.size
    unit = max(4096, min(Int(opened.blockSize), 4 << 20))
    writer = ImageWriter(
      opened, store: files.store,
      devices: opened.devices ?? [files.store] + (disk.map { [$0] } ?? []))
  }

  func place(_ chunk: Chunk) throws(ImageError) -> [ChunkWrite] {
    for part in chunk.parts {
      switch part {
      case .data(let at, let count):
        let offset = chunk.start + UInt64(at)
        let end = at + Int(min(UInt64(count), size - offset))
        try writer.write(UnsafeRawBufferPointer(rebasing: chunk.bytes[at..<end]), at: offset)
      case .zero(let at, let count):
        try zero(at: chunk.start + UInt64(at), count: UInt64(count))
      case .compressed: preconditionFailure("only new qcow2 images are compressed")
      }
    }
    return []
  }

  func zero(at offset: UInt64, count: UInt64) throws(ImageError) {
    try writer.zero(at: offset, count: min(count, size - offset))
  }

  func finish(durable: Bool) throws(ImageError) { try writer.commit() }
}
