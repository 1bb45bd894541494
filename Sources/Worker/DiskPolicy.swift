// SPDX-License-Identifier: Apache-2.0
// How a disk treats trouble: what its daemon, or whoever started the worker, has decided.

package import BlockIO
package import DiskModel
import Glibc
import Target

/// The decisions that a disk is served by.
package struct DiskPolicy: Sendable {
  /// What becomes of writes that find no space.
  package var space = SpacePolicy(waits: true)
  /// Seconds without an I/O error after which the disk counts as ready again; 0: never.
  package var quietTime: UInt32 = 0
  /// Whether somebody else may have had the store since the pending log was written.
  package var verifies = true
  /// The files that are written to, each by an open file description of its own that no
  /// worker flushes.
  package var witnesses: [FileStore] = []

  /// The defaults: writes wait for space without limit, errors stay.
  package init() {}

  /// How often a disk in trouble looks whether it is over, in milliseconds.
  static let tick: Int64 = 1000

  /// What became of a flush whose result nobody saw: the errno of the first write that failed
  /// since the witnesses were opened, or asked last; 0 when every write since then is durable.
  /// EIO without a witness, since then nothing proves that none failed. Blocks. Source:
  /// fsync(2): errors are told to each open file description.
  func judgeFlush() -> Int32 {
    guard !witnesses.isEmpty else { return EIO }
    for witness in witnesses where fsync(witness.raw) != 0 { return errno }
    return 0
  }
}
