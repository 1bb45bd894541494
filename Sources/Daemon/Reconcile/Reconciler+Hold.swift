// SPDX-License-Identifier: Apache-2.0
// Two domains that both run from one disk would destroy what is on it. They may share it only because
// the former one does not run (Reconciler+Join); the toolstack or an admin may resume it all the same.
// So the domains of a shared disk are looked at when one of them changes, as far as xenstore tells, and
// every second, since nothing tells of a domain that is resumed. While two run, all requests wait:
// a device of the device-mapper is suspended; an nbd device is without a worker.
//
// A device is held in writing before it is held, so that the next daemon lets it go.

internal import LinuxBlock
internal import Logging
internal import SystemIO
internal import XenStore

extension Reconciler {
  /// Sees to it that shared disks are looked at from now on.
  func watchSharers() {
    guard !isWatchingSharers, !ending else { return }
    isWatchingSharers = true
    scheduler.start { [weak self, scheduler] in
      while await self?.goesOnWatching() == true {
        do throws(CancellationError) { try await scheduler.sleep(for: .seconds(1)) } catch {
          return
        }
      }
    }
  }

  /// False when there is no shared disk any more.
  private func goesOnWatching() async -> Bool {
    await checkSharers()
    isWatchingSharers = !ending && table.values.contains { $0.isWatched }
    return isWatchingSharers
  }

  /// Looks at every shared disk.
  func checkSharers() async {
    for disk in table.values.filter(\.isWatched) where !disk.isBeingJudged && !ending {
      disk.isBeingJudged = true
      await checkSharers(of: disk)
      disk.isBeingJudged = false
    }
  }

  private func checkSharers(of disk: Disk) async {
    // Of users that were taken over nothing is known before the first look at them.
    guard table[disk.id] === disk, disk.device != nil, !adopting.contains(disk.id),
      disk.users.allSatisfy({ $0.sight != nil || $0.orphaned })
    else { return }
    let rivals: [Disk]
    do { rivals = try await running(disk) } catch {
      // Nothing is known: it stays as it is.
      return log(for: disk).warning(
        "cannot find out which domains of the disk run", metadata: ["error": "\(error)"])
    }
    guard table[disk.id] === disk, disk.device != nil else { return }
    if rivals.isEmpty {
      if disk.held != nil, let failure = await letGo(disk) {
        log(for: disk).error("the device is held", metadata: ["reason": "\(failure)"])
      }
    } else if disk.held == nil, !disk.isLeaving {
      await hold(disk, rivals)
    }
  }

  /// Two users of a disk whose domains run both, if there are such: the former may run at any time, the
  /// latter is not paused. A domain and its stub domain are one.
  private func running(_ disk: Disk) async throws -> [Disk] {
    var users: [(user: Disk, root: Int)] = []
    for user in disk.users {
      guard user.ownWanted != nil, let domain = user.id.vbd?.domain else { continue }
      if user.rootDomain == nil {
        user.rootDomain = try await view.relation(of: domain).target ?? domain
      }
      users.append((user, user.rootDomain ?? domain))
    }
    guard Set(users.map(\.root)).count > 1 else { return [] }
    let domains = host.domains
    let states = try await offload.run { [roots = users.map(\.root)] () throws(IOError) in
      var states: [Int: DomainState] = [:]
      for root in roots { states[root] = try domains.state(of: root) }
      return states
    }
    for (index, (old, root)) in users.enumerated() where states[root]?.runs == true {
      for (new, other) in users[(index + 1)...] where other != root {
        guard let state = states[other], state.runs, state.isPaused != true else { continue }
        return [old, new]
      }
    }
    return []
  }

  /// Has all requests wait.
  private func hold(_ disk: Disk, _ rivals: [Disk]) async {
    guard let device = disk.device else { return }
    let failure = DiskFailure.bothRun(disk, rivals)
    disk.held = failure
    log(for: disk).error("two domains run from one disk", metadata: ["reason": "\(failure)"])
    await saveUsers(of: disk)
    if device.kind == .dm {
      let (mapper, id) = (mapper, disk.id)
      do throws(DeviceMapperError) {
        try await mapping.run { () throws(DeviceMapperError) in try mapper.hold(id) }
      } catch {
        disk.held = nil
        return log(for: disk).error("cannot hold the device", metadata: ["error": "\(error)"])
      }
    } else if let worker = disk.worker, worker.ended == nil {
      // Its successor waits.
      await replace(worker, of: disk, failure.sentence)
    }
    if case .serving = disk.phase, device.kind == .dm {
      enter(disk, .serving(DiskPhase.Trouble(state: .degraded, error: failure.sentence)))
    }
    await publish(disk)
  }

  /// Lets requests go on. Why that is not possible yet, if so.
  func letGo(_ disk: Disk) async -> DiskFailure? {
    if disk.device?.kind == .dm {
      let (mapper, id) = (mapper, disk.id)
      do throws(DeviceMapperError) {
        try await mapping.run { () throws(DeviceMapperError) in try mapper.letGo(id) }
      } catch { return .mapper(error) }
    }
    disk.held = nil
    log(for: disk).notice("only one domain runs from the disk: requests go on")
    await saveUsers(of: disk)
    switch disk.phase {
    case .serving: enter(disk, .serving(DiskPhase.Trouble(disk.report)))
    case .restarting: enter(disk, .restarting(at: scheduler.now))
    default: return nil
    }
    await publish(disk)
    mark(disk.id)
    return nil
  }
}

extension Disk {
  /// Whether its domains are looked at.
  fileprivate var isWatched: Bool { users.count > 1 || held != nil }
}

extension DiskFailure {
  static func bothRun(_ disk: Disk, _ rivals: [Disk]) -> DiskFailure {
    let who = rivals.isEmpty ? disk.holders : rivals.map { Holder(id: $0.id, vdev: $0.vdev) }
    return DiskFailure(
      .inUse,
      "\(words(who)) run both from store \(disk.spec?.store ?? ""): all requests wait until one of"
        + " them is destroyed or paused")
  }
}
