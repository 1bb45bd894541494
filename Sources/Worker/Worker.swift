// SPDX-License-Identifier: Apache-2.0
// The loop between a target and an image format: takes the target's faults, asks the
// format, gives its answers, and has commit plans run.
//
// Invariants:
// - One thread. Nothing here waits, reads or writes guest data; what blocks (a commit plan, and what
//   of the image's metadata is not in memory) is done elsewhere, and its end comes back on the same
//   thread.
// - What comes is answered in its order. Behind a question that waits for metadata everything else
//   waits: see MetadataGate.
// - A flush is answered `flushDone` only after its commit plan has run to its end. If the plan
//   fails, the flush fails, the marks stay uncommitted, and the next flush tries them again. If it
//   fails for want of space and the policy is to wait, the flush waits and the plan runs again.
// - A question that the format cannot answer for want of space stays unanswered in the same way.
// - One commit plan at a time; flushes that come meanwhile wait their turn.
// - A placement that the target refuses is taken back from the format at once.

package import BlockIO
package import DiskFormats
package import DiskModel
import Glibc
import SystemIO
import Target
package import WorkerLink

/// How a disk is, and why.
package struct Condition: Sendable, Equatable {
  /// The state.
  package var state: DiskState
  /// One sentence; empty when ready.
  package var reason: String

  /// All is well.
  package static let ready = Condition(.ready, "")

  /// A condition from its parts.
  package init(_ state: DiskState, _ reason: String) {
    self.state = state
    self.reason = reason
  }

  /// The graver of two; degraded is graver than no-space.
  func worse(_ other: Condition) -> Condition {
    func gravity(_ state: DiskState) -> Int {
      switch state {
      case .ready: 0
      case .noSpace: 1
      case .degraded: 2
      }
    }
    return gravity(other.state) > gravity(state) ? other : self
  }
}

/// Serves the faults of one target from one image.
package final class Worker {
  /// Runs a commit elsewhere, and `then` on the worker's thread with its failure.
  package typealias Offload = (
    _ work: @escaping @Sendable () -> CommitFailure?, _ then: @escaping (CommitFailure?) -> Void
  ) -> Void

  /// Runs a piece of work elsewhere, and `then` on the worker's thread.
  typealias Fetch = (_ work: @escaping @Sendable () -> Void, _ then: @escaping () -> Void) -> Void

  /// Something to be done in its turn.
  enum Step {
    case fault(Fault)
    /// The plan of the first flush that waits.
    case commit
    /// The target wants room for first writes.
    case pool
  }

  /// How many blocks a read fault is answered with at most: what lies beside is often read
  /// next, and an extent costs the same however long it is.
  static let readAhead: UInt64 = 1 << 20

  /// Faults answered so far.
  package private(set) var faults: UInt64 = 0
  /// How the disk is, as far as the format and the commits tell.
  package private(set) var condition = Condition.ready
  /// Whether a commit plan is being run.
  package var isCommitting: Bool { !flushes.isEmpty }

  let target: any TargetEngine
  let format: any ImageFormat
  private let store: any ByteStore
  private let offload: Offload
  let gate: MetadataGate
  /// Does what the gate wants, and then calls back on the worker's thread.
  private let fetch: Fetch
  let log: Log
  private let trace: Trace?
  /// The greatest mark that the target has been given. What bears one up to it is no news to
  /// the target, which takes only marks that grow.
  private var lastMark: Mark = 0
  /// The first mark that the format could not take up: nothing from there on is ever durable.
  private var lost: Mark?
  /// Room for first writes that the target has.
  var pools = Pools()
  /// Flush faults not yet answered; the first one's plan is being run.
  private var flushes: [(id: FaultID, upTo: Mark)] = []
  /// A flush has failed that nobody heard of: every one fails until an admin acts.
  var flushFailed = false
  /// What becomes of a question that the format cannot answer for want of space.
  var space = SpacePolicy(waits: false)
  /// Questions that wait for space, in the order in which they came.
  private var starving: [Fault] = []
  /// The question that is being answered.
  private var asked: Fault?
  /// What has come and is not done, from `taken` on.
  private var steps: [Step] = []
  private var taken = 0
  /// Whether a step is being taken, and whether the first waits for what the gate wants.
  private var isStepping = false
  private var isFetching = false
  /// Whether the plan of the first flush found no space and is tried again.
  private var isStuck = false
  /// Since when questions or a commit have waited, in milliseconds; 0: none does.
  private var starvingSince: Int64 = 0
  /// When the condition became worse last, in milliseconds.
  private var conditionSince: Int64 = 0

  /// A worker from its parts.
  package convenience init(
    target: any TargetEngine, format: any ImageFormat, store: any ByteStore, log: Log,
    offload: @escaping Offload
  ) {
    self.init(
      target: target, format: format, store: store, log: log, offload: offload,
      gate: MetadataGate(), fetch: { _, then in then() }, trace: nil)
  }

  init(
    target: any TargetEngine, format: any ImageFormat, store: any ByteStore, log: Log,
    offload: @escaping Offload, gate: MetadataGate, fetch: @escaping Fetch, trace: Trace?
  ) {
    self.trace = trace
    self.gate = gate
    self.fetch = fetch
    self.target = target
    self.format = format
    self.store = store
    self.log = log
    self.offload = offload
  }

  /// Takes up what a former worker left uncommitted. Before the first `pump`. With `verify`
  /// somebody else may have had the store meanwhile: throws `stale` when it is not the one any
  /// more on which the placements were made.
  package func restore(verify: Bool = false) throws(ImageError) {
    let extents = target.uncommitted()
    guard !extents.isEmpty else { return }
    if verify {
      try StoreCheck.restore(format, extents, name: store.name)
    } else {
      try format.restore(extents)
    }
    lastMark = extents.reduce(0) { max($0, $1.mark) }
    log(.info, "took up uncommitted placements", ["count": String(extents.count)])
  }

  /// Answers every fault that is there; whether there were any.
  package func pump() -> Bool {
    var any = false
    while let fault = target.nextFault() {
      any = true
      if !fault.isNewsOfPlacement { faults += 1 }
      handle(fault)
    }
    return any
  }

  private func handle(_ fault: Fault) {
    trace?.fault(fault)
    // Most of them, when the module places first writes: they need no turn where none waits.
    if case .placed(let extent) = fault, isIdle, !isFetching, placed(extent) { return }
    // What waits before it is older, and has nothing to do with it.
    if case .marked(let provisional, let mark) = fault { return marked(provisional, mark) }
    enqueue(.fault(fault))
  }

  // MARK: Steps

  func enqueue(_ step: Step) {
    steps.append(step)
    proceed()
  }

  /// Takes the steps that there are, up to one that has to wait.
  private func proceed() {
    guard !isStepping, !isFetching else { return }
    isStepping = true
    while taken < steps.count, take(steps[taken]) { taken += 1 }
    isStepping = false
    if taken == steps.count {
      steps.removeAll(keepingCapacity: true)
      taken = 0
      return
    }
    if taken > 1024 {
      steps.removeFirst(taken)
      taken = 0
    }
    isFetching = true
    let gate = gate
    fetch({ gate.fetch() }) { [self] in
      isFetching = false
      proceed()
    }
  }

  /// Whether nothing has to wait for its turn.
  private var isIdle: Bool { steps.isEmpty }

  /// Whether the step is done; else it is taken again when what the gate wants is there.
  private func take(_ step: Step) -> Bool {
    let fault: Fault
    switch step {
    case .fault(let it): fault = it
    case .commit: return commit()
    case .pool: return givePool()
    }
    asked = fault
    defer { asked = nil }
    switch fault {
    case .read(let id, let blocks):
      return resolve(id, blocks) { () throws(ImageError) in
        let limit = max(blocks.count, Self.readAhead)
        return .map(id, fresh(Placement(try format.findMerged(blocks.first, limit: limit))))
      }
    case .write(let id, let blocks, let whole):
      return resolve(id, blocks) { () throws(ImageError) in
        .map(id, fresh(try format.place(blocks, whole: whole)))
      }
    case .discard(let id, let blocks, let zeroing):
      return resolve(id, blocks) { () throws(ImageError) in
        switch try format.discard(blocks, zeroing: zeroing) {
        case .zero(let extent): .map(id, fresh(Placement(extent, .zero)))
        case .nothing(let count): .done(id, blocks: count)
        }
      }
    case .flush(let id, let upTo):
      flushes.append((id, upTo))
      if flushes.count == 1 { enqueue(.commit) }
    case .mapError(let block, let mark, let code):
      if mark != 0 { format.abandon(mark) }
      log(.warning, "a placement failed", ["block": String(block), "errno": reason(code)])
    case .placed(let extent): return placed(extent)
    // A mark has been taken up already.
    case .marked, .invalidateDone: break
    }
    return true
  }

  /// Lets the target place first writes by itself where the format knows beforehand where they
  /// go. Once the mapping is told.
  package func grant() {
    guard target.givesMarks, format.takeMarks(), target.takesGrants else { return }
    guard let grant = format.grant() else {
      pools.isOn = true
      wantPool()
      return
    }
    do throws(AnswerRefusal) {
      try target.grant(grant)
    } catch {
      // Then it asks, as it does without.
      log(.info, "first writes are asked for", ["refusal": "\(error)"])
    }
  }

  private func marked(_ provisional: Mark, _ mark: Mark) {
    format.marked(provisional, as: mark)
    lastMark = max(lastMark, mark)
  }

  /// As `take`.
  private func placed(_ extent: Extent) -> Bool {
    do throws(ImageError) {
      guard try gate.ask({ () throws(ImageError) in try format.granted(extent) }) != nil else {
        return false
      }
      lastMark = max(lastMark, extent.mark)
      pools.use()
      wantPool()
    } catch {
      // What the format does not know of it cannot commit: the flush must not end well.
      log(.error, "the image cannot take up a placement", ["error": "\(error)"])
      degrade(.degraded, "block \(extent.blocks.first): \(error)")
      lost = min(lost ?? extent.mark, extent.mark)
    }
    return true
  }

  /// A placement without its mark when the target has it already.
  private func fresh(_ placement: Placement) -> Placement {
    var placement = placement
    if placement.extent.mark <= lastMark { placement.extent.mark = 0 }
    return placement
  }

  /// Answers with what the format says, or fails the fault with the format's error; as `take`.
  private func resolve(
    _ id: FaultID, _ blocks: BlockRange, _ question: () throws(ImageError) -> Answer
  ) -> Bool {
    let answer: Answer
    do throws(ImageError) {
      guard let found = try gate.ask(question) else { return false }
      answer = found
    } catch {
      refuse(id, blocks, error)
      return true
    }
    give(answer, to: id, blocks)
    return true
  }

  private func give(_ answer: Answer, to id: FaultID, _ blocks: BlockRange) {
    var answer = answer
    if target.takesGrants, case .map(_, let placement, _) = answer,
      placement.extent.mark == 0, placement.extent.blocks.count > 1
    {
      // Of the blocks beside those that were asked for some may have been placed meanwhile.
      if offer(answer) == nil { return }
      var asked = placement
      asked.extent.blocks.count = min(blocks.count, placement.extent.blocks.count)
      answer = .map(id, asked)
    }
    let mark: Mark = if case .map(_, let placement, _) = answer { placement.extent.mark } else { 0 }
    guard !give(answer) else {
      if !mark.isProvisional { lastMark = max(lastMark, mark) }
      // Where one was placed there may be room for others.
      if mark != 0 {
        pools.isMissing = false
        wantPool()
      }
      return
    }
    if mark != 0 { format.abandon(mark) }
    degrade(.degraded, "the target refused the answer for block \(blocks.first)")
    give(.fail(id, code: EIO))
  }

  /// The format has no answer: the question waits, if that is for want of space, or fails.
  private func refuse(_ id: FaultID, _ blocks: BlockRange, _ error: ImageError) {
    let code = error.cause?.code ?? EIO
    let what = "block \(blocks.first): \(error)"
    let isFull = SpacePolicy.isShortage(code)
    log(
      isFull ? .info : .error, "the image cannot answer",
      ["block": String(blocks.first), "error": "\(error)"])
    degrade(isFull ? .noSpace : .degraded, what)
    guard isFull, let asked, starve() else {
      give(.fail(id, code: code))
      return
    }
    starving.append(asked)
  }

  /// Whether something may wait for space; then it does.
  private func starve() -> Bool {
    guard space.waits else { return false }
    if starvingSince == 0 { starvingSince = DiskTrouble.now() }
    return space.timeout == 0
      || DiskTrouble.now() - starvingSince < Int64(space.timeout) * 1000
  }

  /// Whether time alone may change something: to be told of by `tick` every second.
  package var wantsTicks: Bool { starvingSince != 0 || condition.state != .ready }

  /// A second has passed: what waits for space is tried again. After `quiet` seconds without a
  /// new one, errors that the format met are forgotten; 0: never.
  package func tick(quiet: UInt32) {
    if quiet > 0, condition.state == .degraded, lost == nil, !isStuck,
      DiskTrouble.now() - conditionSince >= Int64(quiet) * 1000
    {
      condition = .ready
    }
    guard starvingSince != 0 else { return }
    if isStuck {
      isStuck = false
      enqueue(.commit)
    }
    let waiting = starving
    starving = []
    for fault in waiting { handle(fault) }
    if isIdle, starving.isEmpty, !isStuck {
      starvingSince = 0
      if condition.state == .noSpace { condition = .ready }
    }
  }

  /// Fails whatever waits for space, and the commit that does, with an errno.
  package func endWaiting(_ code: Int32) {
    let waiting = starving
    starving = []
    starvingSince = 0
    for fault in waiting {
      if let id = fault.id { give(.fail(id, code: code)) }
    }
    guard isStuck, let flush = flushes.first else { return }
    isStuck = false
    finish(.fail(flush.id, code: code))
  }

  /// An admin has acted: what went wrong is history, but for placements that were lost.
  package func clear() {
    guard lost == nil, starvingSince == 0 else { return }
    condition = .ready
  }

  /// Whether the target took it.
  @discardableResult private func give(_ answer: Answer) -> Bool {
    guard let refusal = offer(answer) else { return true }
    log(
      .error, "the target refused an answer", ["refusal": "\(refusal)", "answer": "\(answer)"])
    return false
  }

  /// What the target has against it, if anything.
  private func offer(_ answer: Answer) -> AnswerRefusal? {
    do throws(AnswerRefusal) {
      trace?.answer(answer)
      try target.answer(answer)
      return nil
    } catch { return error }
  }

  /// Runs the plan of the first flush that waits; as `take`.
  private func commit() -> Bool {
    guard let flush = flushes.first else { return true }
    let plan: CommitPlan
    do throws(ImageError) {
      if let lost, lost <= flush.upTo {
        finish(.fail(flush.id, code: EIO))
        return true
      }
      guard !flushFailed else {
        finish(.fail(flush.id, code: EIO))
        return true
      }
      let made = try gate.ask { () throws(ImageError) in try format.commitPlan(upTo: flush.upTo) }
      guard let made else { return false }
      plan = made
    } catch {
      log(.error, "the image cannot be committed", ["error": "\(error)"])
      degrade(.degraded, "cannot commit: \(error)")
      finish(.fail(flush.id, code: error.cause?.code ?? EIO))
      return true
    }
    guard !plan.stages.isEmpty else {
      committed(flush)
      return true
    }
    run(plan, for: flush)
    return true
  }

  private func run(_ plan: CommitPlan, for flush: (id: FaultID, upTo: Mark)) {
    let store = store
    offload(
      {
        do throws(CommitFailure) {
          try plan.run(on: store)
          return nil
        } catch { return error }
      },
      { [self] failure in
        guard let failure else { return committed(flush) }
        gate.forget()
        log(.error, "a commit failed", ["error": "\(failure)"])
        // What a failed flush was to write may be gone, whatever its errno: EIO stands.
        let code = failure.flushCode == 0 ? failure.error.code : EIO
        let isFull = SpacePolicy.isShortage(code)
        degrade(isFull ? .noSpace : .degraded, "cannot commit: \(failure)")
        if isFull, starve() {
          isStuck = true
        } else {
          finish(.fail(flush.id, code: code))
        }
      })
  }

  private func committed(_ flush: (id: FaultID, upTo: Mark)) {
    format.committed(upTo: flush.upTo)
    gate.forget()
    // A disk that ran out of space and can commit again has found some.
    if condition.state == .noSpace, starving.isEmpty {
      condition = .ready
      starvingSince = 0
    }
    finish(.flushDone(flush.id))
  }

  private func finish(_ answer: Answer) {
    flushes.removeFirst()
    give(answer)
    if !flushes.isEmpty { enqueue(.commit) }
  }

  /// What is degraded stays so, with its first reason, until `clear` or a quiet time.
  private func degrade(_ state: DiskState, _ reason: String) {
    let next = Condition(state, reason)
    conditionSince = DiskTrouble.now()
    if condition.worse(next) != condition { condition = next }
  }

  private func reason(_ code: Int32) -> String { String(cString: strerror(code)) }
}
