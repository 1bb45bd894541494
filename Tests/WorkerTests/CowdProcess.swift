// SPDX-License-Identifier: Apache-2.0
// cowd as a real process, by hand and supervised; the test plays the daemon.

import BlockIO
import DiskFormats
import Glibc
import SystemIO
import Testing
import TestSupport
import WorkerLink

/// Where built programs are: `DMU_BIN_DIR`, or beside this one.
func program(_ name: String) throws -> String {
  if let folder = getenv("DMU_BIN_DIR") { return String(cString: folder) + "/" + name }
  var buffer = [CChar](repeating: 0, count: 4096)
  let count = readlink("/proc/self/exe", &buffer, buffer.count)
  guard count > 0 else { throw IOError.last("find", "this program") }
  let me = String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
  return me[..<(me.lastIndex(of: "/") ?? me.startIndex)] + "/" + name
}

/// A file of the kernel's, whose length nobody knows before it is read.
func kernelText(_ path: String) throws -> String {
  let file = try Descriptor(path: path, flags: O_RDONLY)
  var bytes = [UInt8](repeating: 0, count: 1 << 16)
  let count = read(file.raw, &bytes, bytes.count)
  guard count >= 0 else { throw IOError.last("read", path) }
  return String(decoding: bytes[..<count], as: UTF8.self)
}

/// A base with a stamp of its own in every sector, and a store over it.
final class TestImage {
  static let baseStamp: UInt64 = 0xb000_0000_0000
  let folder: TemporaryFolder
  let sectors: Int
  var base: String { folder.file("base") }
  var store: String { folder.file("store.dscow") }

  init(sectors: Int, blockSize: UInt32, create: Bool = true) throws {
    folder = try TemporaryFolder()
    self.sectors = sectors
    var bytes: [UInt8] = []
    for sector in 0..<sectors { bytes += Stamp.sectors(1, Self.stamp(sector)) }
    let file = try FileStore(
      Descriptor(path: base, flags: O_RDWR | O_CREAT, mode: 0o600), name: base)
    try file.write(bytes, at: 0)
    let made = try FileStore(
      Descriptor(path: store, flags: O_RDWR | O_CREAT, mode: 0o600), name: store)
    guard create else { return }
    // A relative base starts at the store's folder, and this names it so.
    try Dscow.create(store: made, base: file, baseName: "base", blockSize: blockSize)
  }

  static func stamp(_ sector: Int) -> UInt64 { baseStamp + UInt64(sector) }

  func model() -> NaiveDisk { NaiveDisk(sectors: sectors) { Self.stamp($0) } }

  /// Throws what `dscow_tool check` calls damage.
  func check() throws {
    let result = try Dscow.check(
      store: FileStore(path: store, writable: false),
      base: FileStore(path: base, writable: false))
    #expect(!result.isDamaged, "\(result.findings)")
  }
}

/// A running cowd.
final class CowdProcess {
  let process: ProcessHandle
  private let output: Descriptor
  private let log: Descriptor

  /// `injecting`: what strace is to do to its system calls, as its `-e inject=` has it. Those calls are
  /// told in the folder's file "calls", a line each: the thread, seconds since 1970, the call.
  init(
    _ arguments: [String], descriptors: [Int32: Int32] = [:], injecting: String? = nil,
    folder: TemporaryFolder
  ) throws {
    let pair = try UnixSocket.pair(.stream)
    let path = folder.file("log")
    log = try Descriptor(path: path, flags: O_RDWR | O_CREAT | O_APPEND, mode: 0o600)
    var command = Command(try program("cowd"), arguments)
    if let injecting {
      // With -D it is strace that is the child, and this process cowd's.
      let call = injecting.prefix { $0 != ":" }
      command = Command(
        "/usr/bin/strace",
        [
          "-D", "-f", "-ttt", "-o", folder.file("calls"), "-e", "trace=\(call)", "-e",
          "inject=\(injecting)",
        ]
          + [try program("cowd")] + arguments)
    }
    command.descriptors = descriptors
    command.descriptors[1] = pair.second.raw
    if descriptors[2] == nil { command.descriptors[2] = log.raw }
    process = try command.start()
    output = pair.first
  }

  deinit {
    if !process.hasEnded { _ = kill(process.pid, SIGKILL) }
  }

  /// The next line of standard output; nil when there was none in ten seconds.
  func line() -> String? {
    var bytes: [UInt8] = []
    var item = pollfd(fd: output.raw, events: Int16(POLLIN), revents: 0)
    while poll(&item, 1, 10_000) > 0 {
      var byte: UInt8 = 0
      guard read(output.raw, &byte, 1) == 1 else { return nil }
      if byte == 0x0a { return String(decoding: bytes, as: UTF8.self) }
      bytes.append(byte)
    }
    return nil
  }

  /// Expects it to say that it serves.
  func expectReady() throws {
    guard line() == nil else { return }
    let words = try messages()
    Issue.record("cowd is not ready: \(words)")
  }

  /// All that it said on standard error.
  func messages() throws -> String {
    var buffer = [UInt8](repeating: 0, count: 1 << 16)
    let count = pread(log.raw, &buffer, buffer.count, 0)
    guard count >= 0 else { throw IOError.last("read", "the log") }
    return String(decoding: buffer[..<count], as: UTF8.self)
  }

  /// Ends it at this instant.
  func kill9() throws {
    try process.send(SIGKILL)
    var end = try process.wait(milliseconds: 30_000)
    // A tracer hears of it first.
    for _ in 0..<300 where end == nil {
      usleep(10_000)
      end = try process.wait(milliseconds: 100)
    }
    let words = end == .signalled(SIGKILL) ? "" : try messages()
    #expect(end == .signalled(SIGKILL), "\(words)")
  }

  /// Asks it to end and expects it to do so well.
  func stop() throws {
    try process.send(SIGTERM)
    #expect(try process.wait(milliseconds: 30_000) == .exited(0))
  }
}
