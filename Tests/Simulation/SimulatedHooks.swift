// SPDX-License-Identifier: Apache-2.0
// The hook of a simulated host, whose storage is files of the host's folder: store2, and the base of
// the disks that have it. It is slow or fails as the weather has it, and may then have attached or
// detached nevertheless.
//
// What is checked: nothing is detached that a worker, a device or writes of a guest that are in no
// store still need; no worker gets a store that is not attached, or only for reading; when all is
// over nothing is attached, and the daemon remembers nothing.

import Glibc
import SystemIO
import TestSupport

@testable import Daemon

/// The hook `fake`, and one for events that is of no use to anybody.
struct SimulatedHooks: HookRunning {
  /// The store that disks have by the hook.
  static let storeIndex = 2

  let host: SimulatedHost
  let life: Life

  /// The files that the daemon looks at before it runs a hook.
  static func install(_ configurationPath: String) throws(IOError) {
    let folder = HookFolder(configurationPath: configurationPath)
    var made = ""
    for part in (folder.path + "/events.d").split(separator: "/") {
      made += "/" + part
      guard mkdir(made, 0o755) == 0 || errno == EEXIST else { throw IOError.last("make", made) }
    }
    for path in [folder.path("fake"), folder.path + "/events.d/10-tell"] {
      try TextFile.replace(path, with: "played", mode: 0o755)
      guard chmod(path, 0o755) == 0 else { throw IOError.last("set the mode of", path) }
    }
  }

  func run(_ call: HookCall) throws(IOError) -> HookOutcome {
    guard !life.isDead else { throw IOError(ECANCELED, "run", call.program) }
    if host.weather.fails() { throw IOError(EAGAIN, "start", call.program) }
    let fails = host.weather.fails()
    if !fails || host.timeline.random.chance(50) { act(call) }
    guard !fails else {
      return host.timeline.random.chance(50)
        ? HookOutcome(status: nil) : HookOutcome(status: .exited(1), complaints: ["it fails"])
    }
    var outcome = HookOutcome(status: .exited(0))
    if call.arguments.first == "attach" { outcome.output = path(call.arguments[1]) + "\nshared\n" }
    return outcome
  }

  private func path(_ rest: String) -> String { host.folder.file(rest) }

  private func act(_ call: HookCall) {
    guard call.program.hasSuffix("/fake") else { return }
    let rest = call.arguments[1]
    host.note("the hook does \(call.arguments.joined(separator: " "))")
    if call.arguments[0] == "attach" {
      let isWritable = call.arguments[2] == "rw"
      if host.attached[rest] == true, !isWritable {
        host.violated("\(rest), which is written to, is attached for reading")
      }
      host.attached[rest] = isWritable
    } else {
      checkUnused(rest)
      host.attached[rest] = nil
    }
  }

  private func checkUnused(_ rest: String) {
    let path = path(rest)
    // Of others' disks the base is a path.
    guard rest != "base" else { return }
    for worker in host.living where worker.store == path {
      host.violated("\(rest) is detached while worker \(worker.pid) has it")
    }
    for device in host.mapped.values where device.stores.contains(path) {
      host.violated("\(rest) is detached while \(device.node.path) stands on it")
    }
    if let truth = host.stores[path], truth.acknowledged != truth.committed {
      host.violated(
        "\(rest) is detached with \(truth.acknowledged - truth.committed) writes missing")
    }
  }
}

extension SimulatedHost {
  /// A worker gets its store.
  func checkAttached(_ store: String, isWritten: Bool) {
    let name = "store\(SimulatedHooks.storeIndex)"
    guard store == folder.file(name) else { return }
    guard let isWritable = attached[name] else {
      return violated("a worker gets \(name), which is not attached")
    }
    if isWritten, !isWritable { violated("\(name) is written to and attached for reading") }
  }
}

extension Simulation {
  /// Whose sources are left.
  func checkDetached() {
    for name in host.attached.keys.sorted() { host.violated("\(name) is attached") }
    do throws(IOError) {
      for folder in [configuration.sourceRecords.folder, configuration.hookDirectory] {
        for name in try Folder.names(folder) { host.violated("\(folder)/\(name) is left") }
      }
    } catch { host.violated("\(error)") }
  }

  /// The hook of every disk that is served has attached its store.
  func checkSources() {
    for (id, entry) in store.entries where entry.hotplug == "connected" && !entry.isGoing {
      guard let spec = Reconciler.spec(entry.params) else { continue }
      for (_, source) in spec.sources where host.attached[source.rest] == nil {
        host.violated("\(source) of \(id) is not attached")
      }
    }
  }

  /// Whether a disk of these params is served by its store.
  func isMeant(_ params: String, by store: String) -> Bool {
    guard let spec = Reconciler.spec(params) else { return false }
    return (spec.storeSource.map { host.folder.file($0.rest) } ?? spec.store) == store
  }
}
