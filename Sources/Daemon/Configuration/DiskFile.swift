// SPDX-License-Identifier: Apache-2.0
// Named disks that come back when the host has booted: one small TOML file for each, NAME.toml in
// the folder disks.d beside the configuration (/etc/dmu-xen/disks.d).
//
//     spec = "dmu:dscow:/srv/data.dscow:/dev/vg/base"
//     read-only = true                                        # default: false
//     owner = "8c7e6ac0-4b2b-4b5c-9f6e-0a4c4d1f2e3b"          # default: nobody
//     probe = true                                            # default: false
//     active = false                                          # default: true
//
// dmu-xen reads and writes them; dmu-xend, which may not write below /etc, does not know of them.

import Glibc
internal import SystemIO
internal import TOMLKit

/// The folder of named disks that are kept over a reboot. All calls block.
struct DiskFiles: Sendable {
  private static let suffix = ".toml"

  /// Path of the folder.
  let folder: String

  /// The folder beside a configuration file: "/etc/dmu-xen.toml" has "/etc/dmu-xen/disks.d".
  init(configurationPath: String) {
    let stem =
      configurationPath.hasSuffix(Self.suffix)
      ? String(configurationPath.dropLast(Self.suffix.count)) : configurationPath
    folder = stem + "/disks.d"
  }

  /// Path of a disk's file.
  func path(_ name: DiskName) -> String { "\(folder)/\(name)\(Self.suffix)" }

  /// The names of the disks that have a file, and the files that are named like no disk. Throws:
  /// the errno of opendir(3); a folder that is not there has none.
  func names() throws(IOError) -> (disks: [DiskName], strange: [String]) {
    var disks: [DiskName] = []
    var strange: [String] = []
    for entry in try Folder.names(folder) where entry.hasSuffix(Self.suffix) {
      // A hidden file is an editor's.
      guard entry.first != "." else { continue }
      if let name = DiskName(entry.dropLast(Self.suffix.count)) {
        disks.append(name)
      } else {
        strange.append("\(folder)/\(entry)")
      }
    }
    return (disks.sorted(), strange.sorted())
  }

  /// What a disk's file says; nil when there is none.
  func load(_ name: DiskName) throws(ConfigurationError) -> NamedWish? {
    let path = path(name)
    let text: String
    do { text = try TextFile.read(path) } catch let error where error.code == ENOENT {
      return nil
    } catch {
      throw ConfigurationError(file: path, line: nil, key: nil, reason: error.description)
    }
    return try DiskFiles.parse(text, file: path)
  }

  /// Writes a disk's file; it is there after a power cut.
  func save(_ name: DiskName, _ wish: NamedWish) throws(IOError) {
    var made = ""
    for part in folder.split(separator: "/") {
      made += "/" + part
      guard mkdir(made, 0o755) == 0 || errno == EEXIST else { throw IOError.last("make", made) }
    }
    let text = DiskFiles.text(wish)
    try TextFile.replace(path(name), with: text, mode: 0o644, durably: true)
  }

  /// Removes a disk's file. Whether there was one.
  func remove(_ name: DiskName) throws(IOError) -> Bool {
    let path = path(name)
    guard unlink(path) == 0 else {
      if errno == ENOENT { return false }
      throw IOError.last("remove", path)
    }
    try TextFile.syncFolder(of: path)
    return true
  }

  /// Has a disk's file say whether the disk is active, and leaves the rest of it as it is.
  /// Without a file nothing happens. Throws: the errno of open(2), write(2) or rename(2).
  func setActive(_ name: DiskName, _ isActive: Bool) throws(IOError) {
    let path = path(name)
    let text: String
    do { text = try TextFile.read(path) } catch {
      guard error.code == ENOENT else { throw error }
      return
    }
    let new = DiskFiles.text(text, isActive: isActive)
    if new != text { try TextFile.replace(path, with: new, mode: 0o644, durably: true) }
  }

  /// The text of a file with another word on whether the disk is active.
  static func text(_ text: String, isActive: Bool) -> String {
    var lines = text.split(separator: "\n", omittingEmptySubsequences: false).filter { line in
      let key = line.prefix { $0 != "=" }.filter { $0 != " " && $0 != "\t" }
      return key != "active" || !line.contains("=")
    }
    if lines.last?.isEmpty == true { lines.removeLast() }
    if !isActive { lines.append("active = false") }
    return lines.map { $0 + "\n" }.joined()
  }

  /// The text of a file.
  static func text(_ wish: NamedWish) -> String {
    var text = "# Made by 'dmu-xen attach --persistent'; 'dmu-xen detach' removes it.\n"
    text +=
      "spec = \"\(wish.params.replacing("\\", with: "\\\\").replacing("\"", with: "\\\""))\"\n"
    if wish.readOnly { text += "read-only = true\n" }
    if let owner = wish.owner { text += "owner = \"\(owner)\"\n" }
    if wish.isProbed { text += "probe = true\n" }
    if !wish.isActive { text += "active = false\n" }
    return text
  }

  /// Understands such a text. Throws the first error, with its line.
  static func parse(_ text: String, file: String) throws(ConfigurationError) -> NamedWish {
    let lines = ConfigurationLines(text)
    let document = try Configuration.document(text, lines, file: file)
    var wish: NamedWish?
    var (readOnly, isProbed, isActive) = (false, false, true)
    var owner: OwnerID?
    for key in document.keys.sorted() {
      func fail(_ reason: String) -> ConfigurationError {
        ConfigurationError(file: file, line: lines.line(key), key: key, reason: reason)
      }
      func flag() throws(ConfigurationError) -> Bool {
        guard let value = document[key]?.bool else { throw fail("the value must be true or false") }
        return value
      }
      switch key {
      case "spec":
        guard let value = document[key]?.string else { throw fail("the value must be a spec") }
        do { _ = try Spec(value) } catch { throw fail("\(error)") }
        wish = NamedWish(params: value)
      case "read-only": readOnly = try flag()
      case "probe": isProbed = try flag()
      case "active": isActive = try flag()
      case "owner":
        owner = document[key]?.string.flatMap { OwnerID($0) }
        guard owner != nil else { throw fail("the value must be a UUID") }
      default:
        let hint = NearestMatch.hint(
          for: key, among: ["spec", "read-only", "owner", "probe", "active"])
        throw fail("there is no such key\(hint)")
      }
    }
    guard var wish else {
      throw ConfigurationError(
        file: file, line: nil, key: "spec",
        reason: "the key is missing: write spec = \"dmu:FORMAT:STORE[:BASE]\"")
    }
    (wish.readOnly, wish.isProbed, wish.owner) = (readOnly, isProbed, owner)
    if !isActive { wish.inactiveSince = 0 }
    return wish
  }
}
