// SPDX-License-Identifier: Apache-2.0
// What may stand after -o, for a shell to complete.

package import ImageFormats

extension ImageOptions {
  /// An option by its name, and its values where they are few.
  package typealias Known = (name: String, values: [String])

  private static let switches = ["on", "off"]

  /// The options that every format has, for `qemu-img`'s users: those of -b, -F and the size.
  package static let common: [Known] = [
    ("backing_file", []), ("backing_fmt", ImageKind.names), ("size", []),
  ]

  /// The further options that a new image of a format may be given. The readers in `Kinds` are the
  /// authority; a test compares.
  package static func known(of kind: ImageKind) -> [Known] {
    switch kind {
    case .raw: [("preallocation", ["off", "falloc", "full"])]
    case .dscow: [("block_size", [])]
    case .qcow: []
    case .qcow2:
      [
        ("compat", ["v2", "v3"]), ("cluster_size", []), ("compression_type", ["zlib", "zstd"]),
        ("data_file", []), ("data_file_raw", switches), ("extended_l2", switches),
        ("lazy_refcounts", switches),
        ("preallocation", ["off", "metadata", "falloc", "full"]), ("refcount_bits", []),
      ]
    case .vhd: [("subformat", ["dynamic", "fixed"]), ("block_size", [])]
    case .vmdk:
      [
        ("subformat", VmdkSubformat.allCases.map(\.rawValue)),
        ("adapter_type", ["ide", "lsilogic", "buslogic", "legacyESX"]),
      ]
    }
  }

  /// What `text`, a list as after -o that may be incomplete, can go on as.
  package static func completions(of text: String, for kind: ImageKind) -> [String] {
    let start = text.lastIndex(of: ",").map(text.index(after:)) ?? text.startIndex
    let before = text[..<start]
    let all = known(of: kind) + common
    guard let equals = text[start...].firstIndex(of: "=") else {
      return all.map { "\(before)\($0.name)=" }
    }
    let name = text[start..<equals]
    let values = all.first { $0.name == name }?.values ?? []
    return values.map { "\(before)\(name)=\($0)" }
  }
}
