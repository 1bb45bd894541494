// SPDX-License-Identifier: Apache-2.0

import Synchronization
import Testing
import TestSupport
import XenStore

@Suite("Transactions") struct TransactionTests {
  let xenstored: XenStored
  let store: XenStoreClient

  init() throws {
    xenstored = try XenStored.start()
    store = try client(of: xenstored)
  }

  @Test func takeEffectTogetherOrNotAtAll() async throws {
    let rival = try xenstored.connect()
    try await store.transaction { session throws(XenStoreError) in
      try session.write("/t/a", "1")
      #expect(throws: WireError.self) { try rival.read("/t/a") }
      try session.write("/t/b", "2")
      #expect(try session.readString("/t/a") == "1")
    }
    #expect(try rival.list("/t").sorted() == ["a", "b"])
    let error = await expect(.notFound) {
      try await store.transaction { session throws(XenStoreError) in
        try session.write("/t/c", "3")
        _ = try session.read("/t/none")
      }
    }
    #expect(error?.path == "/t/none")
    #expect(try rival.list("/t").sorted() == ["a", "b"])
  }

  /// A rival writes between our read and our commit, three times: we win at the fourth.
  @Test func tryAgainAfterAConflict() async throws {
    try await store.write("/count", "0")
    let rival = try xenstored.connect()
    let attempts = Counter()
    let result = try await store.transaction { session throws(XenStoreError) in
      attempts.add()
      let count = Int(try session.readString("/count")) ?? -1
      if attempts.value <= 3 {
        #expect(throws: Never.self) { try rival.write("/count", "\(100 * attempts.value)") }
      }
      try session.write("/count", "\(count + 1)")
      return count
    }
    #expect(attempts.value == 4)
    #expect(result == 300)
    #expect(try rival.read("/count") == "301")
  }

  @Test func giveUpWithAnErrorThatSaysSo() async throws {
    try await store.write("/count", "0")
    let rival = try xenstored.connect()
    let attempts = Counter()
    let error = await expect(.conflict) {
      try await store.transaction(attempts: 5) { session throws(XenStoreError) in
        attempts.add()
        let count = try session.readString("/count")
        #expect(throws: Never.self) { try rival.write("/count", "rival \(attempts.value)") }
        try session.write("/count", count + "!")
      }
    }
    #expect(attempts.value == 5)
    #expect(error?.message == "a competing writer came in between 5 times")
    #expect(try rival.read("/count") == "rival 5")
  }

  /// The other side: a rival's transaction loses against ours.
  @Test func makeARivalTryAgain() async throws {
    try await store.write("/count", "0")
    let rival = try xenstored.connect()
    let first = try rival.beginTransaction()
    #expect(try rival.read("/count", in: first) == "0")
    try await store.transaction { session throws(XenStoreError) in
      try session.write("/count", "ours")
    }
    try rival.write("/count", "rival", in: first)
    #expect(try rival.endTransaction(first, commit: true) == false)
    #expect(try await store.readString("/count") == "ours")
  }

  /// Two clients and a rival by hand count together, and no count is lost.
  @Test func loseNoCount() async throws {
    try await store.write("/count", "0")
    let second = try client(of: xenstored)
    let rounds = 150
    let attempts = Counter()
    try await withThrowingTaskGroup(of: Void.self) { group in
      for store in [store, second] {
        group.addTask {
          for _ in 0..<rounds {
            try await store.transaction(attempts: 1000) { session throws(XenStoreError) in
              attempts.add()
              let count = Int(try session.readString("/count")) ?? -1
              try session.write("/count", "\(count + 1)")
            }
          }
        }
      }
      let rival = try xenstored.connect()
      group.addTask {
        for _ in 0..<rounds {
          attempts.add(
            try rival.transaction { transaction throws(WireError) in
              let count = Int(try rival.read("/count", in: transaction)) ?? -1
              try rival.write("/count", "\(count + 1)", in: transaction)
            })
        }
      }
      try await group.waitForAll()
    }
    #expect(try await store.readString("/count") == "\(3 * rounds)")
    #expect(attempts.value > 3 * rounds, "there was no conflict at all")
  }
}
