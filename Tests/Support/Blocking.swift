// SPDX-License-Identifier: Apache-2.0
// What waits, away from the threads that all tasks share.

import Dispatch

/// Runs what may block on a thread of its own, never on one of the few that tasks share.
package func blocking<Value: Sendable>(
  _ body: @escaping @Sendable () throws -> Value
) async throws -> Value {
  try await withCheckedThrowingContinuation { continuation in
    DispatchQueue.global().async { continuation.resume(with: Result { try body() }) }
  }
}
