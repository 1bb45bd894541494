// SPDX-License-Identifier: Apache-2.0
// Clusters that a target takes for first writes by itself; see PooledPlaces.
//
// A block may have a cluster of its own that reads as zeroes, or share one with a snapshot: the commit
// takes the old one's use away. A compressed cluster is none that the target could copy: it asks.

import BlockIO
import Glibc
import SystemIO

extension Qcow2: PooledImage {
  /// Bytes of a pool at most, and clusters of one at least.
  private static let poolSize: UInt64 = 32 << 20
  private static let leastClusters: UInt64 = 8

  /// Clusters of a pool that are used by nothing are free when the image is opened again.
  var poolStore: (any ByteStore)? { store }

  /// Clusters in a row: a hole that is no small part of what is wanted, or else so many at the end, or
  /// less where there is no room for them. None where a block's place is known, or belongs to a cluster
  /// with others.
  func takeRoom(_ wanted: UInt64) throws(ImageError) -> PoolRoom? {
    guard !header.hasDataFile, !header.hasSubclusters else { return nil }
    let size = header.clusterSize
    var wanted = min(max(Self.poolSize / size, Self.leastClusters), wanted)
    while true {
      do throws(ImageError) {
        var (first, count) = try refcounts.allocate(upTo: wanted)
        if count < Self.leastClusters {
          refcounts.release(first..<(first + count))
          (first, count) = try refcounts.allocateAtEnd(wanted)
        }
        return PoolRoom(first: first * size, stride: size, count: count)
      } catch {
        guard error.cause?.code == ENOSPC, wanted > Self.leastClusters else { throw error }
        wanted = max(wanted / 4, Self.leastClusters)
      }
    }
  }
}
