// SPDX-License-Identifier: Apache-2.0
// The list of formats. Whatever opens images by more than one format takes such a list, so that
// a test can have another; programs have the one that is built in.

package import BlockIO
import SystemIO

/// A format as a value, which is compared and handed on.
package struct ImageKind: Sendable, Hashable, CustomStringConvertible {
  /// The format itself.
  package let format: any DiskFormat.Type

  /// A format as a value.
  package init(_ format: any DiskFormat.Type) { self.format = format }

  /// The name that images and `qemu-img` give it.
  package var name: String { format.name }
  /// The name.
  package var description: String { name }

  /// Whether both are the same format.
  package static func == (one: ImageKind, other: ImageKind) -> Bool {
    one.format == other.format
  }

  /// Hashes the type.
  package func hash(into hasher: inout Hasher) { hasher.combine(ObjectIdentifier(format)) }
}

/// The formats that there are.
package struct FormatList: Sendable {
  /// The built-in ones. A new one is a line here.
  package static let all = FormatList([
    RawFormat.self, DscowFormat.self, QcowFormat.self, Qcow2Format.self, VhdFormat.self,
    VmdkFormat.self,
  ])

  /// The formats, in the order in which they are named and asked. No two claim the same bytes.
  package let kinds: [ImageKind]

  /// A list of formats.
  package init(_ formats: [any DiskFormat.Type]) { kinds = formats.map { ImageKind($0) } }

  /// The list with more at its end.
  package func adding(_ formats: any DiskFormat.Type...) -> FormatList {
    FormatList(kinds.map(\.format) + formats)
  }

  /// The names by which a format may be given, those of specs included.
  package var names: [String] {
    Set(kinds.flatMap { [$0.format.name, $0.format.specName] }).sorted()
  }

  /// The format with a name, as images or as specs give it.
  package func named(_ name: String) -> ImageKind? {
    kinds.first { $0.format.name == name || $0.format.specName == name }
  }

  /// The format that a person names. Throws `badRequest` for one that is not known, with the
  /// names that there are.
  package func stated(_ name: String) throws(ImageError) -> ImageKind {
    if let kind = named(name) { return kind }
    let known = kinds.map(\.name).joined(separator: ", ")
    throw ImageError(.badRequest, "format '\(name)' is unknown: use one of \(known)")
  }

  /// The format that an image names as that of its base.
  func ofBase(named word: String) -> ImageKind? {
    kinds.first { $0.format.baseWords.contains(word) }
  }

  /// What a store's bytes say it is; `raw` for what begins like nothing that is known.
  ///
  /// - Throws: `unsupported` for a format that is known and not read, by its name; `corrupt`
  ///   for an image whose header is damaged; `io`.
  package func probe(_ store: any ByteStore) throws(ImageError) -> ImageKind {
    let bytes = try io { () throws(IOError) in
      try store.read(at: 0, count: ForeignFormat.reach)
    }
    if let kind = kinds.first(where: { $0.format.isBeginning(bytes) }) { return kind }
    for kind in kinds where try kind.format.isImage(store) { return kind }
    if let name = try ForeignFormat.name(of: bytes, store) {
      throw ImageError(
        .unsupported,
        "\(store.name) is of format \(name), which is not read here: convert or unpack it first, "
          + "or, if its bytes are the disk, say that it is raw (-f raw, base-format=raw)")
    }
    return .raw
  }
}
