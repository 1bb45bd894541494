// SPDX-License-Identifier: Apache-2.0
// Named disks: what an admin wants takes the place of what the toolstack wants of a vbd. Everything
// else of such a disk is as with any other.
//
// Invariants:
// - A wish is only taken back while nobody uses the disk's device, or while nobody was told of it.
// - It is in writing before anybody is told of the device, and as long as somebody may use that.
// - Attaches and detaches of one name come one after the other.

import Glibc
internal import LinuxBlock
internal import Logging
internal import SystemIO
internal import XenStore

extension Reconciler {
  /// Looks at what is wanted of a disk. Nil: xenstore has forgotten us, and says nothing.
  func look(_ id: DiskID) async throws(XenStoreError) -> Sight? {
    switch id {
    case .vbd(let vbd), .again(let vbd, _):
      // Whatever is there by now is none of the disk's.
      if table[id]?.isOutlived == true { .nothing } else { try await view.look(vbd) }
    case .named(let name): sight(of: name)
    }
  }

  /// The same of a named disk, of which xenstore knows nothing.
  func sight(of name: DiskName) -> Sight {
    Sight(wanted: wishes[name].flatMap(\.wanted), exists: false, vdev: nil)
  }

  /// Takes up what an earlier daemon had in writing.
  func recallWishes() async throws(IOError) {
    let written = configuration.namedWishes
    let (found, strange) = try await offload.run { () throws(IOError) in try written.load() }
    wishes = found
    writtenWishes = Set(found.keys)
    for path in strange {
      log.error("this is no wish for a named disk", metadata: ["file": "\(path)"])
    }
  }

  /// The run directory was made anew: what was written there of named disks is written again.
  func rewriteWishes() {
    for name in writtenWishes { scheduler.start { [weak self] in await self?.rewrite(name) } }
  }

  private func rewrite(_ name: DiskName) async {
    do throws(DiskFailure) {
      try await changing(name) { () async throws(DiskFailure) in
        guard let wish = wishes[name], writtenWishes.contains(name) else { return }
        try await write(name, wish)
        if let disk = table[.named(name)] { try await prepareLink(disk) }
      }
    } catch {
      log.error(
        "cannot keep a named disk for the next daemon",
        metadata: ["disk": "\(name)", "error": "\(error)"])
    }
  }

  // MARK: - Attaching

  /// Takes up a disk under a name, and waits until it is served or has failed. One that is there
  /// already and is wanted in the same way is no error. `create`: a store that does not exist is
  /// created. After a failure the name is free again.
  func attach(
    _ name: DiskName, _ wish: NamedWish, create: Bool
  ) async -> Result<DeviceNode, DiskFailure> {
    guard takesWaiters else { return .failure(.ending) }
    do throws(DiskFailure) {
      return .success(
        try await changing(name) { () async throws(DiskFailure) in
          try await attachAlone(name, wish, create: create)
        })
    } catch { return .failure(error) }
  }

  func attachAlone(
    _ name: DiskName, _ wish: NamedWish, create: Bool
  ) async throws(DiskFailure) -> DeviceNode {
    let (id, before) = (DiskID.named(name), wishes[name])
    try checkNotGoing(name)
    if before?.isOfSameDisk(as: wish) != true { try await release(name, for: wish) }
    if before?.isActive != true || wishes[name] == nil { try await checkFree(name) }
    var active = wish
    active.inactiveSince = nil
    wishes[name] = active
    do throws(DiskFailure) {
      let device = try await attach(id, boots: create).get()
      if !writtenWishes.contains(name) || before?.isActive == false {
        try await write(name, active)
      }
      return device
    } catch {
      // Nobody was told of the device, if there is one.
      if let before, !before.isActive {
        wishes[name] = before
        mark(id)
      } else if !writtenWishes.contains(name) {
        wishes[name] = nil
        mark(id)
      }
      throw error
    }
  }

  /// Keeps a disk by its name, without serving it. One that is known in the same way stays as it
  /// is.
  func keep(_ name: DiskName, _ wish: NamedWish) async throws(DiskFailure) {
    guard takesWaiters else { throw .ending }
    do { _ = try Spec(wish.params) } catch { throw .malformed(error) }
    try await changing(name) { () async throws(DiskFailure) in
      try checkNotGoing(name)
      if wishes[name]?.isOfSameDisk(as: wish) == true { return }
      try await release(name, for: wish)
      try await checkFree(name)
      var kept = wish
      kept.inactiveSince = scheduler.unixTime
      try await write(name, kept)
      wishes[name] = kept
      // What failed under this name is forgotten.
      if table[.named(name)] != nil { mark(.named(name)) }
    }
  }

  /// Throws when the former disk of a name is still on its way out.
  private func checkNotGoing(_ name: DiskName) throws(DiskFailure) {
    let id = DiskID.named(name)
    guard let disk = table[id], wishes[name]?.isActive != true, !adopting.contains(id),
      disk.holdsSomething
    else { return }
    throw .stillGoing(name, disk.reason)
  }

  /// Takes a name from a disk that has failed, for another one. Throws when it has not.
  private func release(_ name: DiskName, for wish: NamedWish) async throws(DiskFailure) {
    guard let before = wishes[name] else { return }
    guard before.isActive, hasFailed(.named(name)) else { throw .nameTaken(name, before) }
    try await erase(name)
  }

  /// Throws when something else than a link has the place of a disk's link.
  private func checkFree(_ name: DiskName) async throws(DiskFailure) {
    let links = host.links
    try await offload.run { () throws(DiskFailure) in
      do throws(IOError) { try links.checkFree(name) } catch { throw .link(error, name) }
    }
  }

  /// Does something with a name that nothing else is done with meanwhile.
  func changing<Value>(
    _ name: DiskName, _ body: () async throws(DiskFailure) -> Value
  ) async throws(DiskFailure) -> Value {
    let end = scheduler.now + configuration.attachTimeout
    while changingNames.contains(name) {
      guard scheduler.now < end else {
        throw .timeout(
          "the disk \(name) is being attached or detached by another command, which was not done",
          configuration.attachTimeout, remedy: "see dmu-xen status, and try again")
      }
      await pause(.milliseconds(20))
    }
    changingNames.insert(name)
    defer { changingNames.remove(name) }
    return try await body()
  }

  /// Whether a disk has failed and holds nothing.
  private func hasFailed(_ id: DiskID) -> Bool {
    guard let disk = table[id] else { return true }
    if case .failed(_, attached: false) = disk.phase { return true }
    return false
  }

  func write(_ name: DiskName, _ wish: NamedWish) async throws(DiskFailure) {
    let written = configuration.namedWishes
    try await blocking { () throws(IOError) in try written.save(name, wish) }
    writtenWishes.insert(name)
  }

  /// Takes a wish back, first in writing.
  private func erase(_ name: DiskName) async throws(DiskFailure) {
    let written = configuration.namedWishes
    try await blocking { () throws(IOError) in try written.remove(name) }
    writtenWishes.remove(name)
    wishes[name] = nil
  }

  // MARK: - Detaching

  /// Takes a named disk down and waits until nothing of it is left. Refused while somebody uses its
  /// device: then nothing has changed.
  func detach(_ name: DiskName) async throws(DiskFailure) {
    let id = DiskID.named(name)
    try await changing(name) { () async throws(DiskFailure) in
      guard wishes[name] != nil || table[id] != nil else { throw .nameUnknown(name) }
      guard wishes[name] != nil else { return }
      // What uses a device is only known of one that is known.
      guard !adopting.contains(id) else { throw .notTakenOver(name) }
      try await checkUnused(name, id)
      try await erase(name)
    }
    try await waitUntilGone(name, "detached")
    forgetFailures(of: name)
  }

  /// Waits until nothing is left of a disk that is not wanted any more. `done`: what was asked for.
  func waitUntilGone(_ name: DiskName, _ done: String) async throws(DiskFailure) {
    let id = DiskID.named(name)
    guard let disk = table[id] else { return }
    hurry(disk)
    let end = scheduler.now + configuration.stopTimeout * 2
    while table[id] === disk, wishes[name]?.isActive != true {
      guard scheduler.now < end, !ending else {
        throw .timeout(
          "disk \(name) is \(disk.phase.publicState.rawValue)"
            + (disk.reason.map { " (\($0))" } ?? "") + " and was not gone",
          configuration.stopTimeout * 2, remedy: "it goes on by itself; see dmu-xen status")
      }
      if case .stopping(let stuck?) = disk.phase, !disk.busy, stuck.retry > scheduler.now {
        throw DiskFailure(
          stuck.failure.code, "disk \(name) is not \(done) yet: \(stuck.failure.sentence)")
      }
      await pause(.milliseconds(20))
    }
  }

  /// Throws when somebody uses the device of a named disk, as far as kernel and xenstore know.
  func checkUnused(_ name: DiskName, _ id: DiskID) async throws(DiskFailure) {
    guard let disk = table[id], let device = disk.device else { return }
    var users: [String] = []
    do throws(XenStoreError) {
      users = try await view.users(of: device.hexadecimal).map { DiskID.vbd($0).words }
    } catch {
      // The device-mapper knows how many have it open, the nbd driver does not.
      guard device.kind == .dm else {
        throw DiskFailure(
          .daemon,
          "whether a guest uses disk \(name) cannot be found out, since xenstore cannot be read"
            + " (\(error)): see to it and detach the disk again")
      }
    }
    let isOpen = try await isOpen(id, device)
    guard isOpen || !users.isEmpty else { return }
    let processes = host.processes
    users += await offload.run { () -> [String] in
      var status = stat()
      guard stat(device.kernelPath, &status) == 0 else { return [] }
      return processes.programs(using: FileIdentity(status))
    }
    throw .deviceInUse(name, host.links.path(name), device, users)
  }

  /// Whether the kernel knows of somebody who has a device open.
  private func isOpen(_ id: DiskID, _ device: DeviceNode) async throws(DiskFailure) -> Bool {
    guard device.kind == .dm else {
      let attacher = attacher
      return try await blocking { () throws(IOError) in try attacher.isInUse(device) }
    }
    let mapper = mapper
    do throws(DeviceMapperError) {
      return try await mapping.run { () throws(DeviceMapperError) in try mapper.users(id) } > 0
    } catch { throw .mapper(error) }
  }
}

extension DiskFailure {
  static func nameBad(_ text: String) -> DiskFailure {
    DiskFailure(
      .malformed, "'\(ForeignText.shown(text))' is no name for a disk: \(DiskName.rule)")
  }

  static func ownerBad(_ text: String) -> DiskFailure {
    DiskFailure(
      .malformed,
      "'\(ForeignText.shown(text))' is no UUID of an owner: give it as in"
        + " 8c7e6ac0-4b2b-4b5c-9f6e-0a4c4d1f2e3b")
  }

  static func nameUnknown(_ name: DiskName) -> DiskFailure {
    DiskFailure(.gone, "there is no named disk '\(name)': see dmu-xen status for those there are")
  }

  static func notTakenOver(_ name: DiskName) -> DiskFailure {
    DiskFailure(
      .inUse,
      "the disk \(name) is not taken over from an earlier daemon yet, since its files or its device"
        + " do not answer, or fail: detach it when dmu-xen status shows it as ready")
  }

  static func nameTaken(_ name: DiskName, _ wish: NamedWish) -> DiskFailure {
    let owner = wish.owner.map { " of owner \($0)" } ?? ""
    return DiskFailure(
      .inUse,
      "the name \(name) is taken by a\(wish.readOnly ? " read-only" : "") disk\(owner) with the"
        + " spec \(wish.params): detach it first, or give this disk another name")
  }

  static func stillGoing(_ name: DiskName, _ reason: String?) -> DiskFailure {
    DiskFailure(
      .inUse,
      "the disk \(name) is being detached\(reason.map { " (\($0))" } ?? ""): attach it again when"
        + " it is gone, or give this disk another name")
  }

  /// - Parameter users: who they are, as far as is known.
  static func deviceInUse(
    _ name: DiskName, _ path: String, _ device: DeviceNode, _ users: [String]
  ) -> DiskFailure {
    let who = words(users) ?? "something of this host"
    let guests =
      users.contains { $0.hasPrefix("domain ") }
      ? "end the guest or take the disk from it (xl block-detach)"
      : "end what uses it (fuser -v \(device.kernelPath); lsblk \(device.kernelPath))"
    return DiskFailure(
      .inUse,
      "the disk \(name) is in use: its device \(path) is open by \(who): \(guests) and detach it"
        + " again")
  }

  /// What is wrong with a named disk's link or wish.
  static func link(_ error: IOError, _ name: DiskName) -> DiskFailure {
    guard error.code == EEXIST else {
      return DiskFailure(.io, "\(error.description): see to it and attach disk \(name) again")
    }
    return DiskFailure(
      .inUse,
      "the name \(name) is taken: \(error.subject) is something else than a link, for example the"
        + " node of a device that cowd serves by hand: give the disk another name")
  }
}
