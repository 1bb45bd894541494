// SPDX-License-Identifier: Apache-2.0
// A pipe that nobody reads and that takes nothing more.

import Glibc
package import SystemIO

/// Its writing end, which waits for ever whoever writes to it.
package final class FullPipe: Sendable {
  /// The end to write to, lent.
  package var raw: Int32 { writer.raw }
  private let reader: Descriptor
  private let writer: Descriptor

  /// Makes it and fills it.
  package init() throws(IOError) {
    var ends: [Int32] = [-1, -1]
    guard pipe(&ends) == 0 else { throw IOError.last("make a pipe") }
    reader = Descriptor(owning: ends[0])
    writer = Descriptor(owning: ends[1])
    let bytes = [UInt8](repeating: 0x0a, count: 4096)
    guard fcntl(writer.raw, F_SETFL, O_NONBLOCK) == 0 else { throw IOError.last("set flags") }
    for size in [4096, 1] { while write(writer.raw, bytes, size) > 0 {} }
    guard errno == EAGAIN, fcntl(writer.raw, F_SETFL, 0) == 0 else { throw IOError.last("fill") }
  }
}
