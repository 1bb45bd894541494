// SPDX-License-Identifier: Apache-2.0
// Images of other formats, and chains of them, served by cowd: QEMU's tools make them and
// judge what is left of them.

import BlockIO
import DiskFormats
import Glibc
import SystemIO
import Testing
import TestSupport
import WorkerLink

/// A store that QEMU made, over the stamped base of `TestImage`.
enum MadeStore: String, CaseIterable {
  case overlay, compressed, dataFile, vhd, raw, dscow, snapshot, qcow, vmdk, splitVMDK, flatVMDK

  var format: String {
    switch self {
    case .overlay, .compressed, .dataFile, .snapshot: "qcow2"
    case .vhd: "vhd"
    case .qcow: "qcow"
    case .vmdk, .splitVMDK, .flatVMDK: "vmdk"
    case .raw: "raw"
    case .dscow: "dscow"
    }
  }

  /// What QEMU calls it; nil: it does not know it.
  var judged: String? { self == .dscow ? nil : self == .vhd ? "vpc" : format }

  /// Makes it; the disk's contents are those of the base. `cluster` in bytes, for qcow2.
  func make(_ image: TestImage, cluster: Int = 65536) throws -> String {
    let folder = image.folder
    let path = folder.file("store.\(format)")
    let size = "cluster_size=\(cluster)"
    if self == .overlay || self == .dscow || self == .dataFile {
      // A chain of two below the store, the compressed one on top.
      try qemu(
        "create", "-f", "qcow2", "-F", "raw", "-b", "base", folder.file("middle"))
      try qemu(
        "convert", "-c", "-f", "raw", "-O", "qcow2", image.base, folder.file("packed.qcow2"))
    }
    switch self {
    case .overlay:
      try qemu(
        "create", "-f", "qcow2", "-o", size, "-F", "qcow2", "-b", "packed.qcow2", path)
    case .compressed:
      try qemu("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", size, image.base, path)
    case .dataFile:
      try qemu(
        "create", "-f", "qcow2", "-o", "\(size),data_file=\(folder.file("data"))", "-F", "qcow2",
        "-b", "middle", path
      )
    case .vhd:
      try qemu("convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", image.base, path)
    case .qcow: try qemu("convert", "-f", "raw", "-O", "qcow", image.base, path)
    case .vmdk: try qemu("convert", "-f", "raw", "-O", "vmdk", image.base, path)
    case .splitVMDK, .flatVMDK:
      let kind = self == .flatVMDK ? "twoGbMaxExtentFlat" : "twoGbMaxExtentSparse"
      try qemu(
        "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=\(kind)", image.base, path)
    case .raw: try qemu("convert", "-f", "raw", "-O", "raw", image.base, path)
    case .snapshot:
      try qemu("convert", "-f", "raw", "-O", "qcow2", "-o", size, image.base, path)
      try qemu("snapshot", "-c", "before", path)
    case .dscow:
      let packed = try FileStore(path: folder.file("packed.qcow2"), writable: false)
      let store = try FileStore(path: image.store, writable: true)
      let base = try Chain(packed, kind: .qcow2, above: [store]) {
        request throws(ImageError) in
        throw ImageError(.baseMissing, request.path)
      }.flat()
      try Dscow.create(store: store, base: base, baseName: "packed.qcow2", blockSize: 65536)
    }
    return path
  }

  func qemu(_ arguments: String...) throws {
    let command = Command("/usr/bin/qemu-img", arguments + (quiet(arguments[0]) ? ["-q"] : []))
    #expect(try command.start().wait(milliseconds: 60_000) == .exited(0), "\(arguments)")
  }

  private func quiet(_ verb: String) -> Bool { verb == "create" || verb == "check" }

  /// What QEMU finds in the store's disk.
  func contents(_ path: String, _ image: TestImage) throws -> [UInt8] {
    let raw = image.folder.file("judged.raw")
    try qemu("convert", "-f", judged ?? "raw", "-O", "raw", path, raw)
    return try FileStore(path: raw, writable: false).read(at: 0, count: image.sectors * 512)
  }
}

let hasQemu = access("/usr/bin/qemu-img", X_OK) == 0

@Suite("Chains of images", .enabled(if: hasQemu), .serialized) struct ChainTests {
  /// Random reads, writes, trims and flushes, then QEMU's view of what is left.
  @Test(arguments: MadeStore.allCases) func everyFormatServesADisk(_ kind: MadeStore) throws {
    let seeds = SeededRandom(announcedAs: "served \(kind)")
    let image = try TestImage(sectors: 8192, blockSize: 65536, create: false)
    let path = try kind.make(image)
    let before = try FileStore(path: image.base, writable: false).identity()
    let socket = image.folder.file("nbd")
    let load = try serve(kind, path, socket, image, seed: seeds)
    #expect(load.wrongs == [])
    if let judged = kind.judged {
      if judged == "qcow2" || judged == "vmdk" { try kind.qemu("check", "-f", judged, path) }
      load.settle(try kind.contents(path, image), after: "the end, as QEMU reads it")
    }
    // And a second time, from what is there.
    let cowd = try CowdProcess(
      ["-p", kind.format, "--nbd", "unix:\(socket)", "--read-only", path], folder: image.folder)
    try cowd.expectReady()
    let reader = try TestNBDClient(path: socket)
    load.settle(try reader.run(.read, offset: 0, length: image.sectors * 512), after: "the end")
    #expect(load.wrongs == [])
    try cowd.stop()
    if kind != .raw {
      let after = try FileStore(path: image.base, writable: false).identity()
      #expect(after == before)
    }
  }

  private func serve(
    _ kind: MadeStore, _ path: String, _ socket: String, _ image: TestImage,
    seed seeds: SeededRandom
  ) throws -> RandomLoad {
    var seeds = seeds
    let cowd = try CowdProcess(
      ["-p", kind.format, "--nbd", "unix:\(socket)", path], folder: image.folder)
    try cowd.expectReady()
    let client = try TestNBDClient(path: socket)
    let load = RandomLoad(image.model(), seed: seeds.next(), longest: 300, repeats: false)
    load.settle(
      try client.run(.read, offset: 0, length: image.sectors * 512), after: "opening")
    while load.replies < 1000, load.wrongs.isEmpty, !client.ended {
      try load.turn(client, depth: 8, milliseconds: 1)
    }
    try load.drain(client)
    try cowd.stop()
    return load
  }

  @Test func aGuessedImageNamesNothing() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096, create: false)
    let kind = MadeStore.overlay
    // A disk whose guest wrote an image's header into it, and a store over it that does not
    // say what its base is.
    try kind.qemu(
      "create", "-f", "qcow2", "-F", "raw", "-b", image.base, image.folder.file("planted"))
    let store = image.folder.file("s.qcow2")
    var options = Qcow2Options()
    options.base = ("planted", nil)
    try Qcow2.create(
      store: FileStore(
        Descriptor(path: store, flags: O_RDWR | O_CREAT, mode: 0o600), name: store),
      size: 256 * 512, options: options)
    let socket = "unix:" + image.folder.file("nbd")
    let cowd = try CowdProcess(["-p", "qcow2", "--nbd", socket, store], folder: image.folder)
    #expect(try cowd.process.wait(milliseconds: 10_000) == .exited(1))
    #expect(try cowd.messages().contains("nobody says that it is one"))
    for format in ["raw", "qcow2"] {
      let told = try CowdProcess(
        ["-p", "qcow2", "--base-format", format, "--nbd", socket, store], folder: image.folder)
      try told.expectReady()
      try told.stop()
    }
  }

  /// Under a daemon each file is asked for by itself, and given back one by one.
  @Test func aSupervisedWorkerAsksForEachFile() throws {
    let image = try TestImage(sectors: 8192, blockSize: 65536, create: false)
    let kind = MadeStore.dataFile
    let path = try kind.make(image)
    let daemon = try TestDaemon(image, store: path)
    var order = daemon.order
    order.format = "qcow2"
    order.storePath = path
    order.basePath = nil
    try daemon.start(order, roles: [.store, .pending])
    let needs = [("data-file", "data", true), ("base", "middle", false), ("base", "base", false)]
      .map { FileNeed(role: $0.0, path: image.folder.file($0.1), writable: $0.2) }
    for need in needs {
      #expect(try daemon.report().0 == .needFile(need))
      try daemon.relink()
      #expect(try daemon.report().0 == .needFile(need), "another daemon is told anew")
      let file = try Descriptor(path: need.path, flags: need.writable ? O_RDWR : O_RDONLY)
      try daemon.link.send(.file, lending: [.file: file.raw])
    }
    guard case .ready(let report) = try daemon.report().0 else {
      Issue.record("not ready: \(try daemon.worker.messages())")
      return
    }
    #expect(report.format == "qcow2" && report.basePath == "middle")
    for index in 1...3 {
      try daemon.link.send(.descriptors(index: index))
      let (answer, descriptors) = try daemon.report()
      #expect(answer == .descriptors(files: 3, file: needs[index - 1]))
      #expect(descriptors.roles == [.file])
    }
    let client = try daemon.attach()
    #expect(try client.run(.read, offset: 512, length: 512) == Stamp.sectors(1, TestImage.stamp(1)))
    try client.run(.write, offset: 512, length: 512, data: Stamp.sectors(1, 5))
    try daemon.link.send(.stop)
    #expect(try daemon.worker.process.wait(milliseconds: 30_000) == .exited(0))
    #expect(try kind.contents(path, image)[512..<1024].elementsEqual(Stamp.sectors(1, 5)))
  }

  @Test func aQcow2StoreIsMadeOverAnImage() throws {
    let image = try TestImage(sectors: 8192, blockSize: 65536, create: false)
    let kind = MadeStore.overlay
    _ = try kind.make(image)
    let path = image.folder.file("new.qcow2")
    _ = try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600)
    let daemon = try TestDaemon(image, store: path, base: image.folder.file("packed.qcow2"))
    var order = daemon.order
    order.format = "qcow2"
    order.storePath = path
    order.basePath = image.folder.file("packed.qcow2")
    order.baseFormat = "qcow2"
    order.create = true
    for _ in 0..<2 {
      try daemon.start(order)
      guard case .ready(let report) = try daemon.report().0 else {
        Issue.record("not ready: \(try daemon.worker.messages())")
        return
      }
      #expect(report.size == 4 << 20)
      let client = try daemon.attach()
      try client.run(.write, offset: 0, length: 512, data: Stamp.sectors(1, 9))
      try daemon.link.send(.stop)
      #expect(try daemon.worker.process.wait(milliseconds: 30_000) == .exited(0))
      try daemon.replaceWorker()
    }
    try kind.qemu("check", "-f", "qcow2", path)
    let found = try kind.contents(path, image)
    #expect(found[..<512].elementsEqual(Stamp.sectors(1, 9)))
    #expect(found[512..<1024].elementsEqual(Stamp.sectors(1, TestImage.stamp(1))))
  }
}

@Suite("Racing writers", .enabled(if: hasQemu), .serialized) struct RacingWritersTests {
  /// Small clusters: tables are made all the time, between data and beside it.
  @Test(arguments: [512, 2048, 65536])
  func tablesAreNotOverwrittenByRacingWriters(cluster: Int) throws {
    try race(.overlay, cluster: cluster)
  }

  /// Every first write to a compressed cluster frees what it lay in, for whoever writes
  /// next, while others zero and trim.
  @Test(arguments: [512, 2048, 65536]) func reusedClustersAreNotPunched(cluster: Int) throws {
    try race(.compressed, cluster: cluster)
  }

  /// The same beside a snapshot, whose clusters are nobody's to reuse.
  @Test func clustersOfASnapshotAreLeftAlone() throws {
    let image = try race(.snapshot, cluster: 2048)
    let path = image.folder.file("store.qcow2")
    try MadeStore.snapshot.qemu("snapshot", "-a", "before", path)
    let found = try MadeStore.snapshot.contents(path, image)
    let base = try FileStore(path: image.base, writable: false)
    let bytes = try base.read(at: 0, count: found.count)
    #expect(found == bytes)
  }

  /// Four clients of one worker at once, each with pieces of its own all over the disk, which
  /// share clusters with others' and also hold whole ones.
  @discardableResult
  private func race(_ kind: MadeStore, cluster: Int) throws -> TestImage {
    var seeds = SeededRandom(announcedAs: "racing writers, \(kind), clusters of \(cluster)")
    let image = try TestImage(sectors: 8192, blockSize: 65536, create: false)
    let path = try kind.make(image, cluster: cluster)
    let width = max(7, cluster / 512 * 5 / 2)
    let loads = (0..<4).map { index in
      RandomLoad(
        image.model(), seed: seeds.next(), longest: width, repeats: false,
        stripe: RandomLoad.Stripe(index: index, count: 4, width: width))
    }
    let depth = Depth.factor
    for round in 1...3 {
      let socket = image.folder.file("nbd\(round)")
      let cowd = try CowdProcess(
        ["-p", kind.format, "--nbd", "unix:\(socket)", path], folder: image.folder)
      try cowd.expectReady()
      let clients = try loads.map { _ in try TestNBDClient(path: socket) }
      var turns = 0
      while loads.contains(where: { $0.replies < round * 400 * depth }), turns < 100_000 * depth {
        turns += 1
        for (load, client) in zip(loads, clients) {
          try load.turn(client, depth: 16, milliseconds: load === loads[3] ? 1 : 0)
        }
      }
      for (load, client) in zip(loads, clients) { try load.drain(client) }
      try cowd.stop()
      try kind.qemu("check", "-f", "qcow2", path)
      let found = try kind.contents(path, image)
      for load in loads {
        #expect(load.outstanding == 0)
        load.settle(found, after: "round \(round)")
        #expect(load.wrongs == [])
      }
      guard loads.allSatisfy({ $0.wrongs.isEmpty }) else { break }
    }
    return image
  }
}
