// SPDX-License-Identifier: Apache-2.0

/// Single requests, each as in `XenStoreSession`.
extension XenStoreClient {
  /// The value of a node, byte for byte. Throws `.notFound` for a node that is not there.
  package func read(_ path: String) async throws(XenStoreError) -> [UInt8] {
    try await perform("read", path) { session throws(XenStoreError) in try session.read(path) }
  }

  /// The value of a node, or nil if there is no such node.
  package func readIfPresent(_ path: String) async throws(XenStoreError) -> [UInt8]? {
    try await perform("read", path) { session throws(XenStoreError) in
      try session.readIfPresent(path)
    }
  }

  /// The value of a node as text. Throws `.invalidValue` if it is not UTF-8.
  package func readString(_ path: String) async throws(XenStoreError) -> String {
    try await perform("read", path) { session throws(XenStoreError) in
      try session.readString(path)
    }
  }

  /// The value of a node as text, or nil if there is no such node.
  package func readStringIfPresent(_ path: String) async throws(XenStoreError) -> String? {
    try await perform("read", path) { session throws(XenStoreError) in
      try session.readStringIfPresent(path)
    }
  }

  /// The names of a node's children, in xenstored's order.
  package func list(_ path: String) async throws(XenStoreError) -> [String] {
    try await perform("list", path) { session throws(XenStoreError) in try session.list(path) }
  }

  /// The names of a node's children, or nil if there is no such node.
  package func listIfPresent(_ path: String) async throws(XenStoreError) -> [String]? {
    try await perform("list", path) { session throws(XenStoreError) in
      try session.listIfPresent(path)
    }
  }

  /// Sets a node's value, any bytes; makes the node and its parents if they are missing.
  package func write(_ path: String, _ value: [UInt8]) async throws(XenStoreError) {
    try await perform("write", path) { session throws(XenStoreError) in
      try session.write(path, value)
    }
  }

  /// Sets a node's value to a text's UTF-8 bytes.
  package func write(_ path: String, _ value: String) async throws(XenStoreError) {
    try await write(path, Array(value.utf8))
  }

  /// Makes a node with an empty value; leaves one that is there as it is.
  package func makeDirectory(_ path: String) async throws(XenStoreError) {
    try await perform("make", path) { session throws(XenStoreError) in
      try session.makeDirectory(path)
    }
  }

  /// Removes a node and everything below it. A node that is not there is no failure.
  package func remove(_ path: String) async throws(XenStoreError) {
    try await perform("remove", path) { session throws(XenStoreError) in
      try session.remove(path)
    }
  }

  /// Who may do what with a node.
  package func permissions(of path: String) async throws(XenStoreError) -> XenStorePermissions {
    try await perform("get permissions of", path) { session throws(XenStoreError) in
      try session.permissions(of: path)
    }
  }

  /// Sets who may do what with a node.
  package func setPermissions(
    _ permissions: XenStorePermissions, of path: String
  ) async throws(XenStoreError) {
    try await perform("set permissions of", path) { session throws(XenStoreError) in
      try session.setPermissions(permissions, of: path)
    }
  }

  /// Whether xenstored has been told of the domain.
  package func isIntroduced(_ domain: DomainID) async throws(XenStoreError) -> Bool {
    try await perform("ask whether introduced", "\(domain)") { session throws(XenStoreError) in
      try session.isIntroduced(domain)
    }
  }

  /// The root of a domain's tree, `/local/domain/N`, whether or not the domain exists.
  package func domainPath(_ domain: DomainID) async throws(XenStoreError) -> String {
    try await perform("get the path of domain", "\(domain)") { session throws(XenStoreError) in
      try session.domainPath(domain)
    }
  }
}
