// SPDX-License-Identifier: Apache-2.0

import Synchronization
import Testing
import TestSupport

@testable import XenStore

@Suite("Watches", .timeLimit(.minutes(2))) struct WatchTests {
  let xenstored: XenStored
  let store: XenStoreClient
  let other: XenStoredWire

  init() throws {
    xenstored = try XenStored.start(options: ["--trace"])
    store = try client(of: xenstored)
    other = try xenstored.connect()
  }

  @Test func fireAtOnceAndOnEveryKindOfChange() async throws {
    let watch = try await store.watch("/w")
    #expect(watch.path == "/w")
    var iterator = watch.makeAsyncIterator()
    #expect(try await iterator.next() == .changed("/w"))
    try other.write("/w", "1")
    #expect(try await iterator.next() == .changed("/w"))
    try other.write("/w/below/deep", "1")
    #expect(try await iterator.next() == .changed("/w/below/deep"))
    try other.setPermissions(["n3"], of: "/w/below")
    #expect(try await iterator.next() == .changed("/w/below"))
    try other.remove("/w/below/deep")
    #expect(try await iterator.next() == .changed("/w/below/deep"))
    try other.write("/elsewhere", "1")
    try other.remove("/w")
    #expect(try await iterator.next() == .changed("/w"))
  }

  @Test func areToldOfOwnChangesAndOfCommitsOnly() async throws {
    let watch = try await store.watch("/w")
    var iterator = watch.makeAsyncIterator()
    #expect(try await iterator.next() == .changed("/w"))
    let transaction = try other.beginTransaction()
    try other.write("/w/abandoned", "1", in: transaction)
    _ = try other.endTransaction(transaction, commit: false)
    try await store.transaction { session throws(XenStoreError) in
      try session.write("/w/committed", "1")
    }
    #expect(try await iterator.next() == .changed("/w/committed"))
  }

  /// Watches are told apart, also on one path, and a relative one tells relative paths.
  @Test func areIndependentOfEachOther() async throws {
    let first = try await store.watch("/w")
    let second = try await store.watch("/w")
    let wide = try await store.watch("/")
    let relative = try await store.watch("data")
    var iterators = [first, second, wide, relative].map { $0.makeAsyncIterator() }
    for (index, path) in ["/w", "/w", "/", "data"].enumerated() {
      #expect(try await iterators[index].next() == .changed(path))
    }
    try other.write("/w/x", "1")
    for index in 0..<3 { #expect(try await iterators[index].next() == .changed("/w/x")) }
    first.cancel()
    #expect(try await iterators[0].next() == nil)
    try other.write("data/y", "1")
    #expect(try await iterators[3].next() == .changed("data/y"))
    try other.write("/w/z", "1")
    #expect(try await iterators[1].next() == .changed("/w/z"))
  }

  @Test func hearOfDomains() async throws {
    let introduced = try await store.watch("@introduceDomain")
    let released = try await store.watch("@releaseDomain")
    var (coming, going) = (introduced.makeAsyncIterator(), released.makeAsyncIterator())
    #expect(try await coming.next() == .changed("@introduceDomain"))
    #expect(try await going.next() == .changed("@releaseDomain"))
    try other.introduce(domain: 3)
    #expect(try await coming.next() == .changed("@introduceDomain"))
    try other.release(domain: 3)
    #expect(try await going.next() == .changed("@releaseDomain"))
  }

  @Test func areTakenBackWhenTheConsumerGoesAway() async throws {
    #expect(watches(of: store) == 0)
    do {
      // Dropped without ever having been iterated.
      _ = try await store.watch("/dropped")
    }
    try await eventually { watches(of: store) == 0 }
    do {
      // Left by a break.
      for try await _ in try await store.watch("/left") { break }
    }
    try await eventually { watches(of: store) == 0 }
    let started = Counter()
    let task = Task { [store] in
      for try await _ in try await store.watch("/cancelled") { started.add() }
    }
    try await eventually { started.value > 0 }
    #expect(watches(of: store) == 1)
    task.cancel()
    try await task.value
    try await eventually { watches(of: store) == 0 }
    // xenstored, too, was told to forget them.
    for path in ["/dropped", "/left", "/cancelled"] {
      try await eventually { xenstored.trace().contains(" UNWATCH (\(path) ") }
    }
  }

  /// A sequence keeps the client whose threads feed it.
  @Test func keepTheirClientAlive() async throws {
    var iterator = try await client(of: xenstored).watch("/kept").makeAsyncIterator()
    #expect(try await iterator.next() == .changed("/kept"))
    try other.write("/kept", "1")
    #expect(try await iterator.next() == .changed("/kept"))
  }

  @Test func endWhenTheClientCloses() async throws {
    let watch = try await store.watch("/w")
    let task = Task {
      var count = 0
      for try await _ in watch { count += 1 }
      return count
    }
    try await Task.sleep(for: .milliseconds(20))
    store.close()
    #expect(try await within(.seconds(10)) { try await task.value } == 1)
  }

  /// 10,000 writes of ten nodes; the consumer must end up with each node's last value.
  @Test func loseNoLastState() async throws {
    var random = SeededRandom(announcedAs: "loseNoLastState")
    let changes = (0..<10_000).map { ("/flood/\(Int.random(in: 0..<10, using: &random))", "\($0)") }
    let store = self.store
    let seen = Task {
      var state: [String: String] = [:]
      var count = 0
      for try await event in try await store.watch("/flood") {
        guard case .changed(let path) = event, path != "/flood" else { continue }
        count += 1
        state[path] = try await store.readStringIfPresent(path)
        if state["/flood/end"] != nil { break }
      }
      return (state, count)
    }
    try await eventually { watches(of: store) == 1 }
    let other = self.other
    for (path, value) in changes { try other.write(path, value) }
    try other.write("/flood/end", "now")
    var wanted = Dictionary(changes, uniquingKeysWith: { $1 })
    wanted["/flood/end"] = "now"
    let (state, count) = try await within(.seconds(60)) { try await seen.value }
    #expect(state == wanted)
    print("loseNoLastState: \(count) events of \(changes.count + 1) reached the consumer")
  }

  /// A consumer that takes nothing costs a bounded amount of memory, and is told to look again.
  @Test func overflowIntoOneResynchronisation() {
    let (_, doorbell) = AsyncStream.makeStream(of: Void.self)
    let state = WatchState(id: 1, path: "/", doorbell: doorbell)
    for number in 0..<XenStoreWatch.pendingLimit { state.post(.changed("/\(number)")) }
    #expect(state.take() == .changed("/0"))
    for number in 0..<XenStoreWatch.pendingLimit { state.post(.changed("/\(number)")) }
    #expect(state.take() == .changed("/1"))
    state.post(.changed("/a"))
    state.post(.changed("/b"))
    state.post(.changed("/c"))
    #expect(state.take() == .resync(.overflow))
    #expect(state.take() == .changed("/c"))
    #expect(state.take() == nil)
  }

  @Test func mergeEqualPendingEvents() {
    let (_, doorbell) = AsyncStream.makeStream(of: Void.self)
    let state = WatchState(id: 1, path: "/", doorbell: doorbell)
    for path in ["/a", "/b", "/a", "/a"] { state.post(.changed(path)) }
    state.post(.resync(.reconnected))
    #expect(state.take() == .resync(.reconnected))
    #expect(state.take() == .changed("/a"))
    state.post(.changed("/a"))
    #expect(state.take() == .changed("/b"))
    #expect(state.take() == .changed("/a"))
    #expect(state.take() == nil)
  }
}

/// The watches that a client keeps.
private func watches(of store: XenStoreClient) -> Int {
  store.core.state.withLock { $0.watches.count }
}
