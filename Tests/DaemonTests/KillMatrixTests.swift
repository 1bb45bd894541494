// SPDX-License-Identifier: Apache-2.0
// Worker, daemon and both killed at every moment of a disk's life, on a medium that works, one
// whose flushes are slow, and one whose flushes fail. After each kill every write that was
// acknowledged reads back, by the same disk and by the next one on the store: as long as the
// machine lives there is a log. What a machine's death leaves is for the power-cut tests.

import Daemon
import Fakes
import Glibc
import Synchronization
import Testing
import TestSupport

private let hasStrace = access("/usr/bin/strace", X_OK) == 0

@Suite(
  .serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"),
  .enabled(if: hasStrace, "strace makes flushes slow and lets them fail"))
struct KillMatrixTests {
  enum Victim: String, CaseIterable { case worker, daemon, both }

  enum Moment: String, CaseIterable {
    case idle, load, flush, commit, attach, detach
  }

  enum Medium: String, CaseIterable {
    case good, slow, failing

    /// How workers are started: one fdatasync(2) takes `delay`.
    var prefix: String {
      let strace = "exec strace -D -f -o /dev/null -e trace=fdatasync -e inject=fdatasync:"
      switch self {
      case .good: return "exec"
      case .slow: return strace + "delay_exit=\(Medium.delay)"
      case .failing: return strace + "error=EIO:delay_enter=\(Medium.delay)"
      }
    }

    static let delay = 120_000
  }

  /// What a guest was told.
  struct Told: Sendable {
    var acknowledged: Set<Int> = []
    var flushed: Set<Int> = []
    var failedFlushes = 0
  }

  private static let piece = 4096
  private static let pieces = 4096

  private static func content(_ place: Int) -> [UInt8] {
    [UInt8](repeating: UInt8(truncatingIfNeeded: place &* 7 &+ 1) | 1, count: piece)
  }

  @Test("Every acknowledged write survives worker, daemon and both, at every moment")
  func matrix() async throws {
    var cells: [String: String] = [:]
    for medium in Medium.allCases {
      // strace lets a call fail by making it one that does not exist, which ends a caged worker.
      let sandbox = medium == .failing ? "\"off\"" : "\"on\""
      let settings = ["worker.stop-timeout": "1", "worker.sandbox": sandbox]
      try await inWorld(settings) { world in
        try world.file("base", [UInt8](repeating: 0, count: Self.piece * Self.pieces))
        var domain = 10
        for victim in Victim.allCases {
          for moment in Moment.allCases {
            // A flush that takes no time has no inside.
            if medium == .good, moment == .flush || moment == .commit { continue }
            let cell = Cell(world, domain, victim, moment, medium)
            cells["\(victim) \(moment) \(medium)"] = try await cell.run()
            domain += 5
          }
        }
      }
    }
    var table = pad("killed", 9) + pad("moment", 9)
    table += Medium.allCases.map { pad($0.rawValue, 28) }.joined()
    for victim in Victim.allCases {
      for moment in Moment.allCases {
        table += "\n" + pad(victim.rawValue, 9) + pad(moment.rawValue, 9)
        table += Medium.allCases.map { pad(cells["\(victim) \(moment) \($0)"] ?? "-", 28) }.joined()
      }
    }
    print("kills: acknowledged writes that read back, of these flushed, flushes that failed")
    for line in table.split(separator: "\n") { print("kills: \(line)") }
  }

  private func pad(_ text: String, _ width: Int) -> String {
    text + String(repeating: " ", count: max(1, width - text.count))
  }

  /// One kill.
  private struct Cell {
    let world: World
    let domain: Int
    let victim: Victim
    let moment: Moment
    let medium: Medium
    let spec: String

    init(_ world: World, _ domain: Int, _ victim: Victim, _ moment: Moment, _ medium: Medium) {
      self.world = world
      self.domain = domain
      self.victim = victim
      self.moment = moment
      self.medium = medium
      spec = world.spec("s\(domain)")
    }

    func run() async throws -> String {
      try await world.makeStore("s\(domain)")
      try world.useWorkers(medium.prefix)
      var told = Told()
      var disk = try world.attach(domain, spec)
      try await world.add(disk)
      let wire = WireHolder(try await world.wire(of: disk))
      told = try await Self.write(wire, told, 16, thenFlush: true)
      switch moment {
      case .attach:
        disk = try await attachAgain(disk, &told)
        try await kill(disk)
      case .detach:
        told = try await Self.write(WireHolder(try await world.wire(of: disk)), told, 16)
        try world.detach(disk)
        try await kill(disk)
      default: told = try await during(disk, wire, told)
      }
      try await goOn(disk)
      if moment != .detach, moment != .attach {
        try await ready(disk)
        // The kernel's end, which is here, outlives the daemon.
        try await check(disk, told, "the same disk", victim == .daemon ? wire : nil)
      }
      return try await takeOver(from: disk, told)
    }

    /// A load that runs while the kill comes.
    private func during(
      _ disk: FakeDisk, _ wire: WireHolder, _ told: Told
    ) async throws -> Told {
      if moment == .idle {
        let told = try await Self.write(wire, told, 16)
        try await kill(disk)
        return told
      }
      let isLoad = moment == .load
      async let result = Self.write(wire, told, isLoad ? 400 : 8, every: 8)
      let wait = [Moment.load: 100, .flush: 60, .commit: 180][moment] ?? 0
      try await Task.sleep(for: .milliseconds(wait))
      try await kill(disk)
      return try await result
    }

    /// Writes pieces that were not written before, until they are done or the wire ends: what
    /// was under way then is nobody's. `every`: a flush after so many.
    private static func write(
      _ holder: WireHolder, _ before: Told, _ count: Int, every: Int = .max,
      thenFlush: Bool = false
    ) async throws -> Told {
      try await blocking {
        var told = before
        var next = (told.acknowledged.max() ?? -1) + 1
        func flush() throws {
          if try holder.wire.flush() == 0 {
            told.flushed = told.acknowledged
          } else {
            told.failedFlushes += 1
          }
        }
        do {
          for index in 1...count where next < KillMatrixTests.pieces {
            // One that got no answer is never written again.
            defer { next += 3 }
            let place = UInt64(next * KillMatrixTests.piece)
            guard try holder.wire.write(KillMatrixTests.content(next), at: place) == 0 else {
              throw WireEnded(description: "a write failed")
            }
            told.acknowledged.insert(next)
            if index % every == 0 { try flush() }
          }
          if thenFlush { try flush() }
        } catch let error as WireEnded where before.acknowledged.count > 0 {
          // The kill.
          _ = error
        }
        return told
      }
    }

    /// Ends the disk so that its log is kept, and attaches the store again.
    private func attachAgain(_ disk: FakeDisk, _ told: inout Told) async throws -> FakeDisk {
      told = try await Self.write(WireHolder(try await world.wire(of: disk)), told, 16)
      try world.useWorkers(instead: "exit 1")
      Glibc.kill(try await world.worker(disk), SIGKILL)
      try world.detach(disk)
      try await world.isGone(disk)
      #expect(world.logs().count == 1, "\(self.name)")
      try world.useWorkers(medium.prefix)
      let again = try world.attach(domain + 1, spec)
      // Taken up by its event alone: its worker may exist by now, or not yet.
      try await eventually("it is being taken up") {
        world.directories().contains("\(again.domain)-\(again.device)")
      }
      return again
    }

    private func kill(_ disk: FakeDisk) async throws {
      let disks = world.runDirectory + "/disks"
      let pids = try World.pids(disks)
      if victim != .worker { try await world.stopDaemon(SIGKILL) }
      if victim != .daemon {
        for pid in pids { Glibc.kill(pid, SIGKILL) }
        // A daemon that is just taking the disk down may have started another.
        if victim == .both {
          for pid in try await world.workers() { Glibc.kill(pid, SIGKILL) }
        }
      }
    }

    private func goOn(_ disk: FakeDisk) async throws {
      try world.useWorkers()
      // A tracer whose worker ended before it was traced stays, with the descriptors that the worker
      // was sent: its link, which nobody reads, and the store's lock. A worker without a device
      // ends with the daemon.
      if victim == .daemon, moment == .attach { try await Task.sleep(for: .milliseconds(300)) }
      let isLeft = victim == .daemon ? try await world.workers().isEmpty : true
      if isLeft {
        for pid in try await world.workers(["strace"]) { Glibc.kill(pid, SIGKILL) }
      }
      if victim != .worker { try await world.startDaemon() }
    }

    private func ready(_ disk: FakeDisk) async throws {
      try await eventually("\(name): it serves again") {
        let state = try await world.state(disk)
        return state == .ready || state == .degraded
      }
    }

    private func check(
      _ disk: FakeDisk, _ told: Told, _ whose: String, _ former: WireHolder? = nil
    ) async throws {
      let index = try #require(
        try await world.status(disk.domain).first?.device?.replacing("/stand-in/nbd", with: ""))
      // A socket that was just replaced may be replaced once more.
      var attempts = 0
      while true {
        do {
          let holder =
            if let former { former } else {
              WireHolder(try world.wire(try #require(UInt32(index))))
            }
          for place in told.acknowledged.sorted() {
            let found = try holder.wire.read(
              KillMatrixTests.piece, at: UInt64(place * KillMatrixTests.piece))
            #expect(
              found == KillMatrixTests.content(place),
              "\(name): \(whose), piece \(place), flushed: \(told.flushed.contains(place))")
          }
          return
        } catch {
          attempts += 1
          guard attempts < 50 else { throw error }
          try await Task.sleep(for: .milliseconds(100))
        }
      }
    }

    /// The next disk on the store reads everything, and when it has gone nothing is left.
    private func takeOver(from disk: FakeDisk, _ told: Told) async throws -> String {
      if moment != .detach { try world.detach(disk) }
      try await world.isGone(disk)
      let next = try world.attach(domain + 2, spec)
      try await world.add(next, boots: false)
      try await check(next, told, "the next disk")
      if try await world.state(next) != .ready {
        let domain = "\(next.domain)"
        let cleared = try await world.command { $0.clear(domain, json: true) }
        #expect(cleared == .done, "\(self.name)")
      }
      try world.detach(next)
      try await world.isGone(next)
      try await eventually("\(name): no log is left") { world.logs().isEmpty }
      return
        "\(told.acknowledged.count) of \(told.acknowledged.count), \(told.flushed.count),"
        + " \(told.failedFlushes)"
    }

    private var name: String { "\(victim) killed at \(moment), \(medium) medium" }
  }
}

/// Gives a wire to one thread.
final class WireHolder: Sendable {
  let wire: NBDWire
  init(_ wire: consuming NBDWire) { self.wire = wire }
}
