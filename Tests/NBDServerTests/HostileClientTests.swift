// SPDX-License-Identifier: Apache-2.0
// Clients that mean ill, or do badly: the server stays up, stays small, and serves others.

import Glibc
import SystemIO
import Testing
import TestSupport

@testable import NBDServer
@testable import Target

@Suite(.serialized) struct HostileClientTests {
  /// A good client gets what it wants.
  private func checkService(_ server: TestServer, sourceLocation: SourceLocation = #_sourceLocation)
    throws
  {
    let client = try RawClient(server.socket)
    try client.go()
    try client.request(0, 77, 0, 4096)
    #expect(try client.simpleReply() == (0, 77), sourceLocation: sourceLocation)
    _ = try client.receive(4096)
    try client.request(2, 78)
  }

  @Test func garbage() throws {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    let seed = UInt64(time.tv_nsec)
    var random = SplitMix64(seed: seed)
    let server = try TestServer()
    defer { server.end() }
    for round in 0..<150 {
      let client = try RawClient(server.socket)
      do {
        switch random.below(4) {
        case 0: break
        case 1: try client.greet()
        default: try client.go(structured: random.chance(50))
        }
        var bytes: [UInt8] = []
        for _ in 0..<(1 + random.below(20)) {
          switch random.below(4) {
          case 0: bytes += (0..<random.below(100)).map { _ in UInt8(random.below(256)) }
          case 1:
            bytes += RawClient.request(
              UInt16(random.below(9)), random.next(), random.next() >> UInt64(random.below(64)),
              UInt32(truncatingIfNeeded: random.next()) >> UInt32(random.below(32)),
              flags: UInt16(random.below(32)))
          case 2:
            bytes += Array("IHAVEOPT".utf8)
            bytes.put(UInt32(random.below(12)))
            bytes.put(UInt32(random.below(40)))
          default: bytes += [UInt8](repeating: 0, count: random.below(5000))
          }
        }
        try client.send(bytes)
      } catch {
        // It may have been thrown out already, and that is its own business.
        _ = error
      }
      if round % 30 == 29 { try checkService(server) }
    }
    print("seed \(seed)")
    try checkService(server)
    for _ in 0..<100 { server.onLoop { _ in usleep(1000) } }
    server.onLoop { #expect($0.export.sessionCount <= 1, "seed \(seed)") }
  }

  @Test func whoDoesNotReadGetsNoMore() throws {
    var options = NBDExport.Options()
    options.maxBytes = 4 << 20
    let server = try TestServer(size: 64 << 20, options: options)
    defer { server.end() }
    let client = try RawClient(server.socket)
    try client.go()
    let count = 200
    try client.send(
      (0..<count).flatMap { RawClient.request(0, UInt64($0), UInt64($0 % 32) << 20, 1 << 20) })
    for _ in 0..<20 {
      usleep(5000)
      server.onLoop { parts in
        let bytes = parts.export.bufferBytes
        #expect(bytes <= 6 << 20, "\(bytes) bytes held for one connection")
      }
    }
    try checkService(server)
    var seen: Set<UInt64> = []
    for _ in 0..<count {
      let reply = try client.simpleReply()
      #expect(reply.error == 0)
      seen.insert(reply.cookie)
      _ = try client.receive(1 << 20)
    }
    #expect(seen.count == count)
  }

  @Test func moreRequestsThanAllowedWait() throws {
    var options = NBDExport.Options()
    options.maxRequests = 4
    let server = try TestServer(options: options)
    defer { server.end() }
    let client = try RawClient(server.socket)
    try client.go()
    // First writes, flushes and reads, far more than may be under way, in one piece.
    var bytes: [UInt8] = []
    for index in 0..<300 as Range<UInt64> {
      switch index % 3 {
      case 0:
        bytes += RawClient.request(1, index, index % 100 * 65536 + 512, 512)
        bytes += Stamp.sectors(1, index + 1)
      case 1: bytes += RawClient.request(3, index)
      default: bytes += RawClient.request(0, index, (index - 2) % 100 * 65536 + 512, 512)
      }
    }
    try client.send(bytes)
    var seen: Set<UInt64> = []
    for _ in 0..<300 {
      let reply = try client.simpleReply()
      #expect(reply.error == 0)
      seen.insert(reply.cookie)
      if reply.cookie % 3 == 2 { _ = try client.receive(512) }
    }
    #expect(seen.count == 300)
  }

  @Test func halfClosedIsAnswered() throws {
    let server = try TestServer()
    defer { server.end() }
    let client = try RawClient(server.socket)
    try client.go()
    try client.send(
      (0..<50).flatMap {
        RawClient.request(1, UInt64($0), UInt64($0) * 4096, 512)
          + Stamp.sectors(1, 9)
      } + RawClient.request(3, 50))
    shutdown(client.socket.raw, Int32(SHUT_WR))
    var seen: Set<UInt64> = []
    for _ in 0...50 { seen.insert(try client.simpleReply().cookie) }
    #expect(seen.count == 51)
    #expect(client.isClosed())
  }

  @Test func whoVanishesLeavesNothing() throws {
    let server = try TestServer()
    defer { server.end() }
    for size in [0, 1, 27, 28, 500, 70000, 200_000] {
      let client = try RawClient(server.socket)
      try client.go()
      let whole =
        RawClient.request(1, 1, 0, 300_000) + [UInt8](repeating: 1, count: 300_000)
      try client.send(Array(whole[..<size]))
    }
    // An incomplete write is not done, not even in part.
    let client = try RawClient(server.socket)
    try client.go()
    try client.request(0, 1, 0, 512)
    #expect(try client.simpleReply() == (0, 1))
    #expect(try client.receive(512) == Stamp.sectors(1, 1000))
    for _ in 0..<50 { server.onLoop { _ in usleep(1000) } }
    server.onLoop { #expect($0.export.sessionCount == 1) }
  }

  @Test func connectionsAreCounted() throws {
    var options = NBDExport.Options()
    options.maxConnections = 2
    options.handshakeTime = 100
    let server = try TestServer(options: options)
    defer { server.end() }
    let first = try RawClient(server.socket)
    let second = try RawClient(server.socket)
    try first.greet()
    _ = try second.receive(18)
    let third = try RawClient(server.socket)
    #expect(third.isClosed())
    // Who does not finish the handshake makes room for others.
    for _ in 0..<400 { server.onLoop { _ in usleep(10000) } }
    #expect(second.isClosed())
    try checkService(server)
  }

  @Test func slowWriterDoesNotStopOthers() throws {
    let server = try TestServer()
    defer { server.end() }
    let slow = try RawClient(server.socket)
    try slow.go()
    let whole = RawClient.request(1, 1, 0, 200_000) + [UInt8](repeating: 1, count: 200_000)
    for start in stride(from: 0, to: whole.count, by: 20_011) {
      try slow.send(Array(whole[start..<min(start + 20_011, whole.count)]))
      try checkService(server)
    }
    #expect(try slow.simpleReply() == (0, 1))
  }
}
