// SPDX-License-Identifier: Apache-2.0
// A store that fills up: the writes wait, the daemon is told, and when there is room again they go
// on by themselves; or they fail, where that is wanted. Needs root, to mount a small file system.

import BlockIO
import Glibc
import SystemIO
import Testing
import TestSupport
import WorkerLink

@Suite("No space", .serialized, .enabled(if: geteuid() == 0)) struct NoSpaceTests {
  /// A disk whose store lies on a tmpfs of 6 MiB that something else has filled.
  private final class Scene {
    let outer: TemporaryFolder
    let image: TestImage
    let daemon: TestDaemon
    let client: TestNBDClient
    let filler: FileStore
    let block = Stamp.sectors(8, 5)

    init(_ change: (inout StartOrder) -> Void = { _ in }) throws {
      outer = try TemporaryFolder()
      guard mount("tmpfs", outer.path, "tmpfs", 0, "size=6m") == 0 else {
        throw IOError.last("mount", outer.path)
      }
      image = try TestImage(sectors: 4096, blockSize: 4096)
      let store = outer.file("store")
      let made = Command("/bin/cp", ["--sparse=always", image.store, store])
      #expect(try made.start().wait(milliseconds: 10_000) == .exited(0))
      daemon = try TestDaemon(image, store: store)
      var order = daemon.order
      change(&order)
      _ = try daemon.startReady(order)
      client = try daemon.attach()
      filler = try FileStore(
        Descriptor(path: outer.file("filler"), flags: O_RDWR | O_CREAT, mode: 0o600),
        name: "filler")
      let piece = [UInt8](repeating: 1, count: 65536)
      var filled: UInt64 = 0
      do throws(IOError) {
        while true {
          try filler.write(piece, at: filled)
          filled += 65536
        }
      } catch { #expect(error.code == ENOSPC) }
    }

    deinit { umount2(outer.path, 2) }

    /// Sends 64 first writes and a flush, and takes replies for a second: those that came.
    func submit() throws -> [TestNBDClient.Reply] {
      for number in 0..<64 {
        _ = client.submit(
          .write, offset: UInt64(number) * 4096, length: block.count, data: block)
      }
      return try replies(for: 1000)
    }

    func replies(for time: Int) throws -> [TestNBDClient.Reply] {
      var found: [TestNBDClient.Reply] = []
      let end = milliseconds() + time
      while milliseconds() < end { found += try client.turn(milliseconds: 20) }
      return found
    }

    func makeRoom() throws { try filler.resize(to: 0) }

    func stop() throws {
      try daemon.link.send(.stop)
      #expect(try daemon.worker.process.wait(milliseconds: 10_000) == .exited(0))
    }
  }

  @Test func writesWaitUntilThereIsRoom() throws {
    let scene = try Scene()
    let early = try scene.submit()
    #expect(early.allSatisfy { $0.error == 0 } && early.count < 64)
    #expect(try scene.daemon.event() == .noSpace)
    let status = try scene.daemon.status()
    #expect(status.state == .noSpace && status.error.contains("wait for space"))
    // What is there still reads, and others read meanwhile.
    #expect(try scene.client.run(.read, offset: 64 * 4096, length: 512).count == 512)
    // A flush waits for the space that its commit needs.
    _ = scene.client.submit(.flush)
    let meanwhile = try scene.replies(for: 500)
    #expect(meanwhile.allSatisfy { $0.error == 0 })
    try scene.makeRoom()
    let late = try scene.replies(for: 3500)
    #expect(late.allSatisfy { $0.error == 0 })
    #expect(early.count + meanwhile.count + late.count == 65)
    #expect(try scene.daemon.event() == .ready)
    try scene.client.run(.flush)
    for number in 0..<64 {
      let read = try scene.client.run(.read, offset: UInt64(number) * 4096, length: 4096)
      #expect(read == scene.block)
    }
    #expect(try scene.daemon.status().state == .ready)
    try scene.stop()
  }

  @Test func writesFailAtOnceWhereThatIsWanted() throws {
    let scene = try Scene { $0.failsWhenFull = true }
    let replies = try scene.submit()
    #expect(replies.count == 64 && replies.contains { $0.error == UInt32(ENOSPC) })
    #expect(try scene.daemon.event() == .noSpace)
    try scene.makeRoom()
    try scene.client.run(.write, offset: 0, length: 4096, data: scene.block)
    try scene.client.run(.write, offset: 63 * 4096, length: 4096, data: scene.block)
    try scene.client.run(.flush)
    #expect(try scene.daemon.event() == .ready)
    try scene.stop()
  }

  /// After its time a write fails, and so do those that follow, until there is room.
  @Test func waitingHasALimit() throws {
    let scene = try Scene { $0.fullTimeout = 2 }
    let early = try scene.submit()
    let late = try scene.replies(for: 3000)
    #expect(early.count + late.count == 64)
    #expect(late.contains { $0.error == UInt32(ENOSPC) })
    #expect(throws: IOError(ENOSPC, "do", "write")) {
      try scene.client.run(.write, offset: 63 * 4096, length: 4096, data: scene.block)
    }
    try scene.makeRoom()
    try scene.client.run(.write, offset: 63 * 4096, length: 4096, data: scene.block)
    #expect(try scene.daemon.status().state == .ready)
    try scene.stop()
  }

  /// The kernel takes another socket when a request takes long: what waits is sent again there.
  @Test func whatWaitsMovesToAnotherSocket() throws {
    let scene = try Scene()
    let early = try scene.submit()
    #expect(early.count < 64)
    let next = try scene.daemon.attach()
    #expect(try next.run(.read, offset: 64 * 4096, length: 512).count == 512)
    for number in 0..<64 {
      _ = next.submit(.write, offset: UInt64(number) * 4096, length: 4096, data: scene.block)
    }
    try scene.makeRoom()
    var done = 0
    let end = milliseconds() + 5000
    while done < 64, milliseconds() < end {
      for reply in try next.turn(milliseconds: 20) {
        #expect(reply.error == 0)
        done += 1
      }
    }
    #expect(done == 64)
    try scene.stop()
  }

  /// A worker that is told to stop does not wait for room: it ends, and what it could not
  /// commit is in the pending log.
  @Test func stoppingDoesNotWait() throws {
    let scene = try Scene()
    _ = try scene.submit()
    try scene.daemon.link.send(.stop)
    #expect(try scene.daemon.worker.process.wait(milliseconds: 10_000) != nil)
  }
}
