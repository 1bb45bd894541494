// SPDX-License-Identifier: Apache-2.0
// A file that is read and written past the page cache: any range of bytes, as with it.

import BlockIO
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite struct DirectTests {
  @Test func anyRangeIsReadAndWrittenPastTheCache() throws {
    var seeds = SeededRandom(announcedAs: "past the page cache")
    // Not on tmpfs, which has nothing but the cache.
    let folder = try TemporaryFolder()
    let path = folder.file("file")
    let file = try FileStore(
      Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600), name: path)
    var model = (0..<200_000).map { UInt8(truncatingIfNeeded: $0 &* 31) }
    try file.write(model, at: 0)
    guard try file.bypassCache(true) else {
      Issue.record("\(path): the file system has no direct I/O")
      return
    }
    #expect(file.bypassesCache)
    for round in 0..<500 {
      let offset = Int(seeds.next() % 220_000)
      let length = 1 + Int(seeds.next() % 20_000)
      if round % 2 == 0 {
        let bytes = [UInt8](repeating: UInt8(truncatingIfNeeded: round), count: length)
        try file.write(bytes, at: UInt64(offset))
        if model.count < offset + length {
          model += [UInt8](repeating: 0, count: offset + length - model.count)
        }
        model.replaceSubrange(offset..<offset + length, with: bytes)
        #expect(file.size == UInt64(model.count))
      } else {
        let read = try file.read(at: UInt64(offset), count: length)
        let there = model.dropFirst(offset).prefix(length)
        #expect(read == there + [UInt8](repeating: 0, count: length - there.count))
      }
    }
    // Another owner of the open file sees how it is.
    let other = try FileStore(try copy(of: file), name: path)
    #expect(other.bypassesCache)
    #expect(try other.read(at: 3, count: 7) == Array(model[3..<10]))
    try file.bypassCache(false)
    #expect(!file.bypassesCache)
    #expect(try file.read(at: 0, count: model.count) == model)
  }

  private func copy(of file: FileStore) throws -> Descriptor {
    let raw = fcntl(file.raw, F_DUPFD_CLOEXEC, 3)
    guard raw >= 0 else { throw IOError.last("duplicate") }
    return Descriptor(owning: raw)
  }
}
