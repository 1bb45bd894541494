// SPDX-License-Identifier: Apache-2.0
// The admin of a simulated host, and guests on his named disks: phy:/dev/dmu/NAME.
//
// What is checked: a disk that was promised is served, on the same device, until its detach has
// succeeded; no detach succeeds, and no device of such a disk goes, while a guest has it. The same
// holds for a disk that is deactivated, until it is activated; while it is inactive, it has no
// device, no worker and no link, and the daemon knows of it.

import SystemIO
import TestSupport

@testable import Daemon

/// A named disk that the admin was told of.
struct Promise {
  let params: String
  let device: DeviceNode
  var isActive = true
}

extension Simulation {
  static let names = ["one", "two", "three"].compactMap { DiskName($0) }

  /// The vbd of the guest that uses a named disk.
  private static func guest(_ name: DiskName) -> VBD {
    VBD(domain: 100 + (names.firstIndex(of: name) ?? 0), device: 51712)
  }

  func attachNamed(_ name: DiskName, _ params: String, readOnly: Bool) {
    let id = DiskID.named(name)
    guard promises[name] == nil, scripts[id] == nil, !leaving.contains(name) else { return }
    scripts[id] = timeline.elapsed
    outside.start { [unowned self] in
      if await !isAttached(name, NamedWish(params: params, readOnly: readOnly)) {
        // Nobody knows whether the daemon has it in writing.
        await isDetached(name)
      }
      scripts[id] = nil
    }
  }

  /// `dmu-xen attach`, as often as no daemon answers. Whether it has succeeded.
  private func isAttached(_ name: DiskName, _ wish: NamedWish) async -> Bool {
    let end = timeline.elapsed + .seconds(60)
    while timeline.elapsed < end {
      guard let current = running, current.life.isOpen else {
        await pause(.milliseconds(200))
        continue
      }
      let asked = timeline.elapsed
      let result = await current.reconciler.attach(name, wish, create: true)
      let took = timeline.elapsed - asked
      // Writing the wish down, and taking it back, may each take 20 seconds on a slow host.
      if took > configuration.attachTimeout + .seconds(50) {
        host.violated("the admin waited \(took) for \(name)")
      }
      switch result {
      case .success(let device):
        host.note("\(name) is attached: \(device.path)")
        checkDevice(.named(name), wish.params, device)
        promises[name] = Promise(params: wish.params, device: device)
        if timeline.random.chance(70) { use(name, true) }
        return true
      case .failure(let failure):
        guard failure.code == .daemon || current.life.isDead else {
          host.note("\(name) is refused: \(failure.sentence)")
          return false
        }
        await pause(.milliseconds(200))
      }
    }
    return false
  }

  /// A guest gets the disk, or lets go of it.
  func use(_ name: DiskName, _ isUsed: Bool) {
    guard let promise = promises[name], promise.isActive, !leaving.contains(name) else { return }
    store.users[Self.guest(name)] = isUsed ? promise.device.hexadecimal : nil
    if isUsed {
      host.connect(.named(name), to: promise.device)
    } else {
      host.disconnect(.named(name))
    }
  }

  /// `dmu-xen detach`: sometimes while a guest has the disk, else when that has let go of it.
  func detachNamed(_ name: DiskName) {
    guard promises[name] != nil, !leaving.contains(name) else { return }
    if isStormy, host.isConnected(.named(name)), timeline.random.chance(40) {
      return admin { [unowned self] reconciler in
        do throws(DiskFailure) { try await reconciler.detach(name) } catch { return }
        if promises[name] != nil, host.isConnected(.named(name)) {
          host.violated("\(name) is detached while a guest has it")
        }
      }
    }
    use(name, false)
    leaving.insert(name)
    outside.start { [unowned self] in
      if await isDetached(name) { promises[name] = nil }
      leaving.remove(name)
    }
  }

  /// `dmu-xen deactivate`, likewise.
  func deactivateNamed(_ name: DiskName) {
    guard promises[name]?.isActive == true, !leaving.contains(name) else { return }
    if isStormy, host.isConnected(.named(name)), timeline.random.chance(40) {
      return admin { [unowned self] reconciler in
        do throws(DiskFailure) { try await reconciler.deactivate(name) } catch { return }
        if promises[name] != nil, host.isConnected(.named(name)) {
          host.violated("\(name) is deactivated while a guest has it")
        }
      }
    }
    use(name, false)
    leaving.insert(name)
    outside.start { [unowned self] in
      if await isDeactivated(name) { promises[name]?.isActive = false }
      leaving.remove(name)
      guard timeline.random.chance(70) else { return }
      timeline.after(.milliseconds(timeline.random.below(20_000))) { [unowned self] in
        activateNamed(name)
      }
    }
  }

  /// `dmu-xen activate` of a disk that is inactive; when that fails it is inactive as before.
  func activateNamed(_ name: DiskName) {
    guard let promise = promises[name], !promise.isActive, !leaving.contains(name) else { return }
    leaving.insert(name)
    outside.start { [unowned self] in
      if let device = await activatedDevice(name) {
        host.note("\(name) is active: \(device.path)")
        checkDevice(.named(name), promise.params, device)
        promises[name] = Promise(params: promise.params, device: device)
      } else {
        // Nobody knows whether a daemon that has died has it in writing.
        await isDeactivated(name)
      }
      leaving.remove(name)
      if timeline.random.chance(70) { use(name, true) }
    }
  }

  /// Activates a disk, as often as no daemon answers.
  private func activatedDevice(_ name: DiskName) async -> DeviceNode? {
    let end = timeline.elapsed + .seconds(60)
    while timeline.elapsed < end {
      guard let current = running, current.life.isOpen else {
        await pause(.milliseconds(200))
        continue
      }
      switch await current.reconciler.activate(name) {
      case .success(let device): if !current.life.isDead { return device }
      case .failure(let failure):
        if failure.code == .gone, !current.life.isDead {
          host.violated("\(name) is not known any more: \(failure.sentence)")
        }
        guard failure.code == .daemon || current.life.isDead else {
          host.note("\(name) stays inactive: \(failure.sentence)")
          return nil
        }
      }
      await pause(.milliseconds(200))
    }
    return nil
  }

  /// Deactivates a disk that nobody uses, as often as that fails. Whether it is inactive.
  @discardableResult
  private func isDeactivated(_ name: DiskName) async -> Bool {
    let end = timeline.elapsed + .seconds(200)
    while timeline.elapsed < end {
      if let current = running, current.life.isOpen {
        do throws(DiskFailure) {
          try await current.reconciler.deactivate(name)
          if !current.life.isDead {
            checkInactive(name)
            return true
          }
        } catch {
          host.note("\(name) is not deactivated: \(error.sentence)")
          if error.code == .gone, !current.life.isDead {
            host.violated("\(name) is not known any more: \(error.sentence)")
          }
        }
      }
      await pause(.seconds(1))
    }
    host.violated("\(name) cannot be deactivated")
    return false
  }

  /// An inactive disk has nothing but its name.
  private func checkInactive(_ name: DiskName) {
    let id = DiskID.named(name)
    if host.mapped[id] != nil
      || host.sockets.values.contains(where: {
        $0.identifier.hasSuffix(" \(id)")
      })
    {
      host.violated("\(name) is inactive and has a device")
    }
    if host.living.contains(where: { $0.disk == id }) {
      host.violated("\(name) is inactive and has a worker")
    }
    if let link = FileUsers.link(links.path(name)) {
      host.violated("\(name) is inactive and has a link to \(link)")
    }
  }

  /// Detaches a disk that nobody uses, as often as that fails. Whether it has gone.
  @discardableResult
  private func isDetached(_ name: DiskName) async -> Bool {
    let end = timeline.elapsed + .seconds(200)
    while timeline.elapsed < end {
      if let current = running, current.life.isOpen {
        do throws(DiskFailure) {
          try await current.reconciler.detach(name)
          // What a daemon says that has died meanwhile is nothing.
          if !current.life.isDead { return true }
        } catch {
          if error.code == .gone, !current.life.isDead { return true }
          host.note("\(name) is not detached: \(error.sentence)")
        }
      }
      await pause(.seconds(1))
    }
    host.violated("\(name) cannot be detached")
    return false
  }

  func checkNamesServed() {
    for (name, promise) in promises where !leaving.contains(name) {
      guard promise.isActive else {
        checkInactive(name)
        continue
      }
      let id = DiskID.named(name)
      let nodes = [host.mapped[id]?.node] + host.sockets.values.map { Optional($0.node) }
      guard nodes.contains(promise.device) else {
        host.violated("\(name) has lost its device \(promise.device.path)")
        continue
      }
      if !host.living.contains(where: { $0.disk == id && ($0.servesNode || $0.order != nil) }) {
        host.violated("\(name) has no worker")
      }
      let link = links.path(name)
      if FileUsers.link(link) != promise.device.kernelPath {
        host.violated("\(link) leads to \(FileUsers.link(link) ?? "nothing")")
      }
    }
    for (name, promise) in promises where !leaving.contains(name) {
      let state = states[name]
      if state != (promise.isActive ? .ready : .inactive) {
        let wish = promise.isActive ? "active" : "inactive"
        host.violated("\(name) is \(wish) and \(state?.rawValue ?? "unknown")")
      }
    }
  }

  func checkNamesGone() {
    for name in promises.keys { host.violated("the admin cannot detach \(name)") }
    do throws(IOError) {
      for folder in [configuration.namedWishes.folder, links.folder, linkFiles] {
        for name in try Folder.names(folder) { host.violated("\(folder)/\(name) is left") }
      }
    } catch { host.violated("\(error)") }
  }

  /// Has the daemon say how the named disks are.
  func askForStates() {
    states = [:]
    admin { [unowned self] reconciler in
      do throws(DiskFailure) {
        for status in try await reconciler.status(domain: nil) {
          if case .named(let name) = status.id, status.note == nil || status.state != .failed {
            states[name] = status.state
          }
        }
      } catch { host.violated("no status: \(error)") }
    }
  }
}
