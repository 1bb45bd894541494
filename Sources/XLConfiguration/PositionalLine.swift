// SPDX-License-Identifier: Apache-2.0
// Disk lines of xm: SPEC,VDEV,MODE. xl takes the second field for a format and refuses them.

/// A disk line that begins with a dmu spec and names no script.
package struct PositionalLine: Sendable, Hashable {
  /// The first field: `dmu:FORMAT:STORE:BASE`, as it stands.
  package let spec: String
  /// The disk's name in the guest, such as `xvda`.
  package let vdev: String
  /// What the guest may do: `w`, `r` or another word, which xl judges; nil: none was said.
  package let mode: String?
  /// Further parameters of xl, `KEY=VALUE` or `KEY`, as they stand.
  package let parameters: [String]

  /// Reads a line in one of two forms, with blanks around its fields:
  ///
  ///     SPEC,VDEV[:disk|:cdrom][,MODE][,PARAMETER…]
  ///     SPEC,[FORMAT],VDEV[,MODE][,PARAMETER…]
  ///
  /// nil for what is no such line: it begins otherwise, names a script, or has no VDEV. A comma of
  /// a path is `%2C` in a spec.
  /// Source: xl-disk-configuration(5); the lines of xm.
  package init?(_ text: String) {
    var fields = text.split(separator: ",", omittingEmptySubsequences: false)
      .map { Self.trimmed($0) }
    guard fields[0].hasPrefix("dmu:") else { return nil }
    spec = fields.removeFirst()
    var positions: [String] = []
    var parameters: [String] = []
    for field in fields {
      if field.contains("=") || Self.flags.contains(field) {
        parameters.append(field)
      } else if parameters.isEmpty {
        positions.append(field)
      } else {
        return nil
      }
    }
    guard !parameters.contains(where: { $0.hasPrefix("script=") || $0.hasPrefix("target=") })
    else { return nil }
    if let format = positions.first, format.isEmpty || Self.formats.contains(format) {
      positions.removeFirst()
    }
    guard (1...2).contains(positions.count), Self.isWord(positions[0]) else { return nil }
    let device = positions[0].split(separator: ":", omittingEmptySubsequences: false)
    switch device.count {
    case 1: break
    case 2 where device[1] == "disk": break
    case 2 where device[1] == "cdrom": parameters.append("devtype=cdrom")
    default: return nil
    }
    vdev = String(device[0])
    mode = positions.count == 2 && !positions[1].isEmpty ? positions[1] : nil
    self.parameters = parameters
  }

  /// The line that says the same to xl. `target=` comes last: it takes the rest of the line.
  package var rewritten: String {
    (["script=block-dmu", "vdev=\(vdev)"] + access + parameters + ["target=\(spec)"])
      .joined(separator: ",")
  }

  private var access: [String] {
    switch mode {
    case nil: []
    case "w": ["access=rw"]
    case "r": ["access=ro"]
    case let word?: ["access=\(word)"]
    }
  }

  /// What xl takes for a format. Source: xl-disk-configuration(5).
  private static let formats: Set<String> = ["raw", "qcow", "qcow2", "vhd", "qed"]
  /// Parameters of xl without a value. Source: the same.
  private static let flags: Set<String> = [
    "cdrom", "discard", "no-discard", "direct-io-safe", "colo",
  ]

  private static func trimmed(_ field: Substring) -> String {
    let isBlank = { (character: Character) in character == " " || character == "\t" }
    var rest = field.drop(while: isBlank)
    while let last = rest.last, isBlank(last) { rest.removeLast() }
    return String(rest)
  }

  /// Whether a field can be the name of a disk.
  private static func isWord(_ field: String) -> Bool {
    !field.isEmpty && field != ":"
      && field.allSatisfy { $0.isASCII && ($0.isLetter || $0.isNumber || $0 == ":") }
      && field.first != ":"
  }
}
