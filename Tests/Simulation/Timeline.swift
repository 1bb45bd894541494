// SPDX-License-Identifier: Apache-2.0
// Time and tasks of a simulation: everything runs on one thread, in an order that a seed decides,
// and time passes only when nothing else is to be done.

import Glibc
import LinuxBlock
import SystemIO
import TestSupport

@testable import Daemon

/// The one thread's tasks and timers. Not for any other thread.
// @unchecked: one thread, which `enqueue` checks.
final class Timeline: TaskExecutor, @unchecked Sendable {
  private struct Timer {
    let at: Duration
    let number: UInt64
    let fire: (Bool) -> Void

    func isBefore(_ other: Timer) -> Bool { (at, number) < (other.at, other.number) }
  }

  /// Virtual time since the beginning.
  private(set) var elapsed = Duration.zero
  var random: SplitMix64
  private let origin = ContinuousClock.now
  private let thread = pthread_self()
  private var jobs: [UnownedJob] = []
  private var timers: [Timer] = []
  private var last: UInt64 = 0

  init(seed: UInt64) { random = SplitMix64(seed: seed) }

  var now: ContinuousClock.Instant { origin + elapsed }

  func enqueue(_ job: consuming ExecutorJob) {
    precondition(pthread_equal(thread, pthread_self()) != 0, "a task of another thread")
    jobs.append(UnownedJob(job))
  }

  /// A number for a timer.
  func number() -> UInt64 {
    last += 1
    return last
  }

  /// Calls back at a time from now: with true, or with false when it is cancelled before.
  func add(_ number: UInt64, after time: Duration, _ fire: @escaping (Bool) -> Void) {
    timers.append(Timer(at: elapsed + max(time, .zero), number: number, fire: fire))
  }

  /// The same for what nobody cancels.
  func after(_ time: Duration, _ fire: @escaping () -> Void) {
    add(number(), after: time) { if $0 { fire() } }
  }

  /// Ends a timer before its time: cancelled, or as if its time had passed. Twice is once.
  func end(_ number: UInt64, hasPassed: Bool) {
    guard let index = timers.firstIndex(where: { $0.number == number }) else { return }
    timers.remove(at: index).fire(hasPassed)
  }

  /// Runs a part of a task, if one is ready: not always the first.
  func runJob() -> Bool {
    guard !jobs.isEmpty else { return false }
    let job = jobs.remove(at: random.below(min(jobs.count, 4)))
    job.runSynchronously(on: asUnownedTaskExecutor())
    return true
  }

  /// Goes on to the next timer, if there is one up to that time. False: it is that time now.
  func fireNext(until end: Duration) -> Bool {
    var next: Int?
    for index in timers.indices {
      if let best = next, timers[best].isBefore(timers[index]) { continue }
      next = index
    }
    guard let next, timers[next].at <= end else {
      elapsed = max(elapsed, end)
      return false
    }
    let timer = timers.remove(at: next)
    elapsed = max(elapsed, timer.at)
    timer.fire(true)
    return true
  }
}

/// The life of a daemon, from its start to its death.
final class Life: @unchecked Sendable {  // One thread.
  /// Nothing that it does has an effect any more.
  var isDead = false
  /// It has taken over what was there, and listens.
  var isOpen = false
  var timers: Set<UInt64> = []
  /// After its death: how much time has passed for what is still to end.
  var passed = Duration.zero
}

/// The scheduler of one daemon.
struct SimulatedScheduler: Scheduling {
  let timeline: Timeline
  let life: Life

  var now: ContinuousClock.Instant { timeline.now + life.passed }
  var unixTime: Int64 { 1_700_000_000 + timeline.elapsed.components.seconds }

  func sleep(for time: Duration) async throws(CancellationError) {
    guard !life.isDead else {
      life.passed += time
      return await Task.yield()
    }
    let number = timeline.number()
    life.timers.insert(number)
    let hasPassed = await withTaskCancellationHandler {
      await withCheckedContinuation { continuation in
        guard !Task.isCancelled else { return continuation.resume(returning: false) }
        timeline.add(number, after: time) { continuation.resume(returning: $0) }
      }
    } onCancel: {
      timeline.end(number, hasPassed: false)
    }
    life.timers.remove(number)
    if !hasPassed { throw CancellationError() }
  }

  /// Nothing else goes on on this thread.
  func block(for time: Duration) {}

  @discardableResult
  func start(_ body: @escaping @Sendable () async -> Void) -> Task<Void, Never> {
    Task(executorPreference: timeline) { await body() }
  }
}

/// Calls that take their time, and fail as often as the weather has it.
struct SimulatedOffload: Offloading {
  let scheduler: SimulatedScheduler
  let weather: Weather

  func run<Value: Sendable, Failure: Error>(
    _ work: @escaping @Sendable () throws(Failure) -> Value
  ) async throws(Failure) -> Value {
    await pause()
    if scheduler.life.isDead || weather.fails(), let error = weather.error(Failure.self) {
      throw error
    }
    let value = try work()
    await pause()
    return value
  }

  private func pause() async {
    let time = weather.callTime()
    guard time > .zero else { return }
    do throws(CancellationError) { try await scheduler.sleep(for: time) } catch { return }
  }
}

/// How well the host is.
final class Weather: @unchecked Sendable {  // One thread.
  let timeline: Timeline
  /// Percent of the calls that fail.
  var failing = 0
  /// Percent of the calls that take seconds.
  var slow = 0
  /// Percent of xenstore's answers that do not come.
  var silent = 0
  /// Workers that misbehave, in percent of their starts.
  var poor = 0

  init(_ timeline: Timeline) { self.timeline = timeline }

  func calm() { (failing, slow, silent, poor) = (0, 0, 0, 0) }

  func fails() -> Bool { timeline.random.chance(failing) }

  func callTime() -> Duration {
    if timeline.random.chance(slow) { return .milliseconds(timeline.random.below(20_000)) }
    return timeline.random.chance(50) ? .zero : .microseconds(timeline.random.below(3000))
  }

  /// A failure of the kind that a call throws; nil for one that throws none.
  func error<Failure: Error>(_: Failure.Type) -> Failure? {
    let codes = [EIO, ENOSPC, EMFILE, ENOMEM]
    let error = IOError(codes[timeline.random.below(codes.count)], "reach", "the host")
    if let error = error as? Failure { return error }
    if let error = DiskFailure(error) as? Failure { return error }
    return DeviceMapperError(error.code, error.operation, error.subject) as? Failure
  }
}

/// Descriptors that are looked at when nothing else is to be done.
final class SimulatedPoller: Polling, @unchecked Sendable {  // One thread.
  private let timeline: Timeline
  private var entries: [(number: UInt64, raw: Int32, handler: () -> Bool)] = []
  private var last: UInt64 = 0

  init(_ timeline: Timeline) { self.timeline = timeline }

  func add(_ raw: Int32, _ handler: @escaping @Sendable () -> Bool) -> PollRegistration {
    last += 1
    entries.append((last, raw, handler))
    return PollRegistration(number: last)
  }

  func remove(_ registration: PollRegistration) {
    entries.removeAll { $0.number == registration.number }
  }

  /// Calls the handler of one that is ready, if there is one.
  func dispatch() -> Bool {
    var list = entries.map { pollfd(fd: $0.raw, events: Int16(POLLIN), revents: 0) }
    guard poll(&list, nfds_t(list.count), 0) > 0 else { return false }
    let ready = list.indices.filter { list[$0].revents != 0 }
    let entry = entries[ready[timeline.random.below(ready.count)]]
    if !entry.handler() { entries.removeAll { $0.number == entry.number } }
    return true
  }

  /// Its daemon is dead: its links, which are sockets of packets, are closed.
  func end() {
    for entry in entries {
      var type: Int32 = 0
      var length = socklen_t(MemoryLayout<Int32>.size)
      guard getsockopt(entry.raw, SOL_SOCKET, SO_TYPE, &type, &length) == 0,
        type == Int32(SOCK_SEQPACKET.rawValue)
      else { continue }
      shutdown(entry.raw, Int32(SHUT_RDWR))
    }
    entries = []
  }
}
