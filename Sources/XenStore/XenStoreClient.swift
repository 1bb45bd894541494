// SPDX-License-Identifier: Apache-2.0

import Synchronization

/// A connection to xenstored that is made again whenever it breaks.
///
/// May be used by any number of tasks. All requests of one client are made in the order of their
/// arrival by one thread of its own, so no caller's thread ever waits in libxenstore; a second
/// thread hands out watch events and looks after deadlines. Every request ends by its deadline, also
/// when xenstored hangs, and then throws `.timedOut`; the connection is then given up and made
/// again, since a late answer could be taken for that of another request. (On /dev/xen/xenbus a
/// hanging call cannot be freed: callers get their `.timedOut`, and the client serves again when
/// the kernel answers.)
///
/// Cancelling a task does not take back its request, which ends by its deadline as any other.
///
/// xenstored need not run yet when a client is made: requests wait for it until their deadline and
/// then throw `.disconnected`. After a reconnection every watch has been set anew and has
/// delivered `.resync(.reconnected)`.
///
/// *Source:* xenstore.h; docs/misc/xenstore.txt.
package final class XenStoreClient: Sendable {
  /// How a client behaves; the defaults suit a daemon.
  package struct Configuration: Sendable {
    /// xenstored's socket, or a device such as /dev/xen/xenbus. Nil: what libxenstore takes by
    /// itself (`XENSTORED_PATH`, `XENSTORED_RUNDIR`, /var/run/xenstored/socket).
    package var socketPath: String?
    /// The time from a request to its end, waiting for a connection included.
    package var deadline: Duration = .seconds(5)
    /// The pause after the first failed attempt to connect, and the longest one.
    package var reconnectDelays: ClosedRange<Duration> = .milliseconds(10) ... .seconds(1)
    /// How often a transaction is tried before it fails with `.conflict`.
    package var transactionAttempts = 64
    /// Called, on a thread of the client's, at each change of `connectionState`, for a log. It
    /// must not wait for the client.
    package var onConnectionChange: (@Sendable (ConnectionState) -> Void)?

    /// The defaults, with a socket of one's own if one is given.
    package init(socketPath: String? = nil) {
      self.socketPath = socketPath
    }
  }

  /// Where a client stands with xenstored.
  package enum ConnectionState: Hashable, Sendable {
    /// Not connected; why the last attempt failed, nil before the first has ended.
    case connecting(lastFailure: String?)
    /// Connected, for the nth time.
    case connected(generation: Int)
    /// Closed for good.
    case closed
  }

  /// Whether requests go by the kernel's device, as in a domain that does not run xenstored.
  package static func goesByDevice(socketPath: String?) -> Bool {
    Opening.goesByDevice(socketPath)
  }

  let core: Core

  /// Starts a client, which connects in the background.
  ///
  /// Fails only if the system has no descriptors or threads left.
  package init(_ configuration: Configuration = Configuration()) throws(XenStoreError) {
    core = try Core(configuration)
    try core.start()
  }

  deinit { core.close() }

  /// Where the client stands at this moment.
  package var connectionState: ConnectionState { core.state.withLock { $0.connectionState } }

  /// Ends the client: waiting requests throw `.closed`, watches end. Does not wait; twice is once.
  package func close() { core.close() }

  /// Makes several requests in one go, without making them one step for others.
  ///
  /// `body` runs on the client's thread: see `XenStoreSession`. Throws what `body` throws.
  package func perform<T: Sendable>(
    _ body: @escaping @Sendable (borrowing XenStoreSession) throws(XenStoreError) -> T
  ) async throws(XenStoreError) -> T {
    try await perform("requests", nil, body)
  }

  /// Makes several requests that take effect together or not at all.
  ///
  /// `body` runs on the client's thread, once for each attempt: if somebody changed what it read or
  /// wrote, xenstored refuses the commit and all is done again, up to `attempts` times, with
  /// growing pauses; then `.conflict` is thrown. An error that `body` throws abandons the
  /// transaction and is passed on. After `.timedOut` or `.disconnected` it is unknown whether
  /// the commit took effect.
  package func transaction<T: Sendable>(
    attempts: Int? = nil,
    _ body: @escaping @Sendable (borrowing XenStoreSession) throws(XenStoreError) -> T
  ) async throws(XenStoreError) -> T {
    let attempts = max(1, attempts ?? core.configuration.transactionAttempts)
    return try await core.run("transaction") { connection, job in
      do throws(XenStoreError) {
        return .success(
          try runTransaction(on: connection, for: job, attempts: attempts, body))
      } catch {
        return .failure(error)
      }
    }
  }

  /// Watches a node and everything below it.
  ///
  /// The first event comes at once and names the path itself, whether or not the node exists. The
  /// special paths `@introduceDomain` and `@releaseDomain` can be watched. Events of a relative
  /// path are relative, too.
  package func watch(_ path: String) async throws(XenStoreError) -> XenStoreWatch {
    try NodePath.checkWatch(path, for: "watch")
    let (state, doorbell) = try await core.watch(path)
    return XenStoreWatch(state: state, doorbell: doorbell, client: self)
  }

  func perform<T: Sendable>(
    _ operation: String, _ path: String?,
    _ body: @escaping @Sendable (borrowing XenStoreSession) throws(XenStoreError) -> T
  ) async throws(XenStoreError) -> T {
    try await core.run(operation, path) { connection, job in
      let session = XenStoreSession(connection: connection, transaction: 0, job: job)
      do throws(XenStoreError) {
        return .success(try body(session))
      } catch {
        return .failure(error)
      }
    }
  }
}
