// SPDX-License-Identifier: Apache-2.0
// Offsets and lengths that no file has: an image may name any, and a file may be as long as there
// are any. They are refused by the kernel, and trap nobody.

import Glibc
import Testing
import TestSupport

@testable import BlockIO
@testable import LinuxBlock
@testable import SystemIO

@Suite struct OffsetTests {
  @Test(arguments: [1 << 63, UInt64.max, UInt64.max - 4095, UInt64(Int64.max)])
  func offsetsThatNoFileHas(_ offset: UInt64) throws {
    let folder = try TemporaryFolder()
    let path = folder.file("f")
    let descriptor = try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600)
    let file = try FileStore(descriptor, name: path)
    try file.resize(to: 4096)
    var bytes = [UInt8](repeating: 1, count: 4096)
    #expect(throws: IOError.self) {
      try bytes.withUnsafeMutableBytes { try file.read($0, at: offset) }
    }
    #expect(throws: IOError.self) { try file.write(bytes, at: offset) }
    if offset > UInt64(Int64.max) { #expect(throws: IOError.self) { try file.resize(to: offset) } }
    #expect(file.size == 4096)
  }

  /// Space is reserved only where there is four times as much: else it is what others are writing to.
  @Test func theLastSpaceIsNotReserved() throws {
    let folder = try TemporaryFolder()
    let path = folder.file("f")
    let file = try FileStore(
      try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600), name: path)
    let free = try #require(try file.freeBytes())
    try file.resize(to: free)
    do throws(IOError) {
      try file.reserve(at: 0, count: free / 2)
      Issue.record("half of what is free is reserved")
    } catch { #expect(error.code == ENOSPC) }
    #expect(try file.allocatedBytes() == 0)
    try file.reserve(at: 0, count: 1 << 20)
    #expect(try file.allocatedBytes() == 1 << 20 && file.size == free)
  }

  @Test func aFileAsLongAsFilesCanBeIsNotLengthened() throws {
    // A file system that has such files.
    let path = "/dev/shm/dmu-test-\(getpid())"
    let descriptor = try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600)
    defer { unlink(path) }
    let longest = off_t.max / 4096 * 4096
    try #require(ftruncate(descriptor.raw, longest) == 0)
    for growth in [UInt64(4096), 1 << 40, 1 << 62] {
      #expect(try LoopDevice.stretch(descriptor.raw, path, by: growth) == nil)
    }
    var status = stat()
    #expect(fstat(descriptor.raw, &status) == 0)
    #expect(status.st_size == longest)
    try #require(ftruncate(descriptor.raw, 4096) == 0)
    #expect(try LoopDevice.stretch(descriptor.raw, path, by: 1 << 62) == 4096)
  }
}
