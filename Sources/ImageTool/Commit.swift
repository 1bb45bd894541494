// SPDX-License-Identifier: Apache-2.0
// dmu-img commit and rebase.
//
// Commit: the base is written, and durable, before the image gives anything up; until then the
// image shows the same whatever of the base was written. Rebase: whatever the image would no
// longer show is copied into it, and durable, before it names another base.

import BlockIO
package import DiskFormats
import Glibc
package import SystemIO

extension ImageTool {
  private static let piece = 1 << 20

  /// Writes everything that an image has into its base. The image is empty afterwards, unless
  /// `keep`.
  package static func commit(
    _ source: ImageSource, keep: Bool, progress: Progress, quiet: Bool, to output: Output
  ) throws(ImageError) {
    let store = try source.open(writable: true)
    let decision = try source.decision(of: store)
    let kind = decision.kind
    let format = kind.format
    let names = try format.names(in: store)
    guard let path = names.base else {
      throw ImageError(.badRequest, "\(source.path) has no base to commit into")
    }
    try decision.checkMayName(path, store)
    try format.refuseSnapshots(store, "committed into its base")
    if !keep { try format.checkCanEmpty(store) }
    guard !source.untrusted else {
      throw NamedFile(role: .base, path: path, from: store.name).refusal
    }
    let base = try ImageFile.store(ImageSource.beside(source.path, path), writable: true)
    guard try !Dscow.same(base, store) else {
      throw ImageError(.corrupt, "\(source.path) is its own base")
    }
    let below = try FormatDecision.decide(
      FormatStatement(try source.baseKind(), named: names.baseFormat), of: base,
      among: source.formats)
    guard !below.isGuessed else {
      throw ImageError(
        .unsupported,
        "base \(base.name) begins like an image of format \(below.kind), but nobody says "
          + "that it is one: give its format with --base-format")
    }
    try commit(
      store, kind, into: base, below.kind, keep: keep, progress: progress, among: source.formats,
      resolve: ImageSource.resolver(writing: [store.name, base.name], untrusted: false))
    progress.finish()
    if !quiet { output.put("Image committed.\n") }
  }

  /// As the other, for stores that are open and locked.
  static func commit(
    _ store: any ByteStore, _ kind: ImageKind, into base: any ByteStore, _ baseKind: ImageKind,
    keep: Bool, progress: Progress, among formats: FormatList = .all,
    resolve: Chain.Resolver
  ) throws(ImageError) {
    func disk() throws(ImageError) -> any ByteStore {
      baseKind == .raw
        ? base
        : try Chain(base, kind: baseKind, among: formats, resolve: resolve).layers().flat()
    }
    let link = try ChainLink(store, FormatDecision(kind: kind), resolve: resolve)
    // The image by itself: what it has of its own.
    let top = try link.layer(over: try disk())
    let isShort = try disk().size < top.size
    guard !isShort || baseKind != .raw || !base.isFixedSize else {
      throw ImageError(
        .badRequest,
        "base \(base.name) is a device of \(base.size) bytes, and \(store.name) has \(top.size): "
          + "make the device longer, or the image shorter")
    }
    try kind.format.beginCommit(of: store, into: try disk())
    var hasWritten = false
    do throws(ImageError) {
      try fillBase(
        base, baseKind, from: top, of: store, kind, isShort: isShort, progress, formats, resolve,
        &hasWritten)
    } catch {
      // A base that was not written yet is as the image knows it.
      if !hasWritten { try kind.format.cancelCommit(of: store) }
      throw error
    }
    try kind.format.endCommit(link.parts(over: try disk()), emptying: !keep)
  }

  /// Writes what an image has of its own into its base, which is durable then. `hasWritten`:
  /// whether the base may differ from what it was.
  private static func fillBase(
    _ base: any ByteStore, _ baseKind: ImageKind, from top: ImageLayer, of store: any ByteStore,
    _ kind: ImageKind, isShort: Bool, _ progress: Progress, _ formats: FormatList,
    _ resolve: Chain.Resolver, _ hasWritten: inout Bool
  ) throws(ImageError) {
    let next = try kind.format.nextContentID(of: base, for: store)
    if isShort {
      hasWritten = true
      try Kinds.resize(
        base, FormatDecision(kind: baseKind), among: formats, to: top.size, contentID: next,
        resolve: resolve)
    }
    let target = try Chain(base, kind: baseKind, among: formats, resolve: resolve)
      .disk(writable: true, contentID: next)
    hasWritten = true
    try kind.format.adopt(base: base, of: store)
    let writer = ImageWriter(target, store: base, devices: target.devices ?? [base])
    try copyOwn(top, writer, progress)
    try writer.commit()
  }

  /// Writes what an image has of its own to another disk.
  private static func copyOwn(
    _ top: ImageLayer, _ writer: ImageWriter, _ progress: Progress
  ) throws(ImageError) {
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: piece, alignment: 4096)
    defer { buffer.deallocate() }
    if progress.isOn { progress.expect(try bytes(of: top) { $0.isData }) }
    var offset: UInt64 = 0
    while offset < top.size {
      let (content, count) = try top.run(
        at: offset, limit: min(UInt64(piece), top.size - offset))
      switch content {
      case .absent: break
      case .zero: try writer.zero(at: offset, count: count)
      case .data(let store, let place), .made(let store, let place):
        let part = UnsafeMutableRawBufferPointer(rebasing: buffer[..<Int(count)])
        try toolIO { () throws(IOError) in try store.read(part, at: place) }
        try writer.write(UnsafeRawBufferPointer(part), at: offset)
      }
      offset += count
      if content.isData { progress.advance(count) }
    }
  }

  /// How many bytes of an image are of some kind.
  private static func bytes(
    of image: ImageLayer, where isCounted: (ImageLayer.Content) -> Bool
  ) throws(ImageError) -> UInt64 {
    var bytes: UInt64 = 0
    var offset: UInt64 = 0
    while offset < image.size {
      let (content, count) = try image.run(at: offset, limit: image.size - offset)
      if isCounted(content) { bytes += count }
      offset += count
    }
    return bytes
  }

  /// Puts an image over another base, or none.
  ///
  /// - Parameter unsafe: only the name is changed; whether the image shows the same is the
  ///   caller's to know.
  package static func rebase(
    _ source: ImageSource, base path: String?, baseFormat: String?, unsafe: Bool,
    progress: Progress
  ) throws(ImageError) {
    let store = try source.open(writable: true)
    let decision = try source.decision(of: store)
    let kind = decision.kind
    let format = kind.format
    try format.checkCanRebase(store)
    if !unsafe { try format.refuseSnapshots(store, "given another base") }
    if let path = try format.names(in: store).base {
      try decision.checkMayName(path, store)
    }
    var new: NewImage.Base?
    if let path {
      do throws(ImageError) {
        new = try openBase(
          path, baseFormat, for: source.path, kind: kind, untrusted: source.untrusted,
          among: source.formats)
      } catch {
        // A name alone need not lead anywhere yet, where the image keeps no more than that.
        guard unsafe, format.keepsBaseNameOnly, baseFormat != nil, error.cause?.code == ENOENT
        else { throw error }
        return try format.rename(base: NamedBase(path: path, format: baseFormat), of: store)
      }
    }
    if let new, try Dscow.same(new.file, store) {
      throw ImageError(.badRequest, "\(source.path) cannot be its own base")
    }
    let resolve = ImageSource.resolver(writing: [store.name], untrusted: source.untrusted)
    try rebase(
      store, kind, onto: new.map { ($0.path, $0.kind, $0.disk) }, format: baseFormat,
      oldKind: try source.baseKind(), unsafe: unsafe, progress: progress, among: source.formats,
      resolve: resolve)
    progress.finish()
  }

  /// As the other, for stores that are open and locked.
  static func rebase(
    _ store: any ByteStore, _ kind: ImageKind,
    onto new: (path: String, kind: ImageKind, disk: any ByteStore)?, format: String?,
    oldKind: ImageKind? = nil, unsafe: Bool, progress: Progress,
    among formats: FormatList = .all, resolve: Chain.Resolver
  ) throws(ImageError) {
    if !unsafe { try inherit(store, kind, oldKind, new?.disk, progress, formats, resolve) }
    let base = new.map { NamedBase(path: $0.path, format: format ?? $0.kind.name, disk: $0.disk) }
    try kind.format.rename(base: base, of: store)
  }

  /// Copies into an image what it shows of its base and would not show of another.
  private static func inherit(
    _ store: any ByteStore, _ kind: ImageKind, _ baseKind: ImageKind?, _ new: (any ByteStore)?,
    _ progress: Progress, _ formats: FormatList, _ resolve: Chain.Resolver
  ) throws(ImageError) {
    let chain = try Chain(
      store, FormatDecision(kind: kind), baseKind: baseKind, among: formats, resolve: resolve)
    let old = try chain.below?.layers().flat()
    let image = try chain.top.layer(over: old, writable: true)
    let writer = ImageWriter(image.format, store: store, devices: image.devices)
    let unit = max(4096, min(Int(image.format.blockSize), piece))
    let worker = try ChunkWorker(chunk: piece, unit: unit, compression: nil)
    if progress.isOn { progress.expect(try bytes(of: image) { $0.isAbsent }) }
    var offset: UInt64 = 0
    while offset < image.size {
      let start = offset
      let next = (start / UInt64(piece) + 1) * UInt64(piece)
      let (content, count) = try image.run(at: start, limit: min(image.size, next) - start)
      offset += count
      guard content.isAbsent else { continue }
      progress.advance(count)
      func pieces(_ disk: (any ByteStore)?) -> [DiskReader.Piece] {
        guard let disk, disk.size > start else { return [] }
        let count = Int(min(count, disk.size - start))
        return [DiskReader.Piece(store: disk, place: start, at: 0, count: count)]
      }
      try worker.read(pieces(old), count: Int(count))
      for part in try worker.differing(from: pieces(new), count: Int(count)) {
        switch part {
        case .zero(let at, let length):
          let length = min(length, Int(count) - at)
          try writer.zero(at: start + UInt64(at), count: UInt64(length))
        case .data(let at, let length):
          let length = min(length, Int(count) - at)
          try writer.write(
            UnsafeRawBufferPointer(rebasing: worker.buffer[at..<(at + length)]),
            at: start + UInt64(at))
        case .compressed: preconditionFailure("nothing is compressed here")
        }
      }
    }
    try writer.commit()
  }
}

extension ImageLayer.Content {
  /// Whether the image has bytes of its own here.
  fileprivate var isData: Bool {
    switch self {
    case .data, .made: true
    case .zero, .absent: false
    }
  }

  /// Whether the image says nothing here.
  fileprivate var isAbsent: Bool {
    if case .absent = self { true } else { false }
  }
}
