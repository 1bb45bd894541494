// SPDX-License-Identifier: Apache-2.0
// Space in the run directory for what the daemon has to write there, whoever has filled the file
// system: a file that is there for its blocks only, some of which are given back when there are no
// others.

import Glibc
import Synchronization
internal import SystemIO

/// The reserve of this process's run directory.
enum RunReserve {
  /// Bytes when it is whole, and bytes that are given back at a time. A disk's start takes some 50
  /// KiB, most of it for its pending log.
  static let size = 2 << 20
  static let step = 64 << 10

  private struct State {
    var directory: String?
    var left = 0
  }

  private static let state = Mutex(State())

  /// Makes it, or takes over that of an earlier daemon. Throws ENOSPC when there is no space for
  /// it now: `refill` tries again. Blocks.
  static func establish(in directory: String) throws(IOError) {
    state.withLock { $0 = State(directory: directory) }
    try refill()
  }

  /// Makes it whole again. Throws the errno of fallocate(2). Blocks.
  static func refill() throws(IOError) {
    try locked { state throws(IOError) in
      guard let directory = state.directory, state.left < size else { return }
      let path = directory + "/reserve"
      let file = try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600)
      let code = posix_fallocate(file.raw, 0, off_t(size))
      guard code == 0 else { throw IOError(code, "keep space in", path) }
      state.left = size
    }
  }

  /// Does what writes to a file of the run directory. When there is no space, some of the reserve
  /// is given back and it is done again. Throws what it throws. Blocks.
  static func writing<Value>(
    _ path: String, _ body: () throws(IOError) -> Value
  ) throws(IOError) -> Value {
    while true {
      do throws(IOError) { return try body() } catch {
        guard error.code == ENOSPC, try spend(for: path) else { throw error }
      }
    }
  }

  /// False when there is nothing left, or the path lies elsewhere.
  private static func spend(for path: String) throws(IOError) -> Bool {
    try locked { state throws(IOError) in
      guard let directory = state.directory, path.hasPrefix(directory + "/") else { return false }
      let reserve = directory + "/reserve"
      let file: Descriptor
      do throws(IOError) { file = try Descriptor(path: reserve, flags: O_RDWR) } catch {
        if error.code == ENOENT { return false }
        throw error
      }
      var status = stat()
      guard fstat(file.raw, &status) == 0 else { throw IOError.last("examine", reserve) }
      guard status.st_size > 0 else { return false }
      let left = max(0, Int(status.st_size) - step)
      guard ftruncate(file.raw, off_t(left)) == 0 else { throw IOError.last("shorten", reserve) }
      state.left = left
      return true
    }
  }

  private static func locked<Value: Sendable>(
    _ body: (inout State) throws(IOError) -> Value
  ) throws(IOError) -> Value {
    let result = state.withLock { state in
      Result { () throws(IOError) in try body(&state) }
    }
    return try result.get()
  }
}
