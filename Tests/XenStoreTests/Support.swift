// SPDX-License-Identifier: Apache-2.0

import Synchronization
import Testing
import TestSupport
import XenStore

/// A client of one xenstored. Suites that need special limits change the configuration.
func client(
  of xenstored: XenStored, _ change: (inout XenStoreClient.Configuration) -> Void = { _ in }
) throws -> XenStoreClient {
  var configuration = XenStoreClient.Configuration(socketPath: xenstored.socketPath)
  configuration.deadline = .seconds(30)
  change(&configuration)
  return try XenStoreClient(configuration)
}

/// Fails the test unless `body` throws a XenStoreError of this code, and returns the error.
@discardableResult
func expect(
  _ code: XenStoreError.Code, _ location: SourceLocation = #_sourceLocation,
  _ body: () async throws -> Void
) async -> XenStoreError? {
  do {
    try await body()
    Issue.record("nothing was thrown instead of \(code)", sourceLocation: location)
  } catch let error as XenStoreError {
    #expect(error.code == code, "\(error)", sourceLocation: location)
    return error
  } catch {
    Issue.record("\(error) instead of \(code)", sourceLocation: location)
  }
  return nil
}

/// Takes events until one satisfies `wanted`, for ten seconds; what came before is returned too.
func events(
  of watch: XenStoreWatch, until wanted: @escaping @Sendable (XenStoreWatchEvent) -> Bool
) async throws -> [XenStoreWatchEvent] {
  try await within(.seconds(10)) {
    var seen: [XenStoreWatchEvent] = []
    for try await event in watch {
      seen.append(event)
      if wanted(event) { break }
    }
    return seen
  }
}

struct TookTooLong: Error {}

/// Runs `body`, and fails if it has not ended in time.
func within<T: Sendable>(
  _ limit: Duration, _ body: @escaping @Sendable () async throws -> T
) async throws -> T {
  try await withThrowingTaskGroup(of: T.self) { group in
    group.addTask { try await body() }
    group.addTask {
      try await Task.sleep(for: limit)
      throw TookTooLong()
    }
    defer { group.cancelAll() }
    guard let result = try await group.next() else { throw TookTooLong() }
    return result
  }
}

/// Waits until `condition` holds, ten seconds at most.
func eventually(
  _ location: SourceLocation = #_sourceLocation, _ condition: () async throws -> Bool
) async throws {
  for _ in 0..<2000 {
    if try await condition() { return }
    try await Task.sleep(for: .milliseconds(5))
  }
  Issue.record("it did not come about within ten seconds", sourceLocation: location)
}

/// A number that several tasks add to.
final class Counter: Sendable {
  private let number = Mutex(0)

  var value: Int { number.withLock { $0 } }

  func add(_ more: Int = 1) {
    number.withLock { $0 += more }
  }
}
