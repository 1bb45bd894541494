// SPDX-License-Identifier: Apache-2.0
// Backing I/O that ends when and as a seed says: at once, later, in any order, with an
// error, or never because the worker was killed.

package import BlockIO
import Glibc
import SystemIO
import TestSupport

/// An executor over byte stores that a test moves by hand. Used from one thread.
package final class SimulatedExecutor: IOExecutor {
  /// How it behaves, in percent.
  package struct Manners: Sendable {
    /// Reads and writes that are done at once, wholly or in part.
    package var atOnce = 50
    /// Started operations that fail with EIO.
    package var failing = 0
    /// Flushes that fail with EIO.
    package var failingFlush = 0

    /// The defaults.
    package init() {}
  }

  private enum Job {
    case io(BackingIO)
    case work(@Sendable () -> CommitFailure?, (CommitFailure?) -> Void)
  }

  /// Told of each operation's end.
  package var completion: ((UInt32, Int32) -> Void)?
  /// How it behaves; may be changed at any time.
  package var manners: Manners
  /// Operations that touched the store, flushes included, so far.
  package private(set) var performed = 0
  private let devices: [any ByteStore]
  private var random: SplitMix64
  private var queue: [Job] = []

  /// Devices in the order of their numbers.
  package init(devices: [any ByteStore], seed: UInt64, manners: Manners = Manners()) {
    self.devices = devices
    self.manners = manners
    random = SplitMix64(seed: seed)
  }

  /// How many devices there are.
  package var deviceCount: Int { devices.count }
  /// Operations that wait to be performed.
  package var waiting: Int { queue.count }

  /// Whether a device may be written.
  package func isWritable(_ device: UInt16) -> Bool { devices[Int(device)].isWritable }

  /// The end of a device that is not written.
  package func end(_ device: UInt16) -> UInt64 {
    let device = devices[Int(device)]
    return device.isWritable ? UInt64.max : device.size
  }

  /// Does some reads and writes at once, and of some only a part.
  package func attempt(_ io: BackingIO) -> Int {
    guard random.chance(manners.atOnce) else { return -Int(EAGAIN) }
    var io = io
    if random.chance(20), io.count > 512 { io.count = 512 * (1 + random.below(io.count / 512)) }
    let code = perform(io)
    return code == 0 ? io.count : -Int(code)
  }

  /// Queues an operation.
  package func start(_ io: BackingIO) { queue.append(.io(io)) }

  /// Queues a commit plan.
  package func run(
    _ work: @escaping @Sendable () -> CommitFailure?, then: @escaping (CommitFailure?) -> Void
  ) {
    queue.append(.work(work, then))
  }

  /// Nothing is known of holes.
  package func hole(
    _ device: UInt16, at offset: UInt64, limit: UInt64
  ) -> (isHole: Bool, count: UInt64) {
    let size = devices[Int(device)].size
    return offset >= size ? (true, limit) : (false, min(limit, size - offset))
  }

  /// Performs one operation of those that wait, by the seed's choice. False: none waited.
  package func step() -> Bool {
    guard !queue.isEmpty else { return false }
    switch queue.remove(at: random.below(queue.count)) {
    case .io(let io):
      let percent = io.operation == .flush ? manners.failingFlush : manners.failing
      let code = random.chance(percent) ? EIO : perform(io)
      completion?(io.token, code)
    case .work(let work, let then):
      then(random.chance(manners.failingFlush) ? .flush(IOError(EIO, "flush", "store")) : work())
    }
    return true
  }

  /// The worker dies: of what waits some is performed, and nobody is told. A commit plan may
  /// be cut short: `interrupt` runs its work up to some point.
  package func kill(interrupt: (() -> CommitFailure?) -> Void = { _ = $0() }) {
    completion = nil
    while !queue.isEmpty {
      let job = queue.remove(at: random.below(queue.count))
      guard random.chance(50) else { continue }
      switch job {
      case .io(let io): _ = perform(io)
      case .work(let work, _): interrupt(work)
      }
    }
  }

  private func perform(_ io: BackingIO) -> Int32 {
    performed += 1
    let store = devices[Int(io.device)]
    do throws(IOError) {
      switch io.operation {
      case .read:
        try store.read(.init(start: io.buffer, count: io.count), at: io.offset)
      case .write:
        try store.write(.init(start: io.buffer, count: io.count), at: io.offset)
      case .punch, .zero: try store.zero(at: io.offset, count: UInt64(io.count))
      case .flush: try store.flush()
      }
      return 0
    } catch {
      return error.code
    }
  }
}
