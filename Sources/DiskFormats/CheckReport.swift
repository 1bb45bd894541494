// SPDX-License-Identifier: Apache-2.0
// What a check of an image found. The words of `problems` are for people.

/// The outcome of a check, and of a repair.
package struct CheckReport: Sendable, Equatable {
  /// So many problems are put in words; the rest is only counted.
  package static let mostWords = 100
  /// Things that are wrong and may cost data.
  package var corruptions: UInt64 = 0
  /// Clusters that are counted and not used.
  package var leaks: UInt64 = 0
  /// Problems that a repair has mended.
  package var repaired: UInt64 = 0
  /// Bytes of a cluster that leaks.
  package var clusterSize: UInt64 = 0
  /// Where what is in use ends, in bytes.
  package var imageEnd: UInt64 = 0
  /// Clusters that the disk has.
  package var totalClusters: UInt64 = 0
  /// Clusters of the disk that have a place; how many of them do not follow the one before
  /// there, and how many are compressed.
  package var allocatedClusters: UInt64 = 0
  /// See `allocatedClusters`.
  package var fragmentedClusters: UInt64 = 0
  /// See `allocatedClusters`.
  package var compressedClusters: UInt64 = 0
  /// The first problems in words.
  package var problems: [String] = []
  /// Whether nothing is wrong.
  package var isClean: Bool { corruptions == 0 && leaks == 0 }

  /// A report of nothing.
  package init() {}

  mutating func corruption(_ words: String) {
    corruptions += 1
    if problems.count < Self.mostWords { problems.append(words) }
  }

  mutating func leak(_ words: String) {
    leaks += 1
    if problems.count < Self.mostWords { problems.append(words) }
  }
}

/// What a repair may do.
package enum Repair: Sendable {
  /// Give back clusters that nothing uses.
  case leaks
  /// That, and count everything anew.
  case all
}

/// An image in words: what `info` prints.
package struct ImageInfo: Sendable, Equatable {
  /// The format's name.
  package var format: String
  /// Length of the disk in bytes.
  package var size: UInt64
  /// Bytes of a cluster or block.
  package var clusterSize: UInt64
  /// The base's path and format as the image has them.
  package var basePath: String?
  /// The base's format by name, if the image says it.
  package var baseFormat: String?
  /// What else there is to say, in order.
  package var details: [(name: String, value: String)]

  /// A description from its parts.
  package init(
    format: String, size: UInt64, clusterSize: UInt64, basePath: String?, baseFormat: String?,
    details: [(name: String, value: String)]
  ) {
    self.format = format
    self.size = size
    self.clusterSize = clusterSize
    self.basePath = basePath
    self.baseFormat = baseFormat
    self.details = details
  }

  /// Whether two are the same.
  package static func == (one: ImageInfo, other: ImageInfo) -> Bool {
    one.format == other.format && one.size == other.size
      && one.clusterSize == other.clusterSize && one.basePath == other.basePath
      && one.baseFormat == other.baseFormat
      && one.details.elementsEqual(other.details, by: ==)
  }
}
