// SPDX-License-Identifier: Apache-2.0
// A commit plan in the making: sectors of tables, changed in stages. A sector that a later
// stage changes again keeps what the earlier ones did to it.

/// Collects changes of tables and turns them into the stages of a plan.
struct CommitDraft {
  private let cache: MetadataCache
  /// Clusters that are written anew, whatever the store holds there, by their first byte.
  private(set) var fresh: Set<UInt64> = []
  private let clusterSize: UInt64
  private(set) var sectors: [UInt64: [UInt8]] = [:]
  private var touched: Set<UInt64> = []
  private var zeroed: [UInt64] = []
  private(set) var stages: [[CommitPlan.Write]] = []

  /// `clusterSize` is a power of two from 512 on.
  init(_ cache: MetadataCache, clusterSize: UInt64) {
    self.cache = cache
    self.clusterSize = clusterSize
  }

  /// Begins a cluster of zeroes at a byte offset, a multiple of the cluster size.
  mutating func begin(cluster: UInt64) {
    guard fresh.insert(cluster).inserted else { return }
    zeroed.append(cluster)
  }

  private mutating func load(_ index: UInt64) throws(ImageError) {
    touched.insert(index)
    guard sectors[index] == nil else { return }
    if fresh.contains(index * 512 / clusterSize * clusterSize) {
      sectors[index] = [UInt8](repeating: 0, count: 512)
    } else {
      try cache.pin(sector: index)
      sectors[index] = try cache.sector(index)
    }
  }

  /// A big-endian number as the draft has it.
  func big<Number: FixedWidthInteger>(
    _ type: Number.Type, at offset: UInt64
  ) throws(ImageError) -> Number {
    if let sector = sectors[offset / 512] { return sector.big(type, at: Int(offset % 512)) }
    if fresh.contains(offset / clusterSize * clusterSize) { return 0 }
    return try cache.big(type, at: offset)
  }

  /// Changes a sector that holds a byte offset; `body` is given the offset within it.
  mutating func change(
    at offset: UInt64, _ body: (inout [UInt8], Int) -> Void
  ) throws(ImageError) {
    try load(offset / 512)
    body(&sectors[offset / 512, default: []], Int(offset % 512))
  }

  /// Puts a big-endian number.
  mutating func putBig(_ value: some FixedWidthInteger, at offset: UInt64) throws(ImageError) {
    try change(at: offset) { $0.putBig(value, at: $1) }
  }

  /// Puts a little-endian number.
  mutating func putLittle(_ value: some FixedWidthInteger, at offset: UInt64) throws(ImageError) {
    try putBig(value.byteSwapped, at: offset)
  }

  /// Puts whole sectors at a byte offset, a multiple of 512; those of zeroes are left out
  /// where the cluster is fresh.
  mutating func put(sectors bytes: [UInt8], at offset: UInt64) throws(ImageError) {
    for start in stride(from: 0, to: bytes.count, by: 512) {
      let piece = [UInt8](bytes[start..<(start + 512)])
      let index = (offset + UInt64(start)) / 512
      let isFresh = fresh.contains(index * 512 / clusterSize * clusterSize)
      if isFresh, sectors[index] == nil, piece.allSatisfy({ $0 == 0 }) { continue }
      try load(index)
      sectors[index] = piece
    }
  }

  /// Ends a stage; one without changes is none.
  mutating func seal() {
    var writes: [CommitPlan.Write] = []
    for cluster in zeroed.sorted() {
      writes.append(CommitPlan.Write(offset: cluster, zeroes: clusterSize))
    }
    var run: (start: UInt64, bytes: [UInt8]) = (0, [])
    for index in touched.sorted() {
      guard let bytes = sectors[index] else { continue }
      if !run.bytes.isEmpty, run.start * 512 + UInt64(run.bytes.count) == index * 512 {
        run.bytes += bytes
        continue
      }
      if !run.bytes.isEmpty {
        writes.append(CommitPlan.Write(offset: run.start * 512, bytes: run.bytes))
      }
      run = (index, bytes)
    }
    if !run.bytes.isEmpty {
      writes.append(CommitPlan.Write(offset: run.start * 512, bytes: run.bytes))
    }
    if !writes.isEmpty { stages.append(writes) }
    touched = []
    zeroed = []
  }
}
