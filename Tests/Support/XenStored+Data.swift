// SPDX-License-Identifier: Apache-2.0
//
// What a xenstored holds, taken out and put back: for a restart that keeps the store, which the
// real program has only as a live update.

/// One node as it stands in the store.
package struct StoredNode: Hashable, Sendable {
  /// Absolute.
  package let path: String
  /// As text; the tests that need other bytes ask for them themselves.
  package let value: String
  /// As xenstored writes them: `n0`, `r5`.
  package let permissions: [String]
}

extension XenStored {
  /// Every node, parents before children, without xenstored's own under /tool.
  package func save() throws(WireError) -> [StoredNode] {
    let wire = try connect()
    var nodes: [StoredNode] = []
    try Self.collect("/", from: wire, into: &nodes)
    return nodes
  }

  /// Puts nodes back in one transaction.
  package func restore(_ nodes: [StoredNode]) throws(WireError) {
    guard !nodes.isEmpty else { return }
    let wire = try connect()
    try wire.transaction { (transaction) throws(WireError) in
      for node in nodes {
        try wire.write(node.path, node.value, in: transaction)
        try wire.setPermissions(node.permissions, of: node.path, in: transaction)
      }
    }
  }

  private static func collect(
    _ path: String, from wire: XenStoredWire, into nodes: inout [StoredNode]
  ) throws(WireError) {
    for name in try wire.list(path) where path != "/" || name != "tool" {
      let child = (path == "/" ? "" : path) + "/" + name
      nodes.append(
        StoredNode(
          path: child, value: try wire.read(child), permissions: try wire.permissions(of: child)))
      try collect(child, from: wire, into: &nodes)
    }
  }
}
