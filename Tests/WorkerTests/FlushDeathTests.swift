// SPDX-License-Identifier: Apache-2.0
// A worker that is killed within a flush takes along what the kernel told of it: an error is told
// once to an open file description, and the next worker uses the same one. Nothing that such a
// flush has lost may be confirmed by the next. Needs root: for loop devices and a small tmpfs
// under them, whose want of space is the medium's failure.

import BlockIO
import Glibc
import LinuxBlock
import SystemIO
import Testing
import TestSupport
import WorkerLink

@Suite("Killed in a flush", .serialized, .enabled(if: geteuid() == 0)) struct FlushDeathTests {
  /// A block device on a tmpfs that can be filled up.
  private final class FailingMedium {
    let folder: TemporaryFolder
    let device: String
    let filler: FileStore
    private let loop: Descriptor

    init(megabytes: Int, deviceMegabytes: UInt64) throws {
      folder = try TemporaryFolder()
      guard mount("tmpfs", folder.path, "tmpfs", 0, "size=\(megabytes)m") == 0 else {
        throw IOError.last("mount", folder.path)
      }
      let path = folder.file("disk")
      let file = try FileStore(
        Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600), name: path)
      try file.resize(to: deviceMegabytes << 20)
      let made = try LoopDevice(file: file.raw, name: path, readOnly: false, direct: false)
      device = made.path
      loop = try Descriptor(path: device, flags: O_RDWR)
      let name = folder.file("filler")
      filler = try FileStore(
        Descriptor(path: name, flags: O_RDWR | O_CREAT, mode: 0o600), name: name)
    }

    /// From now on what is new on the device cannot be written.
    func fail() throws {
      let piece = [UInt8](repeating: 1, count: 65536)
      var end: UInt64 = 0
      do throws(IOError) {
        while true {
          try filler.write(piece, at: end)
          end += 65536
        }
      } catch { guard error.code == ENOSPC else { throw error } }
    }

    deinit { umount2(folder.path, 2) }
  }

  private struct Scene {
    let image: TestImage
    let daemon: TestDaemon
    let client: TestNBDClient
    let medium: FailingMedium?
  }

  private static let block = 4096

  /// A worker that has written and is within a flush which takes three seconds.
  private static func inFlush(failing: Bool) throws -> Scene {
    let image = try TestImage(sectors: 32768, blockSize: 4096)
    let medium = try failing ? FailingMedium(megabytes: 8, deviceMegabytes: 64) : nil
    if let medium {
      let made = Command(
        "/bin/dd",
        [
          "if=\(image.store)", "of=\(medium.device)", "conv=notrunc,fsync,sparse", "status=none",
        ])
      #expect(try made.start().wait(milliseconds: 20_000) == .exited(0))
    }
    let daemon = try TestDaemon(
      image, store: medium?.device, injecting: "fdatasync:delay_exit=3000000")
    _ = try daemon.startReady()
    let client = try daemon.attach()
    try client.run(.write, offset: 0, length: block, data: Stamp.sectors(8, 1))
    try medium?.fail()
    for number in 1..<64 {
      try client.run(
        .write, offset: UInt64(number * 16 * block), length: block,
        data: Stamp.sectors(8, UInt64(number)))
    }
    _ = client.submit(.flush)
    let start = milliseconds()
    while milliseconds() < start + 1000 { #expect(try client.turn(milliseconds: 10).isEmpty) }
    try daemon.worker.kill9()
    return Scene(image: image, daemon: daemon, client: client, medium: medium)
  }

  private static func code(_ body: () throws -> Void) -> Int32 {
    do {
      try body()
      return 0
    } catch { return (error as? IOError)?.code ?? -1 }
  }

  /// The error stands, whether or not there is a witness of it, until it is cleared.
  @Test(arguments: [true, false])
  func aFailureIsNotConfirmed(witnessed: Bool) throws {
    let scene = try Self.inFlush(failing: true)
    let daemon = scene.daemon
    try daemon.replaceWorker()
    _ = try daemon.startReady(roles: witnessed ? TestDaemon.all : [.store, .base, .pending])
    let client = try daemon.attach()
    #expect(Self.code { try client.run(.flush) } == EIO)
    #expect(Self.code { try client.run(.flush) } == EIO)
    #expect(try daemon.status().state == .degraded)
    // Nor by a worker after that one.
    try daemon.worker.kill9()
    try daemon.replaceWorker()
    #expect(try daemon.startReady().state == .degraded)
    let last = try daemon.attach()
    #expect(Self.code { try last.run(.flush) } == EIO)
    // First there is room again: what is written after the order must not fail anew.
    try scene.medium?.filler.resize(to: 0)
    try daemon.link.send(.clear)
    while case .event = try daemon.report().0 {}
    #expect(Self.code { try last.run(.write, length: 512, data: Stamp.sectors(1, 9)) } == 0)
    #expect(Self.code { try last.run(.flush) } == 0)
    #expect(try daemon.status().state == .ready)
  }

  /// A flush that was only slow is no failure, as the witness proves.
  @Test func aSlowFlushIsConfirmed() throws {
    let scene = try Self.inFlush(failing: false)
    let daemon = scene.daemon
    try daemon.replaceWorker()
    _ = try daemon.startReady()
    let client = try daemon.attach()
    #expect(Self.code { try client.run(.flush) } == 0)
    let read = try client.run(.read, offset: UInt64(63 * 16 * Self.block), length: Self.block)
    #expect(read == Stamp.sectors(8, 63))
    #expect(try daemon.status().state == .ready)
  }

  /// Without a witness nothing proves it, and the disk says so.
  @Test func withoutAWitnessItIsAFailure() throws {
    let scene = try Self.inFlush(failing: false)
    try scene.daemon.replaceWorker()
    let report = try scene.daemon.startReady(roles: [.store, .base, .pending])
    #expect(report.state == .degraded && report.error.contains("flush"))
    let client = try scene.daemon.attach()
    #expect(Self.code { try client.run(.flush) } == EIO)
    // What was acknowledged reads, all the same.
    let read = try client.run(.read, offset: UInt64(63 * 16 * Self.block), length: Self.block)
    #expect(read == Stamp.sectors(8, 63))
  }
}
