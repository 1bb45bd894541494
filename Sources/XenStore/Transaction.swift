// SPDX-License-Identifier: Apache-2.0

import CXenStore
import Glibc

/// Runs `body` in a transaction, again and again until it is committed.
func runTransaction<T>(
  on connection: Connection, for job: Job, attempts: Int,
  _ body: (borrowing XenStoreSession) throws(XenStoreError) -> T
) throws(XenStoreError) -> T {
  let outside = XenStoreSession(connection: connection, transaction: 0, job: job)
  for attempt in 1...attempts {
    let id = try outside.request("begin a transaction", nil) { handle in
      let id = xs_transaction_start(handle)
      return id == 0 ? nil : id
    }
    do throws(XenStoreError) {
      let inside = XenStoreSession(connection: connection, transaction: id, job: job)
      let result = try body(inside)
      try outside.accomplish("commit a transaction", nil) { handle in
        xs_transaction_end(handle, id, false)
      }
      return result
    } catch {
      // A refused commit has ended the transaction; everything else leaves it open.
      if error.operation != "commit a transaction", !connection.isDead {
        // The error that is thrown says more than a failure to abandon could.
        _ = xs_transaction_end(connection.handle, id, true)
      }
      guard error.code == .conflict else { throw error }
    }
    pauseBeforeRetry(attempt)
  }
  throw XenStoreError(
    .conflict, "transaction", nil, "a competing writer came in between \(attempts) times",
    remedy: "find out who writes to the same nodes so often")
}

/// The first retries follow at once; later ones step aside for up to 6.4 ms, by chance, so that
/// two rivals do not keep step with each other.
private func pauseBeforeRetry(_ attempt: Int) {
  guard attempt >= 3 else { return }
  usleep(UInt32.random(in: 0...(100 << UInt32(min(attempt - 3, 6)))))
}
