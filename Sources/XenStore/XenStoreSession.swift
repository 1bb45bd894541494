// SPDX-License-Identifier: Apache-2.0

import CXenStore
import Glibc

/// The requests of one `perform` or one attempt of a `transaction`, made one after the other.
///
/// Lent to a closure that runs on the client's own thread: everything else that the client was
/// asked waits meanwhile, so such a closure makes requests and computes, and does nothing slow.
/// Every method throws `.timedOut` once the deadline of the whole has passed.
package struct XenStoreSession: ~Copyable {
  let connection: Connection
  let transaction: xs_transaction_t
  let job: Job

  /// The value of a node, byte for byte. Throws `.notFound` for a node that is not there.
  package func read(_ path: String) throws(XenStoreError) -> [UInt8] {
    try NodePath.check(path, for: "read")
    var length: UInt32 = 0
    let value = try request("read", path) { handle in
      xs_read(handle, transaction, path, &length)
    }
    defer { free(value) }
    return [UInt8](UnsafeRawBufferPointer(start: value, count: Int(length)))
  }

  /// The value of a node, or nil if there is no such node.
  package func readIfPresent(_ path: String) throws(XenStoreError) -> [UInt8]? {
    do { return try read(path) } catch { return try error.asAbsence() }
  }

  /// The value of a node as text. Throws `.invalidValue` if it is not UTF-8.
  package func readString(_ path: String) throws(XenStoreError) -> String {
    let bytes = try read(path)
    guard let text = String(validating: bytes, as: UTF8.self) else {
      throw XenStoreError(
        .invalidValue, "read", path, "the value is not UTF-8", remedy: "read it as bytes")
    }
    return text
  }

  /// The value of a node as text, or nil if there is no such node.
  package func readStringIfPresent(_ path: String) throws(XenStoreError) -> String? {
    do { return try readString(path) } catch { return try error.asAbsence() }
  }

  /// The names of a node's children, in xenstored's order.
  package func list(_ path: String) throws(XenStoreError) -> [String] {
    try NodePath.check(path, for: "list")
    var count: UInt32 = 0
    let names = try request("list", path) { handle in
      xs_directory(handle, transaction, path, &count)
    }
    defer { free(names) }
    return (0..<Int(count)).compactMap { names[$0].map { String(cString: $0) } }
  }

  /// The names of a node's children, or nil if there is no such node.
  package func listIfPresent(_ path: String) throws(XenStoreError) -> [String]? {
    do { return try list(path) } catch { return try error.asAbsence() }
  }

  /// Sets a node's value, any bytes; makes the node and its parents if they are missing.
  package func write(_ path: String, _ value: [UInt8]) throws(XenStoreError) {
    try NodePath.check(path, for: "write")
    let size = path.utf8.count + 1 + value.count
    guard size <= Int(XENSTORE_PAYLOAD_MAX) else {
      throw XenStoreError(
        .tooLarge, "write", path,
        "path and value have \(size) bytes, more than \(XENSTORE_PAYLOAD_MAX)",
        remedy: "shorten the value")
    }
    try accomplish("write", path) { handle in
      xs_write(handle, transaction, path, value, UInt32(value.count))
    }
  }

  /// Sets a node's value to a text's UTF-8 bytes.
  package func write(_ path: String, _ value: String) throws(XenStoreError) {
    try write(path, Array(value.utf8))
  }

  /// Makes a node with an empty value; leaves one that is there as it is.
  package func makeDirectory(_ path: String) throws(XenStoreError) {
    try NodePath.check(path, for: "make")
    try accomplish("make", path) { handle in xs_mkdir(handle, transaction, path) }
  }

  /// Removes a node and everything below it. A node that is not there is no failure.
  package func remove(_ path: String) throws(XenStoreError) {
    try NodePath.check(path, for: "remove")
    do {
      try accomplish("remove", path) { handle in xs_rm(handle, transaction, path) }
    } catch {
      guard error.code == .notFound else { throw error }
    }
  }

  /// Who may do what with a node.
  package func permissions(of path: String) throws(XenStoreError) -> XenStorePermissions {
    try NodePath.check(path, for: "get permissions of")
    var count: UInt32 = 0
    let entries = try request("get permissions of", path) { handle in
      xs_get_permissions(handle, transaction, path, &count)
    }
    defer { free(entries) }
    let list = UnsafeBufferPointer(start: entries, count: Int(count))
    guard let permissions = XenStorePermissions(entries: list) else {
      throw XenStoreError(
        .invalidValue, "get permissions of", path, "xenstored's list makes no sense",
        remedy: XenStoreError.checkService)
    }
    return permissions
  }

  /// Sets who may do what with a node.
  package func setPermissions(
    _ permissions: XenStorePermissions, of path: String
  ) throws(XenStoreError) {
    try NodePath.check(path, for: "set permissions of")
    var entries = permissions.entries
    try accomplish("set permissions of", path) { handle in
      xs_set_permissions(handle, transaction, path, &entries, UInt32(entries.count))
    }
  }

  /// Whether xenstored has been told of the domain. Never part of a transaction.
  package func isIntroduced(_ domain: DomainID) throws(XenStoreError) -> Bool {
    var answer = false
    // libxenstore says false for a failure, too: only errno tells the two apart.
    try accomplish("ask whether introduced", "\(domain)") { handle in
      errno = 0
      answer = xs_is_domain_introduced(handle, UInt32(domain.rawValue))
      return answer || errno == 0
    }
    return answer
  }

  /// The root of a domain's tree, `/local/domain/N`, whether or not the domain exists.
  package func domainPath(_ domain: DomainID) throws(XenStoreError) -> String {
    let text = try request("get the path of domain", "\(domain)") { handle in
      xs_get_domain_path(handle, UInt32(domain.rawValue))
    }
    defer { free(text) }
    return String(cString: text)
  }
}

extension XenStoreSession {
  /// Makes one call of libxenstore that returns nil on failure.
  func request<Answer>(
    _ operation: String, _ path: String?, _ call: (OpaquePointer) -> Answer?
  ) throws(XenStoreError) -> Answer {
    if job.isFinished { throw job.overdue }
    if let answer = call(connection.handle) { return answer }
    let failure = XenStoreError(errno: errno, operation, path)
    // When the connection breaks under a call, errno may be anything: ask the socket.
    if connection.checkPulse(), failure.code != .disconnected { throw failure }
    connection.kill()
    if job.isFinished { throw job.overdue }
    throw .disconnected(operation, path, because: "the connection to xenstored broke")
  }

  /// Makes one call of libxenstore that returns false on failure.
  func accomplish(
    _ operation: String, _ path: String?, _ call: (OpaquePointer) -> Bool
  ) throws(XenStoreError) {
    _ = try request(operation, path) { call($0) ? true : nil }
  }
}

extension XenStoreError {
  /// Nil for a missing node; any other failure stays one.
  fileprivate func asAbsence<Value>() throws(XenStoreError) -> Value? {
    guard code == .notFound else { throw self }
    return nil
  }
}
