// SPDX-License-Identifier: Apache-2.0
//
// Who may read and write a node. xenstore keeps a list of (domain, access); the first entry
// names the owner, who may do everything, and its access is that of every domain that the
// rest of the list does not name. Here the two meanings of the first entry have two names.

import CXenStore

/// The permissions of one node.
///
/// Source: xenstore.h, xs_set_permissions; docs/misc/xenstore.txt, "Permissions".
package struct XenStorePermissions: Hashable, Sendable {
  /// What a domain may do with a node. The raw value is the letter in the textual form.
  package enum Access: Character, CaseIterable, Sendable {
    /// Neither read nor write.
    case none = "n"
    /// Read only.
    case read = "r"
    /// Write only.
    case write = "w"
    /// Read and write.
    case both = "b"
  }

  /// The access of one domain.
  package struct Grant: Hashable, Sendable {
    /// Who.
    package var domain: DomainID
    /// May do what.
    package var access: Access

    /// Names one domain's access.
    package init(_ domain: DomainID, _ access: Access) {
      self.domain = domain
      self.access = access
    }
  }

  /// The domain that owns the node: it and the control domain may always read and write it.
  package var owner: DomainID
  /// The access of every domain that is neither the owner nor named in `grants`.
  package var others: Access
  /// The access of single domains, in the order in which xenstore keeps them.
  package var grants: [Grant]

  /// Permissions with an owner; nobody else has access unless it is given here.
  package init(owner: DomainID, others: Access = .none, grants: [Grant] = []) {
    self.owner = owner
    self.others = others
    self.grants = grants
  }

  /// Reads the textual form, such as `n0,r5`: owned by 0, none for others, 5 may read.
  ///
  /// Nil for anything that is not a comma-separated list of a letter and a domain id each.
  package init?(_ text: String) {
    var entries: [Grant] = []
    for part in text.split(separator: ",", omittingEmptySubsequences: false) {
      guard let letter = part.first, let access = Access(rawValue: letter),
        let domain = DomainID(part.dropFirst())
      else { return nil }
      entries.append(Grant(domain, access))
    }
    guard let first = entries.first else { return nil }
    self.init(owner: first.domain, others: first.access, grants: Array(entries.dropFirst()))
  }
}

extension XenStorePermissions: CustomStringConvertible {
  /// The textual form, such as `n0,r5`.
  package var description: String {
    ([Grant(owner, others)] + grants).map { "\($0.access.rawValue)\($0.domain)" }
      .joined(separator: ",")
  }
}

extension XenStorePermissions {
  /// The list as libxenstore takes it.
  var entries: [xs_permissions] {
    ([Grant(owner, others)] + grants).map {
      xs_permissions(id: UInt32($0.domain.rawValue), perms: $0.access.bits)
    }
  }

  /// Decodes what libxenstore returned; nil if it is empty or names an impossible domain.
  init?(entries: UnsafeBufferPointer<xs_permissions>) {
    var decoded: [Grant] = []
    for entry in entries {
      guard let id = UInt16(exactly: entry.id) else { return nil }
      decoded.append(Grant(DomainID(rawValue: id), Access(bits: entry.perms)))
    }
    guard let first = decoded.first else { return nil }
    self.init(owner: first.domain, others: first.access, grants: Array(decoded.dropFirst()))
  }
}

extension XenStorePermissions.Access {
  fileprivate var bits: UInt32 {
    switch self {
    case .none: 0
    case .read: UInt32(XS_PERM_READ)
    case .write: UInt32(XS_PERM_WRITE)
    case .both: UInt32(XS_PERM_READ | XS_PERM_WRITE)
    }
  }

  /// Looks at the two public bits only; the others are xenstored's own.
  fileprivate init(bits: UInt32) {
    let reads = bits & UInt32(XS_PERM_READ) != 0
    let writes = bits & UInt32(XS_PERM_WRITE) != 0
    self = reads ? (writes ? .both : .read) : (writes ? .write : .none)
  }
}
