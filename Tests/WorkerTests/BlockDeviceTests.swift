// SPDX-License-Identifier: Apache-2.0
// A store on a block device with sectors of 512 or 4096 bytes: zeroes at any alignment. Needs
// root, for a loop device.

import BlockIO
import Glibc
import LinuxBlock
import SystemIO
import Testing
import TestSupport
import WorkerLink

@Suite("Stores on block devices", .serialized, .enabled(if: geteuid() == 0))
struct BlockDeviceTests {
  @Test(arguments: [512, 4096]) func zeroesOfAnyAlignment(sector: Int) throws {
    var seeds = SeededRandom(announcedAs: "zeroes on a device of \(sector) bytes a sector")
    let image = try TestImage(sectors: 4096, blockSize: 65536)
    let disk = image.folder.file("disk")
    let file = try FileStore(
      Descriptor(path: disk, flags: O_RDWR | O_CREAT, mode: 0o600), name: disk)
    try file.resize(to: 16 << 20)
    let loop = try LoopDevice(
      file: file.raw, name: disk, readOnly: false, direct: false, sector: UInt32(sector))
    let device = loop.path
    let copied = Command(
      "/bin/dd", ["if=\(image.store)", "of=\(device)", "bs=64k", "conv=fsync", "status=none"])
    #expect(try copied.start().wait(milliseconds: 20_000) == .exited(0))
    let daemon = try TestDaemon(image, store: device)
    _ = try daemon.startReady()
    let client = try daemon.attach()
    let size = 4096 * 512
    var model = try client.run(.read, offset: 0, length: size)
    for round in 0..<400 {
      let offset = Int(seeds.next() % UInt64(size - 1))
      let length = 1 + Int(seeds.next() % UInt64(min(size - offset, 200_000)))
      if round % 2 == 0 {
        let bytes = [UInt8](repeating: UInt8(truncatingIfNeeded: round | 1), count: length)
        try client.run(.write, offset: UInt64(offset), length: length, data: bytes)
        model.replaceSubrange(offset..<(offset + length), with: bytes)
      } else {
        try client.run(.writeZeroes, offset: UInt64(offset), length: length)
        model.replaceSubrange(
          offset..<(offset + length), with: [UInt8](repeating: 0, count: length))
      }
      if round % 40 == 0 { try client.run(.flush) }
    }
    try client.run(.flush)
    #expect(try daemon.status().state == .ready)
    #expect(try client.run(.read, offset: 0, length: size) == model)
    // Until here it is there.
    #expect(try loop.sectorSize() == UInt32(sector))
  }
}
