// SPDX-License-Identifier: Apache-2.0
// VHD images with the largest blocks that there are, served by cowd: a first write copies or
// zeroes a block of 256 MiB, and the worker's memory does not notice.

import BlockIO
import DiskFormats
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite("Huge blocks", .serialized) struct HugeBlockTests {
  private static let blockSize: UInt64 = 256 << 20
  private let image: TestImage
  private var folder: TemporaryFolder { image.folder }

  init() throws { image = try TestImage(sectors: 8, blockSize: 4096, create: false) }

  private func make(_ name: String) throws -> FileStore {
    let path = folder.file(name)
    return try FileStore(
      Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600), name: path)
  }

  /// The most bytes that a process ever had resident. Source: proc_pid_status(5), VmHWM.
  private func peak(_ cowd: CowdProcess) throws -> Int {
    let path = "/proc/\(cowd.process.pid)/status"
    let text = String(decoding: try readAll(path), as: UTF8.self)
    let line = try #require(text.split(separator: "\n").first { $0.hasPrefix("VmHWM:") })
    return try #require(Int(line.split { " \t".contains($0) }[1])) << 10
  }

  private func readAll(_ path: String) throws -> [UInt8] {
    let file = try Descriptor(path: path, flags: O_RDONLY)
    var buffer = [UInt8](repeating: 0, count: 8192)
    let count = read(file.raw, &buffer, buffer.count)
    guard count > 0 else { throw IOError.last("read", path) }
    return Array(buffer[..<count])
  }

  /// Writes a stamp to each of some sectors, all at once, and flushes; how much more memory
  /// that took than opening the image and reading from it.
  private func write(_ sectors: [Int], stamp: UInt64, to store: String) throws -> Int {
    let socket = folder.file("nbd")
    let cowd = try CowdProcess(["-p", "vhd", "--nbd", "unix:\(socket)", store], folder: folder)
    try cowd.expectReady()
    let client = try TestNBDClient(path: socket)
    _ = try client.run(.read, offset: 0, length: 65536)
    let before = try peak(cowd)
    for (index, sector) in sectors.enumerated() {
      client.submit(
        .write, handle: UInt64(index + 1), offset: UInt64(sector * 512), length: 512,
        data: Stamp.sectors(1, stamp), fua: false)
    }
    var replies = 0
    for _ in 0..<600 where replies < sectors.count {
      replies += try client.turn(milliseconds: 100).count
    }
    #expect(replies == sectors.count)
    _ = try client.run(.flush)
    let grown = try peak(cowd) - before
    try cowd.stop()
    print("huge blocks: \(sectors.count) first writes, \(grown >> 10) KiB more at most")
    return grown
  }

  private func expect(_ wanted: [Int: UInt64], in store: FileStore) throws {
    let disk = try Chain(store, kind: .vhd) { request throws(ImageError) in
      do throws(IOError) {
        return try FileStore(path: folder.file(request.path), writable: false)
      } catch { throw ImageError(error) }
    }.layers().flat()
    for (sector, stamp) in wanted {
      let found = try disk.read(at: UInt64(sector * 512), count: 512)
      #expect(found == Stamp.sectors(1, stamp), "sector \(sector)")
    }
  }

  @Test func zeroesAroundAWrite() throws {
    let store = try make("dynamic.vhd")
    try Vhd.create(
      store: store, size: 4 * Self.blockSize, blockSize: Self.blockSize,
      uuid: [UInt8](repeating: 1, count: 16))
    let perBlock = Int(Self.blockSize / 512)
    let sectors = (0..<4).map { $0 * perBlock + 1000 + $0 * 150_000 }
    #expect(try write(sectors, stamp: 7, to: store.name) < 32 << 20)
    var wanted: [Int: UInt64] = [:]
    for sector in sectors { (wanted[sector], wanted[sector - 1], wanted[sector + 1]) = (7, 0, 0) }
    try expect(wanted, in: store)
    #expect(try Vhd.check(store: store).isClean)
  }

  /// A disk of 160 MiB, all in one block: pieces of it are copied from a base, and one of which the
  /// image has some sectors is made whole at its own place.
  @Test func copiesOfABase() throws {
    let size: UInt64 = 160 << 20
    let last = Int(size / 512) - 1
    let lower = try make("base.vhd")
    let uuid = [UInt8](repeating: 2, count: 16)
    try Vhd.create(store: lower, size: size, blockSize: 65536, uuid: uuid)
    let stamped = [0: 100, 9: 101, 70_000: 102, last: 103] as [Int: UInt64]
    do {
      let image = try Vhd.open(store: lower, writable: true)
      let writer = ImageWriter(image, store: lower, devices: image.devices ?? [lower])
      for (sector, stamp) in stamped {
        let bytes = Stamp.sectors(1, stamp)
        try bytes.withUnsafeBytes { try writer.write($0, at: UInt64(sector * 512)) }
      }
      try writer.commit()
    }
    let store = try make("store.vhd")
    let header = try Vhd.create(
      store: store, size: size, kind: .differencing, blockSize: Self.blockSize,
      uuid: [UInt8](repeating: 3, count: 16), base: ("base.vhd", uuid))
    #expect(try write([5, 150_000], stamp: 7, to: store.name) < 32 << 20)
    var wanted = stamped
    (wanted[5], wanted[150_000], wanted[6]) = (7, 7, 0)
    try expect(wanted, in: store)
    // As blktap leaves blocks: the first 8 sectors are the image's own, the others the base's.
    let entry = try store.read(at: 4096, count: 4).reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
    let bitmap = [0xFF] + [UInt8](repeating: 0, count: 65535)
    try store.write(bitmap, at: entry * 512)
    wanted[150_000] = 0
    try expect(wanted, in: store)
    #expect(try write([200_000], stamp: 8, to: store.name) < 32 << 20)
    wanted[200_000] = 8
    try expect(wanted, in: store)
    #expect(try Vhd.check(store: store).isClean)
    #expect(header.size == size)
  }
}
