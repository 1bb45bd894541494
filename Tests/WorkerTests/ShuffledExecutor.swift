// SPDX-License-Identifier: Apache-2.0
// Backing I/O of a target under test: operations that were started are done in any order and
// their ends told in any order, by the choice of a seed.

import BlockIO
import Glibc
import SystemIO
import TestSupport

/// An executor over byte stores. Nothing happens but in `attempt` and `step`.
final class ShuffledExecutor: IOExecutor {
  private enum Job {
    case io(BackingIO)
    case work(@Sendable () -> CommitFailure?, (CommitFailure?) -> Void)
  }

  /// What was done last.
  enum Deed { case transfer, flush, work }

  var completion: ((UInt32, Int32) -> Void)?
  /// Every flush of the store fails with EIO.
  var failsFlushes = false
  private(set) var last = Deed.transfer
  private let devices: [any ByteStore]
  private var random: SplitMix64
  /// Started and not done.
  private var started: [Job] = []
  /// Done and not told.
  private var done: [() -> Void] = []

  init(devices: [any ByteStore], seed: UInt64) {
    self.devices = devices
    random = SplitMix64(seed: seed)
  }

  var deviceCount: Int { devices.count }
  func isWritable(_ device: UInt16) -> Bool { devices[Int(device)].isWritable }
  func end(_ device: UInt16) -> UInt64 { device == 0 ? .max : devices[Int(device)].size }
  func hole(_ device: UInt16, at offset: UInt64, limit: UInt64) -> (isHole: Bool, count: UInt64) {
    (false, limit)
  }

  func attempt(_ io: BackingIO) -> Int {
    guard random.chance(50) else { return -Int(EAGAIN) }
    var part = io
    if io.count > 512, random.chance(20) { part.count = 512 * (1 + random.below(io.count / 512)) }
    let code = perform(part)
    return code == 0 ? part.count : -Int(code)
  }

  func start(_ io: BackingIO) { started.append(.io(io)) }

  func run(
    _ work: @escaping @Sendable () -> CommitFailure?, then: @escaping (CommitFailure?) -> Void
  ) {
    started.append(.work(work, then))
  }

  private func perform(_ io: BackingIO) -> Int32 {
    let store = devices[Int(io.device)]
    last = io.operation == .flush ? .flush : .transfer
    if failsFlushes, io.operation == .flush { return EIO }
    do throws(IOError) {
      switch io.operation {
      case .read: try store.read(.init(start: io.buffer, count: io.count), at: io.offset)
      case .write: try store.write(.init(start: io.buffer, count: io.count), at: io.offset)
      case .punch, .zero: try store.zero(at: io.offset, count: UInt64(io.count))
      case .flush: try store.flush()
      }
      return 0
    } catch { return error.code }
  }

  private func perform(_ job: Job) {
    switch job {
    case .io(let io):
      let code = perform(io)
      done.append { [self] in completion?(io.token, code) }
    case .work(let work, let then):
      last = .work
      let error = work()
      done.append { then(error) }
    }
  }

  /// Does an operation or tells of the end of one; false when there is neither.
  func step() -> Bool {
    let count = started.count + done.count
    guard count > 0 else { return false }
    let choice = random.below(count)
    if choice < started.count {
      perform(started.remove(at: choice))
    } else {
      done.remove(at: choice - started.count)()
    }
    return true
  }

  /// The process dies: what was started is done or not, and nobody is told. Buffers must
  /// still be there.
  func die() {
    for job in started where random.chance(50) {
      switch job {
      case .io(let io): _ = perform(io)
      case .work(let work, _): _ = work()
      }
    }
    started.removeAll()
    done.removeAll()
    completion = nil
  }
}
