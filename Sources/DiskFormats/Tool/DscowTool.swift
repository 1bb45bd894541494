// SPDX-License-Identifier: Apache-2.0
// What dscow_tool does, as functions of paths that return what to print.

import BlockIO
import DiskModel
package import SystemIO

/// The commands of dscow_tool. Each throws `ImageError`.
package enum DscowTool {
  /// How a command ends.
  package enum Exit: Int32, Sendable {
    /// Done; a checked store is clean.
    case done = 0
    /// The command could not be done.
    case failed = 1
    /// The checked store is damaged.
    case damaged = 2
    /// The checked store has leftovers that harm nobody.
    case leftovers = 3
  }

  /// The disk in a base: its own bytes, or what an image in it shows. A base that names further
  /// files has to be stated to be an image. `untrusted`: none of these files is opened.
  private static func disk(
    in base: FileStore, format: String?, untrusted: Bool
  ) throws(ImageError) -> any ByteStore {
    // Whoever makes a store of it says what is wrong with that.
    guard base.size > 0 else { return base }
    let stated = try format.map { name throws(ImageError) in try FormatList.all.stated(name) }
    return try Chain(base, kind: stated) { asked throws(ImageError) in
      if untrusted { throw asked.refusal }
      let folder = asked.from.lastIndex(of: "/").map { String(asked.from[...$0]) } ?? ""
      return try ImageFile.base(asked.path.hasPrefix("/") ? asked.path : folder + asked.path)
    }.layers().flat()
  }

  /// Makes a store, with the lines that describe it. `base` nil: a disk of zeroes. A store over
  /// an image is as long as the disk in that.
  package static func create(
    store path: String, base basePath: String?, baseFormat: String? = nil, untrusted: Bool = false,
    blockSize: UInt64?, size: UInt64?, force: Bool
  ) throws(ImageError) -> String {
    guard let blockSize = UInt32(exactly: blockSize ?? UInt64(Dscow.defaultBlockSize)) else {
      throw ImageError(.badRequest, "block size \(blockSize ?? 0) is larger than 4 MiB")
    }
    let base = try basePath.map { path throws(ImageError) in
      try ImageFile.open(path, as: "base", writable: false)
    }
    let name = try basePath.map { path throws(ImageError) in try ImageFile.absolute(path) }
    let (store, isNew) = try ImageFile.create(path)
    do throws(ImageError) {
      // Before the locks, of which one would stand in the way of the other.
      if let base { try Dscow.checkDistinct(store, base) }
      try ImageFile.lock(store: store, exclusive: true)
      if let base { try ImageFile.lock(base: base) }
      let header = try Dscow.create(
        store: store,
        base: try base.map { file throws(ImageError) in
          try disk(in: file, format: baseFormat, untrusted: untrusted)
        }, baseName: name ?? "", blockSize: blockSize, size: size,
        overwrite: force)
      if isNew { try ImageFile.flushDirectory(of: path) }
      return geometry(header)
    } catch {
      if isNew { ImageFile.remove(path) }
      throw error
    }
  }

  /// The five lines of the 2006 HowTo.
  static func geometry(_ header: DscowHeader) -> String {
    """
    Size:         \(header.size)
    First block:  \(header.firstBlock)
    Block size:   \(header.blockSize)
    Blocks:       \(header.blocks)
    Bitmap count: \(header.bitmapCount)

    """
  }

  /// Describes a store.
  package static func info(
    store path: String, json: Bool, evenInUse: Bool
  ) throws(ImageError) -> String {
    let store = try ImageFile.store(path, writable: false, evenInUse: evenInUse)
    let (header, copies) = try Dscow.header(of: store)
    let allocated = try Dscow.countBits(store, header)
    return json
      ? infoJSON(path, header, copies, allocated).lines + "\n"
      : infoText(path, header, copies, allocated)
  }

  private static func infoText(
    _ path: String, _ header: DscowHeader, _ copies: DscowHeader.CopyState, _ allocated: UInt64
  ) -> String {
    var text = "Store:        \(path)\n" + geometry(header)
    text += "Allocated:    \(allocated) blocks\n"
    text += "Header:       change \(header.sequence), \(describe(copies))\n"
    guard let base = header.base else { return text + "Base:         none\n" }
    text += "Base:         \(base.path)\n"
    text += "Base size:    \(base.size)\n"
    if base.modified != 0 { text += "Base changed: \(base.modified) ns since 1970\n" }
    return text + "Base check:   \(hexadecimal(UInt64(base.fingerprint)))\n"
  }

  /// The state of a header's copies in words.
  package static func describe(_ copies: DscowHeader.CopyState) -> String {
    switch copies {
    case .both: "both copies good"
    case .stale(let copy): "copy \(copy + 1) out of date"
    case .damaged(let copy): "copy \(copy + 1) damaged"
    }
  }

  private static func infoJSON(
    _ path: String, _ header: DscowHeader, _ copies: DscowHeader.CopyState, _ allocated: UInt64
  ) -> JSON {
    let base: JSON =
      header.base.map { base in
        .object([
          ("path", .string(base.path)), ("size", .number(base.size)),
          ("modified", .number(base.modified)),
          ("fingerprint", .number(UInt64(base.fingerprint))),
        ])
      } ?? .null
    return .object([
      ("format", .string("dscow")), ("store", .string(path)), ("size", .number(header.size)),
      ("first-block", .number(header.firstBlock)),
      ("block-size", .number(UInt64(header.blockSize))), ("blocks", .number(header.blocks)),
      ("bitmap-count", .number(header.bitmapCount)), ("allocated-blocks", .number(allocated)),
      ("sequence", .number(header.sequence)), ("header-copies", .string(describe(copies))),
      ("base", base),
    ])
  }

  /// Checks a store, with its base when a path is given.
  package static func check(
    store path: String, base: String?, baseFormat: String? = nil, untrusted: Bool = false,
    repair: Bool, json: Bool, evenInUse: Bool
  ) throws(ImageError) -> (text: String, exit: Exit) {
    let store = try ImageFile.store(path, writable: repair, evenInUse: evenInUse && !repair)
    let base = try base.map { path throws(ImageError) in
      try disk(in: try ImageFile.base(path), format: baseFormat, untrusted: untrusted)
    }
    let result = try Dscow.check(store: store, base: base, repair: repair)
    let exit: Exit =
      result.isDamaged ? .damaged : result.hasLeftovers ? .leftovers : .done
    return (json ? checkJSON(path, result).lines + "\n" : checkText(path, result), exit)
  }

  private static func checkText(_ path: String, _ result: DscowCheck) -> String {
    var text = ""
    for finding in result.findings {
      let kind = finding.isDamage ? "damage" : "leftover"
      text += "\(kind): \(finding.message)\(finding.isRepaired ? " (repaired)" : "")\n"
    }
    if let header = result.header {
      text += "\(result.allocatedBlocks) of \(header.blocks) blocks are in the store\n"
    }
    if result.isDamaged { return text + "\(path) is damaged\n" }
    if result.hasLeftovers {
      return text + "\(path) is sound; 'dscow_tool check --repair' clears the leftovers\n"
    }
    return text + "\(path) is clean\n"
  }

  private static func checkJSON(_ path: String, _ result: DscowCheck) -> JSON {
    let findings = result.findings.map { finding in
      JSON.object([
        ("damage", .bool(finding.isDamage)), ("message", .string(finding.message)),
        ("repaired", .bool(finding.isRepaired)),
      ])
    }
    return .object([
      ("store", .string(path)), ("damaged", .bool(result.isDamaged)),
      ("leftovers", .bool(result.hasLeftovers)), ("findings", .array(findings)),
      ("allocated-blocks", .number(result.allocatedBlocks)),
      ("leaked-blocks", .number(result.leakedBlocks)),
    ])
  }

  /// Says where everything is.
  package static func map(
    store path: String, json: Bool, evenInUse: Bool, to output: Output
  ) throws(ImageError) {
    let store = try ImageFile.store(path, writable: false, evenInUse: evenInUse)
    let header = try Dscow.header(of: store).header
    var isFirst = true
    output.put(json ? "[" : "Start           Length          Place  Offset there\n")
    _ = try Dscow.map(store: store) { extent in
      let unit = UInt64(header.blockSize)
      let start = extent.blocks.first * unit
      let length = min(extent.blocks.count * unit, header.size - start)
      if json {
        output.put(known: isFirst ? "\n  {\"start\": " : ",\n  {\"start\": ")
        object(start, length, extent.place, to: output)
      } else {
        line(start, length, extent.place, to: output)
      }
      isFirst = false
    }
    if json { output.put(known: "\n]\n") }
  }

  private static func words(_ place: Place) -> (name: StaticString, offset: UInt64?) {
    switch place {
    case .zero: ("zero", nil)
    case .device(Dscow.storeDevice, let sector): ("store", sector * 512)
    case .device(_, let sector): ("base", sector * 512)
    }
  }

  private static func line(
    _ start: UInt64, _ length: UInt64, _ place: Place, to output: Output
  ) {
    let (name, offset) = words(place)
    output.put(start, width: 15)
    output.put(known: " ")
    output.put(length, width: 15)
    output.put(known: " ")
    output.put(known: name)
    if let offset {
      for _ in name.utf8CodeUnitCount..<7 { output.put(known: " ") }
      output.put(offset)
    }
    output.put(known: "\n")
  }

  private static func object(
    _ start: UInt64, _ length: UInt64, _ place: Place, to output: Output
  ) {
    let (name, offset) = words(place)
    output.put(start)
    output.put(known: ", \"length\": ")
    output.put(length)
    output.put(known: ", \"place\": \"")
    output.put(known: name)
    output.put(known: "\", \"offset\": ")
    if let offset { output.put(offset) } else { output.put(known: "null") }
    output.put(known: "}")
  }

  /// Stamps a store with its base as it is now: the one its header names, or another, whose
  /// path it then keeps.
  package static func accept(
    store path: String, base: String?, baseFormat: String? = nil, untrusted: Bool = false
  ) throws(ImageError) -> String {
    let store = try ImageFile.store(path, writable: true)
    guard let known = try Dscow.header(of: store).header.base else {
      throw ImageError(.badRequest, "store \(path) has no base that could change")
    }
    guard base != nil || !untrusted else {
      throw NamedFile(role: .base, path: known.path, from: path).refusal
    }
    let basePath = try base.map { path throws(ImageError) in try ImageFile.absolute(path) }
    let file = try ImageFile.base(basePath ?? known.path)
    try Dscow.checkDistinct(store, file)
    try Dscow.accept(
      store: store, base: try disk(in: file, format: baseFormat, untrusted: untrusted),
      baseName: basePath)
    return "\(path) now belongs to \(basePath ?? known.path) as it is\n"
  }

  /// Gives a store blocks of another size, with the lines that describe it then.
  package static func reblock(
    store path: String, to blockSize: UInt64
  ) throws(ImageError) -> String {
    guard let blockSize = UInt32(exactly: blockSize) else {
      throw ImageError(.badRequest, "block size \(blockSize) is larger than 4 MiB")
    }
    let store = try ImageFile.store(path, writable: true)
    return geometry(try Dscow.reblock(store: store, to: blockSize))
  }
}
