// SPDX-License-Identifier: Apache-2.0
// The event loop, the thread pool, and the executor over them.

import BlockIO
import Glibc
import Synchronization
import SystemIO
import Testing
import TestSupport

@Suite struct LoopTests {
  @Test func handlersTimersAndStagesTakeTurns() throws {
    let loop = try EventLoop()
    var ends: [Int32] = [-1, -1]
    #expect(pipe(&ends) == 0)
    let reader = Descriptor(owning: ends[0])
    let writer = Descriptor(owning: ends[1])
    var events: [String] = []
    var work = 0
    let registration = try loop.add(reader.raw, for: .readable) { what in
      #expect(what.contains(.readable))
      var byte: UInt8 = 0
      #expect(read(reader.raw, &byte, 1) == 1)
      events.append("handler")
      work = 2
    }
    loop.addStage(.send) {
      if work > 0 { events.append("send") }
      return false
    }
    loop.addStage(.answer) {
      guard work > 0 else { return false }
      work -= 1
      events.append("answer")
      return true
    }
    var byte: UInt8 = 1
    #expect(write(writer.raw, &byte, 1) == 1)
    try loop.turn()
    #expect(events == ["handler", "answer", "send", "answer"])
    // Not waited for any more: what is written is not told of.
    loop.change(registration, to: [])
    #expect(write(writer.raw, &byte, 1) == 1)
    try loop.turn(timeout: 10)
    loop.remove(registration)
    try loop.turn(timeout: 0)
    #expect(events.count == 4)
  }

  @Test func staleEventsAreNotDelivered() throws {
    let loop = try EventLoop()
    let pair = try UnixSocket.pair(.stream)
    let first = try pair.first.duplicate()
    let second = try pair.second.duplicate()
    var byte: UInt8 = 1
    #expect(write(first.raw, &byte, 1) == 1 && write(second.raw, &byte, 1) == 1)
    var registrations: [EventLoop.Registration] = []
    var calls = 0
    for raw in [first.raw, second.raw] {
      registrations.append(
        try loop.add(raw, for: .readable) { _ in
          calls += 1
          // Whoever comes first removes both; the other's event is in the batch already.
          for registration in registrations { loop.remove(registration) }
        })
    }
    try loop.turn(timeout: 0)
    try loop.turn(timeout: 0)
    #expect(calls == 1)
  }

  @Test func timersComeInTimeAndGo() throws {
    let loop = try EventLoop()
    var fired: [Int] = []
    loop.addTimer(after: 30) { fired.append(2) }
    loop.addTimer(after: 1) { fired.append(1) }
    var every: EventLoop.Timer?
    every = loop.addTimer(after: 5, every: 5) {
      fired.append(0)
      if fired.count(where: { $0 == 0 }) == 3, let every { loop.cancel(every) }
    }
    let never = loop.addTimer(after: 10) { fired.append(9) }
    loop.cancel(never)
    loop.addTimer(after: 80) { loop.stop() }
    try loop.run()
    #expect(fired.first == 1 && fired.count(where: { $0 == 0 }) == 3)
    #expect(fired.contains(2) && !fired.contains(9))
  }

  @Test func poolWorksElsewhereAndTellsHere() throws {
    let loop = try EventLoop()
    let pool = try ThreadPool(loop: loop, threads: 3)
    let me = pthread_self()
    let elsewhere = Mutex(0)
    var told = 0
    for index in 0..<500 {
      pool.run {
        if pthread_equal(me, pthread_self()) == 0 { elsewhere.withLock { $0 += 1 } }
        return index % 2 == 0 ? nil : IOError(EIO, "try")
      } then: { error in
        #expect(pthread_equal(me, pthread_self()) != 0)
        #expect((error == nil) == (index % 2 == 0))
        told += 1
      }
    }
    while told < 500 { try loop.turn(timeout: 1000) }
    pool.shutdown()
    #expect(elsewhere.withLock { $0 } == 500)
  }
}

@Suite struct PoolExecutorTests {
  /// Every operation at any place, at once or not, against the same done to an array.
  @Test(arguments: [true, false]) func agreesWithAnArray(inline: Bool) throws {
    let folder = try TemporaryFolder()
    let file = try FileStore(
      Descriptor(path: folder.file("store"), flags: O_RDWR | O_CREAT, mode: 0o600), name: "store")
    let size = 1 << 20
    var model = [UInt8](repeating: 0, count: size)
    let loop = try EventLoop()
    let pool = try ThreadPool(loop: loop, threads: 2)
    let executor = PoolExecutor(pool: pool, devices: [file], inlineLimit: inline ? 1 << 20 : 0)
    var ended: [UInt32: Int32] = [:]
    executor.completion = { ended[$0] = $1 }
    var random = SplitMix64(seed: 11)
    let buffer = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: 4096)
    defer { buffer.deallocate() }
    for token in 0..<600 as Range<UInt32> {
      let operations: [BackingIO.Operation] = [.read, .read, .write, .write, .punch, .zero, .flush]
      let operation = operations[random.below(operations.count)]
      let offset = random.below(size - 1)
      let count = 1 + random.below(min(size - offset, random.chance(10) ? size : 9000))
      let range = offset..<(offset + count)
      for index in 0..<count {
        buffer.storeBytes(of: UInt8(token & 0xff), toByteOffset: index, as: UInt8.self)
      }
      var io = BackingIO(
        operation, device: 0, offset: UInt64(offset), count: count,
        buffer: operation == .read || operation == .write ? buffer : nil, token: token)
      var isDone = false
      while !isDone {
        let done = executor.attempt(io)
        if done < 0 {
          #expect(done == -Int(EAGAIN))
          executor.start(io)
          while ended[token] == nil { try loop.turn(timeout: 1000) }
          #expect(ended[token] == 0)
          isDone = true
        } else {
          io.offset += UInt64(done)
          io.count -= done
          io.buffer = io.buffer.map { $0 + done }
          isDone = io.count == 0
        }
      }
      switch operation {
      case .read:
        let bytes = UnsafeRawBufferPointer(start: buffer, count: count)
        #expect(bytes.elementsEqual(model[range]), "operation \(token)")
      case .write:
        for index in range { model[index] = UInt8(token & 0xff) }
      case .punch, .zero:
        for index in range { model[index] = 0 }
      case .flush: break
      }
    }
    // Where there is data, no hole is told.
    var at: UInt64 = 0
    while at < UInt64(size) {
      let (isHole, count) = executor.hole(0, at: at, limit: UInt64(size) - at)
      #expect(count > 0)
      if isHole { #expect(model[Int(at)..<Int(at + count)].allSatisfy { $0 == 0 }) }
      at += count
    }
    pool.shutdown()
  }
}
