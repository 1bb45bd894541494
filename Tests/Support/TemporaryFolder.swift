// SPDX-License-Identifier: Apache-2.0
// A folder for one test, removed with all that is in it.

import Glibc
package import SystemIO

/// A new empty folder; goes when this object goes.
package final class TemporaryFolder: Sendable {
  /// Its absolute path.
  package let path: String

  /// Makes one. Throws: the errno of mkdtemp(3).
  package init() throws(IOError) {
    let parent = getenv("TMPDIR").map { String(cString: $0) } ?? "/tmp"
    var template = Array("\(parent)/dmu-test-XXXXXX".utf8CString)
    guard mkdtemp(&template) != nil else { throw IOError.last("make a folder in", parent) }
    path = String(
      decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  deinit {
    Self.remove(path)
  }

  /// What cannot be removed remains in the system's temporary folder, for the system to clear.
  private static func remove(_ path: String) {
    if let folder = opendir(path) {
      while let entry = readdir(folder) {
        let name = withUnsafeBytes(of: entry.pointee.d_name) {
          String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
        }
        guard name != ".", name != ".." else { continue }
        if entry.pointee.d_type == UInt8(DT_DIR) {
          remove(path + "/" + name)
        } else {
          unlink(path + "/" + name)
        }
      }
      closedir(folder)
    }
    rmdir(path)
  }

  /// The path of something in it.
  package func file(_ name: String) -> String { path + "/" + name }
}
