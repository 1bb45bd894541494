// A store that fills up: the write fails, the daemon is told, and when there is room again
// all is well. Needs the right to mount a small file system.

import Glibc
import Posix
import TestSupport
import Testing
import WorkerLink

@Suite("No space", .enabled(if: geteuid() == 0)) struct NoSpaceTests {
  @Test func aFullStoreIsToldAndRecovers() throws {
    let outer = try TemporaryFolder()
    guard mount("tmpfs", outer.path, "tmpfs", 0, "size=6m") == 0 else {
      print("no space: skipped, since mounting is not allowed here")
      return
    }
    defer { umount2(outer.path, 2) }
    let image = try TestImage(sectors: 4096, blockSize: 4096)
    let store = outer.file("store")
    let made = Command("/bin/cp", ["--sparse=always", image.store, store])
    #expect(try made.start().wait(milliseconds: 10_000) == .exited(0))
    let daemon = try TestDaemon(image, store: store)
    _ = try daemon.startReady()
    let client = try daemon.attach()
    let filler = try FileStore(
      Descriptor(path: outer.file("filler"), flags: O_RDWR | O_CREAT, mode: 0o600), name: "filler")
    let piece = [UInt8](repeating: 1, count: 65536)
    var filled: UInt64 = 0
    do throws(IOError) {
      while true {
        try filler.write(piece, at: filled)
        filled += 65536
      }
    } catch { #expect(error.code == ENOSPC) }
    let block = Stamp.sectors(8, 5)
    var failed: Int32 = 0
    var written = 0
    for number in 0..<64 where failed == 0 {
      do throws(IOError) {
        try write(client, block, at: number)
        written += 1
      } catch { failed = error.code }
    }
    #expect(failed == ENOSPC)
    #expect(try daemon.event() == .noSpace)
    let status = try daemon.status()
    #expect(status.state == .noSpace && !status.error.isEmpty)
    // What is there still reads and can still be written.
    if written > 0 { try write(client, block, at: 0) }
    #expect(try client.run(.read, offset: 64 * 4096, length: 512).count == 512)
    try filler.resize(to: 0)
    try write(client, block, at: 63)
    try client.run(.flush)
    #expect(try daemon.event() == .ready)
    #expect(try daemon.status().state == .ready)
    try daemon.link.send(.stop)
    #expect(try daemon.worker.process.wait(milliseconds: 10_000) == .exited(0))
  }

  private func write(
    _ client: TestNBDClient, _ bytes: [UInt8], at block: Int
  ) throws(IOError) {
    do {
      try client.run(.write, offset: UInt64(block) * 4096, length: bytes.count, data: bytes)
    } catch let error as IOError { throw error } catch { throw IOError(EPROTO, "write") }
  }
}
