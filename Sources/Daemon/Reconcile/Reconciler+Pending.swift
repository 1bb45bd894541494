// SPDX-License-Identifier: Apache-2.0
// What an admin asks of pending logs: committing them, and giving them up.

internal import BlockIO
internal import Logging
internal import SystemIO

extension Reconciler {
  /// Commits the logs of a store, given by its path or the log's key, or every one for nil.
  func recover(store: String?) async throws(DiskFailure) -> [RecoveredStore] {
    var results: [RecoveredStore] = []
    for kept in try await keptLogs() where isMeant(kept, by: store) {
      do throws(DiskFailure) {
        let summary = try await recover(kept.entry)
        results.append(RecoveredStore(kept.store, summary, nil))
      } catch { results.append(RecoveredStore(kept.store, kept.summary, error)) }
    }
    // A device that waits for its worker is tried at once, too.
    for disk in Array(table.values) {
      guard case .stopping(_?) = disk.phase, let path = disk.spec?.store,
        store == nil || Reconciler.isSame(path, store)
      else { continue }
      results.append(await finish(disk, path))
    }
    return results
  }

  /// Tries again to take a disk down that cannot go.
  private func finish(_ disk: Disk, _ store: String) async -> RecoveredStore {
    let held = await status(of: disk.id)?.uncommitted ?? 0
    var result = RecoveredStore(
      store: store, placements: held, holds: "\(held) placements in its device", error: nil)
    hurry(disk)
    let end = scheduler.now + configuration.stopTimeout + .seconds(10)
    while scheduler.now < end {
      await pause(.milliseconds(100))
      guard table[disk.id] === disk, case .stopping(let stuck) = disk.phase else { return result }
      guard let stuck, !disk.busy, stuck.retry > scheduler.now else { continue }
      result.error = stuck.failure.sentence
      return result
    }
    result.error = disk.reason ?? "its disk is being taken down"
    return result
  }

  /// What would be lost by `discard`. Throws `gone` when there is nothing of that name.
  func pending(of store: String) async throws(DiskFailure) -> RecoveredStore {
    if let kept = try await keptLogs().first(where: { isMeant($0, by: store) }) {
      return RecoveredStore(kept.store, kept.summary, nil)
    }
    if let disk = discardable(store) {
      guard let status = await status(of: disk.id) else { throw .nothingPending(store) }
      return RecoveredStore(
        store: disk.spec?.store ?? store, placements: status.uncommitted ?? 0,
        holds: "\(status.uncommitted ?? 0) placements", error: nil)
    }
    throw .nothingPending(store)
  }

  /// Gives up what a store's log, or the device of a disk that cannot go, holds. Answers what was
  /// lost. Throws `gone` when there is nothing of that name.
  func discard(_ store: String) async throws(DiskFailure) -> RecoveredStore {
    if let kept = try await keptLogs().first(where: { isMeant($0, by: store) }) {
      try await claiming(kept.entry) { () async throws(DiskFailure) in
        try await blocking { () throws(IOError) in try kept.entry.remove() }
      }
      log.warning(
        "gave up a pending log by order",
        metadata: ["store": "\(kept.store)", "held": "\(kept.summary.words)"])
      await announce("running")
      return RecoveredStore(kept.store, kept.summary, nil)
    }
    guard let disk = discardable(store) else { throw .nothingPending(store) }
    let lost = try await pending(of: store)
    log(for: disk).warning("gives up what it holds, by order")
    if case .stopping = disk.phase {
      disk.discards = true
      hurry(disk)
      return lost
    }
    if let entry = disk.entry {
      try await blocking { () throws(IOError) in try entry.remove() }
    }
    disk.pending = nil
    disk.backOff.reset()
    enter(disk, .restarting(at: scheduler.now))
    mark(disk.id)
    return lost
  }

  /// A disk whose writes can be given up: one that cannot go, or that has no worker any more.
  private func discardable(_ store: String) -> Disk? {
    table.values.first { disk in
      guard let path = disk.spec?.store, Reconciler.isSame(path, store) else { return false }
      switch disk.phase {
      case .stopping(_?): return disk.device?.kind == .dm
      case .failed(_, attached: true): return disk.worker == nil && disk.device?.kind == .nbd
      default: return false
      }
    }
  }

  private func isMeant(_ kept: KeptLog, by store: String?) -> Bool {
    guard let store else { return true }
    return kept.entry.key == store || Reconciler.isSame(kept.store, store)
  }

  private static func isSame(_ path: String, _ other: String?) -> Bool {
    guard let other else { return false }
    if path == other { return true }
    let real = Images.real(other)
    return real != nil && Images.real(path) == real
  }
}

/// What became of one store's log.
package struct RecoveredStore: Codable, Sendable, Equatable {
  /// Path of the store.
  package var store: String
  /// Placements that the log held.
  package var placements: UInt64
  /// All that it held, in words.
  package var holds: String
  /// Why it still holds them; nil when it does not.
  package var error: String?

  init(store: String, placements: UInt64, holds: String, error: String?) {
    self.store = store
    self.placements = placements
    self.holds = holds
    self.error = error
  }

  init(_ store: String, _ summary: PendingSummary, _ failure: DiskFailure?) {
    self.init(
      store: store, placements: summary.uncommitted, holds: summary.words,
      error: failure?.sentence)
  }
}

extension DiskFailure {
  static func nothingPending(_ store: String) -> DiskFailure {
    DiskFailure(
      .gone, "there is no pending log for store \(store): see 'dmu-xen status' for those there are")
  }
}
