// SPDX-License-Identifier: Apache-2.0
// What XenServer asks of a VHD image before it takes it, written down as rules: the judge that
// `vhd-util check` is, for machines that have none. Source: Microsoft's specification, and what
// vhd-util refuses.

import Fakes
import Testing
import TestSupport

@testable import DiskFormats

/// A look at the bytes of a VHD image, without the code that wrote them.
struct XenServerRules {
  /// What it finds wrong; empty for an image that is valid.
  private(set) var problems: [String] = []
  private let bytes: [UInt8]
  private let isDynamic: Bool

  init(_ bytes: [UInt8]) {
    self.bytes = bytes
    let footer = [UInt8](bytes.suffix(512))
    isDynamic = footer.big(UInt32.self, at: 60) != 2
    checkFooter(footer)
    guard isDynamic, problems.isEmpty else { return }
    require([UInt8](bytes[..<512]) == footer, "the footers differ")
    let at = Int(footer.big(UInt64.self, at: 16))
    let header = [UInt8](bytes[at..<(at + 1024)])
    checkHeader(header, isDifferencing: footer.big(UInt32.self, at: 60) == 4)
    checkBlocks(footer, header)
  }

  private mutating func require(_ condition: Bool, _ words: String) {
    if !condition { problems.append(words) }
  }

  private static func isZero(_ bytes: ArraySlice<UInt8>) -> Bool { bytes.allSatisfy { $0 == 0 } }

  private mutating func checkFooter(_ footer: [UInt8]) {
    require(footer.starts(with: Array("conectix".utf8)), "no footer at the end")
    require(footer.big(UInt32.self, at: 64) == VhdHeader.checksum(footer, at: 64), "its sum")
    let features = footer.big(UInt32.self, at: 8)
    require(features == 2 || features == 3, "features \(features)")
    require(footer.big(UInt32.self, at: 12) == 0x0001_0000, "the format's version")
    let kind = footer.big(UInt32.self, at: 60)
    require((2...4).contains(kind), "type \(kind)")
    require(isDynamic || footer.big(UInt64.self, at: 16) == .max, "a header of a fixed image")
    if footer[28..<31] == Array("tap".utf8)[...] {
      require(footer.big(UInt32.self, at: 32) <= 0x0001_0003, "the creator's version")
    }
    let geometry =
      UInt64(footer.big(UInt16.self, at: 56)) * UInt64(footer[58]) * UInt64(footer[59])
    require(geometry * 512 <= footer.big(UInt64.self, at: 48), "the geometry is too large")
    require(!Self.isZero(footer[68..<84]), "no identity")
    require(footer[84] <= 1 && Self.isZero(footer[86..<512]), "reserved bytes of the footer")
  }

  private mutating func checkHeader(_ header: [UInt8], isDifferencing: Bool) {
    require(header.starts(with: Array("cxsparse".utf8)), "no dynamic header")
    require(header.big(UInt32.self, at: 36) == VhdHeader.checksum(header, at: 36), "its sum")
    require(header.big(UInt64.self, at: 8) == .max, "the header's data offset")
    require(header.big(UInt32.self, at: 24) == 0x0001_0000, "the header's version")
    let (table, entries) = (header.big(UInt64.self, at: 16), header.big(UInt32.self, at: 28))
    require(table > 0 && table % 512 == 0, "the table's place")
    require(table + UInt64(entries) * 4 + 512 <= UInt64(bytes.count), "the table's end")
    require(header.big(UInt32.self, at: 32).nonzeroBitCount == 1, "the block size")
    require(Self.isZero(header[60..<64]) && Self.isZero(header[768...]), "reserved bytes")
    guard isDifferencing else {
      require(Self.isZero(header[40..<60]) && Self.isZero(header[64..<768]), "a base of none")
      return
    }
    checkLocators(header)
  }

  /// Each code once, with room and data in the file, and the base's name as the path's last part.
  private mutating func checkLocators(_ header: [UInt8]) {
    var units: [UInt16] = []
    for at in stride(from: 64, to: 576, by: 2) {
      let unit = header.big(UInt16.self, at: at)
      if unit == 0 { break }
      units.append(unit)
    }
    let name = String(decoding: units, as: UTF16.self)
    require(!name.isEmpty, "the base has no name")
    var seen: Set<String> = []
    for at in stride(from: 576, to: 768, by: 24) {
      let code = text([UInt8](header[at..<(at + 4)]))
      guard !Self.isZero(header[at..<(at + 4)]) else {
        require(Self.isZero(header[at..<(at + 24)]), "a locator without a code")
        continue
      }
      require(["MacX", "W2ru", "W2ku"].contains(code), "a locator of code \(code)")
      require(seen.insert(code).inserted, "\(code) twice")
      let space = UInt64(header.big(UInt32.self, at: at + 4))
      let length = Int(header.big(UInt32.self, at: at + 8))
      let offset = Int(header.big(UInt64.self, at: at + 16))
      require(space > 0 && length > 0 && offset > 0, "\(code) is empty")
      require(Self.isZero(header[(at + 12)..<(at + 16)]), "reserved bytes of \(code)")
      guard offset + length + 512 <= bytes.count else {
        require(false, "\(code) is not in the file")
        continue
      }
      let path = bytes[offset..<(offset + length)].filter { $0 != 0 }
      let last = text(path).split { $0 == "/" || $0 == "\\" }.last.map(String.init)
      require(last == name, "\(code) ends in \(last ?? "nothing"), the name is \(name)")
    }
    require(!seen.isEmpty, "no locator")
  }

  private mutating func checkBlocks(_ footer: [UInt8], _ header: [UInt8]) {
    let table = Int(header.big(UInt64.self, at: 16))
    let entries = Int(header.big(UInt32.self, at: 28))
    let block = Int(header.big(UInt32.self, at: 32))
    require(
      footer.big(UInt64.self, at: 48) <= UInt64(entries * block),
      "the table is too short for the disk")
    var front = max(1536, table + entries * 4)
    for at in stride(from: 576, to: 768, by: 24) where !Self.isZero(header[at..<(at + 4)]) {
      let offset = header.big(UInt64.self, at: at + 16)
      front = max(front, Int(offset) + Int(header.big(UInt32.self, at: at + 8)))
    }
    if footer[28..<31] == Array("tap".utf8)[...], footer.big(UInt32.self, at: 32) > 0x0001_0001 {
      let batmap = (table + entries * 4 + 511) / 512 * 512
      let isThere = bytes[batmap..<(batmap + 8)] == Array("tdbatmap".utf8)[...]
      require(isThere, "no batmap, which the creator's version promises")
      if isThere { front = batmap + 512 }
    }
    let length = (block / 4096 + 511) / 512 * 512 + block
    var places: [Int] = []
    for entry in 0..<entries {
      let sector = bytes.big(UInt32.self, at: table + entry * 4)
      guard sector != .max else { continue }
      places.append(Int(sector) * 512)
    }
    places.sort()
    for place in places {
      require(place >= front, "a block at \(place), over the headers")
      require(place + length + 512 <= bytes.count, "a block at \(place), over the footer")
    }
    for (one, next) in zip(places, places.dropFirst()) {
      require(one + length <= next, "blocks at \(one) and \(next)")
    }
  }
}

@Suite struct XenServerRulesTests {
  private static let none = [UInt8](repeating: 0, count: 16)
  private static func identity(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: 16) }

  private static func expectValid(_ store: MemoryStore, _ words: String) {
    let rules = XenServerRules(store.contents())
    #expect(rules.problems.isEmpty, "\(words): \(rules.problems)")
  }

  /// XenServer's own images are valid by these rules, or the rules are wrong.
  @Test(
    .enabled(if: Faults.isThere, "../shared/faults is missing"),
    arguments: ["xenserver-empty.vhd", "xenserver-one-block.vhd", "xenserver-child.vhd"])
  func theirOwn(name: String) throws {
    Self.expectValid(try Faults.image(name), name)
  }

  /// Whatever is made here, written, given other lengths and repaired is valid at every step.
  @Test(arguments: [VhdKind.dynamic, .differencing, .fixed]) func ours(kind: VhdKind) throws {
    let base = MemoryStore("base", bytes: [UInt8](repeating: 9, count: 1 << 20))
    for (blockSize, size) in [(UInt64(65536), UInt64(1 << 20)), (2 << 20, (5 << 20) + 1536)] {
      let store = MemoryStore("store")
      try Vhd.create(
        store: store, size: size, kind: kind, blockSize: blockSize, uuid: Self.identity(2),
        base: kind == .differencing ? ("base", Self.none) : nil)
      Self.expectValid(store, "made")
      func engine() throws -> DeviceEngine {
        let image = try Vhd.open(
          store: store, base: kind == .differencing ? base : nil, writable: true)
        return DeviceEngine(image, store: store)
      }
      var random = SplitMix64(seed: size)
      func write() throws {
        let disk = try engine()
        for _ in 0..<12 {
          let sector = random.below(disk.sectors - 8)
          try disk.write(sector, [UInt8](repeating: 7, count: 512 * 8))
        }
        try disk.flush()
      }
      try write()
      Self.expectValid(store, "written")
      for other in [size + 3 << 20, 700 << 20, 1 << 20, size] {
        try #require(try engine().format as? Vhd).resize(to: other)
        Self.expectValid(store, "\(other) bytes")
        try write()
        Self.expectValid(store, "\(other) bytes, written")
      }
      guard kind != .fixed else { continue }
      try store.resize(to: store.size - 512)
      #expect(!XenServerRules(store.contents()).problems.isEmpty)
      try Vhd.repair(store: store, .all)
      Self.expectValid(store, "repaired")
    }
  }

  /// The name in the header is the last part of the path, however that is written.
  @Test(arguments: ["base.vhd", "/images/base.vhd", "../base.vhd", "a/b c/base.vhd"])
  func names(path: String) throws {
    for identity in [Self.none, Self.identity(3)] {
      let store = MemoryStore("store")
      try Vhd.create(
        store: store, size: 1 << 20, kind: .differencing, uuid: Self.identity(2),
        base: (path, identity))
      Self.expectValid(store, path)
      // And nothing but the path is asked for: another file may bear the name.
      #expect(try VhdHeader.read(from: store).basePaths == [path])
    }
  }
}
