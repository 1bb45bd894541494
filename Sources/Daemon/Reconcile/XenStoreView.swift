// SPDX-License-Identifier: Apache-2.0
// What the daemon reads of xenstore and writes into it.
//
// Invariants:
// - Nothing is read from a frontend's tree, which the guest can write.
// - `dmu/` nodes are written only under a backend entry that exists, in one transaction
//   with the look at it: an entry that the toolstack has deleted is never made again.
// - A look that failed says nothing: no disk is taken down because xenstored was silent.
// - Nor does the look into a store that has forgotten what we told of ourselves: it is a new
//   one, and what is missing in it was not taken away. Every look asks for that first, and we
//   tell a new store of ourselves only when the disks that it does not know are marked.
// - In a driver domain xenstored shows the backend entries and this domain's own nodes, and nothing
//   else. What may not be read says nothing: there a guest exists as long as its entry does.

internal import SystemIO
internal import XenStore

/// What one look found out about a disk.
struct Sight: Sendable, Equatable {
  /// What is wanted; nil when it is not a disk of ours or not wanted any more.
  var wanted: WantedDisk?
  /// Whether the backend entry exists, wanted or not.
  var exists: Bool
  /// The disk's name in the guest as the toolstack wrote it.
  var vdev: String?
  /// The state that stands in our own nodes; nil when they are not there.
  var told: String?
  /// The backend's state.
  var state: String?
  /// Whether the disk is attached to the very domain that serves it.
  var isOwn = false
  /// Whether it is served in a driver domain.
  var isInDriverDomain = false
  /// Whether the backend has closed and the toolstack wants the entry gone.
  var isClosed = false
  /// The device that the toolstack was given, "fd:5"; nil when it has none yet.
  var device: String?

  /// What there is where nothing is.
  static let nothing = Sight(wanted: nil, exists: false, vdev: nil)

  /// Whether the backend has not come to be connected: Initialising, InitWait, Initialised.
  /// Source: XenbusState in Xen's io/xenbus.h.
  var isUnconnected: Bool { state.map { ["1", "2", "3"].contains($0) } ?? false }
}

/// What xenstore says of a domain's relations. Nothing is known of it in a driver domain.
struct DomainRelation: Sendable, Equatable {
  /// What the domain's `vm` says: "/vm/UUID". Nothing below that path is read, since two domains of the
  /// same UUID share it and each deletes it at its end.
  var vm: String?
  /// The domain whose stub domain it is.
  var target: Int?
}

/// What everybody is told of a disk.
struct DiskNodes: Sendable, Equatable {
  var state: PublicState
  var format: String
  var device: String
  var worker: String
  var error: String
  var since: String

  var all: [(String, String)] {
    [
      ("state", state.rawValue), ("format", format), ("device", device), ("worker", worker),
      ("error", error), ("since", since),
    ]
  }
}

/// The daemon's window on xenstore.
struct XenStoreView: StoreView {
  /// Where the disks are, below this domain's own path.
  static let root = "backend/vbd"
  /// Where the daemon tells of itself, below this domain's own path: the second is for a driver
  /// domain, which may not write to the first.
  static let own = ["dmu-xen", "data/dmu-xen"]
  /// Longest sentence in a node, in bytes. A node of a driver domain has room for 2048 with its
  /// permissions. Source: quota_max_entry_size in Xen's xenstored_core.c.
  static let longest = 1500

  let client: XenStoreClient

  /// Looks at one vbd. Nil: the store has forgotten us.
  func look(_ vbd: VBD) async throws(XenStoreError) -> Sight? {
    try await client.perform { session throws(XenStoreError) in
      guard try XenStoreView.remembersUs(session) else { return nil }
      var domains: [Int: Bool] = [:]
      return try XenStoreView.look(vbd, nil, &domains, session)
    }
  }

  /// Looks at every backend entry whose params are ours, and at these disks whether or not
  /// they have one; what does not change in a disk's life is not read again. Nil: the store
  /// has forgotten us.
  func lookAll(and known: [VBD: Sight?]) async throws(XenStoreError) -> [VBD: Sight]? {
    try await client.perform { session throws(XenStoreError) in
      guard try XenStoreView.remembersUs(session) else { return nil }
      var sights: [VBD: Sight] = [:]
      var domains: [Int: Bool] = [:]
      for vbd in try XenStoreView.entries(session) {
        let sight = try XenStoreView.look(vbd, known[vbd] ?? nil, &domains, session)
        let isLeft = sight.isClosed && sight.isInDriverDomain
        if sight.wanted != nil || isLeft || known.keys.contains(vbd) { sights[vbd] = sight }
      }
      for vbd in known.keys where sights[vbd] == nil {
        sights[vbd] = Sight(wanted: nil, exists: false, vdev: nil)
      }
      return sights
    }
  }

  /// Every backend entry, in no order.
  private static func entries(
    _ session: borrowing XenStoreSession
  ) throws(XenStoreError) -> [VBD] {
    var found: [VBD] = []
    for domain in try session.listIfPresent(XenStoreView.root) ?? [] {
      for device in try session.listIfPresent(XenStoreView.root + "/" + domain) ?? [] {
        if let vbd = VBD(domain + "-" + device) { found.append(vbd) }
      }
    }
    return found
  }

  /// The vbds of domains that exist, whoever serves them, that use a device. One that is closed
  /// counts as well: blkback may still be at work on it.
  func users(of device: String) async throws(XenStoreError) -> [VBD] {
    try await client.perform { session throws(XenStoreError) in
      var found: [VBD] = []
      for vbd in try XenStoreView.entries(session) {
        let used = try XenStoreView.text(session, vbd.backendPath + "/physical-device")
        guard used == device, try XenStoreView.exists(vbd.domain, session) else { continue }
        found.append(vbd)
      }
      return found.sorted()
    }
  }

  /// Writes a vbd's nodes, readable by this domain only. False, and nothing happens, when
  /// the entry has gone.
  func publish(_ vbd: VBD, _ nodes: DiskNodes) async throws(XenStoreError) -> Bool {
    try await client.transaction { session throws(XenStoreError) in
      let entry = vbd.backendPath
      guard try session.readIfPresent(entry + "/params") != nil else { return false }
      let folder = entry + "/dmu"
      try session.makeDirectory(folder)
      let permissions = try session.permissions(of: folder)
      // New nodes take over the permissions of their parent.
      try session.setPermissions(XenStorePermissions(owner: permissions.owner), of: folder)
      for (name, value) in nodes.all {
        try session.write(folder + "/" + name, XenStoreView.cut(value))
      }
      return true
    }
  }

  /// The vbds that have nodes of ours.
  func toldDisks() async throws(XenStoreError) -> [VBD] {
    try await client.perform { session throws(XenStoreError) in
      var found: [VBD] = []
      for vbd in try XenStoreView.entries(session)
      where try session.readIfPresent(vbd.backendPath + "/dmu/state") != nil { found.append(vbd) }
      return found.sorted()
    }
  }

  /// Gives the backend the device of a disk, as a block script does. False, and nothing happens,
  /// when it does not wait for one.
  func connect(_ vbd: VBD, _ device: DeviceNode) async throws(XenStoreError) -> Bool {
    try await client.transaction { session throws(XenStoreError) in
      let entry = vbd.backendPath
      guard try XenStoreView.text(session, entry + "/state") == "2",
        try session.readIfPresent(entry + "/physical-device") == nil
      else { return false }
      try XenStoreView.write(
        [
          ("physical-device", device.hexadecimal), ("physical-device-path", device.path),
          ("hotplug-status", "connected"),
        ], below: entry, session)
      return true
    }
  }

  /// Says in a disk's entry why it cannot be had, as a block script does. Nothing happens when the
  /// entry has gone.
  func refuse(_ vbd: VBD, _ sentence: String) async throws(XenStoreError) {
    try await client.transaction { session throws(XenStoreError) in
      let entry = vbd.backendPath
      guard try session.readIfPresent(entry + "/params") != nil else { return }
      try XenStoreView.write(
        [("hotplug-error", XenStoreView.cut(sentence)), ("hotplug-status", "error")],
        below: entry, session)
    }
  }

  /// Deletes the entry of a vbd that has closed, for which the toolstack in domain 0 waits. Nothing
  /// happens when it has not closed, or has come again.
  func delete(_ vbd: VBD) async throws(XenStoreError) {
    try await client.transaction { session throws(XenStoreError) in
      let entry = vbd.backendPath
      guard try XenStoreView.text(session, entry + "/state") == "6",
        try XenStoreView.text(session, entry + "/online") == "0"
      else { return }
      try session.remove(entry)
    }
  }

  /// Takes a vbd's nodes back.
  func withdraw(_ vbd: VBD) async throws(XenStoreError) {
    try await client.remove(vbd.backendPath + "/dmu")
  }

  /// Tells of the daemon itself. False, and nothing happens, when the store has forgotten us,
  /// unless it is `anew`: what we have told makes the next look believe what the store says.
  func publishSelf(
    state: String, disks: Int, pending: Int, anew: Bool
  ) async throws(XenStoreError) -> Bool {
    try await client.transaction { session throws(XenStoreError) in
      let remembersUs = try XenStoreView.remembersUs(session)
      guard anew || remembersUs else { return false }
      let nodes = [
        ("version", Version.text), ("state", state), ("disks", String(disks)),
        ("pending", String(pending)),
      ]
      do throws(XenStoreError) {
        try XenStoreView.write(nodes, below: XenStoreView.own[0], session)
      } catch {
        guard error.code == .accessDenied else { throw error }
        try XenStoreView.write(nodes, below: XenStoreView.own[1], session)
      }
      return true
    }
  }

  private static func write(
    _ nodes: [(String, String)], below folder: String, _ session: borrowing XenStoreSession
  ) throws(XenStoreError) {
    for (name, value) in nodes { try session.write(folder + "/" + name, value) }
  }

  /// Whether a changed path below `root` is one of those that the daemon writes itself.
  static func isOurs(_ path: String) -> Bool {
    path.split(separator: "/").dropFirst(4).first == "dmu"
  }

  /// The domain's name, nil when it has none, or none that this domain may read.
  func name(of domain: Int) async throws(XenStoreError) -> String? {
    try await client.perform { session throws(XenStoreError) in
      do throws(XenStoreError) {
        return try XenStoreView.text(session, "/local/domain/\(domain)/name")
      } catch {
        guard error.code == .accessDenied else { throw error }
        return nil
      }
    }
  }

  /// How a domain is related to others, as far as this one may know.
  func relation(of domain: Int) async throws(XenStoreError) -> DomainRelation {
    try await client.perform { session throws(XenStoreError) in
      let home = "/local/domain/\(domain)"
      do throws(XenStoreError) {
        return DomainRelation(
          vm: try XenStoreView.text(session, home + "/vm"),
          target: try XenStoreView.text(session, home + "/target").flatMap { Int($0) })
      } catch {
        guard error.code == .accessDenied else { throw error }
        return DomainRelation()
      }
    }
  }

  private static func remembersUs(
    _ session: borrowing XenStoreSession
  ) throws(XenStoreError) -> Bool {
    for folder in own where try session.readIfPresent(folder + "/version") != nil { return true }
    return false
  }

  /// Whether a domain exists, as far as this one may know.
  private static func exists(
    _ domain: Int, _ session: borrowing XenStoreSession
  ) throws(XenStoreError) -> Bool {
    do throws(XenStoreError) {
      return try session.readIfPresent("/local/domain/\(domain)") != nil
    } catch {
      guard error.code == .accessDenied else { throw error }
      return true
    }
  }

  /// `known` is what was seen of the disk before, `domains` which domains exist.
  private static func look(
    _ vbd: VBD, _ known: Sight?, _ domains: inout [Int: Bool],
    _ session: borrowing XenStoreSession
  ) throws(XenStoreError) -> Sight {
    let entry = vbd.backendPath
    guard let params = try text(session, entry + "/params") else {
      return Sight(wanted: nil, exists: false, vdev: nil)
    }
    guard Spec.isOurs(params) else { return Sight(wanted: nil, exists: true, vdev: nil) }
    let vdev = if let known = known?.vdev { known } else { try text(session, entry + "/dev") }
    let state = try text(session, entry + "/state")
    let online = try text(session, entry + "/online")
    let hotplug = try text(session, entry + "/hotplug-status")
    if domains[vbd.domain] == nil {
      domains[vbd.domain] = try exists(vbd.domain, session)
    }
    let isClosed = state == "6" && online == "0"
    let own = try text(session, "domid")
    let isInDriverDomain = own != nil && own != "0"
    guard !isClosed, hotplug != "error", domains[vbd.domain] == true else {
      return Sight(
        wanted: nil, exists: true, vdev: vdev, isInDriverDomain: isInDriverDomain,
        isClosed: isClosed)
    }
    let readOnly =
      if let before = known?.wanted, before.params == params { before.readOnly } else {
        try text(session, entry + "/mode")?.first == "r"
      }
    let going = online == "0" || state == "5" || state == "6"
    let wanted = WantedDisk(params: params, readOnly: readOnly, going: going)
    let told = try text(session, entry + "/dmu/state")
    return Sight(
      wanted: wanted, exists: true, vdev: vdev, told: told, state: state,
      isOwn: own == String(vbd.domain), isInDriverDomain: isInDriverDomain,
      device: try text(session, entry + "/physical-device"))
  }

  /// A node as text; one that is not UTF-8 as if it were not there.
  private static func text(
    _ session: borrowing XenStoreSession, _ path: String
  ) throws(XenStoreError) -> String? {
    try session.readIfPresent(path).flatMap { String(validating: $0, as: UTF8.self) }
  }

  /// The beginning of a text that a node has room for, in whole characters.
  private static func cut(_ text: String) -> String {
    let bytes = text.utf8
    var end = bytes.index(bytes.startIndex, offsetBy: longest, limitedBy: bytes.endIndex)
    while let place = end, place.samePosition(in: text.unicodeScalars) == nil {
      end = bytes.index(before: place)
    }
    return end.map { String(text[..<$0]) } ?? text
  }
}
