// SPDX-License-Identifier: Apache-2.0
// dmu-img create, resize, snapshot.

import BlockIO
package import DiskFormats
package import SystemIO

/// The commands of dmu-img. Each throws `ImageError`; what it prints goes to an `Output`.
package enum ImageTool {}

extension ImageTool {
  /// What `create` is asked for.
  package struct CreateRequest: Sendable {
    /// The file to make, or a device.
    package var path: String
    /// The format by name.
    package var format = "raw"
    /// Length of the disk in bytes; unless given, that of the base.
    package var size: UInt64?
    /// The base's path, as the image shall say it.
    package var base: String?
    /// Its format by name.
    package var baseFormat: String?
    /// What stands after -o.
    package var options: [String] = []
    /// Whether nothing is printed.
    package var quiet = false
    /// Whether no file that the base names is opened.
    package var untrusted = false
    /// The formats that there are.
    package var formats = FormatList.all

    /// A request for an image at a path.
    package init(path: String) { self.path = path }
  }

  /// Makes an image.
  package static func create(
    _ request: CreateRequest, to output: Output
  ) throws(ImageError) {
    let kind = try request.formats.stated(request.format)
    var options = try ImageOptions(request.options, for: kind)
    let basePath = request.base ?? options.take("backing_file")
    let baseFormat = request.baseFormat ?? options.take("backing_fmt")
    let base = try basePath.map { path throws(ImageError) in
      try openBase(
        path, baseFormat, for: request.path, kind: kind, untrusted: request.untrusted,
        among: request.formats)
    }
    let sizeOption = try options.bytes("size")
    guard let size = request.size ?? sizeOption ?? base?.disk.size else {
      throw ImageError(
        .badRequest, "image \(request.path) needs a size: dmu-img create -f FORMAT FILE SIZE")
    }
    let image = NewImage(kind: kind, size: size, base: base, options: options)
    var made: [String] = []
    do throws(ImageError) {
      try write(image, to: request.path, &made)
    } catch {
      for path in made { ImageFile.remove(path) }
      throw error
    }
    guard !request.quiet else { return }
    output.put("Made '\(request.path)', format=\(kind.name) size=\(size)")
    if let base { output.put(" base=\(base.path) base-format=\(base.kind.name)") }
    output.put("\n")
  }

  private static func write(
    _ image: NewImage, to path: String, _ made: inout [String]
  ) throws(ImageError) {
    var fresh: [String] = []
    func open(_ path: String) throws(ImageError) -> FileStore {
      let (store, isNew) = try ImageFile.create(path)
      if isNew { fresh.append(path) }
      if let base = image.base, try Dscow.same(store, base.file) {
        throw ImageError(.badRequest, "\(path) cannot be its own base")
      }
      try ImageFile.lock(store: store, exclusive: true)
      return store
    }
    defer { made = fresh }
    let store = try open(path)
    try image.kind.format.create(image, in: store) { file throws(ImageError) in
      try open(ImageSource.beside(path, file))
    }
    for path in fresh { try ImageFile.flushDirectory(of: path) }
  }

  /// Opens a base, whose path stands, or shall stand, in an image. `untrusted`: no file that the
  /// base names is opened.
  static func openBase(
    _ path: String, _ format: String?, for image: String, kind: ImageKind, untrusted: Bool,
    among formats: FormatList
  ) throws(ImageError) -> NewImage.Base {
    guard let format else {
      throw ImageError(
        .badRequest,
        "base \(path): backing file given without its format, and guesses are not written down: "
          + "say which it has (-F raw, -F qcow2, ...)")
    }
    let known = try formats.stated(format)
    let real = ImageSource.beside(image, path)
    let file = try ImageFile.base(real)
    let layers = try Chain(
      file, kind: known, among: formats, resolve: ImageSource.resolver(untrusted: untrusted)
    ).layers()
    // What daemons open they open from wherever they are.
    let name = kind.format.wantsAbsoluteBase ? try ImageFile.absolute(real) : path
    return (name, known, file, layers.flat())
  }

  /// Gives a disk another length: a number of bytes, or how many more (+) or fewer (-).
  ///
  /// - Parameter shrink: must be said for a length that is less than now.
  package static func resize(
    _ source: ImageSource, size words: String, shrink: Bool, quiet: Bool, to output: Output
  ) throws(ImageError) {
    let sign = words.first.flatMap { $0 == "+" || $0 == "-" ? $0 : nil }
    guard let amount = ImageFile.bytes(sign == nil ? words : String(words.dropFirst())) else {
      throw ImageError(
        .badRequest,
        "'\(words)' is no size: write SIZE, +SIZE or -SIZE, where SIZE is \(ImageFile.sizeHelp)")
    }
    let store = try source.open(writable: true)
    let decision = try source.decision(of: store)
    let old = try decision.kind.format.info(of: store).size
    let (size, overflow): (UInt64, Bool)
    switch sign {
    case "+": (size, overflow) = old.addingReportingOverflow(amount)
    case "-": (size, overflow) = old.subtractingReportingOverflow(amount)
    default: (size, overflow) = (amount, false)
    }
    guard !overflow, size > 0 else {
      throw ImageError(.badRequest, "\(source.path) has \(old) bytes: it cannot be given \(words)")
    }
    guard size >= old || shrink else {
      throw ImageError(
        .badRequest,
        "\(source.path) would lose everything from byte \(size) to \(old): "
          + "say --shrink if nothing there is needed")
    }
    try Kinds.resize(
      store, decision, baseKind: try source.baseKind(), among: source.formats, to: size,
      resolve: ImageSource.resolver(writing: [store.name], untrusted: source.untrusted))
    if !quiet { output.put("Image resized.\n") }
  }

  /// Lists internal snapshots.
  package static func listSnapshots(
    _ source: ImageSource, json: Bool, to output: Output
  ) throws(ImageError) {
    let store = try source.open()
    let snapshots = try source.decision(of: store).kind.format.snapshots(of: store)
    if json {
      output.put(JSON.array(snapshots.map(snapshot)).indented + "\n")
    } else if !snapshots.isEmpty {
      output.put("Snapshot list:\n")
      put(snapshots, to: output)
    }
  }

  static func snapshot(_ snapshot: Qcow2Snapshot) -> JSON {
    .object([
      ("id", .string(snapshot.id)), ("name", .string(snapshot.name)),
      ("date-sec", .number(UInt64(snapshot.seconds))),
      ("vm-state-size", .number(snapshot.stateSize)), ("disk-size", .number(snapshot.diskSize)),
    ])
  }

  static func put(_ snapshots: [Qcow2Snapshot], to output: Output) {
    output.put("ID        TAG               VM SIZE                DATE            DISK SIZE\n")
    for snapshot in snapshots {
      output.put(
        Words.left(snapshot.id, 9) + " " + Words.left(snapshot.name, 16)
          + Words.right(Words.size(snapshot.stateSize), 9) + " "
          + Words.right(Words.date(snapshot.seconds), 19) + " "
          + Words.right(Words.size(snapshot.diskSize), 16) + "\n")
    }
  }
}
