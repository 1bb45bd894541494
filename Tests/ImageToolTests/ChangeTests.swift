// SPDX-License-Identifier: Apache-2.0
// Commit, rebase and resize under power cuts and failing calls: what the image showed before it
// shows afterwards, and what was begun can be done again.

import BlockIO
import DiskFormats
import DiskModel
import Fakes
import Foundation
import SystemIO
import Testing
import TestSupport

@testable import ImageTool

/// An image, its base and another base, each a third of one disk.
struct Trio {
  static let third: UInt64 = 512 << 10
  static let size: UInt64 = 192 << 10
  let kind: ImageKind
  let disk: any ByteStore
  /// The image's room, which is what is left of the disk.
  var room = third

  var base: Window { Window("base", disk, at: 0, size: Self.size) }
  var other: Window { Window("other", disk, at: Self.third, size: Self.size) }
  var top: Window { Window("top", disk, at: 2 * Self.third, size: room) }

  func resolve(_ request: NamedFile) throws(ImageError) -> any ByteStore {
    switch request.path {
    case "base": return base
    case "other": return other
    default: throw ImageError(.badRequest, "nobody knows \(request.path)")
    }
  }

  /// What the image shows.
  func contents() throws -> [UInt8] {
    let flat = try Chain(top, kind: kind, resolve: resolve).layers().flat()
    return try flat.read(at: 0, count: Int(flat.size))
  }

  func check() throws -> CheckReport {
    kind == .dscow ? try Dscow.report(store: top, repair: nil) : try Qcow2.check(store: top)
  }

  /// Two bases of random words, which share some blocks, and an image that has some blocks.
  static func make(
    _ kind: ImageKind, on disk: SimulatedDisk, seed: UInt64, room: UInt64 = third
  ) throws -> Trio {
    let trio = Trio(kind: kind, disk: disk, room: room)
    var random = SplitMix64(seed: seed)
    func block(_ value: UInt64) -> [UInt8] {
      (0..<4096).map { UInt8(truncatingIfNeeded: value &+ UInt64($0 % 251)) }
    }
    for number in 0..<(Self.size / 4096) {
      let mine = random.chance(20) ? [UInt8](repeating: 0, count: 4096) : block(random.next())
      try trio.base.write(mine, at: number * 4096)
      try trio.other.write(
        random.chance(40) ? mine : block(random.next()), at: number * 4096)
    }
    try disk.flush()
    if kind == .dscow {
      try Dscow.create(store: trio.top, base: trio.base, baseName: "base", blockSize: 4096)
    } else {
      var options = Qcow2Options()
      options.clusterSize = 4096
      options.base = ("base", "raw")
      try Qcow2.create(store: trio.top, size: Self.size, options: options)
    }
    let image = try Chain(trio.top, kind: kind, resolve: trio.resolve).disk(writable: true)
    let writer = ImageWriter(
      image, store: trio.top, devices: image.devices ?? [trio.top, trio.base])
    for _ in 0..<10 {
      let place = UInt64(random.below(Int(Self.size / 4096)))
      if random.chance(25) {
        try writer.zero(at: place * 4096, count: 4096)
      } else {
        try block(random.next()).withUnsafeBytes { bytes in
          try writer.write(UnsafeRawBufferPointer(rebasing: bytes[..<3000]), at: place * 4096 + 512)
        }
      }
    }
    try writer.commit()
    return trio
  }
}

@Suite struct ChangeTests {
  static let quiet = Progress(on: false)

  /// Does something to a trio with the power going at some point, until it got by without;
  /// `judge` sees what is left each time.
  func cut(
    _ kind: ImageKind, rounds: Int, _ change: (Trio) throws(ImageError) -> Void,
    _ judge: (Trio, _ before: Trio, _ seed: UInt64, _ done: Bool) throws -> Void
  ) throws {
    var (cuts, whole) = (0, 0)
    for seed in Depth.seeds(rounds) {
      var random = SplitMix64(seed: seed)
      let disk = SimulatedDisk("disk", size: Int(3 * Trio.third))
      let trio = try Trio.make(kind, on: disk, seed: seed % 7)
      let before = Trio(kind: kind, disk: SimulatedDisk("before", contents: disk.contents()))
      disk.cutPower(after: random.below(kind == .dscow ? 40 : 90))
      var done = false
      do throws(ImageError) {
        try change(trio)
        done = true
        whole += 1
      } catch {
        #expect(error.cause?.code == 5, "seed \(seed): \(error)")
        cuts += 1
      }
      let left = Trio(kind: kind, disk: disk.afterPowerCut(using: &random))
      do {
        try judge(left, before, seed, done)
      } catch { Issue.record("seed \(seed): \(error)") }
    }
    print("\(kind): \(cuts) power cuts, \(whole) got by without")
    #expect(cuts > 0 && whole > 0)
  }

  @Test(arguments: [ImageKind.dscow, .qcow2]) func commitAndPowerCuts(kind: ImageKind) throws {
    func commit(_ trio: Trio) throws(ImageError) {
      try ImageTool.commit(
        trio.top, kind, into: trio.base, .raw, keep: false, progress: Self.quiet,
        resolve: trio.resolve)
    }
    try cut(kind, rounds: 40, commit) { left, before, seed, done in
      let shown = try before.contents()
      #expect(try left.contents() == shown, "seed \(seed)")
      let report = try left.check()
      #expect(report.corruptions == 0, "seed \(seed): \(report.problems)")
      // Done again, all of it is in the base.
      if !done { try commit(left) }
      #expect(try left.base.read(at: 0, count: Int(Trio.size)) == shown, "seed \(seed)")
      #expect(try left.contents() == shown, "seed \(seed)")
      #expect(try left.check().corruptions == 0)
    }
  }

  /// What cannot be emptied is committed with -d, and keeps what it has.
  @Test(arguments: ["qcow", "vpc", "vmdk"]) func commitOfWhatKeepsItsData(format: String) throws {
    let bench = try Bench()
    let baseFormat = format == "vmdk" ? "vmdk" : "raw"
    try bench.makeRaw("a", size: 1 << 20, seed: 3)
    try bench.makeRaw("b", size: 1 << 20, seed: 4)
    try bench.must("dmu-img", "convert", "-f", "raw", "-O", baseFormat, "a", "base")
    try bench.must("dmu-img", "create", "-f", format, "-b", "base", "-F", baseFormat, "top")
    do {
      let source = try FileStore(path: bench.path("b"), writable: false)
      let file = try FileStore(path: bench.path("top"), writable: true)
      let kind = try FormatList.all.probe(file)
      let image = try Chain(
        file, kind: kind, resolve: ImageSource.resolver(writing: [file.name], untrusted: false)
      ).disk(writable: true)
      let writer = ImageWriter(image, store: file, devices: image.devices ?? [file])
      try source.read(at: 0, count: 1 << 20).withUnsafeBytes { try writer.write($0, at: 0) }
      try writer.commit()
    }
    let refused = try bench.tool("commit", "-f", format, "top")
    #expect(refused.exit == 1 && refused.error.contains("commit it with -d"), "\(refused)")
    try bench.must("dmu-img", "compare", "-f", "raw", "a", "-F", baseFormat, "base")
    try bench.must("dmu-img", "commit", "-f", format, "-d", "top")
    try bench.must("qemu-img", "compare", "-f", "raw", "b", "-F", baseFormat, "base")
    try bench.must("dmu-img", "compare", "-f", "raw", "b", "-F", format, "top")
  }

  /// Space that was asked for is there, and reads as zeroes whatever the file held before.
  @Test(arguments: ["falloc", "full"]) func preallocatedSpaceIsThere(how: String) throws {
    let bench = try Bench()
    try bench.makeRaw("data", size: 6 << 20, seed: 5)
    for options in ["preallocation=\(how)", "preallocation=\(how),data_file=data"] {
      try bench.must("dmu-img", "create", "-f", "qcow2", "-o", options, "t", "8M")
      let file = options.contains("data_file") ? "data" : "t"
      let space = try FileStore(path: bench.path(file), writable: false).allocatedBytes()
      #expect(space >= 8 << 20, "\(options): \(space) bytes")
      try bench.must("dmu-img", "create", "-f", "raw", "zeroes", "8M")
      try bench.must("qemu-img", "compare", "-f", "qcow2", "t", "-F", "raw", "zeroes")
      try bench.must("qemu-img", "check", "-q", "t")
    }
  }

  @Test(arguments: [ImageKind.dscow, .qcow2]) func rebaseAndPowerCuts(kind: ImageKind) throws {
    func rebase(_ trio: Trio) throws(ImageError) {
      try ImageTool.rebase(
        trio.top, kind, onto: ("other", .raw, trio.other), format: "raw", unsafe: false,
        progress: Self.quiet, resolve: trio.resolve)
    }
    try cut(kind, rounds: 40, rebase) { left, before, seed, done in
      let shown = try before.contents()
      #expect(try left.contents() == shown, "seed \(seed)")
      #expect(try left.check().corruptions == 0, "seed \(seed)")
      if !done { try rebase(left) }
      #expect(try kind.format.names(in: left.top).base == "other")
      #expect(try left.contents() == shown, "seed \(seed)")
      #expect(try left.check().corruptions == 0)
    }
  }

  /// The base is as long as the disk, longer or shorter.
  @Test(arguments: [64 << 10, 150_000, 200_000, 400 << 10]) func dscowResizeAndPowerCuts(
    newSize: Int
  ) throws {
    let size = UInt64(newSize + 511) / 512 * 512
    try cut(
      .dscow, rounds: 30,
      { trio throws(ImageError) in
        try Dscow.resize(store: trio.top, base: trio.base, to: UInt64(newSize))
      }
    ) { left, before, seed, done in
      let shown = try before.contents()
      let now = try left.contents()
      #expect(now.count == shown.count || UInt64(now.count) == size, "seed \(seed)")
      #expect(!done || UInt64(now.count) == size)
      let common = min(now.count, shown.count)
      #expect(now[..<common] == shown[..<common], "seed \(seed)")
      #expect(now[common...].allSatisfy { $0 == 0 }, "seed \(seed)")
      #expect(try left.check().corruptions == 0, "seed \(seed)")
    }
  }

  /// A shrunk disk that grows again shows nothing of what it had, nor of the base.
  @Test func dscowShrinksAndGrows() throws {
    let disk = SimulatedDisk("disk", size: Int(3 * Trio.third))
    let trio = try Trio.make(.dscow, on: disk, seed: 3)
    let shown = try trio.contents()
    for size: UInt64 in [100 << 10, 192 << 10, 50_176, 300 << 10, 4096, 200 << 10] {
      try Dscow.resize(store: trio.top, base: trio.base, to: size)
      #expect(try trio.check().corruptions == 0)
    }
    let now = try trio.contents()
    #expect(now.count == 200 << 10)
    #expect(now[..<4096] == shown[..<4096])
    #expect(now[4096...].allSatisfy { $0 == 0 })
  }

  /// A bitmap that no longer fits before the blocks moves behind them, and back.
  @Test func dscowMovesItsBitmap() throws {
    let store = MemoryStore("store")
    try Dscow.create(store: store, base: nil, baseName: "", blockSize: 4096, size: 4 << 20)
    let image = try Dscow.open(store: store, base: nil, writable: true)
    let writer = ImageWriter(image, store: store, devices: [store])
    try [UInt8](repeating: 7, count: 8192).withUnsafeBytes { try writer.write($0, at: 1 << 20) }
    try writer.commit()
    for size: UInt64 in [1 << 30, 8 << 30, 3 << 30, 16 << 30, 2 << 20] {
      try Dscow.resize(store: store, base: nil, to: size)
      let header = try Dscow.header(of: store).header
      #expect(header.size == size)
      #expect(store.size == header.storeSize)
      #expect(try Dscow.report(store: store, repair: nil).isClean)
      #expect(try Dscow.countBits(store, header) == 2)
      let disk = try ImageLayer(ImageParts(store), kind: .dscow)
      let (content, count) = try disk.run(at: 1 << 20, limit: 1 << 20)
      guard case .data(let place, let offset) = content else {
        Issue.record("the blocks are gone")
        continue
      }
      #expect(count == 8192)
      #expect(try place.read(at: offset, count: 8192).allSatisfy { $0 == 7 })
    }
  }

  @Test(arguments: [UInt32(8192), 65536, 1 << 20]) func dscowReblockAndPowerCuts(
    blockSize: UInt32
  ) throws {
    // A trio's own blocks have 4 KiB: what it shows is put into larger ones first, all of them.
    func reblock(_ trio: Trio) throws(ImageError) {
      try Dscow.reblock(store: trio.top, to: 4096)
    }
    func prepared(_ trio: Trio) throws {
      let shown = try trio.contents()
      try Dscow.create(
        store: trio.top, base: trio.base, baseName: "base", blockSize: blockSize, overwrite: true)
      let image = try Chain(trio.top, kind: .dscow, resolve: trio.resolve).disk(writable: true)
      let writer = ImageWriter(image, store: trio.top, devices: [trio.top, trio.base])
      for place in stride(from: 0, to: shown.count, by: 4096) where place / 4096 % 5 == 1 {
        try shown[place..<(place + 4096)].withUnsafeBytes {
          try writer.write($0, at: UInt64(place))
        }
      }
      try writer.commit()
    }
    var (cuts, whole) = (0, 0)
    // At every moment, with what three disks may have kept.
    for seed in Depth.seeds(75) {
      var random = SplitMix64(seed: seed)
      let disk = SimulatedDisk("disk", size: Int(2 * Trio.third) + 4 << 20)
      let trio = try Trio.make(.dscow, on: disk, seed: seed % 7, room: 4 << 20)
      try prepared(trio)
      let shown = try trio.contents()
      disk.cutPower(after: Int(seed % 25))
      var done = false
      do throws(ImageError) {
        try reblock(trio)
        done = true
        whole += 1
      } catch {
        #expect(error.cause?.code == 5, "seed \(seed): \(error)")
        cuts += 1
      }
      let left = Trio(kind: .dscow, disk: disk.afterPowerCut(using: &random), room: 4 << 20)
      let size = try Dscow.header(of: left.top).header.blockSize
      #expect(size == 4096 || (!done && size == blockSize), "seed \(seed): \(size)")
      #expect(try left.contents() == shown, "seed \(seed)")
      #expect(try left.check().corruptions == 0, "seed \(seed)")
      try reblock(left)
      #expect(try left.contents() == shown, "seed \(seed)")
      #expect(try left.check().corruptions == 0, "seed \(seed)")
      // What a cut has left harms nobody, and is cleared.
      _ = try Dscow.report(store: left.top, repair: .all)
      #expect(try left.check().isClean, "seed \(seed)")
      #expect(try left.contents() == shown, "seed \(seed)")
    }
    print("reblock from \(blockSize): \(cuts) power cuts, \(whole) got by without")
    #expect(cuts > 0 && whole > 0)
  }

  /// Blocks of any size, up and down, by a naive list of the blocks that are there; larger ones only
  /// where they are whole, and a refusal changes not one byte.
  @Test func dscowReblocksAtRandom() throws {
    var refused = 0
    for seed in Depth.seeds(30) {
      var random = SplitMix64(seed: seed)
      let size = UInt64(1 + random.below(6000)) * 512
      let store = MemoryStore("store")
      try Dscow.create(
        store: store, base: nil, baseName: "", blockSize: 1 << UInt32(12 + random.below(9)),
        size: size)
      let image = try Dscow.open(store: store, base: nil, writable: true)
      let writer = ImageWriter(image, store: store, devices: [store])
      for _ in 0..<random.below(12) {
        let start = UInt64(random.below(Int(size / 512))) * 512
        let count = min(size - start, UInt64(1 + random.below(300)) * 512)
        try [UInt8](repeating: UInt8(1 + random.below(250)), count: Int(count)).withUnsafeBytes {
          try writer.write($0, at: start)
        }
      }
      try writer.commit()
      func contents() throws -> [UInt8] {
        let flat = try Chain(store, kind: .dscow) { asked throws(ImageError) in
          throw ImageError(.badRequest, "nobody knows \(asked.path)")
        }.layers().flat()
        return try flat.read(at: 0, count: Int(size))
      }
      func here() throws -> Set<UInt64> {
        var found: Set<UInt64> = []
        let disk = try Dscow.open(store: store, base: nil, writable: false)
        let unit = UInt64(disk.blockSize)
        for block in 0..<((size - 1) / unit + 1) where try disk.find(block, limit: 1).place != .zero
        {
          for sector in stride(from: block * unit, to: min(size, (block + 1) * unit), by: 512) {
            found.insert(sector)
          }
        }
        return found
      }
      let shown = try contents()
      let places = try here()
      for _ in 0..<4 {
        let old = try Dscow.header(of: store).header
        let unit: UInt64 = 1 << UInt64(12 + random.below(11))
        let isWhole = stride(from: 0, to: size, by: Int(unit)).allSatisfy { start in
          let all = stride(from: start, to: min(size, start + unit), by: 512)
          return Set(all.map { places.contains($0) }).count == 1
        }
        let before = try store.read(at: 0, count: Int(store.size))
        do throws(ImageError) {
          try Dscow.reblock(store: store, to: UInt32(unit))
          #expect(isWhole || unit <= UInt64(old.blockSize), "seed \(seed)")
        } catch {
          refused += 1
          #expect(error.code == .badRequest, "seed \(seed): \(error)")
          #expect(!isWhole || old.firstBlock % unit != 0, "seed \(seed): \(error)")
          #expect(try store.read(at: 0, count: Int(store.size)) == before, "seed \(seed)")
        }
        #expect(try contents() == shown, "seed \(seed)")
        #expect(try here() == places, "seed \(seed)")
        #expect(try Dscow.report(store: store, repair: nil).isClean, "seed \(seed)")
        let header = try Dscow.header(of: store).header
        #expect(store.size == header.storeSize, "seed \(seed)")
      }
    }
    #expect(refused > 0)
  }

  @Test func dscowReblockByTheTool() throws {
    let bench = try Bench()
    try bench.makeRaw("base", size: 3 << 20, seed: 5)
    try bench.must("dscow_tool", "-c", "s.dscow", "base")
    try bench.must("dmu-img", "convert", "-f", "dscow", "-O", "raw", "s.dscow", "before")
    #expect(
      try bench.must("dscow_tool", "reblock", "s.dscow", "4K").contains("Block size:   4096\n"))
    try bench.must("dmu-img", "convert", "-f", "dscow", "-O", "raw", "s.dscow", "after")
    try bench.must("cmp", "before", "after")
    let refused = try bench.run("dscow_tool", ["reblock", "s.dscow", "3K"])
    #expect(refused.exit == 1 && refused.error.contains("is not a power of two"))
  }

  /// Every call of a commit or a rebase fails in turn, once or for good.
  @Test(arguments: [ImageKind.dscow, .qcow2], [true, false]) func failingCalls(
    kind: ImageKind, forGood: Bool
  ) throws {
    for isCommit in [true, false] {
      var number = 0
      while true {
        let disk = SimulatedDisk("disk", size: Int(3 * Trio.third))
        let trio = try Trio.make(kind, on: disk, seed: 5)
        let shown = try trio.contents()
        let failing = FailingStore(disk, failAt: number, forGood: forGood)
        let weak = Trio(kind: kind, disk: failing)
        do throws(ImageError) {
          if isCommit {
            try ImageTool.commit(
              weak.top, kind, into: weak.base, .raw, keep: false, progress: Self.quiet,
              resolve: weak.resolve)
          } else {
            try ImageTool.rebase(
              weak.top, kind, onto: ("other", .raw, weak.other), format: nil, unsafe: false,
              progress: Self.quiet, resolve: weak.resolve)
          }
        } catch { #expect(error.cause?.code == 5, "call \(number): \(error)") }
        #expect(try trio.contents() == shown, "call \(number)")
        #expect(try trio.check().corruptions == 0, "call \(number)")
        guard failing.calls > number else { break }
        // All of them would take minutes in a debug build.
        number += max(1, 7 / Depth.factor)
      }
    }
  }

  /// Every call of a conversion fails in turn: the error is told, the source is as it was.
  @Test func failingConversions() throws {
    let disk = SimulatedDisk("disk", size: Int(3 * Trio.third))
    let trio = try Trio.make(.qcow2, on: disk, seed: 6)
    let before = disk.contents()
    let shown = try trio.contents()
    for compress in [false, true] {
      for failsSource in [true, false] {
        var number = 0
        while true {
          let target = MemoryStore("target")
          let failing = FailingStore(
            failsSource ? disk : target as any ByteStore, failAt: number, forGood: true)
          let source = failsSource ? Trio(kind: .qcow2, disk: failing) : trio
          do throws(ImageError) {
            var request = ImageTool.ConvertRequest(ImageSource("top"), target: "target")
            request.compress = compress
            request.threads = 2
            let chain = try Chain(source.top, kind: .qcow2, resolve: source.resolve).layers()
            let into = try Qcow2Target(
              chain.size, Qcow2Options(), failsSource ? target : failing, nil, isZero: true,
              full: false)
            try ConvertJob(request, chain, base: nil, into).run()
            try into.finish(durable: true)
          } catch { #expect(error.cause?.code == 5, "call \(number): \(error)") }
          #expect(disk.contents() == before)
          guard failing.calls > number else {
            let made = try Chain(target, kind: .qcow2, resolve: trio.resolve).layers().flat()
            #expect(try made.read(at: 0, count: Int(made.size)) == shown)
            #expect(try Qcow2.check(store: target).isClean)
            break
          }
          number += 1
        }
      }
    }
  }
}
