// SPDX-License-Identifier: Apache-2.0
// dmu-img dump and restore: the mapping of an image as XML, in the schema of thin_dump: a
// superblock, a device, runs of blocks as range_mapping and single blocks as single_mapping.
// What the schema has no word for, the disk's length and the image's base, stands in a comment.

import BlockIO
package import DiskFormats
import SystemIO

extension ImageTool {
  /// A run of a mapping, in bytes.
  private struct Mapped {
    var start: UInt64
    var place: UInt64
    var count: UInt64
  }

  /// Writes the mapping of an image by itself to a file, or to standard output.
  ///
  /// - Throws: `unsupported` for what the schema cannot say: compressed clusters, and zeroes
  ///   that hide a base.
  package static func dump(
    _ source: ImageSource, into path: String?
  ) throws(ImageError) {
    let store = try source.open()
    let decision = try source.decision(of: store)
    let kind = decision.kind
    let link = try ChainLink(
      store, decision,
      resolve: ImageSource.resolver(evenInUse: source.evenInUse, untrusted: source.untrusted))
    let (names, image) = (link.names, try link.layer(over: nil))
    // The unit in which everything can be said: a block, unless data lies at odder places.
    var unit = UInt64(image.format.blockSize)
    var mapped: UInt64 = 0
    try runs(of: image, names) { run throws(ImageError) in
      while run.place % unit != 0 { unit /= 2 }
      mapped += run.count
    }
    let writer = try MappingWriter(path)
    try writer.comment(
      " dmu-img: format=\(kind.name) size=\(image.size)"
        + (names.base.map { " base=\(percent($0))" } ?? "") + " ")
    try writer.start(
      "superblock",
      [
        ("uuid", ""), ("time", "0"), ("transaction", "0"), ("version", "2"),
        ("data_block_size", "\(unit / 512)"),
        ("nr_data_blocks", "\((image.devices[0].size + unit - 1) / unit)"),
      ])
    try writer.start(
      "device",
      [
        ("dev_id", "0"), ("mapped_blocks", "\((mapped + unit - 1) / unit)"),
        ("transaction", "0"), ("creation_time", "0"), ("snap_time", "0"),
      ])
    try runs(of: image, names) { run throws(ImageError) in
      let (start, place) = ("\(run.start / unit)", "\(run.place / unit)")
      let count = (run.count + unit - 1) / unit
      if count == 1 {
        try writer.start(
          "single_mapping", [("origin_block", start), ("data_block", place), ("time", "0")])
      } else {
        try writer.start(
          "range_mapping",
          [
            ("origin_begin", start), ("data_begin", place), ("length", "\(count)"), ("time", "0"),
          ])
      }
      try writer.end()
    }
    try writer.finish()
  }

  /// The runs of data that an image has of its own, as long as they can be.
  private static func runs(
    of image: ImageLayer, _ names: ImageNames,
    visit: (Mapped) throws(ImageError) -> Void
  ) throws(ImageError) {
    var last: Mapped?
    var offset: UInt64 = 0
    while offset < image.size {
      let (content, count) = try image.run(at: offset, limit: image.size - offset)
      switch content {
      case .absent: break
      case .zero:
        guard names.base == nil else {
          throw ImageError(
            .unsupported,
            "\(image.store.name) has zeroes at byte \(offset) that hide its base, for which the "
              + "mapping has no word: rebase it onto nothing first (dmu-img rebase -b '')")
        }
      case .made:
        throw ImageError(
          .unsupported,
          "\(image.store.name) is compressed at byte \(offset), for which the mapping has no "
            + "word: convert it without -c first")
      case .data(_, let place):
        if let before = last, before.start + before.count == offset,
          before.place + before.count == place
        {
          last?.count += count
        } else {
          if let before = last { try visit(before) }
          last = Mapped(start: offset, place: place, count: count)
        }
      }
      offset += count
    }
    if let last { try visit(last) }
  }

  private static func percent(_ text: String) -> String {
    var result = ""
    for byte in text.utf8 {
      let isPlain =
        byte > 0x20 && byte < 0x7F && byte != UInt8(ascii: "%") && byte != UInt8(ascii: "-")
      result +=
        isPlain
        ? String(UnicodeScalar(byte)) : "%" + (byte < 16 ? "0" : "") + String(byte, radix: 16)
    }
    return result
  }

  /// Makes an image of a mapping and the file that holds its blocks.
  package static func restore(
    _ path: String, data: ImageSource, into target: String, format: String, base: String?,
    baseFormat: String?
  ) throws(ImageError) {
    let kind = try data.formats.stated(format)
    let blocks = try data.open()
    let reader = try MappingReader(path)
    var size: UInt64?
    var unit: UInt64?
    while unit == nil, let node = try reader.next() {
      switch node {
      case .comment(let text): size = size ?? number("size", in: text)
      case .element(let name):
        guard name == "superblock" else { throw reader.refuse("'\(name)' before a superblock") }
        let sectors = try reader.number("data_block_size")
        guard sectors > 0, sectors <= 1 << 22 else {
          throw reader.refuse("blocks of \(sectors) sectors")
        }
        unit = sectors * 512
      }
    }
    guard let unit else { throw reader.refuse("there is no superblock") }
    guard let size else {
      throw reader.refuse("the disk's length is not said: write <!-- dmu-img: size=BYTES -->")
    }
    let under = try base.map { path throws(ImageError) in
      try openBase(
        path, baseFormat, for: target, kind: kind, untrusted: data.untrusted, among: data.formats)
    }
    var request = ConvertRequest(data, target: target)
    request.format = format
    let files = try TargetFiles(request, sources: [blocks])
    do throws(ImageError) {
      let image = NewImage(
        kind: kind, size: size, base: under, options: try ImageOptions([], for: kind))
      try kind.format.create(image, in: files.store) { path throws(ImageError) in
        try files.make(ImageSource.beside(target, path))
      }
      try fill(image, files, from: reader, blocks, unit: unit, among: data.formats)
      try files.publish(durable: true)
    } catch {
      files.abandon()
      throw error
    }
  }

  private static func number(_ name: String, in text: String) -> UInt64? {
    for word in text.split(separator: " ") where word.hasPrefix(name + "=") {
      return UInt64(word.dropFirst(name.utf8.count + 1))
    }
    return nil
  }

  /// Copies the blocks of every mapping to their places.
  private static func fill(
    _ image: NewImage, _ files: TargetFiles, from reader: MappingReader, _ blocks: FileStore,
    unit: UInt64, among formats: FormatList
  ) throws(ImageError) {
    let disk = image.base?.disk
    let chain = try Chain(files.store, kind: image.kind, among: formats) {
      asked throws(ImageError) in
      if asked.role == .base, let disk, disk.file != nil { return disk }
      if let made = files.made[ImageSource.beside(asked.from, asked.path)] { return made }
      // The base, which the command names.
      return try ImageSource.resolver(untrusted: false)(asked)
    }
    let opened = try chain.disk(writable: true)
    let writer = ImageWriter(
      opened, store: files.store,
      devices: opened.devices ?? [files.store] + (disk.map { [$0] } ?? []))
    var end: UInt64 = 0
    while let node = try reader.next() {
      guard case .element(let name) = node else { continue }
      let (first, place, count): (UInt64, UInt64, UInt64)
      switch name {
      case "device": continue
      case "single_mapping":
        (first, place, count) = (
          try reader.number("origin_block"), try reader.number("data_block"), 1
        )
      case "range_mapping":
        (first, place, count) = (
          try reader.number("origin_begin"), try reader.number("data_begin"),
          try reader.number("length")
        )
      default: throw reader.refuse("'\(name)' is no part of a mapping of one device")
      }
      let most = UInt64(Int64.max) / unit / 2
      guard count > 0, first < most, place < most, count < most, first >= end,
        first * unit < image.size
      else { throw reader.refuse("a mapping of \(count) blocks at \(first), to \(place)") }
      end = first + count
      let bytes = min(count * unit, image.size - first * unit)
      guard place * unit + bytes <= (blocks.size + unit - 1) / unit * unit else {
        throw reader.refuse("block \(place) lies past the end of \(blocks.name)")
      }
      try copy(blocks, place * unit, to: writer, first * unit, count: bytes)
    }
    try writer.commit()
  }

  private static func copy(
    _ blocks: FileStore, _ place: UInt64, to writer: ImageWriter, _ offset: UInt64, count: UInt64
  ) throws(ImageError) {
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 4096)
    defer { buffer.deallocate() }
    var done: UInt64 = 0
    while done < count {
      let part = UnsafeMutableRawBufferPointer(
        rebasing: buffer[..<Int(min(UInt64(buffer.count), count - done))])
      try toolIO { () throws(IOError) in try blocks.read(part, at: place + done) }
      try writer.write(UnsafeRawBufferPointer(part), at: offset + done)
      done += UInt64(part.count)
    }
  }
}
