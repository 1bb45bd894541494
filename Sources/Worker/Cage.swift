// SPDX-License-Identifier: Apache-2.0
// What a worker may touch is what it was handed: it leaves the host's namespaces for empty ones,
// gives up every right, and is ended by the kernel when it asks for anything that no worker needs.
//
// Invariants:
// - Every step is done or the worker does not start. The one exception is Landlock, which not
//   every kernel has and which denies only what the others deny already.
// - Where root starts it there is no user namespace: a process that has no capability and can get
//   none has nothing to lose in the host's, and in one of its own it could not tell who connects
//   to its link.
// - The steps stand in the order in which each still has the rights that it needs. They need a
//   process of one thread.

import Glibc
package import SystemIO

/// The cage of a worker.
package enum Cage {
  /// So many threads and no process at all.
  private static let threads: UInt64 = 64
  /// What the largest images need is some hundred MiB, and each thread has a stack of 8 MiB.
  private static let memory: UInt64 = 4 << 30
  /// Address space is reserved in larger pieces than are ever used, and counts as locked.
  private static let lockedMemory: UInt64 = 64 << 30

  /// Enters it for good. Where root starts it, it becomes this user and group, which nobody else
  /// shall have; any other user it stays. `files`: the most descriptors that the worker will have.
  /// Throws: the errno of the step that failed; then the process is in no state to serve anything.
  package static func enter(uid: UInt32, gid: UInt32, files: UInt64) throws(IOError) {
    try Hardening.keepMemoryFile()
    // While there is a root with libraries in it.
    let calls = try SystemCalls()
    let isRoot = geteuid() == 0
    try Hardening.leaveHost()
    try Hardening.limit(.core, to: 0)
    try Hardening.limit(.files, to: files)
    try Hardening.limit(.memory, to: memory)
    // In a user namespace of its own the first process may.
    try Hardening.emptyBoundingSet()
    if isRoot {
      try Hardening.limit(.lockedMemory, to: lockedMemory)
      // Of a user that nobody else has.
      try Hardening.limit(.processes, to: threads)
      try Hardening.become(uid: uid, gid: gid)
    }
    try Hardening.renounceRights()
    _ = try Hardening.denyPaths()
    try calls.restrict()
  }
}
