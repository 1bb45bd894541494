// SPDX-License-Identifier: Apache-2.0
// Who may open what while somebody else has it: between this project's programs, and between
// them and QEMU's, either way.

import BlockIO
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite("Locks") struct LockTests {
  private let folder: TemporaryFolder
  private let path: String

  init() throws {
    folder = try TemporaryFolder()
    path = folder.file("image")
    let file = try FileStore(
      Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600), name: path)
    try file.resize(to: 1 << 20)
  }

  private func open() throws -> FileStore { try FileStore(path: path, writable: true) }

  private func isRefused(_ store: FileStore, exclusive: Bool) -> Bool {
    do throws(IOError) {
      try store.lock(exclusive: exclusive)
      return false
    } catch { return error.code == EAGAIN }
  }

  private func succeeds(_ program: String, _ arguments: String...) throws -> Bool {
    let command = Command("/usr/bin/" + program, arguments)
    return try command.start().wait(milliseconds: 30_000) == .exited(0)
  }

  @Test func oneStoreOrManyBases() throws {
    let first = try open()
    try first.lock(exclusive: false)
    let second = try open()
    try second.lock(exclusive: false)
    let third = try open()
    #expect(isRefused(third, exclusive: true))
    // What was refused has left nothing behind.
    let fourth = try open()
    try fourth.lock(exclusive: false)
    do {
      let other = folder.file("other")
      let file = try Descriptor(path: other, flags: O_RDWR | O_CREAT, mode: 0o600)
      let store = try FileStore(file, name: other)
      try store.lock(exclusive: true)
      for exclusive in [true, false] {
        let again = try FileStore(path: other, writable: true)
        #expect(isRefused(again, exclusive: exclusive))
      }
    }
  }

  @Test(.enabled(if: hasQemu)) func qemuReadsABaseInUseAndWritesNothing() throws {
    let base = try open()
    try base.lock(exclusive: false)
    #expect(try succeeds("qemu-img", "info", "-f", "raw", path))
    #expect(try succeeds("qemu-img", "map", "-f", "raw", path))
    #expect(try succeeds("qemu-img", "compare", "-f", "raw", "-F", "raw", path, path))
    #expect(try succeeds("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", path))
    #expect(try !succeeds("qemu-io", "-f", "raw", "-c", "write 0 4k", path))
    #expect(try !succeeds("qemu-img", "resize", "-f", "raw", path, "2M"))
    let overlay = folder.file("overlay")
    #expect(
      try succeeds("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", path, overlay))
    #expect(try succeeds("qemu-io", "-f", "qcow2", "-c", "write 0 4k", overlay))
    #expect(try !succeeds("qemu-img", "commit", "-q", "-f", "qcow2", overlay))
  }

  @Test(.enabled(if: hasQemu)) func qemuLeavesAStoreInUseAlone() throws {
    #expect(try succeeds("qemu-img", "create", "-q", "-f", "qcow2", path, "1M"))
    let store = try open()
    try store.lock(exclusive: true)
    #expect(try !succeeds("qemu-img", "info", "-f", "qcow2", path))
    #expect(try succeeds("qemu-img", "info", "-U", "-f", "qcow2", path))
    #expect(try !succeeds("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4k", path))
    #expect(try !succeeds("qemu-io", "-f", "raw", "-c", "write 0 4k", path))
  }

  @Test(.enabled(if: hasQemu), arguments: [true, false])
  func whatQemuHasIsRespected(_ readOnly: Bool) throws {
    let socket = folder.file("nbd")
    let server = try Command(
      "/usr/bin/qemu-nbd", ["-t", "-f", "raw", "-k", socket] + (readOnly ? ["-r"] : []) + [path]
    ).start()
    defer { _ = kill(server.pid, SIGKILL) }
    for _ in 0..<600 where access(socket, F_OK) != 0 { usleep(50_000) }
    // The socket is there before the image is open; an answer comes after that.
    let client = try TestNBDClient(path: socket)
    #expect(client.size == 1 << 20)
    let mine = try open()
    #expect(isRefused(mine, exclusive: true))
    #expect(isRefused(mine, exclusive: false) == !readOnly)
  }
}
