// SPDX-License-Identifier: Apache-2.0
// Stores and bases that hooks attach (Spec/Source.swift): attached when the first disk wants one,
// detached when nobody does any more.
//
// Invariants:
// - A source is in use as long as a disk or a recovery has it in `sources`, or a kept pending log
//   names it: a log is found by its store's device, which has to stay the same one.
// - A hook runs for a source only while `isBusy` is set, which who wants it or detaches it waits for.
// - No disk has a source in `sources` and waits for another disk's: each waits for hooks only, and
//   those have a deadline.
// - Whatever a hook may have attached has a record (Hooks/SourceRecord.swift).

import Glibc
internal import Logging
internal import SystemIO

/// A source that a hook has attached, or was asked to.
final class HeldSource {
  let number: UInt64
  var record: SourceRecord
  /// Its hook runs, or is about to.
  var isBusy = false
  /// Whether its record was ever written.
  var isWritten = false
  /// How often it could not be attached, and why something of it failed last.
  var attachFailures = 0
  var failure: DiskFailure?
  /// How often in a row it could not be detached, and when that is tried again.
  var detachFailures = 0
  var retry: ContinuousClock.Instant?

  init(_ number: UInt64, _ record: SourceRecord) {
    self.number = number
    self.record = record
  }
}

/// The sources that the daemon knows.
struct HeldSources {
  var table: [Source: HeldSource] = [:]
  private var last: UInt64 = 0

  mutating func add(_ record: SourceRecord, number: UInt64? = nil) -> HeldSource {
    let number = number ?? last + 1
    last = max(last, number)
    let held = HeldSource(number, record)
    table[record.source] = held
    return held
  }

  /// The paths of those that are attached.
  var paths: [Source: String] { table.compactMapValues { $0.record.attached?.path } }
}

extension Reconciler {
  // MARK: - What an earlier daemon has attached

  /// Takes up what an earlier daemon had in writing.
  func recallSources() async throws(IOError) {
    let records = configuration.sourceRecords
    let (found, strange) = try await offload.run { () throws(IOError) in try records.load() }
    for (number, record) in found.sorted(by: { $0.key < $1.key }) {
      sources.add(record, number: number).isWritten = true
    }
    for path in strange {
      log.error("this is no record of a source", metadata: ["file": "\(path)"])
    }
  }

  /// Takes over what an earlier daemon has written down of a disk, its sources among it.
  func recall(_ disk: Disk, _ record: DiskRecord) {
    disk.recall(record, configuration.registry)
    disk.sources = Set(disk.spec?.sources.map(\.source) ?? [])
    disk.spec = disk.spec?.attached(sources.paths)
  }

  /// The run directory was made anew: what was written there of sources is written again.
  func rewriteSources() {
    for source in sources.table.keys {
      scheduler.start { [weak self] in await self?.rewrite(source) }
    }
  }

  private func rewrite(_ source: Source) async {
    // One whose hook runs is written before and after that.
    guard let held = sources.table[source], !held.isBusy else { return }
    held.isBusy = true
    await keep(held)
    held.isBusy = false
  }

  // MARK: - Attaching

  /// Sees to it that a disk's sources are attached: those of one whose daemon, or whose run
  /// directory, was lost may not be.
  func resolveSources(_ disk: Disk) async throws(DiskFailure) {
    guard let spec = disk.spec, spec.isUnresolved else { return }
    disk.spec = try await attachSources(disk, spec)
  }

  /// Has hooks attach the sources of a spec. Answers the spec with their paths. The disk has them
  /// until `releaseSources`, whatever comes of it.
  func attachSources(_ disk: Disk, _ spec: Spec) async throws(DiskFailure) -> Spec {
    var paths: [Source: String] = [:]
    for (role, source) in spec.sources {
      disk.sources.insert(source)
      disk.activity = "the hook \(source.scheme) attaches the \(role.rawValue)"
      paths[source] = try await attach(
        source, role, for: disk, isWritable: role == .store && !disk.readOnly)
    }
    return paths.isEmpty ? spec : spec.attached(paths)
  }

  /// The path of a source, which is attached if it is not yet.
  private func attach(
    _ source: Source, _ role: SpecError.Role, for disk: Disk, isWritable: Bool
  ) async throws(DiskFailure) -> String {
    var waitedFor: (held: HeldSource, failures: Int)?
    while let held = sources.table[source], held.isBusy {
      if waitedFor?.held !== held { waitedFor = (held, held.attachFailures) }
      await pause(.milliseconds(20))
    }
    // Those who have waited for a hook that failed do not have it fail once more for each of them.
    if let (held, failures) = waitedFor, held.attachFailures != failures, let failure = held.failure
    {
      throw failure
    }
    let wish = SourceRecord(source, isWritable: isWritable, disk: disk.id)
    let held = sources.table[source] ?? sources.add(wish)
    if let attached = held.record.attached, held.record.isWritable || !isWritable {
      return attached.path
    }
    held.isBusy = true
    defer { held.isBusy = false }
    if held.record.attached != nil { try await reopen(held, for: disk) }
    held.record = wish
    do throws(DiskFailure) {
      let attached = try await runAttach(held, role, disk)
      held.record.attached = attached
      held.detachFailures = 0
      await keep(held)
      log(for: disk).info(
        "attached a source",
        metadata: [
          "source": "\(source)", "path": "\(attached.path)",
          "shared": "\(attached.isShared ? "yes" : "no")",
        ])
      return attached.path
    } catch {
      held.failure = error
      held.attachFailures += 1
      // No hook was run, and nothing is to be detached.
      if !held.isWritten { sources.table[source] = nil }
      throw error
    }
  }

  /// Detaches a source that can only be read and is to be written to, unless others have it. Those
  /// that are going are waited for.
  private func reopen(_ held: HeldSource, for disk: Disk) async throws(DiskFailure) {
    let source = held.record.source
    let end = scheduler.now + configuration.hookTimeout
    while true {
      let others = (Array(table.values) + recovering.values).filter {
        $0 !== disk && $0.sources.contains(source)
      }
      if others.isEmpty { break }
      guard others.allSatisfy(\.isLeaving), scheduler.now < end, !ending else {
        throw .sourceReadOnly(source, others.flatMap(\.holders).sorted { $0.id < $1.id })
      }
      await pause(.milliseconds(100))
    }
    held.record.attached = nil
    try await runDetach(held)
  }

  private func runAttach(
    _ held: HeldSource, _ role: SpecError.Role, _ disk: Disk
  ) async throws(DiskFailure) -> AttachedSource {
    let source = held.record.source
    let folder = HookFolder(configurationPath: configurationPath)
    let program = try await offload.run { () throws(DiskFailure) in try folder.program(for: source)
    }
    try await write(held)
    var environment = hookEnvironment(disk)
    environment["DMU_ROLE"] = role.rawValue
    environment["DMU_SPEC"] = disk.params
    let outcome = try await runHook(
      held, program, ["attach", source.rest, held.record.isWritable ? "rw" : "ro"], environment,
      log(for: disk))
    guard outcome.isGood else {
      throw .hookFailed(source, program, "attach", outcome, configuration.hookTimeout)
    }
    let attached: AttachedSource
    do throws(AttachedSource.Senseless) { attached = try AttachedSource(outcome.output) } catch {
      throw .hookSenseless(source, program, error.line)
    }
    let path = attached.path
    let isThere = await offload.run {
      var status = stat()
      return stat(path, &status) == 0 && [S_IFBLK, S_IFREG].contains(status.st_mode & S_IFMT)
    }
    guard isThere else { throw .hookSenseless(source, program, path) }
    return attached
  }

  // MARK: - Detaching

  /// A disk has let go of its sources.
  func releaseSources(_ disk: Disk) {
    guard !disk.sources.isEmpty else { return }
    disk.sources = []
    scheduler.start { [weak self] in await self?.detachUnused() }
  }

  /// Has hooks detach every source that nobody uses.
  func detachUnused() {
    // What an earlier daemon's disks have is known when they are taken over.
    guard hasRecovered, !ending else { return }
    let now = scheduler.now
    for (source, held) in sources.table where !held.isBusy && !isUsed(source) {
      if let retry = held.retry, retry > now { continue }
      // Each by itself: one may hang.
      scheduler.start { [weak self] in await self?.detachIfUnused(source) }
    }
  }

  /// Whether a disk or a recovery has a source.
  private func isUsed(_ source: Source) -> Bool {
    table.values.contains { $0.sources.contains(source) }
      || recovering.values.contains { $0.sources.contains(source) }
  }

  /// Why a source stays attached; nil: it is not any more, or is used.
  @discardableResult
  func detachIfUnused(_ source: Source) async -> DiskFailure? {
    guard let held = sources.table[source], !held.isBusy, !isUsed(source), !ending else {
      return nil
    }
    held.isBusy = true
    defer { held.isBusy = false }
    do throws(DiskFailure) {
      // Nobody begins to use it meanwhile, so that no new log of it comes to be kept.
      let logs = try await keptLogs()
      let isNeeded = logs.contains { kept in
        kept.info.flatMap { Reconciler.spec($0.params) }?.sources.contains { $0.source == source }
          ?? false
      }
      guard !isNeeded, !isUsed(source), !ending else { return nil }
      held.record.attached = nil
      try await runDetach(held)
      let (records, number) = (configuration.sourceRecords, held.number)
      try await blocking { () throws(IOError) in try records.remove(number) }
      sources.table[source] = nil
      log.info("detached a source", metadata: ["source": "\(source)"])
      return nil
    } catch {
      let wait = Reconciler.patience(held.detachFailures)
      if held.detachFailures == 0 {
        log.error(
          "a source that nobody uses is not detached yet",
          metadata: ["source": "\(source)", "reason": "\(error)"])
      }
      held.detachFailures += 1
      held.failure = error
      held.retry = scheduler.now + wait
      scheduler.after(wait) { [weak self] in await self?.detachUnused() }
      return error
    }
  }

  private func runDetach(_ held: HeldSource) async throws(DiskFailure) {
    let source = held.record.source
    let folder = HookFolder(configurationPath: configurationPath)
    let program = try await offload.run { () throws(DiskFailure) in try folder.program(for: source)
    }
    try await write(held)
    var log = log
    log[metadataKey: "disk"] = "\(held.record.disk)"
    let outcome = try await runHook(
      held, program, ["detach", source.rest], ["DMU_DISK": "\(held.record.disk)"], log)
    guard outcome.isGood else {
      throw .hookFailed(source, program, "detach", outcome, configuration.hookTimeout)
    }
  }

  // MARK: - Telling

  /// What is attached of a disk's sources; nil: it has none.
  func attachedPaths(_ disk: Disk) -> [AttachedPath]? {
    let paths = disk.sources.sorted { "\($0)" < "\($1)" }.compactMap { source in
      sources.table[source]?.record.attached.map {
        AttachedPath(source: "\(source)", path: $0.path, shared: $0.isShared)
      }
    }
    return paths.isEmpty ? nil : paths
  }

  /// Sources that no disk has and whose hooks could not detach them.
  func strayRecords() -> [SourceRecord] {
    sources.table.values.filter { $0.detachFailures > 0 && !isUsed($0.record.source) }
      .map(\.record).sorted { "\($0.source)" < "\($1.source)" }
  }

  // MARK: - Hooks

  private func runHook(
    _ held: HeldSource, _ program: String, _ arguments: [String], _ environment: [String: String],
    _ log: Logger
  ) async throws(DiskFailure) -> HookOutcome {
    let (hooks, source) = (host.hooks, held.record.source)
    var call = HookCall(
      program: program, arguments: arguments, deadline: configuration.hookTimeout,
      files: configuration.hookFiles("source-\(held.number)"))
    call.environment = environment
    call.environment["DMU_SOURCE"] = "\(held.record.source)"
    call.environment["DMU_DEADLINE"] = "\(configuration.hookTimeout.components.seconds)"
    let outcome = try await offload.run { [call] () throws(DiskFailure) in
      do throws(IOError) { return try hooks.run(call) } catch {
        throw DiskFailure(
          .source,
          "source \(source) cannot be had: \(error.description): see to it and attach the disk"
            + " again")
      }
    }
    for line in outcome.complaints {
      log.log(
        level: outcome.isGood ? .info : .warning, "a hook says",
        metadata: ["hook": "\(program)", "line": "\(line)"])
    }
    return outcome
  }

  /// What a hook is told of a disk, by variables.
  func hookEnvironment(_ disk: Disk) -> [String: String] {
    var variables = ["DMU_DISK": "\(disk.id)"]
    switch disk.id {
    case .vbd(let vbd), .again(let vbd, _):
      variables["DMU_DOMAIN"] = "\(vbd.domain)"
      variables["DMU_VDEV"] = ForeignText.shown(disk.vdev ?? vbd.vdev)
      variables["DMU_DOMAIN_NAME"] = disk.domainName.map { ForeignText.shown($0) }
    case .named(let name): variables["DMU_NAME"] = "\(name)"
    }
    return variables
  }

  private func write(_ held: HeldSource) async throws(DiskFailure) {
    let (records, number, record) = (configuration.sourceRecords, held.number, held.record)
    try await blocking { () throws(IOError) in try records.save(number, record) }
    held.isWritten = true
  }

  /// Writes a record down whose loss costs another run of its hook at most.
  private func keep(_ held: HeldSource) async {
    do throws(DiskFailure) { try await write(held) } catch {
      log.error(
        "cannot keep for the next daemon that a source is attached",
        metadata: ["source": "\(held.record.source)", "error": "\(error)"])
    }
  }
}

extension DiskFailure {
  static func sourceReadOnly(_ source: Source, _ holders: [Holder]) -> DiskFailure {
    DiskFailure(
      .inUse,
      "source \(source) is attached for reading only, since \(words(holders)) has it so: detach it"
        + " there first")
  }

  static func hookFailed(
    _ source: Source, _ program: String, _ verb: String, _ outcome: HookOutcome,
    _ deadline: Duration
  ) -> DiskFailure {
    let remedy = "'\(program) check \(source.rest)' may say more"
    guard let status = outcome.status else {
      return DiskFailure(
        .source,
        "source \(source) cannot be \(verb)ed: the hook \(program) did not end within"
          + " \(deadline.components.seconds) seconds, or wrote too much, and was killed: see what it"
          + " waits for, or raise hooks.timeout; \(remedy)")
    }
    let why = outcome.complaints.last ?? "it ended with \(status) and said nothing"
    return DiskFailure(
      .source,
      "source \(source) cannot be \(verb)ed: hook \(source.scheme): \(why): see to it;"
        + " \(remedy)")
  }

  static func hookSenseless(_ source: Source, _ program: String, _ line: String) -> DiskFailure {
    let what =
      line.isEmpty
      ? "it printed nothing"
      : "'\(ForeignText.shown(line))' is neither the path of a block device or file nor 'shared'"
    return DiskFailure(
      .source,
      "source \(source) cannot be had, since the hook \(program) makes no sense: \(what): correct the"
        + " hook, see dmu-hooks(7)")
  }
}
