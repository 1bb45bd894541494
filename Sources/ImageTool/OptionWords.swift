// SPDX-License-Identifier: Apache-2.0
// What may stand after -o, for a shell to complete.

package import DiskFormats

extension ImageOptions {
  /// The options that every format has, for `qemu-img`'s users: those of -b, -F and the size.
  package static let common: [Known] = [
    ("backing_file", []), ("backing_fmt", FormatList.all.names), ("size", []),
  ]

  /// The further options that a new image of a format may be given. What the format reads is the
  /// authority; a test compares.
  package static func known(of kind: ImageKind) -> [Known] { kind.format.options }

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
