// SPDX-License-Identifier: Apache-2.0
// The run directory of a daemon that runs: when somebody has wiped it, it is made anew. Disks go on
// meanwhile, since what they need is open; nobody could ask for them, though.

import Glibc
internal import Logging
import Synchronization
internal import SystemIO

/// Looks after the run directory.
final class RunDirectoryKeeper: Sendable {
  /// Tells of each time that it was made anew.
  let remade: AsyncStream<Void>

  private let configuration: Configuration
  private let tell: AsyncStream<Void>.Continuation
  /// The lock of the moment, and those on files that are no more.
  private let locks: Mutex<[DaemonLock]>

  /// Looks after a directory that this daemon has locked.
  init(_ configuration: Configuration, _ lock: DaemonLock) {
    self.configuration = configuration
    locks = Mutex([lock])
    (remade, tell) = AsyncStream.makeStream()
  }

  /// Makes it anew if it is not there, and answers whether it did so. Throws the errno of what
  /// failed. Blocks.
  func look(_ log: Logger) throws(IOError) -> Bool {
    let directory = configuration.runDirectory
    var status = stat()
    guard lstat(directory + "/lock", &status) != 0 else { return false }
    guard errno == ENOENT else { throw IOError.last("examine", directory + "/lock") }
    log.error("the run directory has gone and is made anew", metadata: ["path": "\(directory)"])
    let lock = try RunDirectory.prepare(configuration)
    locks.withLock { $0.append(lock) }
    try PendingEntry.prepare(configuration.registry)
    tell.yield()
    try RunReserve.establish(in: directory)
    return true
  }

  /// The locks are held until here.
  func keepUntilHere() { locks.withLock { for lock in $0 { lock.keepUntilHere() } } }
}
