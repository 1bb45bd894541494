// SPDX-License-Identifier: Apache-2.0
// The header as bytes: what it looks like, and that nothing that stands there can trap or
// mislead.

import Fakes
import Testing
import TestSupport

@testable import DiskFormats

@Suite struct HeaderTests {
  static let fixtureBase: UInt64 = 537_919_488

  /// Of a store as they were made before blocks of 4 KiB were the default, or with other blocks.
  static func fixtureHeader(blockSize: UInt32 = 65536) throws -> DscowHeader {
    let base = MemoryStore("base", size: fixtureBase, modified: 1_153_958_400_000_000_000)
    let store = MemoryStore("store")
    try Dscow.create(store: store, base: base, baseName: "/images/base.img", blockSize: blockSize)
    return try Dscow.header(of: store).header
  }

  /// A valid copy with a number changed and its checksum put right.
  static func forged(_ change: (inout [UInt8]) -> Void) throws -> [UInt8] {
    var bytes = try fixtureHeader().encoded()
    change(&bytes)
    bytes.put(UInt32(0), at: DscowHeader.Field.checksum)
    bytes.put(CRC32C.of(bytes), at: DscowHeader.Field.checksum)
    return bytes
  }

  static func code(_ first: [UInt8], _ second: [UInt8], writable: Bool = false) -> String {
    do throws(ImageError) {
      let (header, copies) = try DscowHeader.choose(first, second, writable: writable)
      return "\(header.sequence) \(copies)"
    } catch { return error.code.rawValue }
  }

  @Test func checksumOfTheStandardExamples() {
    #expect(CRC32C.of([UInt8](repeating: 0, count: 32)) == 0x8A91_36AA)
    #expect(CRC32C.of([UInt8](repeating: 0xFF, count: 32)) == 0x62A8_AB43)
    #expect(CRC32C.of([UInt8](0..<32)) == 0x46DD_794E)
    #expect(CRC32C.of([UInt8]("123456789".utf8)) == 0xE306_9283)
  }

  @Test(arguments: [
    (Dscow.defaultBlockSize, "4k", "4096", "131328", "4104"),
    (UInt32(65536), "64k", "65536", "8208", "257"),
  ]) func goldenBytes(
    blockSize: UInt32, name: String, size: String, blocks: String, words: String
  ) throws {
    let text = try Fixture.text("dscow-header-\(name).hex")
    let golden = text.split(separator: "\n").joined()
    var header = try Self.fixtureHeader(blockSize: blockSize)
    // The bytes from 120 on were not used by all who made stores of version 1.
    #expect(header.stampFlags == 1)
    #expect(header.encoded()[120..<128] == [1, 0, 0, 0, 0, 0, 0, 0])
    header.stampFlags = 0
    let hex = header.encoded().map { byte in
      (byte < 16 ? "0" : "") + String(byte, radix: 16)
    }
    #expect(hex.joined() == golden)
    #expect(
      DscowTool.geometry(header) == """
        Size:         537919488
        First block:  65536
        Block size:   \(size)
        Blocks:       \(blocks)
        Bitmap count: \(words)

        """)
  }

  /// It lies at a multiple of 64 KiB, or of larger blocks, behind the bitmap.
  @Test func theFirstBlockIsAligned() throws {
    for size: UInt64 in [512, 1 << 20, (1 << 30) + 512, 1792 << 20, 1793 << 20, 1 << 40, 64 << 40] {
      for shift in UInt32(12)...22 {
        let header = try DscowHeader(size: size, blockSize: 1 << shift, base: nil)
        let unit = max(65536, UInt64(header.blockSize))
        #expect(header.firstBlock % unit == 0)
        #expect(header.firstBlock >= header.bitmapOffset + header.bitmapBytes)
        #expect(header.firstBlock - header.bitmapOffset - header.bitmapBytes < unit)
      }
    }
  }

  @Test func readsWhatItWrote() throws {
    let header = try Self.fixtureHeader()
    let again = try DscowHeader(validCopy: header.encoded(), writable: true)
    #expect(again == header)
    #expect(again.storeSize == 65536 + 8208 * 65536)
  }

  @Test func everyFlippedByteOfOneCopyFallsToTheOther() throws {
    let good = try Self.fixtureHeader().encoded()
    for index in good.indices {
      var bad = good
      bad[index] ^= UInt8(1 << (index % 8))
      #expect(Self.code(bad, good) == "1 damaged(0)")
      #expect(Self.code(good, bad) == "1 damaged(1)")
    }
  }

  @Test func everyFlippedByteOfBothCopiesIsRefused() throws {
    let good = try Self.fixtureHeader().encoded()
    for index in good.indices {
      var bad = good
      bad[index] ^= UInt8(1 << (index % 8))
      let expected: ImageError.Code =
        index < DscowHeader.magic.count ? .notThisFormat : .corrupt
      #expect(Self.code(bad, bad) == expected.rawValue)
    }
  }

  @Test func everyTruncationIsRefused() throws {
    let good = try Self.fixtureHeader().encoded()
    for count in stride(from: 0, to: good.count, by: 1) {
      let short = [UInt8](good[..<count])
      let expected: ImageError.Code =
        count < DscowHeader.magic.count ? .notThisFormat : .corrupt
      #expect(Self.code(short, short) == expected.rawValue)
      #expect(Self.code(short, good) == "1 damaged(0)")
    }
  }

  @Test func everyTruncatedStoreIsRefused() throws {
    let store = MemoryStore("store")
    let base = MemoryStore("base", size: 8192)
    try Dscow.create(store: store, base: base, baseName: "base", blockSize: 4096)
    let whole = store.contents()
    for count in stride(from: 0, to: whole.count, by: 64) {
      let cut = MemoryStore("cut", bytes: [UInt8](whole[..<count]))
      #expect(throws: ImageError.self) { try Dscow.header(of: cut) }
    }
  }

  @Test func theTwoCopies() throws {
    let old = try Self.fixtureHeader().encoded()
    let new = try Self.forged { $0.put(UInt64(2), at: DscowHeader.Field.sequence) }
    let other = try Self.forged { $0.put(UInt32(7), at: DscowHeader.Field.baseFingerprint) }
    let damaged = [UInt8](new[..<4000]) + [UInt8](repeating: 1, count: 96)
    let absent = [UInt8](repeating: 0, count: 4096)
    #expect(Self.code(new, new) == "2 both")
    #expect(Self.code(new, old) == "2 stale(1)")
    #expect(Self.code(old, new) == "2 stale(0)")
    #expect(Self.code(old, other) == "corrupt")
    #expect(Self.code(old, damaged) == "1 damaged(1)")
    #expect(Self.code(damaged, old) == "1 damaged(0)")
    #expect(Self.code(old, absent) == "1 damaged(1)")
    #expect(Self.code(absent, old) == "1 damaged(0)")
    #expect(Self.code(damaged, damaged) == "corrupt")
    #expect(Self.code(damaged, absent) == "corrupt")
    #expect(Self.code(absent, damaged) == "corrupt")
    #expect(Self.code(absent, absent) == "not-this-format")
  }

  @Test func anOlderCopyNeverStandsInForANewerOneThatIsNotKnown() throws {
    let old = try Self.fixtureHeader().encoded()
    let newer = try Self.forged {
      $0.put(UInt64(2), at: DscowHeader.Field.sequence)
      $0.put(UInt32(2), at: DscowHeader.Field.version)
    }
    #expect(Self.code(old, newer) == "unsupported")
    #expect(Self.code(newer, old) == "unsupported")
  }

  @Test func features() throws {
    let compatible = try Self.forged { $0.put(UInt64(4), at: DscowHeader.Field.compatible) }
    #expect(Self.code(compatible, compatible, writable: true) == "1 both")
    let readOnly = try Self.forged { $0.put(UInt64(4), at: DscowHeader.Field.readOnlyCompatible) }
    #expect(Self.code(readOnly, readOnly) == "1 both")
    #expect(Self.code(readOnly, readOnly, writable: true) == "unsupported")
    let incompatible = try Self.forged { $0.put(UInt64(4), at: DscowHeader.Field.incompatible) }
    #expect(Self.code(incompatible, incompatible) == "unsupported")
  }

  /// What a rewrite does not know it keeps.
  @Test func reservedBytesSurvive() throws {
    let bytes = try Self.forged { $0[300] = 0x5A }
    let header = try DscowHeader(validCopy: bytes, writable: true)
    #expect(header.encoded() == bytes)
  }

  static let hostile: [(String, Int, UInt64)] = {
    typealias Field = DscowHeader.Field
    var cases: [(String, Int, UInt64)] = []
    for (name, offset) in [
      ("size", Field.size), ("blocks", Field.blocks), ("first block", Field.firstBlock),
      ("bitmap offset", Field.bitmapOffset), ("bitmap count", Field.bitmapCount),
    ] {
      for value in [0, 1, 511, 1 << 32, 1 << 47, 1 << 63, UInt64.max - 4095, .max] {
        // A header may leave room before its first block; whether the store has it is seen
        // by the store's length.
        if name == "first block", value == 1 << 32 || value == 1 << 47 { continue }
        cases.append((name, offset, value))
      }
    }
    cases.append(("size within the last block", Field.size, fixtureBase - 65536))
    cases.append(("size of 64 TiB and a sector", Field.size, (64 << 40) + 512))
    cases.append(("first block within the bitmap", Field.firstBlock, 8192))
    cases.append(("first block between blocks", Field.firstBlock, 65536 + 4096))
    cases.append(("first block so that the end overflows", Field.firstBlock, (1 << 63) - 65536))
    cases.append(("bitmap within the header", Field.bitmapOffset, 4096))
    cases.append(("bitmap within the data", Field.bitmapOffset, 65536))
    cases.append(("bitmap between pages", Field.bitmapOffset, 8192 + 512))
    cases.append(("base of 2^63 bytes", Field.baseSize, 1 << 63))
    cases.append(("changes without end", Field.sequence, .max))
    return cases
  }()

  @Test(arguments: hostile) func hostileNumber(name: String, offset: Int, value: UInt64) throws {
    let bytes = try Self.forged { $0.put(value, at: offset) }
    #expect(Self.code(bytes, bytes) == "corrupt", "\(name) \(value)")
  }

  @Test(arguments: [0, 1, 512, 2048, 4095, 12288, 1 << 23, 1 << 31, UInt32.max])
  func hostileBlockSize(value: UInt32) throws {
    let bytes = try Self.forged { $0.put(value, at: DscowHeader.Field.blockSize) }
    #expect(Self.code(bytes, bytes) == "corrupt")
  }

  @Test func hostilePath() throws {
    for count in [3585, 1 << 31, UInt32.max] {
      let bytes = try Self.forged { $0.put(count, at: DscowHeader.Field.basePathCount) }
      #expect(Self.code(bytes, bytes) == "corrupt")
    }
    let zero = try Self.forged { $0[DscowHeader.Field.basePath + 3] = 0 }
    #expect(Self.code(zero, zero) == "corrupt")
    let notText = try Self.forged { $0[DscowHeader.Field.basePath + 3] = 0xFF }
    #expect(Self.code(notText, notText) == "corrupt")
  }

  @Test func randomHeadersNeverTrap() throws {
    let seed = UInt64.random(in: 0...(.max))
    print("seed \(seed)")
    var random = SplitMix64(seed: seed)
    for _ in 0..<3000 {
      let bytes = try Self.forged { bytes in
        for _ in 0..<(1 + random.below(8)) {
          bytes[8 + random.below(112)] = UInt8(truncatingIfNeeded: random.next())
        }
      }
      _ = Self.code(bytes, bytes, writable: true)
    }
  }
}
