// SPDX-License-Identifier: Apache-2.0
// What stands in a folder.

import Glibc

/// Looks into folders.
package enum Folder {
  /// The names in a folder but its own and its parent's, in no order; none where there is no
  /// folder. Throws the errno of opendir(3).
  package static func names(_ path: String) throws(IOError) -> [String] {
    guard let folder = opendir(path) else {
      if errno == ENOENT { return [] }
      throw IOError.last("list", path)
    }
    defer { closedir(folder) }
    var found: [String] = []
    while let entry = readdir(folder) {
      let name = withUnsafeBytes(of: entry.pointee.d_name) {
        String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
      }
      if name != ".", name != ".." { found.append(name) }
    }
    return found
  }

  /// The paths that begin with a text, for a shell to complete it: folders end in a slash. Names
  /// with a dot in front only where the text has one. None where the folder may not be listed.
  package static func paths(beginning text: String) -> [String] {
    let start = text.lastIndex(of: "/").map(text.index(after:)) ?? text.startIndex
    let folder = String(text[..<start])
    let beginning = text[start...]
    let names: [String]
    do throws(IOError) {
      names = try self.names(folder.isEmpty ? "." : folder)
    } catch {
      // Nothing to offer: a shell that completes has no place for an error.
      return []
    }
    return names.filter { $0.hasPrefix(beginning) && ($0.first != "." || beginning.first == ".") }
      .sorted().map { name in
        var status = stat()
        let isFolder =
          stat(folder + name, &status) == 0 && status.st_mode & S_IFMT == S_IFDIR
        return folder + name + (isFolder ? "/" : "")
      }
  }

  /// Where a symbolic link leads, as it is written there. Throws the errno of readlink(2): EINVAL
  /// for what is no link.
  package static func target(of path: String) throws(IOError) -> String {
    var buffer = [CChar](repeating: 0, count: 4096)
    let count = readlink(path, &buffer, buffer.count)
    guard count >= 0 else { throw IOError.last("examine", path) }
    return String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}
