// SPDX-License-Identifier: Apache-2.0
// cowd by hand on a Unix socket: what it says, what it refuses, what it leaves.

import Glibc
import SystemIO
import Testing
import TestSupport

@Suite("By hand") struct ByHandTests {
  private func run(_ arguments: [String], _ folder: TemporaryFolder) throws
    -> (status: SystemIO.ExitStatus?, messages: String)
  {
    let cowd = try CowdProcess(arguments, folder: folder)
    let status = try cowd.process.wait(milliseconds: 10_000)
    return (status, try cowd.messages())
  }

  @Test func itIsReadyAtOnceAndLeavesNothing() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096)
    let path = image.folder.file("a b.sock")
    var begin = milliseconds()
    var cowd = try CowdProcess(
      ["-p", "dscow", "--nbd", "unix:\(path)", image.store], folder: image.folder)
    var line = try #require(cowd.line())
    var taken = milliseconds() - begin
    // On a machine that other tests keep busy the first try may say nothing about cowd.
    for _ in 0..<4 where taken >= 1000 {
      try cowd.stop()
      begin = milliseconds()
      cowd = try CowdProcess(
        ["-p", "dscow", "--nbd", "unix:\(path)", image.store], folder: image.folder)
      line = try #require(cowd.line())
      taken = milliseconds() - begin
    }
    #expect(line.hasSuffix("nbdinfo 'nbd+unix:///?socket=\(image.folder.path)/a%20b.sock'"))
    #expect(taken < 1000, "\(taken) ms to be ready")
    let client = try TestNBDClient(path: path)
    try client.run(.write, offset: 1024, length: 512, data: Stamp.sectors(1, 5))
    #expect(try client.run(.read, offset: 1024, length: 512) == Stamp.sectors(1, 5))
    try cowd.stop()
    #expect(access(path, F_OK) != 0, "the socket is removed")
    #expect(try cowd.messages() == "")
    print("cowd --nbd was ready after \(taken) ms")

    // Not flushed by the client, and there all the same.
    let again = try CowdProcess(
      ["-p", "dscow", "--nbd", "unix:\(path)", image.store, "--read-only"], folder: image.folder)
    #expect(again.line() != nil)
    let reader = try TestNBDClient(path: path)
    #expect(try reader.run(.read, offset: 1024, length: 512) == Stamp.sectors(1, 5))
    #expect(throws: IOError.self) {
      try reader.run(.write, offset: 0, length: 512, data: Stamp.sectors(1, 6))
    }
    try again.stop()
  }

  @Test func whatItCannotDoItSaysInASentence() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096)
    let socket = "unix:" + image.folder.file("s")
    func expect(
      _ sentence: String, _ arguments: [String], status: Int32 = 1,
      from location: SourceLocation = #_sourceLocation
    ) throws {
      let result = try run(arguments, image.folder)
      #expect(result.status == .exited(status), sourceLocation: location)
      #expect(
        result.messages.contains(sentence), "it says \(result.messages)", sourceLocation: location)
    }
    try expect(
      "cowd: format 'foo' is unknown: this dmu-xen has dscow, ",
      ["-p", "foo", "--nbd", socket, image.store])
    let missing = image.folder.file("none")
    try expect(
      "store \(missing) does not exist: make it with 'dscow_tool -c \(missing) BASE'\n",
      ["-p", "dscow", "--nbd", socket, missing])
    try expect(
      "base \(missing) does not exist: put it back, or say with --base where it is\n",
      ["-p", "dscow", "--nbd", socket, image.store, "--base", missing])
    try expect("Say the image's format", ["--nbd", socket, image.store], status: 64)
    try expect("write --nbd unix:PATH", ["-p", "dscow", "--nbd", "/x", image.store], status: 64)
    try expect("say only the STORE", ["-p", "dscow", "--nbd", socket, "a", "b"], status: 64)
    try expect("Say the NAME", ["-p", "dscow", image.store], status: 64)
    try expect(
      "'x' is no transport", ["-p", "dscow", "--transport", "x", "a", image.store], status: 64)
    try expect("cannot be the name of a device", ["-p", "dscow", "a/b", image.store])
  }

  /// What is no file is refused, not waited for: a FIFO has no other end here.
  @Test func oddFilesAreRefused() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096)
    let socket = "unix:" + image.folder.file("s")
    let fifo = image.folder.file("fifo")
    guard mkfifo(fifo, 0o600) == 0 else { throw IOError.last("make", fifo) }
    for (path, kind) in [
      (fifo, "a FIFO"), ("/dev/zero", "a character device"), (image.folder.path, "a directory"),
    ] {
      for (role, arguments) in [
        ("store", ["-p", "dscow", "--nbd", socket, path]),
        ("store", ["-p", "raw", "--read-only", "--nbd", socket, path]),
        ("base", ["-p", "dscow", "--nbd", socket, "--base", path, image.store]),
      ] {
        let result = try run(arguments, image.folder)
        #expect(result.status == .exited(1), "\(arguments)")
        #expect(
          result.messages.contains(
            "\(role) \(path) is \(kind): give a regular file or a block device"),
          "it says \(result.messages)")
      }
    }
  }

  @Test(.enabled(if: access("/dev/mapper/control", R_OK | W_OK) != 0))
  func aMissingDeviceMapperIsNamed() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096)
    let result = try run(
      ["-p", "dscow", "--transport", "dm", "name", image.store], image.folder)
    #expect(result.status == .exited(1))
    #expect(
      result.messages.contains("no device-mapper target 'userspace'"), "\(result.messages)")
  }

  @Test func oneWorkerAStoreAndOnePathASocket() throws {
    let image = try TestImage(sectors: 256, blockSize: 4096)
    let other = try TestImage(sectors: 256, blockSize: 4096)
    let path = image.folder.file("s")
    let cowd = try CowdProcess(
      ["-p", "dscow", "--nbd", "unix:\(path)", image.store], folder: image.folder)
    #expect(cowd.line() != nil)
    let second = try run(
      ["-p", "dscow", "--nbd", "unix:\(path)2", image.store], other.folder)
    #expect(second.status == .exited(1))
    #expect(second.messages.contains("store \(image.store) is in use by another program"))
    let third = try run(["-p", "dscow", "--nbd", "unix:\(path)", other.store], other.folder)
    #expect(third.status == .exited(1))
    #expect(third.messages.contains("\(path) is in use"))
    _ = try TestNBDClient(path: path).run(.read, offset: 0, length: 512)
    try cowd.stop()
  }

  /// Judges from elsewhere: libnbd and QEMU read the same disk.
  @Test(.enabled(if: access("/usr/bin/nbdcopy", X_OK) == 0))
  func otherClientsReadIt() throws {
    let image = try TestImage(sectors: 2048, blockSize: 4096)
    let path = image.folder.file("s")
    let cowd = try CowdProcess(
      ["-p", "dscow", "--nbd", "unix:\(path)", image.store], folder: image.folder)
    #expect(cowd.line() != nil)
    let copy = image.folder.file("copy")
    let uri = "nbd+unix:///?socket=\(path)"
    #expect(
      try Command("/usr/bin/nbdcopy", [uri, copy]).start().wait(milliseconds: 30_000)
        == .exited(0))
    #expect(
      try Command("/usr/bin/cmp", [copy, image.base]).start().wait(milliseconds: 30_000)
        == .exited(0))
    try cowd.stop()
  }
}
