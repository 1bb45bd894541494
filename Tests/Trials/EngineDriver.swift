// SPDX-License-Identifier: Apache-2.0
// What the suites of the contract ask of an engine's surroundings, so that one suite drives
// both: `UserTargetDriver` the engine in user space over simulated devices,
// `KernelTargetDriver` the module in the kernel that runs.

package import DiskModel
import Target

/// A disk of an engine under test, over a store (device 0) and a base (device 1) that the
/// test can look into. The base holds stamp 1000 + n in sector n. One thread.
package protocol EngineDriver: AnyObject {
  /// The engine as its worker sees it; another one after `replaceWorker`.
  var engine: any TargetEngine { get }
  /// Makes a request, numbered in the order of making, and does not wait.
  func submit(_ request: DriverRequest) -> Int
  /// The errno of a request, 0 for success; nil while it is under way.
  func result(_ request: Int) -> Int32?
  /// What a read that has completed has brought.
  func bytes(_ request: Int) -> [UInt8]
  /// Lets everything happen that can happen without an answer.
  func settle()
  /// The engine's next fault. Nil also where nothing has happened since it was asked last.
  func nextFault() -> Fault?
  /// Lets others run who may have something to do, where they are others.
  func giveWay()
  /// Lets something happen; false when nothing could. `patience`: for how many milliseconds
  /// to wait for it where time passes by itself.
  func progress(patience: Int32) -> Bool
  /// Lets no backing operation end until `release`.
  func holdIO()
  /// Ends that.
  func release()
  /// Whether backing reads and writes fail with EIO.
  func failIO(_ fails: Bool)
  /// Whether flushes of the backing devices fail with EIO. False: they cannot be made to.
  func failFlushes(_ fail: Bool) -> Bool
  /// Whether the engine says that an admin has to act.
  var isDegraded: Bool { get }
  /// An admin lets flushes be tried again after one that failed.
  func clearFailure()
  /// The contents of a backing device.
  func contents(_ device: UInt16) -> [UInt8]
  /// Whether a backing device may let later requests pass a forced write that is under way: one
  /// with a cache that knows no forced writes, where the kernel makes two requests of it.
  var isOvertaken: Bool { get }
  /// How often the store has been flushed; nil where nobody counts.
  var flushes: Int? { get }
  /// The worker dies at once, and another one takes over.
  func replaceWorker() throws
  /// The device is suspended without flush and resumed, where there is such a thing.
  func suspend() throws
  /// Copies sectors of the store behind the engine's back, and spoils where they were.
  func moveStore(from: UInt64, to: UInt64, sectors: Int)
  /// Nothing is under way or uncommitted: forgets every mapping and every request.
  func renew() throws
}

/// A request as a test makes it, in bytes.
package enum DriverRequest: Sendable {
  /// Offset, count.
  case read(UInt64, Int)
  /// Offset, bytes; forced: durable before it ends.
  case write(UInt64, [UInt8], fua: Bool = false)
  /// Offset, count.
  case zero(UInt64, Int)
  /// Offset, count.
  case discard(UInt64, Int)
  /// Of everything.
  case flush
}
