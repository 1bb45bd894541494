// SPDX-License-Identifier: Apache-2.0
// The xenstore of a simulated host, and a daemon's view of it.

import TestSupport

@testable import Daemon
@testable import XenStore

/// The backend entries of the disks, and what the daemon has told.
final class SimulatedStore: @unchecked Sendable {  // One thread.
  /// A backend entry.
  struct Entry {
    var params: String
    var readOnly = false
    var state = "2"
    var online = "1"
    var hotplug: String?
    var device: String?
    var told: DiskNodes?

    var isGoing: Bool { online == "0" || state == "5" || state == "6" }
  }

  var entries: [DiskID: Entry] = [:]
  /// The devices of named disks that guests have as vbds of their own: phy:/dev/dmu/NAME.
  var users: [VBD: String] = [:]
  /// Domains, and what xenstore says of their relations.
  var domains: [Int: DomainState] = [:]
  var relations: [Int: DomainRelation] = [:]
  private var lastVM = 0
  /// The daemon has told of itself.
  var isKnown = false
  /// Somebody has changed a disk's entry.
  var changed: (DiskID) -> Void = { _ in }

  func change(_ id: DiskID, _ body: (inout Entry) -> Void) {
    guard var entry = entries[id] else { return }
    body(&entry)
    entries[id] = entry
    changed(id)
  }

  /// A domain begins, of a VM of its own unless another one's is given.
  func create(_ domain: Int, _ relation: DomainRelation?, _ state: DomainState) {
    lastVM += 1
    relations[domain] = relation ?? DomainRelation(vm: "/vm/\(lastVM)")
    domains[domain] = state
  }

  /// The disk goes, and its domain, which has no other.
  func remove(_ id: DiskID) {
    entries[id] = nil
    if let domain = id.vbd?.domain { (domains[domain], relations[domain]) = (nil, nil) }
    changed(id)
  }

  func add(_ id: DiskID, _ entry: Entry) {
    entries[id] = entry
    changed(id)
  }

  fileprivate func sight(_ vbd: VBD) -> Sight {
    guard let entry = entries[.vbd(vbd)] else {
      return Sight(wanted: nil, exists: false, vdev: nil)
    }
    let isClosed = entry.state == "6" && entry.online == "0"
    guard !isClosed, entry.hotplug != "error" else {
      return Sight(wanted: nil, exists: true, vdev: vbd.vdev)
    }
    let wanted = WantedDisk(
      params: entry.params, readOnly: entry.readOnly, going: entry.isGoing)
    return Sight(
      wanted: wanted, exists: true, vdev: vbd.vdev, told: entry.told?.state.rawValue,
      state: entry.state, device: entry.device)
  }
}

/// A daemon's way to xenstore, which ends with it.
struct SimulatedView: StoreView {
  let store: SimulatedStore
  let scheduler: SimulatedScheduler
  let weather: Weather

  private func ask<Value>(_ body: () -> Value) async throws(XenStoreError) -> Value {
    let time = weather.callTime()
    if time > .zero {
      do throws(CancellationError) { try await scheduler.sleep(for: time) } catch {}
    }
    if scheduler.life.isDead || weather.timeline.random.chance(weather.silent) {
      throw XenStoreError(.timedOut, "read", nil, "no answer", remedy: "wait")
    }
    return body()
  }

  func look(_ vbd: VBD) async throws(XenStoreError) -> Sight? {
    try await ask { store.isKnown ? store.sight(vbd) : nil }
  }

  func lookAll(and known: [VBD: Sight?]) async throws(XenStoreError) -> [VBD: Sight]? {
    try await ask {
      guard store.isKnown else { return nil }
      let vbds = Set(store.entries.keys.compactMap(\.vbd)).union(known.keys)
      return Dictionary(uniqueKeysWithValues: vbds.map { ($0, store.sight($0)) })
    }
  }

  func users(of device: String) async throws(XenStoreError) -> [VBD] {
    try await ask { store.users.filter { $0.value == device }.keys.sorted() }
  }

  func publish(_ vbd: VBD, _ nodes: DiskNodes) async throws(XenStoreError) -> Bool {
    try await ask {
      guard store.entries[.vbd(vbd)] != nil else { return false }
      store.entries[.vbd(vbd)]?.told = nodes
      return true
    }
  }

  // The simulated host is a domain 0, where a script does these.
  func connect(_ vbd: VBD, _ device: DeviceNode) async throws(XenStoreError) -> Bool { false }
  func refuse(_ vbd: VBD, _ sentence: String) async throws(XenStoreError) {}
  func delete(_ vbd: VBD) async throws(XenStoreError) {}

  func toldDisks() async throws(XenStoreError) -> [VBD] {
    try await ask { store.entries.filter { $0.value.told != nil }.keys.compactMap(\.vbd).sorted() }
  }

  func withdraw(_ vbd: VBD) async throws(XenStoreError) {
    try await ask { store.entries[.vbd(vbd)]?.told = nil }
  }

  func publishSelf(
    state: String, disks: Int, pending: Int, anew: Bool
  ) async throws(XenStoreError) -> Bool {
    try await ask {
      guard anew || store.isKnown else { return false }
      store.isKnown = true
      return true
    }
  }

  func name(of domain: Int) async throws(XenStoreError) -> String? {
    try await ask { "guest\(domain)" }
  }

  func relation(of domain: Int) async throws(XenStoreError) -> DomainRelation {
    try await ask { store.relations[domain] ?? DomainRelation() }
  }
}
