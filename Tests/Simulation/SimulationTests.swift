// SPDX-License-Identifier: Apache-2.0
// Runs of the simulated host, by seed; a run that fails is told with as few happenings as still
// make it fail.
//
//   SWIFT_DETERMINISTIC_HASHING=1 DMU_SEED=N swift test --filter SimulationTests/storms
//
// replays seed N.

import Glibc
import Testing
import TestSupport

@testable import Daemon

@Suite(.serialized) struct SimulationTests {
  /// Runs of so many seeds take 100,000 steps and more.
  private static let seeds = 40
  /// Seeds that have found faults, which each of these runs ends with.
  private static let found: [UInt64] = [1329, 3326, 3327]

  private static func run(
    _ seed: UInt64, _ events: [Event], _ mutant: Mutant? = nil
  ) async throws -> Outcome {
    try await blocking { try Simulation(seed: seed, events: events, mutant: mutant).run() }
  }

  @Test func storms() async throws {
    var (steps, activations) = (0, 0)
    var (joins, holds) = (0, 0)
    for seed in Depth.seeds(Self.seeds) + Self.found {
      let events = Simulation.events(seed: seed)
      let outcome = try await Self.run(seed, events)
      steps += outcome.steps
      activations += outcome.notes.count { $0.contains(" is active: ") }
      joins += outcome.notes.count { $0.contains("the vbd has joined the disk") }
      holds += outcome.notes.count { $0.contains("two domains run from one disk") }
      guard outcome.violation != nil else { continue }
      let (fewest, last) = try await Self.shrink(seed, events, outcome)
      Issue.record(
        """
        seed \(seed): \(last.violation ?? "")
        \(fewest.map { "\($0)" }.joined(separator: "\n"))
        the run:
        \(last.notes.suffix(200).joined(separator: "\n"))
        """)
      break
    }
    print(
      "simulation: \(steps) steps, \(joins) joins, \(holds) holds, seeds from \(Depth.firstSeed) on"
    )
    #expect(steps >= 100_000)
    #expect(activations > 0, "named disks that were inactive are active again")
    #expect(joins > 0, "guests migrate")
    #expect(holds > 0, "two domains run from one disk")
  }

  /// A failure without its numbers.
  private static func kind(_ outcome: Outcome) -> String? {
    outcome.violation.map { String($0.filter { !$0.isNumber }.prefix(40)) }
  }

  /// Leaves out what is not needed for the failure.
  private static func shrink(
    _ seed: UInt64, _ events: [Event], _ outcome: Outcome
  ) async throws -> ([Event], Outcome) {
    var (fewest, last) = (events, outcome)
    let kind = Self.kind(outcome)
    var size = events.count / 2
    while size > 0 {
      var start = 0
      while start < fewest.count {
        var fewer = fewest
        fewer.removeSubrange(start..<min(start + size, fewest.count))
        let outcome = try await run(seed, fewer)
        if Self.kind(outcome) == kind {
          (fewest, last) = (fewer, outcome)
        } else {
          start += size
        }
      }
      size /= 2
    }
    return (fewest, last)
  }

  /// The order of everything comes from the seed.
  @Test(.enabled(if: getenv("SWIFT_DETERMINISTIC_HASHING") != nil))
  func isReplayed() async throws {
    for seed in Depth.seeds(3) {
      let events = Simulation.events(seed: seed)
      let (first, second) = (try await Self.run(seed, events), try await Self.run(seed, events))
      #expect(first.steps == second.steps, "seed \(seed)")
    }
  }

  /// A successor that hangs while it starts, and cannot be killed: no other gets its store. At some of
  /// these instants it has the store and is not ready.
  @Test func hangingSuccessor() async throws {
    let disk = DiskID(domain: 1, device: 51712)
    for shift in 0..<12 {
      let events = [
        Event(
          at: .seconds(1),
          happening: .attach(
            disk, store: 0, options: "?transport=dm", base: true, readOnly: false)),
        Event(at: .seconds(5), happening: .kill(0)),
        Event(at: .milliseconds(5000 + shift), happening: .wedge(0, .seconds(40))),
      ]
      let outcome = try await Self.run(UInt64(shift), events)
      #expect(outcome.violation == nil, "after \(shift) ms")
    }
  }

  @Test(arguments: Mutant.allCases)
  func faultIsFound(_ mutant: Mutant) async throws {
    for seed in Depth.seeds(10) {
      let outcome = try await Self.run(seed, Simulation.events(seed: seed), mutant)
      if let violation = outcome.violation {
        print("simulation: \(mutant.rawValue) is found by seed \(seed): \(violation)")
        return
      }
    }
    Issue.record("\(mutant.rawValue) is not found")
  }
}
