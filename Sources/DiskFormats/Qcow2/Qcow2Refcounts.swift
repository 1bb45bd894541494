// SPDX-License-Identifier: Apache-2.0
// Refcounts of a qcow2 image, and where there is room for new clusters.
//
// Invariants:
// - What is read here is the durable state. A cluster that was given out and is not yet
//   counted is reserved; no cluster is given out twice.
// - The file is long enough for every cluster that was given out, so that no write of data
//   has to make it longer, and no two of them race to do so.
// - The header, the L1 table and the refcount table are never given out, whatever the
//   refcounts say.

import BlockIO
import Glibc
import SystemIO

/// The width of refcounts and how to read and change one among bytes.
struct Qcow2RefcountWidth {
  let order: UInt32
  var bits: UInt64 { 1 << UInt64(order) }
  var most: UInt64 { order == 6 ? .max : (1 << bits) - 1 }

  /// The refcount with an index in bytes that begin with index 0.
  func get(_ bytes: [UInt8], _ index: Int) -> UInt64 {
    switch order {
    case 3: return UInt64(bytes[index])
    case 4: return UInt64(bytes.big(UInt16.self, at: index * 2))
    case 5: return UInt64(bytes.big(UInt32.self, at: index * 4))
    case 6: return bytes.big(UInt64.self, at: index * 8)
    default:
      let perByte = 8 >> Int(order)
      return UInt64(bytes[index / perByte]) >> UInt64(index % perByte * Int(bits)) & most
    }
  }

  /// Puts a refcount, which fits.
  func put(_ value: UInt64, _ bytes: inout [UInt8], _ index: Int) {
    switch order {
    case 3: bytes[index] = UInt8(value)
    case 4: bytes.putBig(UInt16(value), at: index * 2)
    case 5: bytes.putBig(UInt32(value), at: index * 4)
    case 6: bytes.putBig(value, at: index * 8)
    default:
      let perByte = 8 >> Int(order)
      let shift = UInt8(index % perByte * Int(bits))
      bytes[index / perByte] &= ~(UInt8(most) << shift)
      bytes[index / perByte] |= UInt8(value) << shift
    }
  }
}

/// The refcounts as they stand, and the free space.
final class Qcow2Refcounts {
  /// A search for holes looks at no more clusters at a time.
  private static let searchLimit: UInt64 = 8192
  /// A search for the end looks at no more clusters.
  private static let endSearchLimit = 1 << 24
  /// The file grows by so many bytes at a time.
  private static let growth: UInt64 = 4 << 20

  let width: Qcow2RefcountWidth
  private let store: any ByteStore
  private let cache: MetadataCache
  private let clusterSize: UInt64
  /// Refcounts in one block of them.
  let perBlock: UInt64
  /// Where the refcount table begins, and how many entries it has.
  private(set) var tableOffset: UInt64
  private(set) var tableEntries: UInt64
  private var fixed = HostRuns()
  private var reserved = HostRuns()
  private var quarantine = HostRuns()
  /// Below this there are no holes that are known.
  private var searchFrom: UInt64 = 0
  /// From here on nothing is in use; nil until it is needed.
  private var end: UInt64?
  private var storeSize: UInt64

  init(_ store: any ByteStore, _ cache: MetadataCache, _ header: Qcow2Header) {
    self.store = store
    self.cache = cache
    width = Qcow2RefcountWidth(order: header.refcountOrder)
    clusterSize = header.clusterSize
    perBlock = header.refcountsPerBlock
    tableOffset = header.refcountTableOffset
    tableEntries = UInt64(header.refcountTableClusters) * header.clusterSize / 8
    storeSize = store.size
    protect(offset: 0, bytes: clusterSize)
    protect(offset: header.l1Offset, bytes: UInt64(header.l1Size) * 8)
    protect(offset: tableOffset, bytes: tableEntries * 8)
  }

  private func clusters(_ offset: UInt64, _ bytes: UInt64) -> Range<UInt64> {
    let first = offset / clusterSize
    return first..<(first + (bytes + clusterSize - 1) / clusterSize)
  }

  private func protect(offset: UInt64, bytes: UInt64) {
    fixed.insert(clusters(offset, bytes))
  }

  /// Whether a byte range touches the header, the L1 table or the refcount table.
  func isProtected(_ offset: UInt64, bytes: UInt64) -> Bool {
    fixed.overlaps(clusters(offset, bytes))
  }

  /// The L1 table or the refcount table has moved.
  func move(table offset: UInt64, bytes: UInt64, from old: UInt64, oldBytes: UInt64) {
    fixed.remove(clusters(old, oldBytes))
    protect(offset: offset, bytes: bytes)
    if old == tableOffset {
      tableOffset = offset
      tableEntries = bytes / 8
    }
  }

  /// Where the block of refcounts with an index begins; nil when there is none. Throws
  /// `corrupt` for a place that cannot be.
  func block(_ index: UInt64) throws(ImageError) -> UInt64? {
    guard index < tableEntries else { return nil }
    let entry = try cache.big(UInt64.self, at: tableOffset + index * 8)
    guard entry != 0 else { return nil }
    guard entry % clusterSize == 0, entry < 1 << 56 else {
      throw ImageError(.corrupt, "\(store.name): refcount block \(index) at \(entry)")
    }
    return entry
  }

  /// The byte that holds, or begins, a cluster's refcount in its block.
  func byte(of cluster: UInt64) -> UInt64 { cluster % perBlock * width.bits / 8 }

  /// The index of a refcount within the bytes that begin at `byte(of:)` rounded down to 512.
  func index(of cluster: UInt64) -> Int {
    Int(cluster % perBlock % (512 * 8 / width.bits))
  }

  /// How often a cluster is used.
  func count(of cluster: UInt64) throws(ImageError) -> UInt64 {
    guard let block = try block(cluster / perBlock) else { return 0 }
    let byte = block + byte(of: cluster)
    let page = try cache.page(byte / MetadataCache.pageSize)
    let perPage = MetadataCache.pageSize * 8 / width.bits
    // A page holds the refcounts of one block, or of several that are smaller than it.
    let start = block % MetadataCache.pageSize * 8 / width.bits
    return width.get(page, Int((start + cluster % perBlock) % perPage))
  }

  private func isFree(_ cluster: UInt64) throws(ImageError) -> Bool {
    guard !reserved.contains(cluster), !fixed.contains(cluster),
      !quarantine.contains(cluster)
    else { return false }
    return try count(of: cluster) == 0
  }

  /// The first cluster from which on nothing is in use that the file has; or the file's end,
  /// when it takes too long to find.
  private func findEnd() throws(ImageError) -> UInt64 {
    if let end { return end }
    let fileEnd = (storeSize + clusterSize - 1) / clusterSize
    var found: UInt64 = 0
    var left = Self.endSearchLimit
    var index = min(tableEntries, (fileEnd + perBlock - 1) / perBlock)
    search: while index > 0 {
      index -= 1
      guard try block(index) != nil else { continue }
      var cluster = (index + 1) * perBlock
      while cluster > index * perBlock {
        cluster -= 1
        guard left > 0 else {
          found = fileEnd
          break search
        }
        left -= 1
        if try count(of: cluster) > 0 {
          found = cluster + 1
          break search
        }
      }
    }
    for runs in [fixed, reserved, quarantine] {
      found = max(found, runs.runs.last?.upperBound ?? 0)
    }
    end = found
    return found
  }

  /// Gives out clusters in a row: at least one, `wanted` at most. Throws ENOSPC as `io`.
  func allocate(upTo wanted: UInt64) throws(ImageError) -> (first: UInt64, count: UInt64) {
    let end = try findEnd()
    let stop = min(end, searchFrom + Self.searchLimit)
    while searchFrom < stop {
      guard try isFree(searchFrom) else {
        searchFrom += 1
        continue
      }
      // Who fails from here on has taken nothing.
      var next = searchFrom + 1
      while next < end, next - searchFrom < wanted, try isFree(next) { next += 1 }
      let found = try reserve(searchFrom, next - searchFrom)
      searchFrom = next
      return found
    }
    return try allocateAtEnd(wanted)
  }

  /// Gives out just so many clusters in a row.
  func allocateAtEnd(_ count: UInt64) throws(ImageError) -> (first: UInt64, count: UInt64) {
    try reserve(try findEnd(), count)
  }

  private func reserve(
    _ first: UInt64, _ count: UInt64
  ) throws(ImageError) -> (first: UInt64, count: UInt64) {
    let last = first + count
    let reach = Qcow2Header.largestRefcountTable / 8 * perBlock
    guard last <= reach, last <= (1 << 56) / clusterSize else {
      let cause = IOError(ENOSPC, "place", store.name)
      throw ImageError(.io, "\(store.name): the image can grow no further", cause: cause)
    }
    try grow(to: last * clusterSize)
    reserved.insert(first..<last)
    end = max(try findEnd(), last)
    return (first, count)
  }

  private func grow(to size: UInt64) throws(ImageError) {
    guard size > storeSize else { return }
    let generous = size + Self.growth
    do throws(IOError) {
      try store.resize(to: generous)
      storeSize = generous
    } catch {
      // A device has its own length; a full file system may still have room for less.
      try io { () throws(IOError) in try store.resize(to: size) }
      storeSize = size
    }
  }

  /// Takes over clusters that a former worker was given. Throws `badRequest` when one of them
  /// is given out already, or used more than once.
  func retake(_ range: Range<UInt64>) throws(ImageError) {
    guard !reserved.overlaps(range), !fixed.overlaps(range) else {
      throw ImageError(.badRequest, "two uncommitted placements share clusters \(range)")
    }
    for cluster in range {
      guard try count(of: cluster) <= 1 else {
        throw ImageError(.badRequest, "an uncommitted placement in use: cluster \(cluster)")
      }
    }
    _ = try findEnd()
    _ = try reserve(range.lowerBound, UInt64(range.count))
  }

  /// Clusters that were given out are free again: nothing refers to them.
  func release(_ range: Range<UInt64>) {
    reserved.remove(range)
    searchFrom = min(searchFrom, range.lowerBound)
  }

  /// Clusters that were given out are counted now.
  func counted(_ cluster: UInt64) { reserved.remove(cluster..<(cluster + 1)) }

  /// A cluster whose count has fallen; `keep` it from being given out again while open,
  /// because somebody may still be reading there.
  func freed(_ cluster: UInt64, keep: Bool) {
    if keep { quarantine.insert(cluster..<(cluster + 1)) }
    searchFrom = min(searchFrom, cluster)
  }
}
