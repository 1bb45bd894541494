// SPDX-License-Identifier: Apache-2.0
// Opening images by path, with what stands under them: for a tool that a person runs, paths
// that stand in images are followed as that person could follow them.

import BlockIO
package import DiskFormats

/// A file as a command names it.
package struct ImageSource: Sendable {
  /// Its path.
  package var path: String
  /// Its format by name; nil to look at its first bytes.
  package var format: String?
  /// The format of its base by name, whatever the image says of that.
  package var baseFormat: String?
  /// Whether it may be in use by a running disk.
  package var evenInUse: Bool
  /// Whether no file that it, or an image under it, names is opened.
  package var untrusted: Bool
  /// The formats that there are.
  package var formats = FormatList.all

  /// A file as a command names it.
  package init(
    _ path: String, format: String? = nil, baseFormat: String? = nil, evenInUse: Bool = false,
    untrusted: Bool = false
  ) {
    self.path = path
    self.format = format
    self.baseFormat = baseFormat
    self.evenInUse = evenInUse
    self.untrusted = untrusted
  }

  /// Opens and locks the file. Throws `io`, `badRequest` when it is in use.
  func open(writable: Bool = false) throws(ImageError) -> FileStore {
    try ImageFile.store(path, writable: writable, evenInUse: evenInUse)
  }

  /// Its format: the one that was named, or the one that its first bytes say.
  func decision(of store: any ByteStore) throws(ImageError) -> FormatDecision {
    try .decide(FormatStatement(try kind()), of: store, among: formats)
  }

  /// Its format, if that was named. Throws `badRequest` for one that is not known.
  func kind() throws(ImageError) -> ImageKind? { try kind(format) }

  /// The format of its base, if that was named. Throws as `kind`.
  func baseKind() throws(ImageError) -> ImageKind? { try kind(baseFormat) }

  private func kind(_ name: String?) throws(ImageError) -> ImageKind? {
    guard let name else { return nil }
    return try formats.stated(name)
  }

  /// Opens it for reading with everything under it.
  func layers(snapshot: String? = nil) throws(ImageError) -> Layers {
    let store = try open()
    return try Chain(
      store, kind: try kind(), baseKind: try baseKind(), among: formats,
      resolve: ImageSource.resolver(evenInUse: evenInUse, untrusted: untrusted)
    ).layers(snapshot: snapshot)
  }

  /// Opens the paths that stand in images: relative ones from the image's folder. The files
  /// that hold the data of the stores in `writing`, by name, are opened for that. `untrusted`:
  /// every path is refused.
  static func resolver(
    evenInUse: Bool = false, writing: Set<String> = [], untrusted: Bool
  ) -> Chain.Resolver {
    { request throws(ImageError) in
      if untrusted { throw request.refusal }
      let path = beside(request.from, request.path)
      do throws(ImageError) {
        guard request.role == .base else {
          return try ImageFile.store(
            path, writable: writing.contains(request.from), evenInUse: evenInUse)
        }
        return evenInUse
          ? try ImageFile.store(path, writable: false, evenInUse: true)
          : try ImageFile.base(path)
      } catch {
        throw ImageError(
          error.code, "\(error.message) (\(request.role.rawValue) of \(request.from))",
          cause: error.cause)
      }
    }
  }

  /// A path as it is meant by a file: from that file's folder, unless it is absolute.
  static func beside(_ file: String, _ path: String) -> String {
    var path = path
    for prefix in ["file:", "json:"] where path.hasPrefix(prefix) {
      if prefix == "file:" { path = String(path.dropFirst(prefix.utf8.count)) }
    }
    guard !path.hasPrefix("/"), let slash = file.lastIndex(of: "/") else { return path }
    return String(file[...slash]) + path
  }
}
