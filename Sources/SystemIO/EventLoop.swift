// SPDX-License-Identifier: Apache-2.0
// The one loop of a worker: epoll, timers, and stages that end each turn.
//
// Invariants:
// - A registration is named by slot and generation, so an event that was fetched before a
//   registration went, or before its descriptor's number came back, is never delivered.
// - Handlers run first, then timers that are due, then the stages in order, again and again
//   until none of them had anything to do. Only then the loop sleeps.
// - Used from one thread.

internal import CLinux
import Glibc

/// Waits for descriptors and times on one thread. Source: epoll(7).
package final class EventLoop {
  /// What a descriptor is waited for, or is ready for. `hangup` is told always.
  package struct Readiness: OptionSet, Sendable {
    /// The bits of epoll(7).
    package let rawValue: UInt32
    /// A set from epoll's bits.
    package init(rawValue: UInt32) { self.rawValue = rawValue }
    /// A set of some. For another module the library's own way costs hundreds of instructions, at each
    /// request.
    package init(arrayLiteral elements: Readiness...) {
      rawValue = elements.reduce(0) { $0 | $1.rawValue }
    }
    /// Something to read, or the end of it.
    package static let readable = Readiness(rawValue: EPOLLIN.rawValue)
    /// Room to write.
    package static let writable = Readiness(rawValue: EPOLLOUT.rawValue)
    /// The other side has gone, or the descriptor has failed.
    package static let hangup = Readiness(rawValue: EPOLLHUP.rawValue | EPOLLERR.rawValue)
  }

  /// Names a descriptor that is waited for.
  package struct Registration: Hashable, Sendable {
    let slot: Int32
    let generation: UInt32
  }

  /// Names a timer.
  package struct Timer: Hashable, Sendable {
    let number: UInt64
  }

  /// What ends each turn, in this order.
  package enum Stage: Int, Sendable {
    /// Questions that the handlers raised are answered.
    case answer
    /// What has gathered is sent.
    case send
  }

  private struct Entry {
    var descriptor: Int32 = -1
    var generation: UInt32 = 0
    var handler: ((Readiness) -> Void)?
  }
  private struct Alarm {
    let timer: Timer
    var due: Int64
    let every: Int64?
    let body: () -> Void
  }

  private static let batch = 64
  private let epoll: Descriptor
  private var entries: [Entry] = []
  private var free: [Int32] = []
  private var alarms: [Alarm] = []
  private var lastTimer: UInt64 = 0
  private var stages: [(stage: Stage, body: () -> Bool)] = []
  private var stopping = false
  private let events = UnsafeMutablePointer<epoll_event>.allocate(capacity: EventLoop.batch)

  /// An empty loop. Throws: the errno of epoll_create1(2).
  package init() throws(IOError) {
    let raw = epoll_create1(Int32(EPOLL_CLOEXEC))
    guard raw >= 0 else { throw IOError.last("create an event loop") }
    epoll = Descriptor(owning: raw)
  }

  deinit {
    events.deallocate()
  }

  /// Calls the handler whenever the descriptor, which is lent, is ready for `what`.
  /// Throws: the errno of epoll_ctl(2).
  package func add(
    _ descriptor: Int32, for what: Readiness, _ handler: @escaping (Readiness) -> Void
  ) throws(IOError) -> Registration {
    let slot: Int32
    if let last = free.popLast() {
      slot = last
    } else {
      slot = Int32(entries.count)
      entries.append(Entry())
    }
    let registration = Registration(slot: slot, generation: entries[Int(slot)].generation)
    var event = EventLoop.event(registration, what)
    guard epoll_ctl(epoll.raw, EPOLL_CTL_ADD, descriptor, &event) == 0 else {
      let error = IOError.last("wait for a descriptor")
      free.append(slot)
      throw error
    }
    entries[Int(slot)].descriptor = descriptor
    entries[Int(slot)].handler = handler
    return registration
  }

  /// Waits for something else from now on.
  package func change(_ registration: Registration, to what: Readiness) {
    guard isLive(registration) else { return }
    var event = EventLoop.event(registration, what)
    let descriptor = entries[Int(registration.slot)].descriptor
    let result = epoll_ctl(epoll.raw, EPOLL_CTL_MOD, descriptor, &event)
    precondition(result == 0, "a registered descriptor was closed before its removal")
  }

  /// Waits no longer. To be called before the descriptor is closed.
  package func remove(_ registration: Registration) {
    guard isLive(registration) else { return }
    let slot = Int(registration.slot)
    var event = epoll_event()
    let result = epoll_ctl(epoll.raw, EPOLL_CTL_DEL, entries[slot].descriptor, &event)
    precondition(result == 0, "a registered descriptor was closed before its removal")
    entries[slot] = Entry(generation: entries[slot].generation &+ 1)
    free.append(registration.slot)
  }

  /// Adds something to do at the end of each turn. It tells whether it did anything, and is
  /// called again until it did not.
  package func addStage(_ stage: Stage, _ body: @escaping () -> Bool) {
    stages.append((stage, body))
    stages.sort { $0.stage.rawValue < $1.stage.rawValue }
  }

  /// Calls `body` after so many milliseconds, and with `every` again and again after that.
  @discardableResult
  package func addTimer(
    after milliseconds: Int64, every: Int64? = nil, _ body: @escaping () -> Void
  ) -> Timer {
    lastTimer += 1
    let timer = Timer(number: lastTimer)
    let due = EventLoop.now() + milliseconds
    alarms.append(Alarm(timer: timer, due: due, every: every, body: body))
    return timer
  }

  /// Forgets a timer.
  package func cancel(_ timer: Timer) {
    alarms.removeAll { $0.timer == timer }
  }

  /// One turn: waits at most so many milliseconds (-1: without end) for the first event or
  /// timer. Throws: the errno of epoll_wait(2).
  package func turn(timeout milliseconds: Int32 = -1) throws(IOError) {
    // What was added outside a turn must not wait for an event.
    let pending = runStages()
    let count = epoll_wait(
      epoll.raw, events, Int32(EventLoop.batch), pending ? 0 : patience(milliseconds))
    guard count >= 0 || errno == EINTR else { throw IOError.last("wait for events") }
    for index in 0..<Int(max(count, 0)) {
      let data = events[index].data.u64
      let slot = Int(data & 0xffff_ffff)
      let generation = UInt32(truncatingIfNeeded: data >> 32)
      guard entries[slot].generation == generation, let handler = entries[slot].handler else {
        continue
      }
      handler(Readiness(rawValue: events[index].events))
    }
    runAlarms()
    _ = runStages()
  }

  /// Turns until `stop` is called.
  package func run() throws(IOError) {
    stopping = false
    while !stopping { try turn() }
  }

  /// Ends `run` after the turn that is under way.
  package func stop() {
    stopping = true
  }

  private func isLive(_ registration: Registration) -> Bool {
    let entry = entries[Int(registration.slot)]
    return entry.generation == registration.generation && entry.handler != nil
  }

  private static func event(_ registration: Registration, _ what: Readiness) -> epoll_event {
    var event = epoll_event()
    event.events = what.rawValue
    event.data.u64 =
      UInt64(registration.generation) << 32 | UInt64(UInt32(bitPattern: registration.slot))
    return event
  }

  private func runStages() -> Bool {
    var any = false
    var again = true
    while again {
      again = false
      for index in stages.indices where stages[index].body() { again = true }
      any = any || again
    }
    return any
  }

  private static func now() -> Int64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Int64(time.tv_sec) * 1000 + Int64(time.tv_nsec) / 1_000_000
  }

  private func patience(_ wanted: Int32) -> Int32 {
    guard let first = alarms.map(\.due).min() else { return wanted }
    // One more, since a clock in milliseconds rounds down.
    let rest = max(0, first - EventLoop.now() + 1)
    return wanted < 0 ? Int32(clamping: rest) : min(wanted, Int32(clamping: rest))
  }

  private func runAlarms() {
    guard !alarms.isEmpty else { return }
    let now = EventLoop.now()
    for alarm in alarms.filter({ $0.due <= now }) {
      // An earlier one may have cancelled this one.
      guard let index = alarms.firstIndex(where: { $0.timer == alarm.timer }) else { continue }
      if let every = alarm.every {
        alarms[index].due = now + every
      } else {
        alarms.remove(at: index)
      }
      alarm.body()
    }
  }
}
