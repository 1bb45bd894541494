// SPDX-License-Identifier: Apache-2.0
// One thread that waits for many descriptors: the workers' links and their process
// descriptors. Idle disks cost nothing; a busy one costs a poll(2) over all of them.
//
// Invariants:
// - Handlers run on the poller's thread only, one at a time. After `remove` one call may
//   still be under way: a handler therefore holds the owner of its descriptor, so that the
//   number cannot be given to another meanwhile.
// - A registration's number is never used twice.

import Glibc
import Synchronization
internal import SystemIO

/// Watches descriptors for input.
final class Poller: Polling {
  private struct Entry {
    let raw: Int32
    let handler: @Sendable () -> Bool
  }

  private struct State {
    var entries: [UInt64: Entry] = [:]
    var next: UInt64 = 1
    var changed = true
  }

  private let sleeper: Descriptor
  private let waker: Descriptor
  private let state = Mutex(State())

  /// Starts the thread, which runs as long as the process. Throws: the errno of pipe(2) or
  /// pthread_create(3).
  init() throws(IOError) {
    let ends = try UnixSocket.pair(.packets)
    sleeper = try ends.first.duplicate()
    waker = try ends.second.duplicate()
    try UnixSocket.setNonBlocking(sleeper.raw)
    try UnixSocket.setNonBlocking(waker.raw)
    try DetachedThread.start(stackSize: 256 << 10) { [self] in run() }
  }

  @discardableResult
  func add(_ raw: Int32, _ handler: @escaping @Sendable () -> Bool) -> PollRegistration {
    let number = state.withLock { state in
      defer { state.next += 1 }
      state.entries[state.next] = Entry(raw: raw, handler: handler)
      state.changed = true
      return state.next
    }
    wake()
    return PollRegistration(number: number)
  }

  func remove(_ registration: PollRegistration) {
    let present = state.withLock { state in
      state.changed = true
      return state.entries.removeValue(forKey: registration.number) != nil
    }
    if present { wake() }
  }

  /// Makes poll(2) look at the list anew. A full queue means that it is about to.
  private func wake() {
    var byte: UInt8 = 0
    _ = send(waker.raw, &byte, 1, Int32(MSG_NOSIGNAL))
  }

  private func run() {
    var list: [pollfd] = []
    var numbers: [UInt64] = []
    while true {
      state.withLock { state in
        guard state.changed else { return }
        state.changed = false
        numbers = Array(state.entries.keys)
        list = [pollfd(fd: sleeper.raw, events: Int16(POLLIN), revents: 0)]
        list += numbers.map {
          pollfd(fd: state.entries[$0]?.raw ?? -1, events: Int16(POLLIN), revents: 0)
        }
      }
      if poll(&list, nfds_t(list.count), -1) < 0 {
        precondition(errno == EINTR || errno == EAGAIN || errno == ENOMEM, "poll of our own list")
        continue
      }
      if list[0].revents != 0 {
        var byte: UInt8 = 0
        while recv(sleeper.raw, &byte, 1, 0) > 0 {}
      }
      for (item, number) in zip(list[1...], numbers) where item.revents != 0 {
        // Taken at this moment: it may have been removed since the list was made.
        guard let entry = state.withLock({ $0.entries[number] }) else { continue }
        if !entry.handler() { remove(PollRegistration(number: number)) }
      }
    }
  }
}
