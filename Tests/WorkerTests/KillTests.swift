// SPDX-License-Identifier: Apache-2.0
// A worker by hand is killed at random instants: what a flush had confirmed is there, what
// nobody wrote reads as the base, and the image is sound.

import Glibc
import Testing
import TestSupport

@Suite("Killed by hand", .serialized) struct KillTests {
  private static let kills = getenv("DMU_KILLS").flatMap { Int(String(cString: $0)) } ?? 30

  @Test(arguments: [4096, 65536] as [UInt32])
  func nothingConfirmedIsLost(blockSize: UInt32) throws {
    var seeds = SeededRandom(announcedAs: "killed by hand, blocks of \(blockSize)")
    let image = try TestImage(sectors: blockSize == 4096 ? 2048 : 8192, blockSize: blockSize)
    let load = RandomLoad(
      image.model(), seed: seeds.next(), longest: Int(blockSize) / 512 * 2, repeats: false)
    let path = image.folder.file("nbd")
    for round in 0..<Self.kills {
      let cowd = try CowdProcess(
        ["-p", "dscow", "--nbd", "unix:\(path)", image.store], folder: image.folder)
      guard round % 8 != 7 else {
        // At any instant of its start, too.
        usleep(UInt32(seeds.next() % 40_000))
        try cowd.kill9()
        continue
      }
      guard cowd.line() != nil else {
        Issue.record("cowd did not start: \(try cowd.messages())")
        return
      }
      let client = try TestNBDClient(path: path)
      #expect(client.size == UInt64(image.sectors) * 512)
      load.settle(
        try client.run(.read, offset: 0, length: image.sectors * 512), after: "round \(round)")
      let depth = 1 + Int(seeds.next() % 16)
      let end = milliseconds() + Int(seeds.next() % 60)
      while milliseconds() < end {
        try load.turn(client, depth: depth, milliseconds: 1)
      }
      if round % 8 == 3 {
        // Told to stop, it makes durable what it was given.
        try load.drain(client)
        let start = load.model.beginFlush()
        try cowd.stop()
        load.model.flushed(start)
      } else {
        try cowd.kill9()
      }
      try load.takeRest(client)
      load.forget()
      try image.check()
      let messages = load.wrongs.isEmpty ? "" : try cowd.messages()
      #expect(load.wrongs == [], "\(messages)")
      guard load.wrongs.isEmpty else { return }
    }
    print("killed by hand, blocks of \(blockSize): \(Self.kills) rounds, \(load.replies) replies")
    #expect(load.replies > Self.kills)
  }

  /// The judge itself: an image from which a confirmed write is taken away is noticed.
  @Test func aLostWriteWouldBeNoticed() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096)
    let load = RandomLoad(image.model(), seed: 1, longest: 8, repeats: true)
    let write = load.model.begin(0..<8, stamp: 7)
    load.model.end(write)
    load.model.flushed(load.model.beginFlush())
    let path = image.folder.file("nbd")
    let cowd = try CowdProcess(
      ["-p", "dscow", "--nbd", "unix:\(path)", image.store], folder: image.folder)
    #expect(cowd.line() != nil)
    let client = try TestNBDClient(path: path)
    load.settle(try client.run(.read, offset: 0, length: 256 * 512), after: "nothing")
    #expect(load.wrongs.count == 8)
    try cowd.stop()
  }
}
