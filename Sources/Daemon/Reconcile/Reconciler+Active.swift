// SPDX-License-Identifier: Apache-2.0
// Named disks that are active, which the daemon serves, and those that are only kept by their
// names: without device, link, worker, open file and lock.
//
// Invariants:
// - A disk becomes inactive only while nobody uses its device.
// - It is inactive in writing before anything is taken down, and active in writing before anybody
//   is told of the device.

internal import Logging
internal import SystemIO

extension Reconciler {
  /// Serves a disk that is kept by its name, and waits until it is served. One that is active
  /// already is no error. After a failure it is inactive as before.
  func activate(_ name: DiskName) async -> Result<DeviceNode, DiskFailure> {
    guard takesWaiters else { return .failure(.ending) }
    do throws(DiskFailure) {
      return .success(
        try await changing(name) { () async throws(DiskFailure) in
          guard let wish = wishes[name] else { throw .nameUnknown(name) }
          return try await attachAlone(name, wish, create: false)
        })
    } catch { return .failure(error) }
  }

  /// Takes a disk down, keeps its name, and waits until nothing else of it is left. Refused while
  /// somebody uses its device: then nothing has changed.
  func deactivate(_ name: DiskName) async throws(DiskFailure) {
    let id = DiskID.named(name)
    try await changing(name) { () async throws(DiskFailure) in
      guard var wish = wishes[name] else { throw .nameUnknown(name) }
      guard wish.isActive else { return }
      // What uses a device is only known of one that is known.
      guard !adopting.contains(id) else { throw .notTakenOver(name) }
      try await checkUnused(name, id)
      wish.inactiveSince = scheduler.unixTime
      try await write(name, wish)
      wishes[name] = wish
    }
    try await waitUntilGone(name, "deactivated")
  }

  /// What status says of the disks that are kept by their names and of which nothing else is there,
  /// with why the last try to activate them failed.
  func inactiveDisks() -> [DiskStatus] {
    wishes.compactMap { name, wish in
      guard let since = wish.inactiveSince else { return nil }
      var status = DiskStatus(
        .named(name), vdev: nil, state: .inactive, since: since, readOnly: wish.readOnly)
      let spec = Reconciler.spec(wish.params)
      (status.format, status.store, status.base) = (spec?.format, spec?.store, spec?.base)
      status.owner = wish.owner?.description
      // One of another disk that had the name says nothing of this one.
      let failure = failures.first { $0.name == status.name && $0.store == status.store }
      status.error = failure?.error
      return status
    }
  }
}
