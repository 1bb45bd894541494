// SPDX-License-Identifier: Apache-2.0
//
// One libxenstore handle, from xs_open to xs_close.
//
// libxenstore offers neither a time limit nor word of a lost connection: a call waits for its
// answer for ever, and the descriptor that it lets one poll stays silent when xenstored dies. So a
// connection keeps a *lifeline*, a duplicate of the socket beneath the handle. Polled, it tells of
// xenstored's end; shut down, it makes every waiting call return. The device /dev/xen/xenbus
// has no lifeline, and there a call that hangs cannot be freed.
//
// Invariant: the requester alone makes requests and closes the handle, the listener alone takes
// watch events, and the handle is closed only after the listener has let go of it.

import CXenStore
import Glibc
import Synchronization

// The handle's mutexes guard it, and one thread has `hasReader`: see there.
final class Connection: @unchecked Sendable {
  // The handle is not Sendable by itself: libxenstore guards it with mutexes of its own, and that
  // nobody uses it after the close is the invariant above. `hasReader` is one thread's own.
  let handle: OpaquePointer
  /// Counts the connections of one client, from 1.
  let generation: Int
  /// Readable when watch events wait. Owned by the handle.
  let events: Int32
  /// The socket itself, or -1. Owned by the handle.
  let socket: Int32
  /// A duplicate of the socket, or -1. Owned by this object.
  let lifeline: Int32
  /// libxenstore has started its reader, which it does at the first watch. The requester's own.
  var hasReader = false

  private let dead = Atomic<Bool>(false)
  private let letGo = Atomic<Bool>(false)

  init(handle: OpaquePointer, generation: Int, events: Int32, socket: Int32, lifeline: Int32) {
    self.handle = handle
    self.generation = generation
    self.events = events
    self.socket = socket
    self.lifeline = lifeline
  }

  /// True once the connection is of no more use.
  var isDead: Bool { dead.load(ordering: .acquiring) }

  /// Makes every waiting and every later call on the handle fail. Any thread may call this.
  func kill() {
    dead.store(true, ordering: .releasing)
    if lifeline >= 0 { shutdown(lifeline, Int32(SHUT_RDWR)) }
  }

  /// Asks the socket itself whether xenstored is still there; kills the connection if not.
  func checkPulse() -> Bool {
    if isDead { return false }
    guard lifeline >= 0 else { return true }
    var item = pollfd(fd: lifeline, events: Self.hangUp, revents: 0)
    guard poll(&item, 1, 0) > 0, Connection.isHangUp(item.revents) else { return true }
    kill()
    return false
  }

  /// What to poll a lifeline for. Never POLLIN: the bytes are libxenstore's.
  static let hangUp = Int16(truncatingIfNeeded: 0x2000)  // POLLRDHUP

  static func isHangUp(_ events: Int16) -> Bool {
    events & (hangUp | Int16(POLLHUP) | Int16(POLLERR) | Int16(POLLNVAL)) != 0
  }

  /// The listener's last act on a connection.
  func release() { letGo.store(true, ordering: .releasing) }

  var isReleased: Bool { letGo.load(ordering: .acquiring) }

  /// Closes the handle. The requester's last act, after `kill` and `release`.
  func close() {
    if hasReader { awaitReader() }
    xs_close(handle)
    if lifeline >= 0 { Glibc.close(lifeline) }
  }
}

extension Connection {
  /// Waits, a second at most, until libxenstore's reader has closed the socket.
  ///
  /// It does so when the socket is shut down, but has taken the descriptor out of the handle before:
  /// cancelled in between, as xs_close would, it leaves the descriptor open for ever.
  private func awaitReader() {
    guard lifeline >= 0, let own = Self.inode(of: lifeline) else { return }
    for _ in 0..<1000 where Self.inode(of: socket) == own { usleep(1000) }
  }

  private static func inode(of descriptor: Int32) -> ino_t? {
    var status = stat()
    return fstat(descriptor, &status) == 0 ? status.st_ino : nil
  }
}

/// Takes one watch event off the handle's queue; nil when there is none.
func nextWatchEvent(_ handle: OpaquePointer) -> (path: String, token: String)? {
  guard let pair = xs_check_watch(handle) else { return nil }
  defer { free(pair) }
  guard let path = pair[Int(XS_WATCH_PATH.rawValue)],
    let token = pair[Int(XS_WATCH_TOKEN.rawValue)]
  else { return nil }
  return (String(cString: path), String(cString: token))
}
