// SPDX-License-Identifier: Apache-2.0
// Hooks that are told what has happened to disks: hooks/events.d/*, each in the order of its name.
//
// Invariants:
// - No disk waits for such a hook, and nothing that one does or leaves undone changes a disk.
// - What happens to one disk is told in its order, one thing after the other; other disks do not
//   wait.
// - What is told is of the moment when it happened. A daemon that ends takes along what it has not
//   told yet.

internal import Logging
internal import SystemIO

/// What has happened to a disk: a line of JSON.
struct DiskEvent: Codable, Sendable, Equatable {
  /// What it was.
  enum Kind: String, Codable, Sendable {
    /// The disk is served, for the first time since it was attached.
    case attached
    /// It is gone, after it was served.
    case detached
    /// It is not served, or not any more; `error` says why.
    case failed
    /// Writes wait for space; `error` names the store.
    case noSpace = "no-space"
  }

  var event: Kind
  /// Unix time.
  var time: Int64
  /// "5-51712", or the name of a named disk.
  var disk: String
  var domain: Int?
  var domainName: String?
  var vdev: String?
  var name: String?
  var spec: String
  var format: String?
  var store: String?
  var base: String?
  var readOnly: Bool
  var device: String?
  var error: String?

  init(_ event: Kind, _ disk: Disk, _ phase: DiskPhase, now: Int64) {
    (self.event, time, self.disk) = (event, now, "\(disk.id)")
    (domain, name) = (disk.id.vbd?.domain, disk.id.name?.description)
    (domainName, vdev) = (disk.domainName, disk.vdev)
    (spec, readOnly) = (disk.params, disk.readOnly)
    let understood = disk.spec ?? Reconciler.spec(disk.params)
    (format, store) = (understood?.format, understood?.storeName)
    base = understood?.baseName ?? disk.basePath
    (device, error) = (disk.device?.path, phase.error)
  }
}

/// What hooks are still to be told.
struct EventQueues {
  /// The most for one disk; the oldest go first.
  static let most = 100
  var waiting: [DiskID: [DiskEvent]] = [:]
  /// Disks for which hooks run just now.
  var telling: Set<DiskID> = []
}

extension Reconciler {
  /// Notes what it means that a disk has gone over from one phase to another, and tells it.
  func tellChange(_ disk: Disk, from former: DiskPhase, to phase: DiskPhase) {
    switch phase {
    case .serving(let trouble):
      if case .starting = former {
        (disk.wasAttached, disk.toldFailure) = (true, nil)
        tell(.attached, disk, phase)
      }
      if trouble?.state == .noSpace, former.publicState != .noSpace { tell(.noSpace, disk, phase) }
    case .idle where disk.wasAttached:
      disk.wasAttached = false
      tell(.detached, disk, phase)
    default:
      // Tried again, it may fail in the same way.
      guard phase.publicState == .failed, phase.error != disk.toldFailure else { return }
      disk.toldFailure = phase.error
      tell(.failed, disk, phase)
    }
  }

  private func tell(_ kind: DiskEvent.Kind, _ disk: Disk, _ phase: DiskPhase) {
    let id = disk.id
    var waiting = events.waiting[id] ?? []
    waiting.append(DiskEvent(kind, disk, phase, now: scheduler.unixTime))
    if waiting.count > EventQueues.most {
      let lost = waiting.removeFirst()
      log.error(
        "hooks are too slow for what happens: an event is not told",
        metadata: ["disk": "\(id)", "event": "\(lost.event.rawValue)"])
    }
    events.waiting[id] = waiting
    guard events.telling.insert(id).inserted else { return }
    let environment = hookEnvironment(disk)
    scheduler.start { [weak self] in await self?.tellAll(id, environment) }
  }

  private func tellAll(_ id: DiskID, _ environment: [String: String]) async {
    while let event = events.waiting[id]?.first, !ending {
      events.waiting[id]?.removeFirst()
      await run(event, id, environment)
    }
    events.waiting[id] = nil
    events.telling.remove(id)
  }

  /// Runs every hook for an event.
  private func run(_ event: DiskEvent, _ id: DiskID, _ environment: [String: String]) async {
    let folder = HookFolder(configurationPath: configurationPath)
    var log = log
    log[metadataKey: "disk"] = "\(id)"
    log[metadataKey: "event"] = "\(event.event.rawValue)"
    do {
      let (programs, refused) = try await host.notifying.run { () throws(IOError) in
        try folder.events()
      }
      for failure in refused { log.error("a hook is not run", metadata: ["reason": "\(failure)"]) }
      let input = String(decoding: try ControlLine.encode(event), as: UTF8.self) + "\n"
      for program in programs {
        var call = HookCall(
          program: program, arguments: [event.event.rawValue], deadline: configuration.hookTimeout,
          files: configuration.hookFiles("event-\(id)"))
        call.environment = environment
        call.environment["DMU_EVENT"] = event.event.rawValue
        call.input = input
        await run(call, log)
      }
    } catch { log.error("hooks cannot be told of it", metadata: ["reason": "\(error)"]) }
  }

  private func run(_ call: HookCall, _ log: Logger) async {
    let hooks = host.hooks
    do throws(IOError) {
      let outcome = try await host.notifying.run { () throws(IOError) in try hooks.run(call) }
      for line in outcome.complaints {
        log.info("a hook says", metadata: ["hook": "\(call.program)", "line": "\(line)"])
      }
      guard !outcome.isGood else { return }
      let how =
        outcome.status.map { "\($0)" }
        ?? "it took longer than \(call.deadline.components.seconds) seconds, or wrote too much"
      log.error("a hook failed", metadata: ["hook": "\(call.program)", "how": "\(how)"])
    } catch {
      log.error(
        "a hook cannot be run", metadata: ["hook": "\(call.program)", "reason": "\(error)"])
    }
  }
}
