// SPDX-License-Identifier: Apache-2.0
// Guests that migrate to another domain of the simulated host, and guests with a stub domain: two vbds
// have one disk.
//
// What is checked: who joins gets the device only when no request of the former user is under way and
// that one's domain does not run, unless one is the other's stub domain; no device goes while one of
// its users is connected (SimulatedHost). As with other disks: what was acknowledged is there.

import TestSupport

@testable import Daemon

extension Simulation {
  /// Whether the domain of a vbd runs.
  func runs(_ id: DiskID) -> Bool {
    guard let domain = id.vbd?.domain, let state = store.domains[domain] else { return false }
    return state.runs && state.isPaused != true
  }

  /// `xl migrate` to the same host. The guest is suspended with a write under way; then its new domain
  /// is given the disk. It goes on there; or the new domain is destroyed and the old one resumed; or
  /// somebody resumes the old one although the new one runs.
  func migrate(_ id: DiskID, to domain: Int) {
    guard let vbd = id.vbd, runs(id), isServed(id), let entry = store.entries[id] else { return }
    let new = DiskID(domain: domain, device: vbd.device)
    guard store.entries[new] == nil, scripts[new] == nil else { return }
    store.domains[vbd.domain] = DomainState(isShutDown: true, isPaused: false)
    let relation = store.relations[vbd.domain]
    host.writeLate(id, after: .milliseconds(timeline.random.below(3000)))
    scripts[new] = timeline.elapsed
    outside.start { [unowned self] in
      await pause(.milliseconds(timeline.random.below(500)))
      scripts[new] = timeline.elapsed
      store.create(domain, relation, DomainState(isPaused: true))
      store.add(new, SimulatedStore.Entry(params: entry.params, readOnly: entry.readOnly))
      await script(new)
      scripts[new] = nil
      await pause(.milliseconds(timeline.random.below(1000)))
      await finish(id, relation, new)
    }
  }

  private func finish(_ id: DiskID, _ relation: DomainRelation?, _ new: DiskID) async {
    guard let old = id.vbd?.domain, let domain = new.vbd?.domain else { return }
    // Another domain may have the number by now.
    func isThere() -> Bool { store.relations[old] == relation && store.entries[id] != nil }
    guard isServed(new), timeline.random.chance(80) else {
      if isServed(new) { detach(new) }
      for _ in 0..<600 where store.entries[new] != nil { await pause(.milliseconds(100)) }
      if isThere() { store.domains[old] = DomainState(isPaused: false) }
      return
    }
    store.domains[domain] = DomainState(isPaused: false)
    if timeline.random.chance(20), isThere() {
      host.note("\(id) is resumed beside \(new)")
      store.domains[old] = DomainState(isPaused: false)
      await pause(.seconds(1 + timeline.random.below(6)))
    }
    await pause(.milliseconds(timeline.random.below(3000)))
    if isThere() { detach(id) }
  }

  /// A stub domain of a guest gets the guest's disk.
  func addStub(_ id: DiskID, _ domain: Int) {
    guard let vbd = id.vbd, runs(id), let entry = store.entries[id], !entry.isGoing else { return }
    let stub = DiskID(domain: domain, device: vbd.device)
    guard store.entries[stub] == nil, scripts[stub] == nil else { return }
    store.create(
      domain, DomainRelation(vm: "/vm/stub-\(domain)", target: vbd.domain),
      DomainState(isPaused: false))
    store.add(stub, SimulatedStore.Entry(params: entry.params, readOnly: entry.readOnly))
    scripts[stub] = timeline.elapsed
    outside.start { [unowned self] in
      await script(stub)
      scripts[stub] = nil
    }
  }

  private func isServed(_ id: DiskID) -> Bool {
    store.entries[id].map { $0.hotplug == "connected" && !$0.isGoing } ?? false
  }

  /// A guest is given a device: is it another one's?
  func checkShared(_ id: DiskID, _ device: DeviceNode) {
    guard let vbd = id.vbd else { return }
    let others = store.entries.filter {
      $0.key != id && $0.value.device == device.hexadecimal && !$0.value.isGoing
        && $0.value.hotplug == "connected"
    }
    func root(_ domain: Int) -> Int { store.relations[domain]?.target ?? domain }
    for other in others.keys {
      guard let domain = other.vbd?.domain, root(domain) != root(vbd.domain) else { continue }
      if host.busy[device, default: 0] > 0 {
        host.violated("\(id) is given \(device.path) with a write of \(other) under way")
      }
      if store.domains[root(domain)]?.runs == true {
        host.violated("\(id) is given \(device.path), from which \(other) runs")
      }
    }
  }
}
