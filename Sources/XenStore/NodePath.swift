// SPDX-License-Identifier: Apache-2.0
//
// xenstored answers EINVAL to a path that cannot name a node, and a NUL would silently cut a
// path short on its way through C. So paths are looked at here, where the reason can be named.

import CXenStore

enum NodePath {
  /// Throws `.invalidPath` unless xenstored could take this path for a node.
  ///
  /// Relative paths are allowed: they lie below the own domain's `/local/domain/N`.
  /// Source: docs/misc/xenstore.txt, "Paths"; xen/io/xs_wire.h for the limits.
  static func check(_ path: String, for operation: String) throws(XenStoreError) {
    guard let fault = fault(in: path) else { return }
    throw XenStoreError(
      .invalidPath, operation, path, fault, remedy: "name a node, such as /local/domain/0/name")
  }

  /// As `check`, but lets xenstored's own events (`@introduceDomain`, `@releaseDomain`) pass.
  static func checkWatch(_ path: String, for operation: String) throws(XenStoreError) {
    let body = path.utf8.first == UInt8(ascii: "@") ? String(path.dropFirst()) : path
    guard let fault = fault(in: body) else { return }
    throw XenStoreError(
      .invalidPath, operation, path, fault, remedy: "name a node or a special event")
  }

  private static func fault(in path: String) -> String? {
    let bytes = path.utf8
    if bytes.isEmpty { return "the path is empty" }
    if bytes.contains(0) { return "the path contains a NUL" }
    let limit =
      bytes.first == UInt8(ascii: "/")
      ? Int(XENSTORE_ABS_PATH_MAX) : Int(XENSTORE_REL_PATH_MAX)
    if bytes.count > limit { return "the path has \(bytes.count) bytes, more than \(limit)" }
    if let odd = path.first(where: { !isAllowed($0) }) {
      return "the path contains \(String(odd).debugDescription)"
    }
    if path.contains("//") { return "the path contains an empty name" }
    if path != "/" && path.hasSuffix("/") { return "the path ends in a slash" }
    return nil
  }

  private static func isAllowed(_ character: Character) -> Bool {
    guard let byte = character.asciiValue else { return false }
    switch byte {
    case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
      UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "/"),
      UInt8(ascii: "_"), UInt8(ascii: "@"):
      return true
    default:
      return false
    }
  }
}
