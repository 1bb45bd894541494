// SPDX-License-Identifier: Apache-2.0
// An NBD server on a thread of the test's process: a target over real files, the shift
// format as its worker, and a Unix socket.

import BlockIO
import Glibc
import Synchronization
import SystemIO
import TargetTrials
import TestSupport

@testable import NBDServer
@testable import Target

/// What lives on the server's thread.
final class TestServerParts {
  let loop: EventLoop
  let pool: ThreadPool
  let target: UserTarget
  let worker: ShiftWorker
  let export: NBDExport

  init(folder: TemporaryFolder, size: UInt64, medium: ShiftMedium, options: NBDExport.Options)
    throws
  {
    loop = try EventLoop()
    pool = try ThreadPool(loop: loop, threads: 2)
    let store = try FileStore(path: folder.file("store"), writable: true)
    let base = try FileStore(path: folder.file("base"), writable: false)
    target = try UserTarget(
      size: size, blockSize: 65536,
      executor: PoolExecutor(pool: pool, devices: [store, base]),
      log: PendingLog(anonymousFor: size, blockSize: 65536))
    worker = ShiftWorker(target: target, medium: medium, lateness: 0, seed: 1)
    export = NBDExport(target: target, loop: loop, options: options)
    loop.addStage(.answer) { [worker] in
      var any = false
      do {
        while try worker.pump() { any = true }
      } catch {
        preconditionFailure("\(error)")
      }
      return any
    }
    try export.listen(UnixSocket.listen(at: folder.file("socket"), kind: .stream))
  }
}

/// The server. `end` has to be called.
// `errands` is guarded by its mutex; the rest does not change.
final class TestServer: @unchecked Sendable {
  typealias Errand = @Sendable (TestServerParts) throws -> Void
  let folder: TemporaryFolder
  let medium = ShiftMedium()
  let size: UInt64
  private let bell: Descriptor
  private let listener: Descriptor
  private let errands = Mutex<[Errand]>([])
  private var thread = pthread_t()
  private let options: NBDExport.Options

  var socket: String { folder.file("socket") }
  var uri: String { "nbd+unix:///?socket=\(socket)" }

  /// A disk of so many bytes over a base of stamps, of which the last eighth is missing.
  init(size: UInt64 = 8 << 20, options: NBDExport.Options = NBDExport.Options()) throws {
    folder = try TemporaryFolder()
    self.size = size
    self.options = options
    for (name, length) in [("store", size + 65536), ("base", size - size / 8)] {
      let file = try FileStore(
        Descriptor(path: folder.file(name), flags: O_RDWR | O_CREAT, mode: 0o600), name: name)
      try file.resize(to: length)
      guard name == "base" else { continue }
      for first in stride(from: 0, to: length / 512, by: 2048) {
        let count = min(2048, length / 512 - first)
        try file.write((0..<count).flatMap { Stamp.sectors(1, 1000 + first + $0) }, at: first * 512)
      }
    }
    var ends: [Int32] = [-1, -1]
    guard pipe(&ends) == 0 else { throw IOError.last("make a pipe") }
    bell = Descriptor(owning: ends[0])
    listener = Descriptor(owning: ends[1])
    let result = pthread_create(
      &thread, nil,
      { context in
        guard let context else { return nil }
        Unmanaged<TestServer>.fromOpaque(context).takeRetainedValue().serve()
        return nil
      }, Unmanaged.passRetained(self).toOpaque())
    guard result == 0 else { throw IOError(result, "start a thread") }
    onLoop { _ in }
  }

  private func serve() {
    do {
      let parts = try TestServerParts(folder: folder, size: size, medium: medium, options: options)
      let registration = try parts.loop.add(bell.raw, for: .readable) { [unowned parts] _ in
        var byte: UInt8 = 0
        guard read(self.bell.raw, &byte, 1) == 1 else { return }
        let errand = self.errands.withLock { $0.isEmpty ? nil : $0.removeFirst() }
        do { try errand?(parts) } catch { preconditionFailure("\(error)") }
      }
      try parts.loop.run()
      parts.export.close()
      while parts.target.outstanding > 0 { try parts.loop.turn(timeout: 10) }
      for _ in 0..<3 { try parts.loop.turn(timeout: 0) }
      // The loop's handlers hold this server, and with it the folder.
      parts.loop.remove(registration)
      parts.pool.shutdown()
    } catch {
      preconditionFailure("\(error)")
    }
  }

  /// Does something on the server's thread and waits for it.
  func onLoop(_ body: @escaping Errand) {
    let done = UnsafeMutablePointer<sem_t>.allocate(capacity: 1)
    sem_init(done, 0, 0)
    // A semaphore is there to be shared by threads; it is freed after the wait for it.
    nonisolated(unsafe) let shared = done
    errands.withLock {
      $0.append { parts in
        defer { sem_post(shared) }
        try body(parts)
      }
    }
    var byte: UInt8 = 1
    precondition(write(listener.raw, &byte, 1) == 1)
    while sem_wait(done) != 0 {}
    sem_destroy(done)
    done.deallocate()
  }

  func end() {
    onLoop { $0.loop.stop() }
    pthread_join(thread, nil)
  }
}

/// A client that speaks byte for byte, and waits.
final class RawClient {
  let socket: Descriptor

  init(_ path: String) throws {
    socket = try UnixSocket.connect(to: path, kind: .stream)
    patience(5)
  }

  init(_ socket: consuming Descriptor) {
    self.socket = socket
    patience(5)
  }

  /// Seconds after which receiving gives up.
  private func patience(_ seconds: Int) {
    var time = timeval(tv_sec: seconds, tv_usec: 0)
    setsockopt(socket.raw, SOL_SOCKET, SO_RCVTIMEO, &time, socklen_t(MemoryLayout<timeval>.size))
  }

  func send(_ bytes: [UInt8]) throws {
    var done = 0
    while done < bytes.count {
      let count = bytes.withUnsafeBytes {
        Glibc.send(socket.raw, $0.baseAddress! + done, bytes.count - done, Int32(MSG_NOSIGNAL))
      }
      guard count > 0 else { throw IOError.last("send") }
      done += count
    }
  }

  /// Exactly so many bytes. Throws ENOTCONN at the end, EAGAIN when nothing comes.
  func receive(_ count: Int) throws -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var done = 0
    while done < count {
      let got = bytes.withUnsafeMutableBytes {
        recv(socket.raw, $0.baseAddress! + done, count - done, 0)
      }
      guard got != 0 else { throw IOError(ENOTCONN, "receive") }
      guard got > 0 else { throw IOError.last("receive") }
      done += got
    }
    return bytes
  }

  /// Whether the other end has closed, as far as one can tell by waiting.
  func isClosed() -> Bool {
    do {
      while true { _ = try receive(1) }
    } catch {
      return (error as? IOError)?.code == ENOTCONN || (error as? IOError)?.code == ECONNRESET
    }
  }

  func number<Number: FixedWidthInteger>(_ type: Number.Type) throws -> Number {
    try receive(MemoryLayout<Number>.size).reduce(0) { $0 << 8 | Number(truncatingIfNeeded: $1) }
  }

  // MARK: Handshake

  func greet(flags: UInt32 = 3) throws {
    guard try receive(18) == Array("NBDMAGICIHAVEOPT".utf8) + [0, 3] else {
      throw IOError(EPROTO, "greet")
    }
    var bytes: [UInt8] = []
    bytes.put(flags)
    try send(bytes)
  }

  func option(_ option: UInt32, _ data: [UInt8] = []) throws {
    var bytes = Array("IHAVEOPT".utf8)
    bytes.put(option)
    bytes.put(UInt32(data.count))
    try send(bytes + data)
  }

  func optionReply() throws -> (option: UInt32, type: UInt32, data: [UInt8]) {
    guard try number(UInt64.self) == 0x3e889045565a9 else { throw IOError(EPROTO, "negotiate") }
    let option = try number(UInt32.self)
    let type = try number(UInt32.self)
    return (option, type, try receive(Int(number(UInt32.self))))
  }

  /// The name "" and no wishes.
  static let emptyInfo: [UInt8] = [0, 0, 0, 0, 0, 0]

  /// To the transmission phase.
  func go(structured: Bool = false, status: Bool = false) throws {
    try greet()
    if structured {
      try option(8)
      guard try optionReply().type == 1 else { throw IOError(EPROTO, "negotiate") }
    }
    if status {
      var data: [UInt8] = [0, 0, 0, 0, 0, 0, 0, 1]
      data.put(UInt32("base:allocation".utf8.count))
      try option(10, data + Array("base:allocation".utf8))
      while try optionReply().type != 1 {}
    }
    try option(7, Self.emptyInfo)
    while try optionReply().type != 1 {}
  }

  // MARK: Transmission

  static func request(
    _ command: UInt16, _ cookie: UInt64, _ offset: UInt64 = 0, _ count: UInt32 = 0,
    flags: UInt16 = 0
  ) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.put(UInt32(0x2560_9513))
    bytes.put(flags)
    bytes.put(command)
    bytes.put(cookie)
    bytes.put(offset)
    bytes.put(count)
    return bytes
  }

  func request(
    _ command: UInt16, _ cookie: UInt64, _ offset: UInt64 = 0, _ count: UInt32 = 0,
    flags: UInt16 = 0, _ data: [UInt8] = []
  ) throws {
    try send(Self.request(command, cookie, offset, count, flags: flags) + data)
  }

  func simpleReply() throws -> (error: UInt32, cookie: UInt64) {
    guard try number(UInt32.self) == 0x67446698 else { throw IOError(EPROTO, "read a reply") }
    return (try number(UInt32.self), try number(UInt64.self))
  }

  func chunk() throws -> (flags: UInt16, type: UInt16, cookie: UInt64, data: [UInt8]) {
    guard try number(UInt32.self) == 0x668e33ef else { throw IOError(EPROTO, "read a chunk") }
    let flags = try number(UInt16.self)
    let type = try number(UInt16.self)
    let cookie = try number(UInt64.self)
    return (flags, type, cookie, try receive(Int(number(UInt32.self))))
  }
}
