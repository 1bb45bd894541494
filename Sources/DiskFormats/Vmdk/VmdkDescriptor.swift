// SPDX-License-Identifier: Apache-2.0
// The descriptor of a VMDK image: text that says what the image is, what its base is, and
// which extents make up the disk. Its lines are in docs/formats/vmdk.md.
//
// Invariants of a descriptor that exists as a value (each checked on reading): there are 1 to
// 1024 extents, none empty; together they have at most 2^50 bytes; an extent with data names
// a file; a disk with a base says where it is.

import DiskModel

/// One extent of a VMDK disk, as the descriptor has it.
package struct VmdkExtentLine: Sendable, Equatable {
  /// How an extent's bytes are kept.
  package enum Kind: String, Sendable {
    /// The disk's bytes, from an offset of the file on.
    case flat = "FLAT"
    /// The same, by ESX.
    case vmfs = "VMFS"
    /// Grains where they are needed.
    case sparse = "SPARSE"
    /// The same, by ESX.
    case vmfsSparse = "VMFSSPARSE"
    /// Zeroes; no file.
    case zero = "ZERO"
  }

  /// Whether writes are allowed.
  package var isWritable: Bool
  /// Length in sectors of 512 bytes.
  package var sectors: UInt64
  /// How its bytes are kept.
  package var kind: Kind
  /// The file, as the descriptor names it; empty for `zero`.
  package var path: String
  /// Where a flat extent begins in its file, in sectors.
  package var offset: UInt64 = 0

  /// The line.
  var text: String {
    let start = "\(isWritable ? "RW" : "RDONLY") \(sectors) \(kind.rawValue)"
    switch kind {
    case .zero: return start
    case .flat, .vmfs: return start + " \"\(path)\" \(offset)"
    case .sparse, .vmfsSparse: return start + " \"\(path)\""
    }
  }
}

/// What the descriptor of a VMDK image says.
package struct VmdkDescriptor: Sendable, Equatable {
  /// The first comment, without blanks and in small letters.
  private static let start = Array("#diskdescriptorfile".utf8)
  private static let byteOrderMark: [UInt8] = [0xEF, 0xBB, 0xBF]
  /// So many bytes are looked at for it.
  private static let reach = 4096
  static let mostBytes = 1 << 20
  static let mostExtents = 1024
  static let longestPath = 1023
  static let noParent: UInt32 = .max

  /// Changes whenever the contents may have.
  package var contentID: UInt32
  /// The base's, when this image was made; all ones without a base.
  package var parentContentID = Self.noParent
  /// What kind of image it says it is.
  package var createType: String
  /// The base's path.
  package var basePath: String?
  /// The extents in the order of the disk.
  package var extents: [VmdkExtentLine] = []
  /// What else it says: lines of `ddb.` and others, as they stand.
  var otherLines: [String] = []
  /// Where the digits of the content ID stand in the text.
  var contentIDDigits: Range<Int> = 0..<0
  /// Where those of the base's stand.
  var parentDigits: Range<Int> = 0..<0

  /// Length of the disk in bytes.
  package var size: UInt64 { extents.reduce(0) { $0 + $1.sectors * 512 } }

  init(contentID: UInt32, createType: String) {
    self.contentID = contentID
    self.createType = createType
  }

  private static func isBlank(_ byte: UInt8) -> Bool { [9, 11, 12, 13, 32].contains(byte) }

  /// Whether bytes begin like a descriptor: comments in front, of which one is the first line of
  /// every descriptor in whatever spacing, or the version right after them. Source: QEMU's
  /// probe; the writers that docs/formats/vmdk.md lists.
  static func isDescriptor(_ bytes: [UInt8]) -> Bool {
    var index = bytes.starts(with: byteOrderMark) ? byteOrderMark.count : 0
    let end = min(bytes.count, reach)
    while index < end {
      // A line without its blanks, in small letters, as far as it matters.
      var line: [UInt8] = []
      while index < end, bytes[index] != 10 {
        let byte = bytes[index]
        guard byte != 0 else { return false }
        index += 1
        guard line.count <= start.count, !isBlank(byte) else { continue }
        line.append((65...90).contains(byte) ? byte + 32 : byte)
        // Most files are told from a descriptor by their first byte.
        guard line[0] == 35 || line[0] == 118 else { return false }
      }
      index += 1
      if line.starts(with: start) { return true }
      guard line.first == 118 else { continue }
      return ["version=1", "version=2", "version=3"].contains { line == Array($0.utf8) }
    }
    return false
  }

  /// Reads a descriptor out of its text; a byte of zero ends it.
  ///
  /// - Throws: `corrupt`, `unsupported`, without the store's name.
  init(_ bytes: [UInt8]) throws(ImageError) {
    guard Self.isDescriptor(bytes) else {
      throw ImageError(.notThisFormat, "its descriptor does not begin as one")
    }
    self.init(contentID: 0, createType: "")
    var parent: String?
    var position = 0
    let mark = bytes.starts(with: Self.byteOrderMark) ? Self.byteOrderMark.count : 0
    position = mark
    for line in bytes.dropFirst(mark).prefix(while: { $0 != 0 }).split(
      separator: 10, omittingEmptySubsequences: false)
    {
      defer { position += line.count + 1 }
      let words = Self.trimmed(text(line))
      guard !words.isEmpty, !words.hasPrefix("#") else { continue }
      guard let equals = words.firstIndex(of: "="), !Self.isExtent(words) else {
        guard extents.count < Self.mostExtents else {
          throw ImageError(.corrupt, "it has more than \(Self.mostExtents) extents")
        }
        extents.append(try Self.extent(words))
        continue
      }
      let key = Self.trimmed(String(words[..<equals]))
      let value = Self.unquoted(Self.trimmed(String(words[words.index(after: equals)...])))
      func digits() -> Range<Int> {
        let from = line.firstIndex(of: 61).map { $0 - line.startIndex + 1 } ?? 0
        let blanks = line.dropFirst(from).prefix { $0 == 32 || $0 == 9 }.count
        let first = position + from + blanks
        // Quotation marks are no digits.
        let quote = line.dropFirst(from + blanks).first == 34 ? 1 : 0
        return (first + quote)..<(first + quote + value.utf8.count)
      }
      switch key.lowercased() {
      case "version":
        guard ["1", "2", "3"].contains(value) else {
          throw ImageError(.unsupported, "its descriptor is of version '\(value)'")
        }
      case "cid":
        contentID = try Self.identity(value, key)
        contentIDDigits = digits()
      case "parentcid":
        parentContentID = try Self.identity(value, key)
        parentDigits = digits()
      case "createtype": createType = value
      case "parentfilenamehint": parent = value
      default: otherLines.append(words)
      }
    }
    basePath = parentContentID == Self.noParent ? nil : parent
    try check(hasParentPath: parent != nil)
  }

  private func check(hasParentPath: Bool) throws(ImageError) {
    guard parentContentID == Self.noParent || hasParentPath else {
      throw ImageError(.corrupt, "it has a base (parentCID) and does not name it")
    }
    guard (basePath ?? "-").utf8.count <= Self.longestPath, basePath != "" else {
      throw ImageError(.corrupt, "parentFileNameHint is empty or longer than 1023 bytes")
    }
    guard !extents.isEmpty else { throw ImageError(.corrupt, "its descriptor has no extents") }
    var left: UInt64 = (1 << 50) / 512
    for extent in extents {
      guard extent.sectors > 0, extent.sectors <= left else {
        throw ImageError(.corrupt, "an extent of \(extent.sectors) sectors")
      }
      left -= extent.sectors
    }
  }

  private static func isExtent(_ words: String) -> Bool {
    ["RW", "RDONLY", "NOACCESS"].contains(
      words.split { $0 == " " || $0 == "\t" }.first.map(String.init) ?? "")
  }

  private static func extent(_ words: String) throws(ImageError) -> VmdkExtentLine {
    // A path with blanks in it stands between quotation marks; others may do without.
    let parts = words.split(separator: "\"", omittingEmptySubsequences: false).map(String.init)
    var head = parts[0].split { $0 == " " || $0 == "\t" }.map(String.init)
    func refuse(_ code: ImageError.Code = .corrupt) -> ImageError {
      // Whatever it is, it goes to a terminal.
      let shown = words.prefix(100).map { character in
        character.unicodeScalars.contains { $0.value < 32 || $0.value == 127 || $0.value == 0xFFFD }
          ? "?" : character
      }
      return ImageError(
        code, "its descriptor has the line '\(String(shown))': no extent is written so: restore it")
    }
    guard head.count >= 3, let sectors = UInt64(head[1]) else { throw refuse() }
    guard head[2].uppercased() != "SESPARSE" else {
      throw ImageError(
        .unsupported, "it is of ESX's kind seSparse, which is not read here: convert it on ESX")
    }
    guard head[0] == "RW" || head[0] == "RDONLY", let kind = VmdkExtentLine.Kind(rawValue: head[2])
    else { throw refuse(.unsupported) }
    var line = VmdkExtentLine(
      isWritable: head[0] == "RW", sectors: sectors, kind: kind, path: "")
    head.removeFirst(3)
    guard kind != .zero else {
      guard parts.count == 1, head.isEmpty else { throw refuse() }
      return line
    }
    var tail: [String]
    if parts.count == 1 {
      guard !head.isEmpty else { throw refuse() }
      line.path = head.removeFirst()
      tail = head
    } else {
      guard parts.count == 3, head.isEmpty else { throw refuse() }
      line.path = parts[1]
      tail = parts[2].split { $0 == " " || $0 == "\t" }.map(String.init)
    }
    guard !line.path.isEmpty, line.path.utf8.count <= longestPath else { throw refuse() }
    if let first = tail.first {
      guard let offset = UInt64(first), offset < 1 << 50 else { throw refuse() }
      line.offset = offset
    }
    guard kind == .flat || kind == .vmfs || line.offset == 0 else { throw refuse() }
    return line
  }

  /// Where the length of the last extent stands in a descriptor's text.
  static func lastExtentDigits(in bytes: [UInt8]) -> Range<Int>? {
    var found: Range<Int>?
    var position = 0
    for line in bytes.split(separator: 10, omittingEmptySubsequences: false) {
      defer { position += line.count + 1 }
      guard isExtent(trimmed(text(line))) else { continue }
      // Blanks, the access, blanks, and then the length.
      var index = line.startIndex
      for skipsBlanks in [true, false, true] {
        while index < line.endIndex, isBlank(line[index]) == skipsBlanks { index += 1 }
      }
      let start = index
      while index < line.endIndex, !isBlank(line[index]) { index += 1 }
      found = (position + start - line.startIndex)..<(position + index - line.startIndex)
    }
    return found
  }

  private static func identity(_ value: String, _ key: String) throws(ImageError) -> UInt32 {
    guard value.utf8.count <= 8, let number = UInt32(value, radix: 16) else {
      throw ImageError(.corrupt, "\(key) is '\(value.prefix(40))', no content ID")
    }
    return number
  }

  private static func trimmed(_ words: String) -> String {
    let blanks: Set<Character> = [" ", "\t", "\r", "\r\n"]
    var words = Substring(words)
    while let last = words.last, blanks.contains(last) { words.removeLast() }
    return String(words.drop { blanks.contains($0) })
  }

  private static func unquoted(_ words: String) -> String {
    guard words.count >= 2, words.hasPrefix("\""), words.hasSuffix("\"") else { return words }
    return String(words.dropFirst().dropLast())
  }

  /// The text.
  func encoded() -> [UInt8] {
    var lines = ["# Disk DescriptorFile", "version=1", "CID=\(Self.digits(contentID))"]
    lines.append("parentCID=\(Self.digits(parentContentID))")
    lines.append("createType=\"\(createType)\"")
    if let basePath { lines.append("parentFileNameHint=\"\(basePath)\"") }
    lines += ["", "# Extent description"] + extents.map(\.text)
    lines += ["", "# The Disk Data Base", "#DDB", ""] + otherLines
    return Array((lines.joined(separator: "\n") + "\n").utf8)
  }

  /// Eight hexadecimal digits.
  static func digits(_ number: UInt32) -> String {
    let digits = String(number, radix: 16)
    return String(repeating: "0", count: 8 - digits.count) + digits
  }

  /// A content ID cut to as many digits as the one that stands in the text, so that it fits
  /// into the same bytes.
  func fitting(_ contentID: UInt32) -> UInt32 {
    let digits = String(Self.digits(contentID).suffix(contentIDDigits.count))
    return UInt32(digits, radix: 16) ?? 0
  }

  /// What a base bears from its overlay's commit into it on, until the overlay remembers that:
  /// known to nobody but this overlay, which tells by it that its own commit was broken off.
  func successor(forCommitOf overlay: VmdkDescriptor) -> UInt32 {
    var bytes = Array("dmu-xen commit".utf8)
    bytes.appendBig(overlay.parentContentID)
    bytes.appendBig(overlay.contentID)
    bytes.append(contentsOf: Array(overlay.otherLines.joined().utf8))
    let number = fitting(CRC32C.of(bytes))
    return number == overlay.parentContentID || number == Self.noParent ? number ^ 1 : number
  }

  /// Another content ID of the same number of digits.
  func nextContentID() -> [UInt8] {
    let count = contentIDDigits.count
    while true {
      let digits = String(Self.digits(.random(in: 0..<Self.noParent)).suffix(count))
      guard let number = UInt32(digits, radix: 16), number != contentID else { continue }
      return Array(digits.utf8)
    }
  }
}
