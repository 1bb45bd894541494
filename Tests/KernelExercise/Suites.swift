// SPDX-License-Identifier: Apache-2.0
// The suites of the contract against the module, and side by side with UserTarget.

import BlockIO
import Glibc
import LinuxBlock
import Target
import TargetTrials

/// Every rule of the suite, each on a device of its own: on UserTarget, then on the module.
func tryRules() throws {
  for rule in Rules.all {
    let log = try scratchFile("pending", bytes: 0)
    defer { withExtendedLifetime(log) {} }
    let driver = try UserTargetDriver(
      sectors: Rules.sectors, blockSize: Rules.blockSize, memory: log.raw)
    do {
      try rule.check(Rules(driver))
    } catch {
      complain("rule \(rule.name), UserTarget: \(error)")
    }
  }
  for rule in Rules.all {
    // A memory disk is sent no flush.
    let onLoops = rule.name == "failed-flush-stands"
    try withDisks(onLoops: onLoops) { paths in
      let driver = try KernelTargetDriver(
        sectors: Rules.sectors, blockSize: Rules.blockSize, paths: paths, hasCache: onLoops)
      do {
        try rule.check(Rules(driver))
      } catch {
        driver.abandon()
        complain("rule \(rule.name), the module: \(error)")
      }
      try driver.close()
    }
    print("# rule \(rule.name)")
  }
}

/// A store and a base: memory disks, or files of a mebibyte.
private func withDisks(onLoops: Bool, _ body: ([String]) throws -> Void) throws {
  guard onLoops else { return try body(["/dev/ram0", "/dev/ram1"]) }
  let files = try ["store.img", "base.img"].map { try scratchFile($0, bytes: 1 << 20) }
  let store = try LoopDevice(file: files[0].raw, name: files[0].name, readOnly: false)
  let base = try LoopDevice(file: files[1].raw, name: files[1].name, readOnly: false)
  withExtendedLifetime(files) {}
  try body([store.path, base.path])
  try store.release()
  try base.release()
}

/// The disks that traces are run on, one after the other, for some hundred traces each.
private struct Shape {
  var blockSize: UInt32
  /// Sectors that the last block lacks.
  var lacking = 0
  var onLoops = false

  var sectors: Int { 12 * Int(blockSize) / 512 - lacking }

  static let all = [
    Shape(blockSize: 4096), Shape(blockSize: 512), Shape(blockSize: 4096, lacking: 3),
    Shape(blockSize: 2048, lacking: 1, onLoops: true), Shape(blockSize: 1024),
    Shape(blockSize: 4096), Shape(blockSize: 16384, lacking: 7), Shape(blockSize: 2048),
  ]
}

/// The same random traces on the module and on UserTarget, in this process: `count` from a
/// seed on. Whatever an engine does wrong is told with the seed of its trace, from which the
/// disk follows too.
func tryTraces(seed: UInt64, count: Int) throws {
  let batch: UInt64 = 500
  let end = seed + UInt64(count)
  var next = seed
  var tally = Trace.Tally()
  var other = Trace.Tally()
  while next < end {
    let shape = Shape.all[Int(next / batch % UInt64(Shape.all.count))]
    let seeds = next..<min(end, (next / batch + 1) * batch)
    next = seeds.upperBound
    try withBatch(shape) { kernel, user in
      for seed in seeds {
        let trace = Trace(seed: seed, sectors: shape.sectors, blockSize: shape.blockSize)
        do {
          try trace.run(on: user, tally: &other)
        } catch {
          kernel.abandon()
          complain("UserTarget, \(shape): \(error)")
        }
        do {
          try trace.run(on: kernel, tally: &tally)
        } catch {
          kernel.abandon()
          complain("the module, \(shape): \(error)")
        }
        try user.renew()
        try kernel.renew()
      }
    }
  }
  print(
    "# \(count) traces from seed \(seed) on, on both engines: \(tally.requests) requests, workers",
    "killed \(tally.deaths) and \(other.deaths) times, \(tally.suspends) suspends")
}

/// Traces on the module alone, with a format whose blocks have one place each. What is there stays
/// so, so that each trace has a device of its own; the store keeps what those before have written.
func tryLayers(seed: UInt64, count: Int) throws {
  let batch: UInt64 = 50
  let end = seed + UInt64(count)
  var next = seed
  var tally = Trace.Tally()
  while next < end {
    let shape = Shape.all[Int(next / batch % UInt64(Shape.all.count))]
    let seeds = next..<min(end, (next / batch + 1) * batch)
    next = seeds.upperBound
    try withDisks(onLoops: shape.onLoops) { paths in
      for seed in seeds {
        let kernel = try KernelTargetDriver(
          sectors: shape.sectors, blockSize: shape.blockSize, paths: paths,
          hasCache: shape.onLoops)
        let trace = Trace(seed: seed, sectors: shape.sectors, blockSize: shape.blockSize)
        do {
          try trace.run(on: kernel, layered: true, tally: &tally)
        } catch {
          kernel.abandon()
          complain("the module, layered, \(shape): \(error)")
        }
        try kernel.close()
      }
    }
  }
  print(
    "# \(count) traces from seed \(seed) on, with layers: \(tally.requests) requests, workers",
    "killed \(tally.deaths) times, \(tally.suspends) suspends, \(tally.touched) blocks told of")
}

private func withBatch(
  _ shape: Shape, _ body: (KernelTargetDriver, UserTargetDriver) throws -> Void
) throws {
  let log = try scratchFile("pending", bytes: 0)
  defer { withExtendedLifetime(log) {} }
  let user = try UserTargetDriver(
    sectors: shape.sectors, blockSize: shape.blockSize, atOnce: 30, memory: log.raw)
  try withDisks(onLoops: shape.onLoops) { paths in
    let kernel = try KernelTargetDriver(
      sectors: shape.sectors, blockSize: shape.blockSize, paths: paths,
      hasCache: shape.onLoops)
    try body(kernel, user)
    try kernel.close()
  }
}
