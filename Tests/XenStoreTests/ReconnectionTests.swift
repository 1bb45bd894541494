// SPDX-License-Identifier: Apache-2.0

import Glibc
import Synchronization
import Testing
import TestSupport

@testable import XenStore

@Suite("Reconnection", .timeLimit(.minutes(2))) struct ReconnectionTests {
  @Test func watchesAreSetAnewAfterARestart() async throws {
    let xenstored = try XenStored.start()
    let store = try client(of: xenstored)
    let first = try await store.watch("/first")
    let second = try await store.watch("/second")
    var (one, two) = (first.makeAsyncIterator(), second.makeAsyncIterator())
    #expect(try await one.next() == .changed("/first"))
    #expect(try await two.next() == .changed("/second"))
    for round in 1...3 {
      try xenstored.restart()
      #expect(try await one.next() == .resync(.reconnected))
      #expect(try await two.next() == .resync(.reconnected))
      #expect(try await one.next() == .changed("/first"))
      #expect(try await two.next() == .changed("/second"))
      #expect(try await store.readIfPresent("/first/round") == nil, "the store is a new one")
      try xenstored.connect().write("/first/round", "\(round)")
      #expect(try await one.next() == .changed("/first/round"))
      #expect(try await store.readString("/first/round") == "\(round)")
      #expect(store.connectionState == .connected(generation: round + 1))
    }
  }

  @Test func aRestartMayKeepTheData() async throws {
    let xenstored = try XenStored.start()
    let wire = try xenstored.connect()
    try wire.write("/kept/node", "value")
    try wire.setPermissions(["n0", "r7"], of: "/kept/node")
    let before = try xenstored.save()
    try xenstored.restart(keepingData: true)
    #expect(try xenstored.save() == before)
    let store = try client(of: xenstored)
    #expect(try await store.permissions(of: "/kept/node").description == "n0,r7")
  }

  /// A request that finds no xenstored waits for one.
  @Test func requestsOutliveAShortAbsence() async throws {
    let xenstored = try XenStored.start()
    let store = try client(of: xenstored)
    try await store.write("/x", "1")
    xenstored.stop()
    try await eventually {
      if case .connecting(.some) = store.connectionState { true } else { false }
    }
    let waiting = Task { try await store.readIfPresent("/x") }
    try await Task.sleep(for: .milliseconds(100))
    try xenstored.launch()
    #expect(try await waiting.value == nil)
  }

  @Test func requestsFailAtTheirDeadlineWithoutXenstored() async throws {
    let xenstored = try XenStored.start()
    xenstored.stop()
    let store = try client(of: xenstored) { $0.deadline = .milliseconds(300) }
    let start = ContinuousClock.now
    let error = await expect(.disconnected) { try await store.write("/x", "1") }
    #expect(ContinuousClock.now - start >= .milliseconds(300))
    #expect(
      error?.message == "cannot connect to \(xenstored.socketPath): Connection refused")
    #expect(error?.remedy == "check that xenstored runs")
  }

  @Test func aMissingSocketIsNamed() async throws {
    var configuration = XenStoreClient.Configuration(socketPath: "/nonexistent/socket")
    configuration.deadline = .milliseconds(100)
    let store = try XenStoreClient(configuration)
    let error = await expect(.disconnected) { _ = try await store.read("/x") }
    #expect(error?.message == "no xenstored at /nonexistent/socket: No such file or directory")
  }

  /// Killed in the middle of many requests: each ends, with success or as disconnected.
  @Test func requestsUnderAKillAllEnd() async throws {
    let xenstored = try XenStored.start()
    let store = try client(of: xenstored)
    let (ended, broken) = (Counter(), Counter())
    try await within(.seconds(60)) {
      try await withThrowingTaskGroup(of: Void.self) { group in
        for task in 0..<8 {
          group.addTask {
            for round in 0..<400 {
              do throws(XenStoreError) {
                try await store.write("/k/\(task)", "\(round)")
              } catch {
                guard error.code == .disconnected else { throw error }
                broken.add()
              }
              ended.add()
            }
          }
        }
        for _ in 0..<5 {
          try await Task.sleep(for: .milliseconds(15))
          try xenstored.restart()
        }
        try await group.waitForAll()
      }
    }
    #expect(ended.value == 8 * 400)
    #expect(broken.value <= 5, "more requests broke than could be under way")
    try await store.write("/after", "1")
    #expect(try await store.readString("/after") == "1")
  }

  /// xenstored that hangs: `.timedOut` at the deadline, and service again once it goes on.
  @Test func aHangingXenstoredTimesOut() async throws {
    let xenstored = try XenStored.start()
    defer { xenstored.resume() }
    let store = try client(of: xenstored) { $0.deadline = .seconds(2) }
    let watch = try await store.watch("/w")
    var iterator = watch.makeAsyncIterator()
    #expect(try await iterator.next() == .changed("/w"))
    xenstored.pause()
    let start = ContinuousClock.now
    let error = await expect(.timedOut) { _ = try await store.list("/") }
    let took = ContinuousClock.now - start
    #expect(took >= .seconds(2) && took < .seconds(30), "\(took)")
    #expect(error?.message == "no answer within 2.0 seconds")
    #expect(error?.path == "/")
    // Every later request ends, too, though nobody accepts its connection.
    await expect(.disconnected) { _ = try await store.list("/") }
    xenstored.resume()
    #expect(try await iterator.next() == .resync(.reconnected))
    #expect(try await iterator.next() == .changed("/w"))
    try xenstored.connect().write("/w/x", "1")
    let seen = try await events(of: watch) { $0 == .changed("/w/x") }
    #expect(seen.last == .changed("/w/x"))
    try await store.write("/w/y", "1")
  }

  @Test func aTransactionThatHangsIsGivenUp() async throws {
    let xenstored = try XenStored.start()
    defer { xenstored.resume() }
    let store = try client(of: xenstored) { $0.deadline = .seconds(2) }
    try await store.write("/x", "before")
    await expect(.timedOut) {
      try await store.transaction { session throws(XenStoreError) in
        try session.write("/x", "after")
        xenstored.pause()
        try session.write("/x", "later")
      }
    }
    xenstored.resume()
    try await eventually { store.connectionState == .connected(generation: 2) }
    #expect(try await store.readString("/x") == "before")
  }

  @Test func changesOfTheConnectionAreTold() async throws {
    let xenstored = try XenStored.start()
    let told = Mutex<[XenStoreClient.ConnectionState]>([])
    let store = try client(of: xenstored) {
      $0.onConnectionChange = { state in told.withLock { $0.append(state) } }
    }
    try await store.write("/x", "1")
    xenstored.stop()
    try await eventually {
      if case .connecting = store.connectionState { true } else { false }
    }
    try xenstored.launch()
    try await eventually { store.connectionState == .connected(generation: 2) }
    store.close()
    try await eventually { told.withLock { $0.last } == .closed }
    let states = told.withLock { $0 }
    #expect(states.first == .connected(generation: 1))
    #expect(states.contains(.connecting(lastFailure: "the connection to xenstored broke")))
    #expect(states.dropLast().last == .connected(generation: 2))
  }

  /// Here the new xenstored allows shorter paths only than the old one did.
  @Test func aWatchThatIsRefusedSaysSo() async throws {
    let xenstored = try XenStored.start()
    let store = try client(of: xenstored)
    await expect(.refused(errno: EINVAL)) {
      _ = try await store.watch("/" + String(repeating: "x", count: 3000))
    }
    #expect(store.core.state.withLock { $0.watches.isEmpty })
    let long = "/" + String(repeating: "x", count: 100)
    var lost = try await store.watch(long).makeAsyncIterator()
    var kept = try await store.watch("/short").makeAsyncIterator()
    #expect(try await lost.next() == .changed(long))
    #expect(try await kept.next() == .changed("/short"))
    try xenstored.restart(options: ["--path-max", "50"])
    #expect(try await kept.next() == .resync(.reconnected))
    #expect(try await kept.next() == .changed("/short"))
    #expect(try await lost.next() == .resync(.reconnected))
    let error = await expect(.refused(errno: EINVAL)) { _ = try await lost.next() }
    #expect(error?.operation == "watch" && error?.path == long)
    try await store.write("/short", "1")
    #expect(try await kept.next() == .changed("/short"))
  }

  @Test func closingEndsWaitingRequests() async throws {
    let xenstored = try XenStored.start()
    xenstored.stop()
    let store = try client(of: xenstored)
    let waiting = Task { try await store.read("/x") }
    try await Task.sleep(for: .milliseconds(50))
    store.close()
    store.close()
    await expect(.closed) { _ = try await within(.seconds(10)) { try await waiting.value } }
    await expect(.closed) { _ = try await store.read("/x") }
    try await eventually { store.connectionState == .closed }
  }

  /// Neither descriptors nor threads are left behind by clients that come and go.
  @Test func clientsLeaveNothingBehind() async throws {
    let xenstored = try XenStored.start()
    func connections() throws -> Int {
      let peer = try Knock.knock(at: xenstored.socketPath, limit: .seconds(5))
      return Opening.socketsConnected(to: peer).count
    }
    let before = try connections()
    for _ in 0..<20 {
      let store = try client(of: xenstored)
      let watch = try await store.watch("/w")
      var iterator = watch.makeAsyncIterator()
      #expect(try await iterator.next() == .changed("/w"))
    }
    try await eventually { try connections() == before }
  }
}
