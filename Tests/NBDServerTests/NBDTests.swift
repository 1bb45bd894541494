// SPDX-License-Identifier: Apache-2.0
// The wire, byte for byte.

import Glibc
import Synchronization
import SystemIO
import TargetTrials
import Testing
import TestSupport

@testable import NBDServer
@testable import Target

@Suite final class NBDTests {
  let server: TestServer

  init() throws { server = try TestServer() }
  deinit { server.end() }

  @Test func optionsAreAnswered() throws {
    let client = try RawClient(server.socket)
    try client.greet()
    try client.option(3)
    let entry = try client.optionReply()
    #expect(entry.type == 2 && entry.data == [0, 0, 0, 0])
    #expect(try client.optionReply().type == 1)
    // TLS by policy not; an option from the future not at all; names that do not exist.
    try client.option(5)
    #expect(try client.optionReply().type == 1 << 31 | 2)
    try client.option(99, [1, 2, 3])
    #expect(try client.optionReply().type == 1 << 31 | 1)
    try client.option(6, [0, 0, 0, 1, 0x78, 0, 0])
    #expect(try client.optionReply().type == 1 << 31 | 6)
    // Malformed ones.
    for data in [[], [0, 0, 0, 9, 1], [0, 0, 0, 0, 0, 1], [255, 255, 255, 255, 0, 0]] as [[UInt8]] {
      try client.option(6, data)
      #expect(try client.optionReply().type == 1 << 31 | 3)
    }
    // Contexts need structured replies first.
    try client.option(10, [0, 0, 0, 0, 0, 0, 0, 0])
    #expect(try client.optionReply().type == 1 << 31 | 3)
    try client.option(8)
    #expect(try client.optionReply().type == 1)
    try client.option(9, [0, 0, 0, 0, 0, 0, 0, 0])
    let context = try client.optionReply()
    #expect(context.type == 4 && context.data.dropFirst(4) == Array("base:allocation".utf8)[...])
    #expect(try client.optionReply().type == 1)
    try client.option(10, [0, 0, 0, 0, 255, 255, 255, 255])
    #expect(try client.optionReply().type == 1 << 31 | 3)
    // Every piece of information, then the end.
    try client.option(6, [0, 0, 0, 0, 0, 2, 0, 1, 0, 2])
    var kinds: [UInt8] = []
    while true {
      let reply = try client.optionReply()
      if reply.type == 1 { break }
      kinds.append(reply.data[1])
    }
    #expect(kinds.sorted() == [0, 1, 3])
    try client.option(2)
    #expect(try client.optionReply().type == 1)
    #expect(client.isClosed())
  }

  @Test(arguments: [1, 3] as [UInt32]) func exportName(flags: UInt32) throws {
    let client = try RawClient(server.socket)
    try client.greet(flags: flags)
    try client.option(1)
    #expect(try client.number(UInt64.self) == server.size)
    let told = try client.number(UInt16.self)
    #expect(told & 0x16d == 0x16d)
    if flags == 1 { #expect(try client.receive(124).allSatisfy { $0 == 0 }) }
    try client.request(0, 7, 512, 1024)
    #expect(try client.simpleReply() == (0, 7))
    let bytes = try client.receive(1024)
    #expect(bytes == Stamp.sectors(1, 1001) + Stamp.sectors(1, 1002))
  }

  @Test func everyCommand() throws {
    let client = try RawClient(server.socket)
    try client.go()
    try client.request(1, 1, 70000, 3, [1, 2, 3])
    #expect(try client.simpleReply() == (0, 1))
    try client.request(0, 2, 69999, 5)
    #expect(try client.simpleReply() == (0, 2))
    let around = try client.receive(5)
    #expect(Array(around[1...3]) == [1, 2, 3])
    try client.request(3, 3)
    #expect(try client.simpleReply() == (0, 3))
    #expect(server.medium.committed.withLock { $0 } == [1])
    // A forced write-zeroes of a block and a bit.
    try client.request(6, 4, 65536, 65536 + 100, flags: 1)
    #expect(try client.simpleReply() == (0, 4))
    #expect(server.medium.committed.withLock { $0 } == [1, 2])
    try client.request(6, 5, 3 * 65536, 65536, flags: 2)
    #expect(try client.simpleReply() == (0, 5))
    try client.request(0, 6, 65536, 65536 + 100)
    #expect(try client.simpleReply() == (0, 6))
    #expect(try client.receive(65636).allSatisfy { $0 == 0 })
    try client.request(4, 7, 0, 1 << 20)
    #expect(try client.simpleReply() == (0, 7))
    // Past the end of the base there are zeroes.
    try client.request(0, 8, server.size - 4096, 4096)
    #expect(try client.simpleReply() == (0, 8))
    #expect(try client.receive(4096).allSatisfy { $0 == 0 })
    try client.request(2, 9)
    #expect(client.isClosed())
  }

  @Test func structuredReplies() throws {
    let client = try RawClient(server.socket)
    try client.go(structured: true, status: true)
    try client.request(0, 1, 1024, 512)
    let data = try client.chunk()
    #expect(data.flags == 1 && data.type == 1 && data.cookie == 1)
    #expect(data.data == [0, 0, 0, 0, 0, 0, 4, 0] + Stamp.sectors(1, 1002))
    // Block status: data, then the hole after the base's end. Only one when asked so.
    let size = UInt32(server.size)
    for (flags, count) in [(0, 2), (8, 1)] as [(UInt16, Int)] {
      try client.request(7, 2, 0, size, flags: flags)
      let status = try client.chunk()
      #expect(status.flags == 1 && status.type == 5 && status.data.count == 4 + 8 * count)
    }
    // What is known to be a hole is told, not sent.
    try client.request(0, 3, server.size - 65536, 65536)
    let hole = try client.chunk()
    #expect(hole.flags == 1 && hole.type == 2 && hole.data.count == 12)
    try client.request(0, 4, server.size, 1)
    let error = try client.chunk()
    #expect(error.flags == 1 && error.type == 0x8001)
    #expect(error.data == [0, 0, 0, 22, 0, 0])
    try client.request(1, 5, 0, 512, Stamp.sectors(1, 5))
    #expect(try client.simpleReply() == (0, 5))
  }

  @Test func nonsenseIsRefused() throws {
    let client = try RawClient(server.socket)
    try client.go()
    let size = server.size
    let nonsense: [(UInt16, UInt64, UInt32, UInt16, UInt32)] = [
      (0, size, 1, 0, 22), (0, size - 1, 2, 0, 22), (0, .max, 1, 0, 22), (0, 0, 0, 0, 22),
      (0, 0, 33 << 20, 0, 22), (0, 0, 512, 1 << 4, 22), (3, 1, 0, 0, 22), (3, 0, 1, 0, 22),
      (4, size, 1, 0, 28), (6, .max, .max, 0, 28), (7, 0, 512, 0, 22), (99, 0, 0, 0, 22),
      (5, 0, 512, 0, 22),
    ]
    for (index, item) in nonsense.enumerated() {
      try client.request(item.0, UInt64(index), item.1, item.2, flags: item.3)
      #expect(try client.simpleReply() == (item.4, UInt64(index)), "\(item)")
    }
    // The payload of a refused write is thrown away, and the next request is understood.
    try client.request(1, 50, size - 1, 70000, [UInt8](repeating: 0x25, count: 70000))
    #expect(try client.simpleReply() == (28, 50))
    try client.request(0, 51, 0, 512)
    #expect(try client.simpleReply() == (0, 51))
    #expect(try client.receive(512) == Stamp.sectors(1, 1000))
    // A write that is larger than anything allowed ends it.
    try client.request(1, 52, 0, 33 << 20)
    #expect(client.isClosed())
  }

  @Test func flushCoversEveryConnection() throws {
    let first = try RawClient(server.socket)
    let second = try RawClient(server.socket)
    try first.go()
    try second.go()
    try first.request(1, 1, 0, 512, Stamp.sectors(1, 7))
    #expect(try first.simpleReply() == (0, 1))
    #expect(server.medium.committed.withLock { $0 }.isEmpty)
    try second.request(3, 1)
    #expect(try second.simpleReply() == (0, 1))
    #expect(server.medium.committed.withLock { $0 } == [0])
    try second.request(0, 2, 0, 512)
    #expect(try second.simpleReply() == (0, 2))
    #expect(try second.receive(512) == Stamp.sectors(1, 7))
  }

  @Test func readOnlyExport() throws {
    var options = NBDExport.Options()
    options.readOnly = true
    let server = try TestServer(options: options)
    defer { server.end() }
    let client = try RawClient(server.socket)
    try client.go()
    for (index, command) in ([1, 4, 6] as [UInt16]).enumerated() {
      let data = command == 1 ? Stamp.sectors(1, 1) : []
      try client.request(command, UInt64(index), 0, 512, data)
      #expect(try client.simpleReply() == (1, UInt64(index)))
    }
    try client.request(3, 9)
    #expect(try client.simpleReply() == (0, 9))
  }

  @Test func transmissionFromTheStart() throws {
    let ends = try UnixSocket.pair(.stream)
    let raw = try ends.second.duplicate().release()
    // Written on the server's thread; an errand that was waited for makes it seen on this one.
    nonisolated(unsafe) var end: NBDEnd?
    server.onLoop { parts in
      try parts.export.serve(Descriptor(owning: raw)) { end = $0 }
    }
    do {
      let client = RawClient(try ends.first.duplicate())
      try client.request(0, 1, 512, 512)
      #expect(try client.simpleReply() == (0, 1))
      #expect(try client.receive(512) == Stamp.sectors(1, 1001))
      try client.request(2, 2)
    }
    for _ in 0..<200 where end == nil {
      usleep(10000)
      server.onLoop { _ in }
    }
    #expect(end == .disconnected)
  }
}
