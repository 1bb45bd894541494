// SPDX-License-Identifier: Apache-2.0
// Commit, rebase, resize and repair of every format, killed and cut off at every step: the image
// shows what it did, or what it shall, and the same command done again comes to a good end.

import BlockIO
import Foundation
import SystemIO
import Testing
import TestSupport

@testable import DiskFormats
@testable import ImageTool

/// What a command works on: an image over a base that may be longer, and another base.
struct Scene {
  static let size: UInt64 = 40 << 10
  static let baseSize: UInt64 = 96 << 10

  /// The kinds of image that are maintained.
  enum Kind: String, CaseIterable, Sendable {
    case dscow, dscowLarge, qcow, qcow2, vhd, vhdFixed, vmdk, vmdkFlat

    var image: ImageKind {
      switch self {
      case .dscow, .dscowLarge: .dscow
      case .qcow: .qcow
      case .qcow2: .qcow2
      case .vhd, .vhdFixed: .vhd
      case .vmdk, .vmdkFlat: .vmdk
      }
    }
    /// The format of its base; nil where it has none.
    var base: ImageKind? {
      switch self {
      case .dscow, .dscowLarge, .qcow, .qcow2: .raw
      case .vhd: .vhd
      case .vmdk: .vmdk
      case .vhdFixed, .vmdkFlat: nil
      }
    }
    var isRebased: Bool { image == .dscow || self == .qcow2 }
    var isEmptied: Bool { isRebased }
  }

  let kind: Kind
  let machine: Machine

  func resolve(_ request: NamedFile) throws(ImageError) -> any ByteStore {
    guard machine.names.contains(request.path) else {
      throw ImageError(.badRequest, "nobody knows \(request.path)")
    }
    return machine.file(request.path)
  }

  var top: MachineFile { machine.file("top") }
  var base: MachineFile { machine.file("base") }

  /// What the image shows.
  func contents(_ name: String = "top", kind: ImageKind? = nil) throws -> [UInt8] {
    let flat = try Chain(machine.file(name), kind: kind ?? self.kind.image, resolve: resolve)
      .layers().flat()
    return try flat.read(at: 0, count: Int(flat.size))
  }

  private func files() throws(ImageError) -> [any ByteStore] {
    try ChainLink(top, FormatDecision(kind: kind.image), resolve: resolve).files
  }

  func check() throws -> CheckReport {
    switch kind {
    case .dscow, .dscowLarge: try Dscow.report(store: top, repair: nil)
    case .qcow: try Qcow.check(store: top)
    case .qcow2: try Qcow2.check(store: top)
    case .vhd, .vhdFixed: try Vhd.check(store: top)
    case .vmdk, .vmdkFlat: try Vmdk.check(store: top, extents: try files())
    }
  }

  func repair() throws(ImageError) {
    switch kind {
    case .dscow, .dscowLarge: _ = try Dscow.report(store: top, repair: .all)
    case .qcow: try Qcow.repair(store: top, .all)
    case .qcow2: try Qcow2.repair(store: top, .all)
    case .vhd, .vhdFixed: try Vhd.repair(store: top, .all)
    case .vmdk, .vmdkFlat: try Vmdk.repair(store: top, extents: try files(), .all)
    }
  }

  /// Makes an image of this kind, 4 KiB blocks where it can have them.
  private func make(
    _ kind: Kind, _ name: String, size: UInt64, overBase: Bool
  ) throws {
    let store = machine.file(name)
    let seed = UInt8(name.utf8.reduce(0) { $0 &+ $1 })
    switch kind {
    case .dscow, .dscowLarge:
      try Dscow.create(
        store: store, base: base, baseName: "base", blockSize: kind == .dscow ? 4096 : 16384,
        size: size)
    case .qcow: try Qcow.create(store: store, size: size, base: "base")
    case .qcow2:
      var options = Qcow2Options()
      options.clusterSize = 4096
      options.base = ("base", "raw")
      try Qcow2.create(store: store, size: size, options: options)
    case .vhd:
      let own = [UInt8](repeating: seed, count: 16)
      let below = try overBase ? VhdHeader.read(from: base).uuid : own
      try Vhd.create(
        store: store, size: size, kind: overBase ? .differencing : .dynamic, blockSize: 4096,
        uuid: own, base: overBase ? ("base", below) : nil)
    case .vhdFixed:
      try Vhd.create(
        store: store, size: size, kind: .fixed, uuid: [UInt8](repeating: seed, count: 16))
    case .vmdk:
      var options = VmdkOptions()
      options.name = name
      if overBase { options.base = ("base", try Vmdk.contentID(of: base)) }
      try Vmdk.create(store: store, size: size, options: options)
      // Small grains, so that there is something to be torn.
      var sector = try store.read(at: 0, count: 512)
      sector[20] = 8
      try store.write(sector, at: 0)
    case .vmdkFlat:
      var options = VmdkOptions()
      options.subformat = .monolithicFlat
      options.name = name + ".vmdk"
      try Vmdk.create(
        store: store, size: size, options: options, extents: [machine.file("top-flat.vmdk")])
    }
  }

  private func fill(
    _ name: String, _ kind: ImageKind, blocks: Int, of size: UInt64, _ random: inout SplitMix64
  ) throws {
    let store = machine.file(name)
    let image = try Chain(store, kind: kind, resolve: resolve).disk(writable: true)
    let writer = ImageWriter(image, store: store, devices: image.devices ?? [store, base])
    for _ in 0..<blocks {
      let place = UInt64(random.below(Int(size / 4096)))
      let value = random.next()
      let bytes = (0..<4096).map { UInt8(truncatingIfNeeded: value &+ UInt64($0 % 251)) | 1 }
      try bytes.withUnsafeBytes { try writer.write($0, at: place * 4096) }
    }
    try writer.commit()
  }

  static func make(_ kind: Kind, seed: UInt64) throws -> Scene {
    let machine = Machine(["top", "base", "other", "top-flat.vmdk"])
    let scene = Scene(kind: kind, machine: machine)
    var random = SplitMix64(seed: seed)
    if let base = kind.base {
      for name in ["base", "other"] {
        switch base {
        case .raw:
          let bytes = (0..<Int(baseSize)).map {
            UInt8(truncatingIfNeeded: $0 / 700 + name.count) | 1
          }
          try machine.file(name).write(bytes, at: 0)
        case .vhd:
          try scene.make(.vhd, name, size: baseSize, overBase: false)
          try scene.fill(name, .vhd, blocks: 20, of: baseSize, &random)
        default:
          try scene.make(.vmdk, name, size: baseSize, overBase: false)
          try scene.fill(name, .vmdk, blocks: 20, of: baseSize, &random)
        }
      }
    }
    // An odd end, within a block.
    try scene.make(kind, "top", size: size + 1536, overBase: kind.base != nil)
    try scene.fill("top", kind.image, blocks: 5, of: size, &random)
    for name in machine.names { try machine.file(name).flush() }
    return scene
  }
}

@Suite struct MaintenanceTests {
  enum Command: String, CaseIterable, Sendable {
    case grow, growALittle, shrink, commit, rebase, reblock, repair, rebuild

    func applies(to kind: Scene.Kind) -> Bool {
      switch self {
      case .grow, .growALittle, .shrink: true
      // There is nothing to mend in the others.
      case .repair: kind != .vhdFixed && kind != .vmdkFlat
      // Refcounts that are too low are counted anew, all of them.
      case .rebuild: kind == .qcow2
      case .commit: kind.base != nil
      case .rebase: kind.isRebased
      case .reblock: kind == .dscowLarge
      }
    }

    func run(_ scene: Scene) throws(ImageError) {
      let quiet = Progress(on: false)
      let decision = FormatDecision(kind: scene.kind.image)
      switch self {
      case .grow, .growALittle, .shrink:
        try Kinds.resize(
          scene.top, decision, to: size,
          resolve: { request throws(ImageError) in
            try scene.resolve(request)
          })
      case .commit:
        try ImageTool.commit(
          scene.top, scene.kind.image, into: scene.base, scene.kind.base ?? .raw,
          keep: !scene.kind.isEmptied, progress: quiet, resolve: scene.resolve)
      case .rebase:
        try ImageTool.rebase(
          scene.top, scene.kind.image, onto: ("other", .raw, scene.machine.file("other")),
          format: "raw", unsafe: false, progress: quiet, resolve: scene.resolve)
      case .reblock:
        try Dscow.reblock(store: scene.top, to: 4096)
      case .repair, .rebuild:
        try scene.repair()
      }
    }

    var size: UInt64 {
      switch self {
      case .grow: Scene.size * 3
      case .growALittle: Scene.size + 6 * 512
      default: Scene.size / 2 + 512
      }
    }
  }

  struct Case: CustomTestStringConvertible, Sendable {
    let kind: Scene.Kind
    let command: Command
    let end: Machine.End
    var testDescription: String { "\(kind) \(command) \(end)" }
  }

  static let cases: [Case] = Scene.Kind.allCases.flatMap { kind in
    Command.allCases.filter { $0.applies(to: kind) }.flatMap { command in
      Machine.End.allCases.map { Case(kind: kind, command: command, end: $0) }
    }
  }

  /// Whether bytes begin like others, and from there on are zeroes. By memcmp(3): a debug build
  /// takes its time with arrays.
  private static func begins(_ bytes: [UInt8], like others: [UInt8], count: Int) -> Bool {
    bytes.withUnsafeBytes { mine in
      others.withUnsafeBytes { theirs in
        guard count > 0, let one = mine.baseAddress, let other = theirs.baseAddress else {
          return count == 0
        }
        return memcmp(one, other, count) == 0
      }
    }
  }

  private static func isSame(_ one: [UInt8], _ other: [UInt8]) -> Bool {
    one.count == other.count && begins(one, like: other, count: one.count)
  }

  /// What the image may show, with `shown` before and after the command.
  private static func isRight(_ found: [UInt8], _ shown: [UInt8], _ command: Command) -> Bool {
    switch command {
    case .commit, .rebase, .reblock, .repair, .rebuild: return isSame(found, shown)
    case .grow, .growALittle, .shrink:
      if isSame(found, shown) { return true }
      guard UInt64(found.count) == command.size else { return false }
      let common = min(found.count, shown.count)
      guard begins(found, like: shown, count: common) else { return false }
      return found.withUnsafeBytes { isZero(UnsafeRawBufferPointer(rebasing: $0[common...])) }
    }
  }

  private static func judge(
    _ left: Scene, _ shown: [UInt8], _ test: Case, done: Bool
  ) throws -> String? {
    let found = try left.contents()
    guard isRight(found, shown, test.command) else { return "it shows something else" }
    let report = try left.check()
    guard report.corruptions == 0 || (test.command == .rebuild && !done) else {
      return "\(report.problems)"
    }
    // Done again it comes to a good end.
    try test.command.run(left)
    let again = try left.contents()
    guard isRight(again, shown, test.command) else { return "done again it shows something else" }
    switch test.command {
    case .grow, .growALittle, .shrink:
      guard UInt64(again.count) == test.command.size else { return "done again: \(again.count)" }
    case .commit:
      let base = try left.contents("base", kind: left.kind.base)
      guard base.count >= shown.count, begins(base, like: shown, count: shown.count) else {
        return "the base has not got everything"
      }
    case .reblock:
      guard try Dscow.header(of: left.top).header.blockSize == 4096 else {
        return "done again: its blocks are as they were"
      }
    case .rebase, .repair, .rebuild: break
    }
    let last = try left.check()
    return last.corruptions == 0 ? nil : "done again: \(last.problems)"
  }

  /// A scene for one run of a command, with something to mend where that is what it does.
  private static func scene(_ test: Case, from made: Scene) throws -> Scene {
    let scene = Scene(kind: test.kind, machine: made.machine.copy())
    guard test.command == .repair || test.command == .rebuild else { return scene }
    // Space behind the end, which by qcow2's refcounts is in use.
    let file = scene.machine.file("top")
    let used = (file.size + 4095) / 4096
    try file.write([UInt8](repeating: 7, count: 512), at: (used + 1) * 4096)
    if test.kind == .qcow2 {
      for cluster in [used, used + 1, used + 400] { try count(cluster, as: 1, in: file) }
    }
    if test.command == .rebuild { try count(used - 1, as: 0, in: file) }
    try file.flush()
    return scene
  }

  /// Changes a refcount of a qcow2 image, one of the first block of them.
  private static func count(_ cluster: UInt64, as value: UInt8, in file: MachineFile) throws {
    let header = try Qcow2Header.read(from: file)
    let entry = try file.read(at: header.refcountTableOffset, count: 8)
    try file.write([0, value], at: entry.big(UInt64.self, at: 0) + cluster * 2)
  }

  /// Lets a command do so many steps in a copy of a scene, and judges what is left. Returns how
  /// many it did when it got by, nil when it was cut off.
  private static func run(
    _ test: Case, in made: Scene, steps: Int, seed: UInt64, _ random: inout SplitMix64
  ) throws -> Int? {
    let scene = try scene(test, from: made)
    let shown = try scene.contents()
    scene.machine.limit(steps)
    var used: Int?
    do {
      try test.command.run(scene)
      used = steps - scene.machine.left
    } catch { #expect(error.cause?.code == 5, "\(test.testDescription), seed \(seed): \(error)") }
    let left = Scene(kind: test.kind, machine: scene.machine.after(test.end, using: &random))
    do {
      if let words = try judge(left, shown, test, done: used != nil) {
        Issue.record("\(test.testDescription), seed \(seed): \(words)")
      }
    } catch { Issue.record("\(test.testDescription), seed \(seed): \(error)") }
    return used
  }

  /// Kills: after every step.
  @Test(arguments: cases.filter { $0.end == .kill }) func everyStep(_ test: Case) throws {
    let scene = try Scene.make(test.kind, seed: 0)
    for step in 0..<400 {
      var random = SplitMix64(seed: UInt64(step))
      let used = try Self.run(test, in: scene, steps: step, seed: UInt64(step), &random)
      guard used == nil else { return print("\(test.testDescription): \(step) cut off") }
    }
    Issue.record("\(test.testDescription): it never got by")
  }

  /// Power cuts: so many seeds that each format has more than two hundred. A seed says
  /// everything: 84 share a scene, and after how many of its steps the power goes is theirs.
  @Test(arguments: cases.filter { $0.end == .powerCut }) func powerCuts(_ test: Case) throws {
    var made: (number: UInt64, scene: Scene, steps: Int)?
    var (cuts, whole) = (0, 0)
    for seed in Depth.seeds(50) {
      var random = SplitMix64(seed: seed)
      if made?.number != seed / 84 {
        let scene = try Scene.make(test.kind, seed: seed / 84)
        var other = random
        let steps = try Self.run(test, in: scene, steps: 400, seed: seed, &other)
        made = (seed / 84, scene, try #require(steps))
      }
      guard let made else { break }
      let steps = random.below(made.steps + 1)
      if try Self.run(test, in: made.scene, steps: steps, seed: seed, &random) == nil {
        cuts += 1
      } else {
        whole += 1
      }
    }
    print("\(test.testDescription): \(cuts) cut off, \(whole) got by without")
    #expect(cuts > 0)
  }
}
