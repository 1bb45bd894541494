// SPDX-License-Identifier: Apache-2.0
// How far a command is: a bar on a terminal, and with -p the words that qemu-img has for it.

import Glibc
import Synchronization

/// Shows how far something is. Safe from any thread.
public final class Progress: Sendable {
  private struct State {
    var last: Int64 = 0
    var most: UInt64 = 0
    var isShown = false
  }
  private static let width = 40
  /// Not more often than this, in nanoseconds.
  private static let pause: Int64 = 100_000_000

  private let onTerminal: Bool
  private let asWords: Bool
  private let state = Mutex(State())

  /// Shows nothing unless `on`, or, with `automatic`, where standard error is a terminal.
  public init(on: Bool, automatic: Bool = false) {
    let isTerminal = isatty(2) == 1
    onTerminal = isTerminal && (on || automatic)
    asWords = on && !isTerminal
  }

  private static func now() -> Int64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Int64(time.tv_sec) * 1_000_000_000 + Int64(time.tv_nsec)
  }

  /// So many bytes of so many are done.
  func show(_ done: UInt64, of total: UInt64) {
    guard onTerminal || asWords, total > 0 else { return }
    let shown = state.withLock { state -> String? in
      state.most = max(state.most, done)
      let now = Self.now()
      guard now - state.last >= Self.pause else { return nil }
      state.last = now
      state.isShown = true
      return text(Double(state.most) / Double(total))
    }
    if let shown { put(shown) }
  }

  private func text(_ part: Double) -> String {
    guard onTerminal else { return "    (\(Words.fixed(part * 100, places: 2))/100%)\r" }
    let full = Int(part * Double(Self.width))
    return "\r[" + String(repeating: "#", count: full)
      + String(repeating: ".", count: Self.width - full)
      + "] \(Words.right(Words.fixed(part * 100, places: 1), 5)) %"
  }

  private func put(_ text: String) {
    let bytes = [UInt8](text.utf8)
    // Nobody is left to tell that this could not be shown.
    _ = write(onTerminal ? 2 : 1, bytes, bytes.count)
  }

  /// Everything is done.
  func finish() {
    if asWords { put("    (100.00/100%)\r\n") }
    guard onTerminal, state.withLock({ $0.isShown }) else { return }
    put(text(1) + "\n")
  }
}
