// SPDX-License-Identifier: Apache-2.0

import Glibc

/// A bell that one thread waits at and any thread may ring; rings before a wait are not lost.
///
/// A pair of sockets rather than a condition variable, so that it can be polled beside other
/// descriptors.
final class Wakeup: Sendable {
  /// Readable while the bell has been rung and not been silenced.
  let descriptor: Int32
  private let ringer: Int32

  init() throws(XenStoreError) {
    var ends: [Int32] = [-1, -1]
    let kind = SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue
    guard socketpair(AF_UNIX, Int32(kind), 0, &ends) == 0 else {
      throw XenStoreError(errno: errno, "open a pair of sockets", nil)
    }
    descriptor = ends[0]
    ringer = ends[1]
  }

  deinit {
    close(descriptor)
    close(ringer)
  }

  /// Rings. A full socket has been rung already, so a write that would block is no failure.
  func ring() {
    var byte: UInt8 = 1
    while write(ringer, &byte, 1) < 0 && errno == EINTR {}
  }

  /// Takes back all rings so far.
  func silence() {
    var bytes: (UInt64, UInt64) = (0, 0)
    while true {
      let count = withUnsafeMutableBytes(of: &bytes) { read(descriptor, $0.baseAddress, 16) }
      if count == 16 || (count < 0 && errno == EINTR) { continue }
      return
    }
  }

  /// Waits for a ring, `limit` at most (nil: for ever), and silences the bell.
  func wait(_ limit: Duration?) {
    var item = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
    // An interruption may end the wait early: every caller looks at the state again anyway.
    _ = poll(&item, 1, limit.map(\.pollMilliseconds) ?? -1)
    silence()
  }
}

extension Duration {
  /// For poll(2): milliseconds, rounded up so that a poll never ends before its time.
  var pollMilliseconds: Int32 {
    if self <= .zero { return 0 }
    let (seconds, attoseconds) = components
    if seconds > 1_000_000 { return 1_000_000_000 }
    return Int32(seconds * 1000 + (attoseconds + 999_999_999_999_999) / 1_000_000_000_000_000)
  }
}
