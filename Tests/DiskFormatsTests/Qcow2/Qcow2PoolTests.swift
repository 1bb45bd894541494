// SPDX-License-Identifier: Apache-2.0
// Clusters that a target takes for first writes by itself.

import BlockIO
import DiskFormats
import DiskModel
import Fakes
import SystemIO
import Testing
import TestSupport

@Suite struct Qcow2PoolTests {
  static let cluster: UInt64 = 4096

  private func made() throws -> (MemoryStore, Qcow2) {
    let store = MemoryStore()
    var options = Qcow2Options()
    options.clusterSize = Self.cluster
    try Qcow2.create(store: store, size: 4096 * Self.cluster, options: options)
    let disk = try Qcow2.open(store: store, writable: true)
    #expect(disk.takeMarks())
    return (store, disk)
  }

  /// The extent of a block that has the place of a pool with this number.
  private func taken(_ pool: Pool, _ index: UInt32, _ block: UInt64, _ mark: Mark) -> Extent {
    let place = pool.place.advanced(by: UInt64(index) * pool.stride)
    return Extent(BlockRange(block), place, writable: true, mark: mark)
  }

  @Test func placesOfAPoolAreTakenByAnyBlock() throws {
    let (store, disk) = try made()
    let pool = try #require(try disk.pool())
    let other = try #require(try disk.pool())
    #expect(
      pool.blocks == BlockRange(0, 4096) && pool.stride == 8 && pool.count == 16
        && other.count == 32)
    #expect(other.place == pool.place.advanced(by: UInt64(pool.count) * pool.stride))
    // The file is long enough for all of them, and what is asked for lies elsewhere.
    let end = try Self.byte(other.place) + UInt64(other.count) * Self.cluster
    #expect(store.size >= end)
    let asked = try disk.place(BlockRange(9), whole: true).extent
    #expect(asked.mark.isProvisional)
    #expect(try Self.byte(asked.place) >= end)
    disk.marked(asked.mark, as: 1)
    let wanted: [(pool: Pool, index: UInt32, block: UInt64)] = [
      (pool, 0, 4095), (pool, 1, 0), (other, 0, 700), (pool, 2, 699),
    ]
    for (number, item) in wanted.enumerated() {
      let extent = taken(item.pool, item.index, item.block, Mark(number) + 2)
      try disk.granted(extent)
      #expect(try disk.find(item.block, limit: 1) == extent)
    }
    for wrong in [
      taken(pool, 0, 5, 9), taken(pool, 16, 0, 9), taken(pool, 3, 4096, 9),
      Extent(BlockRange(5, 2), taken(pool, 3, 5, 9).place, writable: true, mark: 9),
      Extent(BlockRange(5), .device(0, sector: 0), writable: true, mark: 9),
      taken(pool, 4, 5, 0),
    ] {
      #expect(throws: ImageError.self) { try disk.granted(wrong) }
    }
    // Only what has a mark up to that of the flush is in the plan.
    let plan = try disk.commitPlan(upTo: 4)
    try plan.carry(to: store)
    disk.committed(upTo: 4)
    let again = try Qcow2.open(store: store, writable: false)
    for (number, item) in wanted.enumerated() {
      let found = try again.find(item.block, limit: 1).place
      #expect(found == (number < 3 ? taken(item.pool, item.index, item.block, 0).place : .zero))
    }
    #expect(try again.find(9, limit: 1).place == asked.place)
    // What of the pools is not used is nobody's.
    let report = try Qcow2.check(store: store)
    #expect(report.isClean, "\(report.problems)")
    let free = try Qcow2.open(store: store, writable: true)
    #expect(free.takeMarks())
    #expect(try Self.byte(try #require(try free.pool()).place) < end)
  }

  /// A placement that came to nothing gives its cluster back, one with a provisional mark, too.
  @Test func whatComesToNothingIsFree() throws {
    let (store, disk) = try made()
    let pool = try #require(try disk.pool())
    try disk.granted(taken(pool, 0, 7, 1))
    disk.abandon(1)
    #expect(try disk.find(7, limit: 1).place == .zero)
    let asked = try disk.place(BlockRange(8), whole: true).extent
    #expect(asked.place == pool.place)
    disk.abandon(asked.mark)
    #expect(try disk.commitPlan(upTo: .max).stages.isEmpty)
    #expect(try Qcow2.check(store: store).isClean)
  }

  /// Who has to wait for the file to be made longer, or for its space, asks for the same again.
  @Test func askedAgainItGivesTheSame() throws {
    var places: Set<Place> = []
    for failAt in 0..<20 {
      let (memory, _) = try made()
      let failing = FailingStore(memory, failAt: failAt, code: 11)
      let late: Qcow2
      do throws(ImageError) { late = try Qcow2.open(store: failing, writable: true) } catch {
        // The call was one of the opening's.
        #expect(error.cause?.code == 11)
        continue
      }
      #expect(late.takeMarks())
      var pool: Pool?
      while pool == nil {
        do throws(ImageError) { pool = try late.pool() } catch {
          guard error.cause?.code == 11 else { throw error }
        }
      }
      places.insert(try #require(pool).place)
    }
    #expect(places.count == 1)
  }

  /// Where there is no room for much there is a small one, and then none; who asks hears of that.
  @Test func aSmallRoomMakesASmallPool() throws {
    let (memory, _) = try made()
    let disk = SimulatedDisk(
      "disk", contents: memory.contents() + [UInt8](repeating: 0, count: 40 * 4096))
    let image = try Qcow2.open(store: disk, writable: true)
    #expect(image.takeMarks())
    let first = try #require(try image.pool())
    #expect(first.count == 16)
    var count = first.count
    do throws(ImageError) {
      while let pool = try image.pool() { count += pool.count }
    } catch { #expect(error.cause?.code == 28) }
    #expect(count > 24)
    var placed: UInt64 = 0
    #expect(throws: ImageError.self) {
      while placed < 64 {
        _ = try image.place(BlockRange(placed), whole: true)
        placed += 1
      }
    }
    #expect(placed < 16)
  }

  /// A cluster that reads as zeroes and one that a snapshot has are left as the tables say they are.
  @Test func oldClustersLoseTheirUse() throws {
    let judge = try Judge()
    try judge.must("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=4k", "disk.img", "1M")
    try judge.io("disk.img", "qcow2", ["write -P 1 0 64k", "write -z 16k 16k"])
    try judge.must("qemu-img", "snapshot", "-c", "one", "disk.img")
    try judge.io("disk.img", "qcow2", ["write -P 2 4k 4k", "write -z 40k 8k"])
    let store = try judge.open("disk.img", writable: true)
    let disk = try Qcow2.open(store: store, writable: true)
    #expect(disk.takeMarks())
    let pool = try #require(try disk.pool())
    var mark: Mark = 0
    for block: UInt64 in [0, 4, 10, 11, 100] {
      let found = try disk.find(block, limit: 1)
      #expect(!found.writable)
      let extent = taken(pool, UInt32(mark), block, mark + 1)
      mark += 1
      try disk.granted(extent)
      guard case .device(_, let sector) = extent.place else { continue }
      try store.write([UInt8](repeating: 9, count: 4096), at: sector * 512)
    }
    try store.flush()
    try (try disk.commitPlan(upTo: mark)).carry(to: store)
    disk.committed(upTo: mark)
    #expect(try Qcow2.check(store: store).isClean)
    try judge.must("qemu-img", "check", "-f", "qcow2", "disk.img")
    try judge.io(
      "disk.img", "qcow2",
      [
        "read -P 9 0 4k", "read -P 2 4k 4k", "read -P 9 16k 4k", "read -P 0 20k 12k",
        "read -P 1 32k 8k", "read -P 9 40k 8k", "read -P 9 400k 4k",
      ])
    try judge.must("qemu-img", "snapshot", "-a", "one", "disk.img")
    try judge.io(
      "disk.img", "qcow2", ["read -P 1 0 16k", "read -P 0 16k 16k", "read -P 1 32k 32k"])
  }

  @Test func noPoolWithSubclusters() throws {
    var options = Qcow2Options()
    options.clusterSize = 16384
    options.extendedL2 = true
    let store = MemoryStore()
    try Qcow2.create(store: store, size: 1 << 20, options: options)
    let disk = try Qcow2.open(store: store, writable: true)
    #expect(disk.takeMarks())
    #expect(try disk.pool() == nil)
  }

  private static func byte(_ place: Place) throws -> UInt64 {
    guard case .device(0, let sector) = place else {
      throw ImageError(.corrupt, "not in the image: \(place)")
    }
    return sector * 512
  }
}
