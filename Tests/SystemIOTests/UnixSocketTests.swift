// SPDX-License-Identifier: Apache-2.0
import Glibc
import SystemIO
import Testing
import TestSupport

@Suite("Unix sockets") struct UnixSocketTests {
  @Test func packetsKeepTheirBoundsAndCarryDescriptors() throws {
    let folder = try TemporaryFolder()
    let pair = try UnixSocket.pair(.packets)
    let file = try Descriptor(path: folder.file("f"), flags: O_RDWR | O_CREAT, mode: 0o600)
    #expect(write(file.raw, "hello", 5) == 5)
    try PacketSocket.send([1, 2, 3], descriptors: [file.raw, file.raw], to: pair.first.raw)
    try PacketSocket.send([4], to: pair.first.raw)
    guard
      case .packet([1, 2, 3], let passed) = try PacketSocket.receive(
        from: pair.second.raw, limit: 100)
    else {
      Issue.record("the first packet did not come whole")
      return
    }
    #expect(passed.count == 2)
    let received = try #require(passed[0].raw)
    #expect(fcntl(received, F_GETFD) & FD_CLOEXEC != 0)
    var buffer = [UInt8](repeating: 0, count: 5)
    #expect(pread(received, &buffer, 5, 0) == 5)
    _ = passed[0].take()
    #expect(passed[0].raw == nil)
    #expect(buffer == Array("hello".utf8))
    guard
      case .packet([4], let none) = try PacketSocket.receive(
        from: pair.second.raw, limit: 100)
    else {
      Issue.record("the second packet did not come")
      return
    }
    #expect(none.isEmpty)
    guard case .none = try PacketSocket.receive(from: pair.second.raw, limit: 100) else {
      Issue.record("a third packet came")
      return
    }
  }

  @Test func aPacketTooLongOrTheEndAreTold() throws {
    let pair = try UnixSocket.pair(.packets)
    let first = PassedDescriptor(pair.first)
    let second = pair.second
    try PacketSocket.send(Array(repeating: 7, count: 101), to: try #require(first.raw))
    guard case .tooLarge = try PacketSocket.receive(from: second.raw, limit: 100) else {
      Issue.record("a long packet was taken")
      return
    }
    _ = first.take()
    guard case .end = try PacketSocket.receive(from: second.raw, limit: 100) else {
      Issue.record("the end was not told")
      return
    }
    #expect(throws: IOError(EPIPE, "send a packet")) {
      try PacketSocket.send([1], to: second.raw)
    }
  }

  @Test func descriptorsNotTakenAreClosed() throws {
    let before = try openDescriptors()
    do {
      let pair = try UnixSocket.pair(.packets)
      for _ in 0..<4 {
        try PacketSocket.send([1], descriptors: Array(repeating: 0, count: 8), to: pair.first.raw)
        guard
          case .packet(_, let passed) = try PacketSocket.receive(
            from: pair.second.raw, limit: 10)
        else {
          Issue.record("no packet")
          return
        }
        #expect(passed.count == 8)
      }
    }
    #expect(try openDescriptors() == before)
  }

  @Test func aConnectionThatNobodyTakesIsGivenUp() throws {
    let folder = try TemporaryFolder()
    let path = folder.file("s")
    let listener = try UnixSocket.listen(at: path, kind: .packets, backlog: 0)
    let first = try UnixSocket.connect(to: path, kind: .packets, milliseconds: 200)
    let start = ContinuousClock.now
    #expect(throws: IOError(ETIMEDOUT, "connect to", path)) {
      _ = try UnixSocket.connect(to: path, kind: .packets, milliseconds: 200)
    }
    #expect(ContinuousClock.now - start < .seconds(5))
    #expect(first.raw >= 0 && listener.raw >= 0)
  }

  @Test func aCloserClosesWhatNobodyTakesOnItsOwnThread() throws {
    let pair = try UnixSocket.pair(.packets)
    let carried = try UnixSocket.pair(.stream)
    let watched = try carried.first.duplicate()
    do {
      let other = try carried.second.duplicate()
      for count in [8, 1] {
        try PacketSocket.send(
          [1], descriptors: Array(repeating: other.raw, count: count), to: pair.first.raw)
      }
    }
    let ends = carried
    try ends.second.close()
    for _ in 0..<2 {
      _ = try PacketSocket.receive(from: pair.second.raw, limit: 10, closer: Closer())
    }
    var byte: UInt8 = 0
    var count = -1
    for _ in 0..<500 where count != 0 {
      count = recv(watched.raw, &byte, 1, Int32(MSG_DONTWAIT))
      if count != 0 { usleep(10_000) }
    }
    #expect(count == 0, "every copy of the other end is closed")
  }

  @Test func aStaleSocketIsReplacedAndALiveOneIsNot() throws {
    let folder = try TemporaryFolder()
    let path = folder.file("s")
    do { _ = try UnixSocket.listen(at: path, kind: .stream) }
    let live = try UnixSocket.listen(at: path, kind: .stream)
    #expect(throws: IOError(EADDRINUSE, "listen on", path)) {
      _ = try UnixSocket.listen(at: path, kind: .stream)
    }
    var status = stat()
    #expect(lstat(path, &status) == 0)
    #expect(status.st_mode & 0o777 == 0o600)
    let client = try UnixSocket.connect(to: path, kind: .stream)
    guard let server = try UnixSocket.accept(from: live.raw) else {
      Issue.record("nobody connected")
      return
    }
    let peer = try UnixSocket.peer(of: server.raw)
    #expect(peer.pid == getpid() && peer.uid == geteuid() && peer.gid == getegid())
    let number = client.raw
    #expect(number >= 0)

    let file = folder.file("f")
    _ = try Descriptor(path: file, flags: O_RDWR | O_CREAT, mode: 0o600)
    for replacing in [false, true] {
      #expect(throws: IOError(EADDRINUSE, "listen on", file)) {
        _ = try UnixSocket.listen(at: file, kind: .stream, replacing: replacing)
      }
    }
    let next = try UnixSocket.listen(at: path, kind: .stream, replacing: true)
    let later = try UnixSocket.connect(to: path, kind: .stream)
    #expect(try UnixSocket.accept(from: next.raw) != nil, "the caller owns the place")
    #expect(later.raw >= 0)
    #expect(throws: IOError.self) {
      _ = try UnixSocket.listen(at: String(repeating: "x", count: 200), kind: .stream)
    }
  }

  /// How many descriptors this process has that are pipes, sockets or files of a test: other
  /// tests run beside this one, so only those of the null device count.
  private func openDescriptors() throws -> Int {
    var count = 0
    var reference = stat()
    guard fstat(0, &reference) == 0 else { throw IOError.last("examine standard input") }
    for number in 3..<Int32(1024) {
      var status = stat()
      if fstat(number, &status) == 0, status.st_ino == reference.st_ino,
        status.st_dev == reference.st_dev
      {
        count += 1
      }
    }
    return count
  }
}
