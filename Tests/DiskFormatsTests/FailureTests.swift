// SPDX-License-Identifier: Apache-2.0
// The Nth input or output fails, or the power goes at it, for every N: what is left is valid.

import BlockIO
import Fakes
import SystemIO
import Testing
import TestSupport

@testable import DiskFormats

@Suite struct FailureTests {
  static let diskSize = 40 * 512

  static func base() -> MemoryStore {
    MemoryStore("base", bytes: (0..<40).flatMap { Stamp.sectors(1, UInt64($0 + 1)) })
  }

  static func make() throws -> SimulatedDisk {
    let disk = SimulatedDisk("store", size: 131072)
    try Dscow.create(store: disk, base: base(), baseName: "base", blockSize: 4096)
    return disk
  }

  static func opens(_ store: any ByteStore) -> Bool {
    do throws(ImageError) {
      _ = try Dscow.header(of: store)
      return true
    } catch { return false }
  }

  /// Runs a body with the first, second, ... call failing, until it gets by without.
  static func everyFailure(
    forGood: Bool, _ body: (_ wrap: (any ByteStore) -> FailingStore) throws -> Void
  ) rethrows {
    for number in 0..<1000 {
      var wrapped: FailingStore?
      try body { store in
        let failing = FailingStore(store, failAt: number, forGood: forGood)
        wrapped = failing
        return failing
      }
      if let wrapped, wrapped.calls <= number { return }
    }
    Issue.record("it never got by without a failure")
  }

  @Test(arguments: [true, false]) func creation(forGood: Bool) throws {
    try Self.everyFailure(forGood: forGood) { wrap in
      let store = MemoryStore("store")
      let failing = wrap(store)
      do throws(ImageError) {
        try Dscow.create(store: failing, base: Self.base(), baseName: "base", blockSize: 4096)
      } catch {
        #expect(error.code == .io)
        #expect(error.cause?.code == 5)
        // Nothing that opens, or, when only the last flush failed, the whole; and it can be
        // tried again.
        let isWhole = Self.opens(store)
        #expect(
          try !isWhole
            || Dscow.check(store: store, base: Self.base()).findings.allSatisfy { $0.isSpare })
        try Dscow.create(
          store: store, base: Self.base(), baseName: "base", blockSize: 4096, overwrite: true)
      }
      #expect(try Dscow.check(store: store, base: Self.base()).findings.isEmpty)
    }
  }

  /// What a power cut leaves of a store over an older one: either, or none, never a mixture.
  @Test func creationOverAnOlderStore() throws {
    for seed in Depth.seeds(300) {
      var random = SplitMix64(seed: seed)
      let disk = try Self.make()
      let old = try Dscow.open(store: disk, base: Self.base(), writable: true)
      let engine = MiniEngine(old, store: disk, base: Self.base())
      try engine.write(0, Stamp.sectors(40, 99))
      try engine.flush()
      disk.cutPower(after: random.below(8))
      do throws(ImageError) {
        try Dscow.create(
          store: disk, base: nil, baseName: "", blockSize: 4096, size: 4096, overwrite: true)
      } catch { #expect(error.cause?.code == 5) }
      let found = disk.afterPowerCut(using: &random)
      do throws(ImageError) {
        let header = try Dscow.header(of: found).header
        let bits = try Dscow.countBits(found, header)
        #expect(bits == (header.base == nil ? 0 : 5), "seed \(seed)")
      } catch { #expect(error.code == .notThisFormat || error.code == .corrupt) }
    }
  }

  @Test(arguments: [true, false]) func acceptance(forGood: Bool) throws {
    try Self.everyFailure(forGood: forGood) { wrap in
      let store = try Self.make()
      let changed = Self.base()
      try changed.write([1, 2, 3], at: 100)
      do throws(ImageError) {
        try Dscow.accept(store: wrap(store), base: changed)
      } catch { #expect(error.cause?.code == 5) }
      // The old header or the new one.
      let header = try Dscow.header(of: store).header
      let path = header.sequence == 1 ? Self.base() : changed
      _ = try Dscow.open(store: store, base: path, writable: true)
    }
  }

  @Test func acceptanceAndPowerCuts() throws {
    for seed in Depth.seeds(300) {
      var random = SplitMix64(seed: seed)
      var store = try Self.make()
      let changed = Self.base()
      try changed.write([1, 2, 3], at: 100)
      store.cutPower(after: random.below(5))
      do throws(ImageError) {
        try Dscow.accept(store: store, base: changed)
      } catch { #expect(error.cause?.code == 5) }
      store = store.afterPowerCut(using: &random)
      #expect(try Dscow.check(store: store).header != nil)
      _ = try Dscow.check(store: store, repair: true)
      #expect(try Dscow.header(of: store).copies == .both)
      try Dscow.accept(store: store, base: changed)
      _ = try Dscow.open(store: store, base: changed, writable: true)
    }
  }

  /// A life of requests during which one call, or everything from one on, fails: what was
  /// confirmed is there, and the disk opens and checks.
  @Test(arguments: [true, false]) func requests(forGood: Bool) throws {
    try Self.everyFailure(forGood: forGood) { wrap in
      let store = try Self.make()
      let failing = wrap(store)
      var model = NaiveDisk(sectors: 40) { UInt64($0 + 1) }
      func attempt(_ body: () throws -> Void) throws -> Bool {
        do { try body() } catch let error as IOError {
          #expect(error.code == 5)
          return false
        } catch let error as ImageError {
          #expect(error.cause?.code == 5)
          return false
        }
        return true
      }
      _ = try attempt {
        let disk = try Dscow.open(store: failing, base: Self.base(), writable: true)
        let engine = MiniEngine(disk, store: failing, base: Self.base())
        for round in 0..<4 {
          let range = (round * 7)..<(round * 7 + 11)
          let stamp = UInt64(1000 + round)
          let write = model.begin(range, stamp: stamp)
          guard try attempt({ try engine.write(range.lowerBound, Stamp.sectors(11, stamp)) })
          else { return }
          model.end(write)
          let flush = model.beginFlush()
          guard try attempt({ try engine.flush() }) else { continue }
          model.flushed(flush)
        }
      }
      let disk = try Dscow.open(store: store, base: Self.base(), writable: true)
      #expect(try !Dscow.check(store: store).isDamaged)
      let bytes = try MiniEngine(disk, store: store, base: Self.base()).read(0, count: 40)
      for sector in 0..<40 {
        let stamp = bytes.withUnsafeBytes { Stamp.read($0, at: sector * 512) }
        #expect(stamp.map { model.mayHold($0, sector: sector) } == true)
      }
    }
  }

  @Test func repairs() throws {
    try Self.everyFailure(forGood: true) { wrap in
      let store = try Self.make()
      try store.write([1], at: 700)
      try store.write([0xFF], at: 8192 + 4)
      do throws(ImageError) {
        _ = try Dscow.check(store: wrap(store), repair: true)
      } catch { #expect(error.cause?.code == 5) }
      _ = try Dscow.header(of: store)
      #expect(try !Dscow.check(store: store, repair: true).isDamaged)
      #expect(try Dscow.check(store: store).findings.isEmpty)
    }
  }

  @Test func aBaseThatChanges() throws {
    let store = MemoryStore("store")
    let base = MemoryStore("base", size: 1 << 20, modified: 5)
    try Dscow.create(store: store, base: base, baseName: "/base")
    func code(_ base: (any ByteStore)?, force: Bool = false, writable: Bool = true) -> String {
      do throws(ImageError) {
        _ = try Dscow.open(store: store, base: base, writable: writable, force: force)
        return "open"
      } catch { return error.code.rawValue }
    }
    #expect(code(base) == "open")
    #expect(code(nil) == "base-missing")
    #expect(code(store) == "bad-request")
    #expect(code(MemoryStore("base", size: (1 << 20) + 1, modified: 5)) == "base-changed")
    #expect(code(MemoryStore("base", size: 1 << 20, modified: 6)) == "base-changed")
    // Contents, at the first, a middle and the last sample; same size and time.
    for offset: UInt64 in [0, 16640 * 5, (1 << 20) - 1] {
      try base.write([1], at: offset)
      #expect(code(base) == "base-changed")
      try base.write([0], at: offset)
    }
    // Forced for reading: let through, not stamped. Forced for writing: stamped.
    base.modified = 6
    #expect(code(base, force: true, writable: false) == "open")
    #expect(code(base) == "base-changed")
    #expect(code(base, force: true) == "open")
    #expect(code(base) == "open")
    #expect(try Dscow.header(of: store).header.sequence == 2)
    // A device has no time: size and contents have to do.
    base.modified = 0
    #expect(code(base) == "open")
  }
}
