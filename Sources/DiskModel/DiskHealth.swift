// SPDX-License-Identifier: Apache-2.0
// How a disk is, as whoever serves it knows it, and what is done when its store is full.

import Glibc

/// How a disk is, as its engine knows it.
package enum DiskHealth: Sendable, Equatable {
  /// All is well.
  case ready
  /// The store has no space for new blocks; goes by itself once it has. `isWaiting`: writes
  /// wait for space, otherwise they fail.
  case noSpace(Int32, isWaiting: Bool)
  /// Something failed with this errno; an admin has to act.
  case degraded(Int32, String)
}

/// How an engine treats a write that finds no space.
package struct SpacePolicy: Sendable, Equatable {
  /// Whether the write waits for space; otherwise it fails at once with ENOSPC.
  package var waits: Bool
  /// After so many seconds without space what waits fails, and so do the writes that follow
  /// until there is some; 0: never.
  package var timeout: UInt32

  /// A policy from its parts.
  package init(waits: Bool, timeout: UInt32 = 0) {
    self.waits = waits
    self.timeout = timeout
  }

  /// The errnos that say that a medium is full, which may pass: ENOSPC and EDQUOT of file
  /// systems, EREMOTEIO of a thin pool that has run out.
  package static func isShortage(_ code: Int32) -> Bool {
    code == ENOSPC || code == EDQUOT || code == EREMOTEIO
  }
}
