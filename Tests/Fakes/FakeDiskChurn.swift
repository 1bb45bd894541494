// SPDX-License-Identifier: Apache-2.0
//
// Many disks appearing and disappearing in random order, and what must be there in the end.

package import TestSupport

/// A random sequence of attachments and detachments that a seed replays.
///
/// Each call of `step` takes one random disk one step further in its life: it comes (its domain with
/// it, if it is the first one there), is waited for, begins to go, closes, and is gone. So at any
/// moment disks stand in every state, and a disk may come again as soon as it has gone.
package struct FakeDiskChurn {
  private enum Stage {
    case absent
    case attached
    case waiting
    case detaching
    case closed
  }

  private let toolstack: FakeToolstack
  private let disks: [FakeDisk]
  private var stages: [Stage]
  private var random: SeededRandom

  /// Disks of any domains; every domain is made when its first disk comes, and stays.
  package init(_ toolstack: FakeToolstack, disks: [FakeDisk], random: SeededRandom) {
    self.toolstack = toolstack
    self.disks = disks
    self.random = random
    stages = Array(repeating: .absent, count: disks.count)
  }

  /// One disk takes one step; which one is returned.
  @discardableResult
  package mutating func step() throws(WireError) -> FakeDisk {
    let index = Int.random(in: 0..<disks.count, using: &random)
    try advance(index)
    return disks[index]
  }

  /// Ends what was begun: every disk is either attached and wanted, or gone.
  ///
  /// Returns the wanted ones: the daemon must end up with a worker for each, and no other.
  package mutating func settle() throws(WireError) -> Set<FakeDisk> {
    for index in disks.indices {
      while stages[index] == .detaching || stages[index] == .closed { try advance(index) }
    }
    return Set(disks.indices.filter { stages[$0] != .absent }.map { disks[$0] })
  }

  private mutating func advance(_ index: Int) throws(WireError) {
    let disk = disks[index]
    switch stages[index] {
    case .absent:
      if try toolstack.read("/local/domain/\(disk.domain)/domid") == nil {
        try toolstack.createDomain(disk.domain, name: "guest\(disk.domain)")
      }
      try toolstack.attach(disk)
      stages[index] = .attached
    case .attached:
      try toolstack.backendWaits(disk)
      stages[index] = .waiting
    case .waiting:
      try toolstack.beginDetach(disk)
      stages[index] = .detaching
    case .detaching:
      try toolstack.backendCloses(disk)
      stages[index] = .closed
    case .closed:
      try toolstack.finishDetach(disk)
      stages[index] = .absent
    }
  }
}
