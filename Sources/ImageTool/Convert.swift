// SPDX-License-Identifier: Apache-2.0
// dmu-img convert: an image, or several one after the other, into another format.
//
// Threads take chunks of the disk in turn. Each reads its chunk, finds what is zeroes, and
// compresses, all at the same time as the others; then, in the order of the disk, gives what is
// left a place; and writes it, again at the same time. So the outcome does not depend on how
// many threads there were. The target has no name, or is not an image, before it is whole.

import BlockIO
package import DiskFormats
import Glibc
import SystemIO

extension ImageTool {
  /// What `convert` is asked for.
  package struct ConvertRequest: Sendable {
    /// The image to read.
    package var source: ImageSource
    /// The internal snapshot to read instead of the disk.
    package var snapshot: String?
    /// The file to write, or a device.
    package var target: String
    /// Its format by name.
    package var format = "raw"
    /// What stands after -o.
    package var options: [String] = []
    /// The base that the target shall have; only what differs from it is copied.
    package var base: String?
    /// Its format by name.
    package var baseFormat: String?
    /// Whether clusters are compressed.
    package var compress = false
    /// Runs of zeroes of so many bytes are left out; 0: everything is written.
    package var sparse: UInt64 = 4096
    /// Whether the target is there already, and only written to.
    package var intoExisting = false
    /// Whether an existing target reads as zeroes.
    package var targetIsZero = false
    /// Whether the kernel copies, where both are plain files.
    package var offload = false
    /// How many threads; nil: one a processor, and four at least.
    package var threads: Int?
    /// Whether the target is on the medium on return.
    package var durable = true
    /// Whether to show how far it is.
    package var progress: Progress

    /// A request to convert one file to another.
    package init(_ source: ImageSource, target: String, progress: Progress = Progress(on: false)) {
      self.source = source
      self.target = target
      self.progress = progress
    }
  }

  /// Converts an image.
  package static func convert(_ request: ConvertRequest) throws(ImageError) {
    let chain = try request.source.layers(snapshot: request.snapshot)
    let formats = request.source.formats
    let kind = try formats.stated(request.format)
    guard !request.compress || kind.format.canCompress, !(request.compress && request.intoExisting)
    else {
      throw ImageError(
        .badRequest,
        "-c: only a new qcow2 image is compressed: say -O qcow2, without -n")
    }
    var options = try ImageOptions(request.options, for: kind)
    let basePath = request.base ?? options.take("backing_file")
    let baseFormat = request.baseFormat ?? options.take("backing_fmt")
    let base = try basePath.map { path throws(ImageError) in
      try openBase(
        path, baseFormat, for: request.target, kind: kind, untrusted: request.source.untrusted,
        among: formats)
    }
    let wanted = try options.bytes("size")
    let size = wanted ?? chain.size
    guard size >= chain.size else {
      throw ImageError(
        .badRequest, "size=\(size) is less than the \(chain.size) bytes of \(request.source.path)")
    }
    let image = NewImage(kind: kind, size: size, base: base, options: options)
    let files = try TargetFiles(request, sources: chain.layers.map(\.store))
    do throws(ImageError) {
      let target = try Kinds.target(image, request, files)
      let job = try ConvertJob(
        request, chain, base: base.map { ($0.kind, $0.file, $0.disk) }, target)
      let isCopied =
        request.offload ? try offload(chain, image, files, request.progress) : false
      if !isCopied { try job.run() }
      try target.finish(durable: request.durable)
      try files.publish(durable: request.durable)
    } catch {
      files.abandon()
      throw error
    }
    request.progress.finish()
  }

  /// Has the kernel copy what of a plain file is no hole; false where it cannot.
  private static func offload(
    _ chain: Layers, _ image: NewImage, _ files: TargetFiles, _ progress: Progress
  ) throws(ImageError) -> Bool {
    guard image.kind == .raw, chain.layers[0].kind == .raw, files.isZero,
      let source = chain.layers[0].store.file, !source.isBlockDevice
    else {
      throw ImageError(
        .badRequest, "-C: the kernel copies from a raw file into a new raw file: leave it out")
    }
    var offset: UInt64 = 0
    let piece: UInt64 = 64 << 20
    do throws(IOError) {
      if progress.isOn {
        var bytes: UInt64 = 0
        while let data = try source.nextData(from: offset) {
          bytes += UInt64(data.count)
          offset = data.upperBound
        }
        progress.expect(bytes)
        offset = 0
      }
      while let data = try source.nextData(from: offset) {
        offset = data.lowerBound
        let count = min(piece, data.upperBound - offset)
        try files.store.copy(from: source, at: offset, to: offset, count: count)
        offset += count
        progress.advance(count)
      }
    } catch {
      // Between these two file systems it does not go.
      guard [EXDEV, EOPNOTSUPP, ENOSYS, EINVAL].contains(error.code) else {
        throw ImageError(error)
      }
      return false
    }
    return true
  }
}

/// The files that a conversion writes: unnamed until they are whole, or there already.
final class TargetFiles {
  /// The image.
  let store: FileStore
  /// Whether it reads as zeroes to begin with.
  let isZero: Bool
  private var pending: [PendingFile] = []
  private var replaced: [FileStore] = []
  private let sources: [any ByteStore]
  /// What was made beside the image, by path: nobody else can open it yet.
  private(set) var made: [String: FileStore] = [:]

  init(
    _ request: ImageTool.ConvertRequest, sources: [any ByteStore]
  ) throws(ImageError) {
    self.sources = sources
    let path = request.target
    if let there = try Self.existing(path) {
      try Self.refuse(there, sources)
      try ImageFile.lock(store: there, exclusive: true)
      replaced.append(there)
      if request.intoExisting || there.isBlockDevice {
        store = there
        isZero = request.targetIsZero
        return
      }
    } else if request.intoExisting {
      throw ImageError(.io, "store \(path) does not exist: leave out -n to have it made")
    }
    let file = try toolIO { () throws(IOError) in try PendingFile(path: path) }
    pending.append(file)
    store = file.store
    isZero = true
  }

  private static func existing(_ path: String) throws(ImageError) -> FileStore? {
    do throws(IOError) {
      return try FileStore(path: path, writable: true)
    } catch {
      guard error.code != ENOENT else { return nil }
      throw ImageFile.failure(error, toOpen: path, as: "target", ifMissing: "")
    }
  }

  private static func refuse(
    _ store: FileStore, _ sources: [any ByteStore]
  ) throws(ImageError) {
    for source in sources where try Dscow.same(source, store) {
      throw ImageError(
        .badRequest, "\(store.name) is being read from: convert into another file")
    }
  }

  /// Makes another file that the image needs. A file that somebody uses is not replaced.
  func make(_ path: String) throws(ImageError) -> FileStore {
    if let there = try Self.existing(path) {
      try Self.refuse(there, sources + [store])
      try ImageFile.lock(store: there, exclusive: true)
      // The lock is kept until the new file has the name.
      replaced.append(there)
      if there.isBlockDevice {
        made[path] = there
        return there
      }
    }
    let file = try toolIO { () throws(IOError) in try PendingFile(path: path) }
    pending.append(file)
    made[path] = file.store
    return file.store
  }

  /// Gives the files their names, the image last.
  func publish(durable: Bool) throws(ImageError) {
    for file in pending.reversed() {
      try toolIO { () throws(IOError) in try file.publish(durable: durable) }
    }
  }

  /// Whatever was begun goes.
  func abandon() { pending = [] }
}
