// SPDX-License-Identifier: Apache-2.0
// One disk, several users: vbds that the same virtual machine has one after the other (a migration to
// the same host), or at the same time (a guest and its stub domain).
//
// A vbd B whose store is that of a disk X joins X in this order:
//  1. Its params and mode are those of X.
//  2. Each user A of X that is not on its way out belongs to B's stub domain or target, which joins at
//     once, or to the same VM: the texts of their domains' `vm` are equal, where a stub domain counts as
//     its target.
//  3. In the second case A's domain does not run: the hypervisor says that it has shut down or is dying,
//     or does not know it. If it cannot be asked, the domain counts as running.
//  4. X is quiet: nothing is under way on its device and no backend takes a request, three times in a
//     row. Then the device is flushed. So an old write cannot come after a new one.
//  5. The record of X names B, before B's block script is answered with X's device.
// A daemon that dies before 5 has not answered; the next one begins with 1.
//
// Invariants:
// - A disk goes when no vbd wants it any more, whoever it was started for. Who is joining wants it.
// - A disk that its own vbd has left is no disk of a later vbd of the same numbers.

internal import Logging
internal import SystemIO
internal import XenStore

extension Reconciler {
  /// How long the requests of the former user may take. The block script has 40 seconds.
  private static let drainTime = Duration.seconds(20)
  /// So often in a row nothing is seen, at this distance.
  private static let quietLooks = 3
  private static let quietPause = Duration.milliseconds(20)

  /// What came of trying to join.
  enum Joining {
    case joined
    /// The disk is none of the vbd's business.
    case stranger
    case refused(DiskFailure)
    /// The disk has changed meanwhile.
    case again
    /// The vbd has been taken away.
    case unwanted
  }

  /// How two domains are related.
  private enum Tie {
    case none
    /// One is the other's stub domain.
    case stub
    /// The same VM. `root`: the other domain, or the one whose stub domain it is.
    case sameVM(root: Int, vm: String)
  }

  /// Has a vbd join the disk that has its store, if it may.
  func join(_ user: Disk, _ disk: Disk) async -> Joining {
    guard user.id.vbd != nil, disk.id.vbd != nil, user.params == disk.params,
      user.readOnly == disk.readOnly
    else { return .stranger }
    // Whoever is joining keeps the disk there.
    (user.host, user.hasJoined) = (disk, false)
    disk.joined.append(user)
    let outcome: Joining
    let start = scheduler.now
    do throws(XenStoreError) { outcome = try await tryJoining(user, disk) } catch {
      outcome = .refused(
        DiskFailure(
          .daemon,
          "whether store \(disk.spec?.store ?? "") is in use by the same VM cannot be found out, since"
            + " xenstore cannot be read (\(error)): see to it and attach the disk again"))
    }
    if case .joined = outcome {
      log(for: user).notice(
        "the vbd has joined the disk of the same VM",
        metadata: ["joined": "\(disk.id)", "after": "\(scheduler.now - start)"])
      return outcome
    }
    separate(user)
    mark(disk.id)
    if case .again = outcome { await pause(Reconciler.quietPause) }
    return outcome
  }

  private func tryJoining(_ user: Disk, _ disk: Disk) async throws(XenStoreError) -> Joining {
    let end = scheduler.now + Reconciler.drainTime
    while true {
      guard await isStillWanted(user) else { return .unwanted }
      guard table[disk.id] === disk else { return .again }
      // A disk whose users are all on their way out goes, and is waited for.
      let users = disk.users.filter { $0.ownWanted?.going == false }
      guard !users.isEmpty else { return .again }
      if let judgement = try await judge(user, users, disk) { return judgement }
      let isAdopted = !adopting.contains(disk.id)
      switch disk.phase {
      case .serving, .starting, .restarting: break
      case .failed(_, attached: true): if isAdopted { return .stranger }
      default: if isAdopted { return .again }
      }
      guard isAdopted, disk.phase.isServing, let device = disk.device else {
        guard scheduler.now < end else { return .refused(.notServed(disk, Reconciler.drainTime)) }
        await pause(.milliseconds(50))
        continue
      }
      if try await !areRelatives(user, users) {
        if let outcome = await drain(user, disk, device, until: end) { return outcome }
        // It may have been resumed meanwhile, and another one may have joined.
        let now = disk.users.filter { $0.ownWanted?.going == false }
        guard !now.isEmpty else { return .again }
        if let judgement = try await judge(user, now, disk) { return judgement }
      }
      user.hasJoined = true
      do throws(DiskFailure) { try await save(disk) } catch { return .refused(error) }
      guard table[disk.id] === disk, disk.device == device else { return .again }
      return .joined
    }
  }

  /// Why a vbd may not join these users of a disk; nil: it may.
  private func judge(
    _ user: Disk, _ others: [Disk], _ disk: Disk
  ) async throws(XenStoreError) -> Joining? {
    let store = disk.spec?.store ?? ""
    for other in others {
      guard user.sight?.isInDriverDomain != true else {
        return other.id.vbd?.domain == user.id.vbd?.domain
          ? .stranger : .refused(.noJoining(store, other.holders))
      }
      switch try await tie(user, other) {
      case .none: return .stranger
      case .stub: continue
      case .sameVM(let root, let vm):
        let domains = host.domains
        do throws(IOError) {
          let state = try await offload.run { () throws(IOError) in try domains.state(of: root) }
          if state?.runs == true {
            return .refused(.sameVMRuns(store, Holder(id: other.id, vdev: other.vdev), vm, nil))
          }
        } catch {
          return .refused(.sameVMRuns(store, Holder(id: other.id, vdev: other.vdev), vm, error))
        }
      }
    }
    return nil
  }

  /// Whether all of them are stub domain or target of a vbd's domain, and there is one.
  private func areRelatives(
    _ user: Disk, _ others: [Disk]
  ) async throws(XenStoreError) -> Bool {
    for other in others {
      guard case .stub = try await tie(user, other) else { return false }
    }
    return !others.isEmpty
  }

  private func tie(_ user: Disk, _ other: Disk) async throws(XenStoreError) -> Tie {
    guard let one = user.id.vbd?.domain, let two = other.id.vbd?.domain, one != two else {
      return .none
    }
    let (first, second) = (try await view.relation(of: one), try await view.relation(of: two))
    let (root, otherRoot) = (first.target ?? one, second.target ?? two)
    (user.rootDomain, other.rootDomain) = (root, otherRoot)
    guard root != otherRoot else { return .stub }
    let vm = root == one ? first.vm : try await view.relation(of: root).vm
    let otherVM = otherRoot == two ? second.vm : try await view.relation(of: otherRoot).vm
    guard let vm, vm == otherVM else { return .none }
    return .sameVM(root: otherRoot, vm: vm)
  }

  /// Waits until nothing of the disk's former users is under way any more, and has the device flushed.
  /// Why that came to nothing, if so.
  private func drain(
    _ user: Disk, _ disk: Disk, _ device: DeviceNode, until end: ContinuousClock.Instant
  ) async -> Joining? {
    user.activity = "waiting for the last requests of \(DiskFailure.words(disk.holders))"
    defer { user.activity = nil }
    let traffic = host.traffic
    var last: DeviceSight?
    var quiet = 0
    var round = 0
    while true {
      let vbds = disk.users.compactMap(\.id.vbd)
      do throws(IOError) {
        let sight = try await offload.run { () throws(IOError) in
          try traffic.look(device, vbds)
        }
        quiet = sight.isBusy ? 0 : sight == last ? quiet + 1 : 1
        last = sight
      } catch { return .refused(.unseen(disk, device, error)) }
      if quiet >= Reconciler.quietLooks { break }
      guard scheduler.now < end else { return .refused(.notQuiet(disk, Reconciler.drainTime)) }
      await pause(Reconciler.quietPause)
      guard table[disk.id] === disk, disk.device == device else { return .again }
      round += 1
      // The toolstack may give up.
      if round % 25 == 0, await !isStillWanted(user) { return .unwanted }
    }
    guard !disk.readOnly else { return nil }
    return await flush(disk, device, until: end)
  }

  private func flush(
    _ disk: Disk, _ device: DeviceNode, until end: ContinuousClock.Instant
  ) async -> Joining? {
    let flush = DeviceFlush()
    let (mapper, attacher, flushing) = (mapper, attacher, host.flushing)
    scheduler.start {
      flush.end(
        await flushing.run { () -> IOError? in
          do throws(IOError) {
            if device.kind == .dm {
              try mapper.flush(device)
            } else {
              try attacher.flush(device)
            }
            return nil
          } catch { return error }
        })
    }
    let limit = max(end - scheduler.now, .seconds(1))
    guard await flush.ended.wait(limit, scheduler) else {
      return .refused(.notQuiet(disk, Reconciler.drainTime))
    }
    return flush.error.map { .refused(.unflushed(disk, device, $0)) }
  }

  // MARK: - Leaving

  /// A vbd lets go of the disk that it has joined, or of one that is no more. It is wanted anew, if at
  /// all.
  func leave(_ user: Disk) async {
    let disk = user.host
    separate(user)
    enter(user, .idle)
    user.due = true
    guard let disk, table[disk.id] === disk else { return }
    await saveUsers(of: disk)
    mark(disk.id)
  }

  private func separate(_ user: Disk) {
    user.host?.joined.removeAll { $0 === user }
    (user.host, user.hasJoined, user.rootDomain) = (nil, false, nil)
  }

  /// Whether the disk that a vbd has joined is gone.
  func hasLostHost(_ user: Disk) -> Bool {
    guard let disk = user.host, table[disk.id] === disk else { return true }
    return disk.device == nil && !adopting.contains(disk.id)
  }

  /// A disk is no more: those who have joined it are on their own.
  func dissolve(_ disk: Disk) {
    for user in disk.joined {
      separate(user)
      guard case .joined = user.phase else { continue }
      enter(user, .idle)
      mark(user.id)
    }
  }

  /// Whether a disk that others use has been left by the vbd for which it was started. Another one may
  /// have come in its place: then the device is not written in the entry.
  func hasLeft(_ disk: Disk) -> Bool {
    guard disk.id.vbd != nil, !disk.isOutlived, !disk.orphaned, !disk.joined.isEmpty,
      let sight = disk.sight
    else { return false }
    guard let wanted = sight.wanted else { return true }
    return wanted.params != disk.params || wanted.readOnly != disk.readOnly
      || (disk.wasGiven && sight.device == nil)
  }

  /// A disk goes on for others.
  func outlive(_ disk: Disk) async {
    guard let vbd = disk.id.vbd, !disk.isOutlived else { return }
    disk.isOutlived = true
    let (waiters, boots) = (disk.waiters, disk.boots)
    (disk.waiters, disk.boots, disk.published) = ([:], nil, nil)
    (disk.released, disk.sight) = (false, .nothing)
    let names = disk.joined.map { "\($0.id)" }.joined(separator: " ")
    log(for: disk).info("its vbd has gone, the disk goes on", metadata: ["users": "\(names)"])
    // What is there by now is for another disk.
    let heir = id(of: vbd)
    mark(heir)
    if !waiters.isEmpty, let new = table[heir] {
      new.waiters.merge(waiters) { $1 }
      new.boots = boots
    }
    await saveUsers(of: disk)
  }

  /// Writes down who uses a disk. A vbd that is named and has gone does no harm.
  func saveUsers(of disk: Disk) async {
    do throws(DiskFailure) { try await save(disk) } catch {
      log(for: disk).warning("cannot keep who uses the disk", metadata: ["error": "\(error)"])
    }
  }

  // MARK: - Taking over

  /// Takes up the vbds that used a disk of an earlier daemon.
  func takeUsers(_ users: [VBD], _ disk: Disk) {
    guard !users.isEmpty, let own = disk.id.vbd else { return }
    disk.isOutlived = !users.contains(own)
    // Others have joined only what it had been given: without the device it is another of its numbers.
    disk.wasGiven = !disk.isOutlived
    for vbd in users where disk.isOutlived || vbd != own {
      let id = id(of: vbd)
      guard table[id] == nil else {
        log(for: disk).error("a user of the disk has another one", metadata: ["user": "\(vbd)"])
        continue
      }
      let user = Disk(id, configuration: configuration, now: scheduler.unixTime)
      (user.params, user.readOnly, user.spec) = (disk.params, disk.readOnly, disk.spec)
      (user.host, user.hasJoined) = (disk, true)
      user.phase = .joined(disk.id)
      disk.joined.append(user)
      table[id] = user
    }
  }
}

extension DiskFailure {
  /// "/vm/UUID" in words.
  private static func uuid(_ vm: String) -> String {
    ForeignText.shown(vm.hasPrefix("/vm/") ? String(vm.dropFirst(4)) : vm)
  }

  /// - Parameter unknown: why it is not known whether it runs; nil: it does.
  static func sameVMRuns(
    _ store: String, _ holder: Holder, _ vm: String, _ unknown: IOError?
  ) -> DiskFailure {
    let state =
      unknown.map { ", and whether that is running cannot be found out (\($0))" }
      ?? ", which is running"
    return DiskFailure(
      .inUse,
      "store \(store) is in use by \(words([holder]))\(state): this is the same VM"
        + " (UUID \(uuid(vm))); destroy one of them")
  }

  static func noJoining(_ store: String, _ holders: [Holder]) -> DiskFailure {
    DiskFailure(
      .inUse,
      "store \(store) is in use by \(words(holders)): in a driver domain nothing tells whether that is"
        + " the same VM and has stopped, so no two domains share a disk here (no migration to the same"
        + " host); end that domain first, or give this disk a store of its own")
  }

  static func notServed(_ disk: Disk, _ limit: Duration) -> DiskFailure {
    .timeout(
      "store \(disk.spec?.store ?? "") is in use by \(words(disk.holders)), whose disk was not ready",
      limit, remedy: "see dmu-xen status, and attach the disk again")
  }

  static func notQuiet(_ disk: Disk, _ limit: Duration) -> DiskFailure {
    .timeout(
      "store \(disk.spec?.store ?? "") is in use by \(words(disk.holders)), the same VM, whose last"
        + " requests were not finished", limit,
      remedy: "see to what they wait for (dmu-xen status, dmesg), and try again")
  }

  static func unseen(_ disk: Disk, _ device: DeviceNode, _ error: IOError) -> DiskFailure {
    DiskFailure(
      .device,
      "whether requests of \(words(disk.holders)) to \(device.path) are under way cannot be found out"
        + " (\(error)): see to it and attach the disk again")
  }

  static func unflushed(_ disk: Disk, _ device: DeviceNode, _ error: IOError) -> DiskFailure {
    DiskFailure(
      .device,
      "what \(words(disk.holders)) has written to \(device.path) cannot be flushed (\(error)): see to"
        + " it (dmu-xen status), and attach the disk again")
  }
}
