// SPDX-License-Identifier: Apache-2.0
// What a disk's device stands on, in the worker's words: "store:wd:0", "file-2:w:1073741824".

/// One of the files and devices that a disk's device stands on.
package struct DiskPart: Sendable, Hashable {
  /// Which one, by how the worker came to it.
  package enum Role: Sendable, Hashable {
    /// The store.
    case store
    /// The base that came with the order.
    case base
    /// The file that was asked for as so many-th, from 0.
    case file(Int)
  }

  /// The most that a disk has. Source: DMU_MAX_DEVICES.
  package static let most = 15

  /// Which one.
  package var role: Role
  /// Whether the device may write it.
  package var isWritable: Bool
  /// Whether the page cache is passed by.
  package var isDirect: Bool
  /// By how many bytes it may grow; 0 for what keeps its length.
  package var growth: UInt64

  /// A part from its properties.
  package init(_ role: Role, isWritable: Bool, isDirect: Bool = true, growth: UInt64 = 0) {
    self.role = role
    self.isWritable = isWritable
    self.isDirect = isDirect
    self.growth = growth
  }

  var word: String {
    let name =
      switch role {
      case .store: "store"
      case .base: "base"
      case .file(let index): "file-\(index)"
      }
    return "\(name):\(isWritable ? "w" : "")\(isDirect ? "d" : ""):\(growth)"
  }

  init?(_ word: some StringProtocol) {
    let fields = word.split(separator: ":", omittingEmptySubsequences: false)
    guard fields.count == 3, fields[1].allSatisfy({ "wd".contains($0) }),
      let growth = UInt64(fields[2]), growth <= 1 << 62
    else { return nil }
    let role: Role
    switch fields[0] {
    case "store": role = .store
    case "base": role = .base
    default:
      guard fields[0].hasPrefix("file-"), let index = Int(fields[0].dropFirst(5)), index >= 0
      else { return nil }
      role = .file(index)
    }
    self.init(
      role, isWritable: fields[1].contains("w"), isDirect: fields[1].contains("d"), growth: growth)
  }
}
