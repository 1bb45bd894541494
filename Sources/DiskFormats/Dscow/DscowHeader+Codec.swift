// SPDX-License-Identifier: Apache-2.0
// The header as bytes, and which of the two copies holds.
//
// Outcomes of the two copies:
//
//   first      second     outcome
//   valid      the same   holds
//   valid      older      first holds; the second is stale (an update was cut off)
//   older      valid      second holds; the first is stale
//   valid      same sequence, other contents: corrupt, no update leaves this behind
//   valid      damaged    first holds; the second can be repaired from it
//   damaged    valid      second holds; likewise
//   damaged    damaged    corrupt when either bears the magic, else not this format
//
// A copy is valid when magic and checksum are right. Its version, features and fields are
// judged only then, and only of the copy that holds: an older copy never stands in for a
// newer one that this program cannot use.

extension DscowHeader {
  /// Byte offsets in a copy.
  enum Field {
    static let magic = 0
    static let version = 8
    static let checksum = 12
    static let sequence = 16
    static let compatible = 24
    static let readOnlyCompatible = 32
    static let incompatible = 40
    static let blockSize = 48
    static let size = 56
    static let blocks = 64
    static let firstBlock = 72
    static let bitmapOffset = 80
    static let bitmapCount = 88
    static let baseSize = 96
    static let baseModified = 104
    static let baseFingerprint = 112
    static let basePathCount = 116
    static let stampFlags = 120
    static let untouched = 124
    static let basePath = 512
  }

  /// The first eight bytes. The high bit, the line end and its two halves show up a copy
  /// that passed through something that changes text.
  static let magic: [UInt8] = [0x89, 0x44, 0x53, 0x43, 0x4F, 0x57, 0x0D, 0x0A]
  /// The version that this program reads and writes.
  static let version: UInt32 = 1
  /// The longest base path in bytes.
  static let longestPath = copySize - Field.basePath

  /// Whether bytes begin with one of the copies, whatever state it is in.
  static func isMagic(_ bytes: [UInt8]) -> Bool {
    bytes.starts(with: magic) || bytes.dropFirst(copySize).starts(with: magic)
  }

  /// The first sector of a store that is being made.
  static let unfinished: [UInt8] = {
    var bytes = magic + [UInt8](repeating: 0, count: 512 - magic.count)
    bytes.put(version, at: Field.version)
    return bytes
  }()

  /// Whether a store was being made when that was broken off.
  static func isUnfinished(_ bytes: [UInt8]) -> Bool { bytes.starts(with: unfinished) }

  /// What one copy is found to be.
  enum Copy: Equatable {
    /// Magic and checksum are right.
    case valid([UInt8])
    /// The magic is there, the checksum is wrong or bytes are missing.
    case damaged
    /// No magic.
    case absent

    init(_ bytes: [UInt8]) {
      guard bytes.starts(with: magic) else {
        self = .absent
        return
      }
      guard bytes.count == copySize, sum(bytes) == bytes.u32(at: Field.checksum) else {
        self = .damaged
        return
      }
      self = .valid(bytes)
    }

    var sequence: UInt64? {
      if case .valid(let bytes) = self { bytes.u64(at: Field.sequence) } else { nil }
    }
  }

  /// What is known of the copies beside the one that holds.
  package enum CopyState: Sendable, Equatable {
    /// Both say the same.
    case both
    /// This copy (0 or 1) is older than the other.
    case stale(Int)
    /// This copy (0 or 1) is damaged or missing.
    case damaged(Int)
  }

  private static func sum(_ bytes: [UInt8]) -> UInt32 {
    var bytes = bytes
    bytes.put(UInt32(0), at: Field.checksum)
    return CRC32C.of(bytes)
  }

  /// The copy as it stands on the store.
  func encoded() -> [UInt8] {
    var bytes = raw
    bytes.replaceSubrange(0..<Self.magic.count, with: Self.magic)
    bytes.put(Self.version, at: Field.version)
    bytes.put(sequence, at: Field.sequence)
    bytes.put(compatible, at: Field.compatible)
    bytes.put(readOnlyCompatible, at: Field.readOnlyCompatible)
    bytes.put(isBitmapBehind ? Self.bitmapBehind : UInt64(0), at: Field.incompatible)
    bytes.put(blockSize, at: Field.blockSize)
    bytes.put(size, at: Field.size)
    bytes.put(blocks, at: Field.blocks)
    bytes.put(firstBlock, at: Field.firstBlock)
    bytes.put(bitmapOffset, at: Field.bitmapOffset)
    bytes.put(bitmapCount, at: Field.bitmapCount)
    let path = [UInt8]((base?.path ?? "").utf8)
    precondition(path.count <= Self.longestPath, "the path was checked when the base was set")
    bytes.put(base?.size ?? 0, at: Field.baseSize)
    bytes.put(base?.modified ?? 0, at: Field.baseModified)
    bytes.put(base?.fingerprint ?? 0, at: Field.baseFingerprint)
    bytes.put(UInt32(path.count), at: Field.basePathCount)
    bytes.put(base == nil ? 0 : stampFlags, at: Field.stampFlags)
    bytes.put(base == nil ? 0 : untouched, at: Field.untouched)
    let rest = [UInt8](repeating: 0, count: Self.longestPath - path.count)
    bytes.replaceSubrange(Field.basePath..., with: path + rest)
    bytes.put(Self.sum(bytes), at: Field.checksum)
    return bytes
  }

  /// Reads a valid copy. Throws `unsupported` for a version or feature that is not known
  /// (an unknown read-only feature counts only when `writable`), `corrupt` for fields that
  /// contradict each other.
  init(validCopy bytes: [UInt8], writable: Bool) throws(ImageError) {
    let version = bytes.u32(at: Field.version)
    guard version == Self.version else {
      throw ImageError(
        .unsupported, "dscow version \(version) is not known here: use a newer dmu-xen")
    }
    try Self.checkFeatures(bytes, writable: writable)
    try self.init(
      size: bytes.u64(at: Field.size), blockSize: bytes.u32(at: Field.blockSize),
      firstBlock: bytes.u64(at: Field.firstBlock),
      bitmapOffset: bytes.u64(at: Field.bitmapOffset), raw: bytes)
    sequence = bytes.u64(at: Field.sequence)
    guard sequence < 1 << 63 else {
      throw ImageError(.corrupt, "the header has been changed \(sequence) times, which cannot be")
    }
    compatible = bytes.u64(at: Field.compatible)
    readOnlyCompatible = bytes.u64(at: Field.readOnlyCompatible)
    guard (bytes.u64(at: Field.incompatible) == Self.bitmapBehind) == isBitmapBehind else {
      throw ImageError(.corrupt, "the header places the bitmap at \(bitmapOffset)")
    }
    guard bytes.u64(at: Field.blocks) == blocks, bytes.u64(at: Field.bitmapCount) == bitmapCount
    else { throw ImageError(.corrupt, "the header's block counts contradict its size") }
    base = try Self.base(bytes)
    stampFlags = bytes.u32(at: Field.stampFlags)
    untouched = bytes.u32(at: Field.untouched)
  }

  private static func checkFeatures(_ bytes: [UInt8], writable: Bool) throws(ImageError) {
    let incompatible = bytes.u64(at: Field.incompatible)
    guard incompatible & ~bitmapBehind == 0 else {
      throw ImageError(
        .unsupported,
        "the store uses features (\(hexadecimal(incompatible & ~bitmapBehind))) that are not "
          + "known here: "
          + "use a newer dmu-xen")
    }
    let readOnly = bytes.u64(at: Field.readOnlyCompatible)
    guard readOnly == 0 || !writable else {
      throw ImageError(
        .unsupported,
        "the store uses features (\(hexadecimal(readOnly))) that must be known for writing: "
          + "open it read-only or use a newer dmu-xen")
    }
  }

  private static func base(_ bytes: [UInt8]) throws(ImageError) -> DscowBase? {
    let count = bytes.u32(at: Field.basePathCount)
    guard count > 0 else { return nil }
    guard count <= longestPath else {
      throw ImageError(.corrupt, "the header's base path has \(count) bytes")
    }
    let path = bytes[Field.basePath..<(Field.basePath + Int(count))]
    guard !path.contains(0), let text = String(validating: path, as: UTF8.self) else {
      throw ImageError(.corrupt, "the header's base path is not text")
    }
    let size = bytes.u64(at: Field.baseSize)
    guard size <= UInt64(Int64.max) else {
      throw ImageError(.corrupt, "the header gives its base \(size) bytes")
    }
    return DscowBase(
      path: text, size: size, modified: bytes.u64(at: Field.baseModified),
      fingerprint: bytes.u32(at: Field.baseFingerprint))
  }

  /// Chooses between the two copies (see the table at the head of this file) and reads the
  /// one that holds.
  static func choose(
    _ first: [UInt8], _ second: [UInt8], writable: Bool
  ) throws(ImageError) -> (DscowHeader, CopyState) {
    let one = Copy(first)
    let copies = (one, first == second ? one : Copy(second))
    switch copies {
    case (.valid(let one), .valid(let two)) where one == two:
      return (try DscowHeader(validCopy: one, writable: writable), .both)
    case (.valid(let one), .valid(let two)):
      let sequences = (one.u64(at: Field.sequence), two.u64(at: Field.sequence))
      guard sequences.0 != sequences.1 else {
        throw ImageError(.corrupt, "the two copies of the header contradict each other")
      }
      let newer = sequences.0 > sequences.1
      let header = try DscowHeader(validCopy: newer ? one : two, writable: writable)
      return (header, .stale(newer ? 1 : 0))
    case (.valid(let one), _):
      return (try DscowHeader(validCopy: one, writable: writable), .damaged(1))
    case (_, .valid(let two)):
      return (try DscowHeader(validCopy: two, writable: writable), .damaged(0))
    case (.absent, .absent):
      throw ImageError(.notThisFormat, "not a dscow store: it does not begin like one")
    default:
      guard !isUnfinished(first) else {
        throw ImageError(.corrupt, "it was not finished when it was made: make it again")
      }
      throw ImageError(
        .corrupt, "both copies of the header are damaged: restore the store from a backup")
    }
  }
}

/// A number as 0x and hexadecimal digits.
func hexadecimal(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
