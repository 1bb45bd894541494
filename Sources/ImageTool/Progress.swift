// SPDX-License-Identifier: Apache-2.0
// How far a command is: a bar on a terminal, and with -p the words that qemu-img has for it. What is
// counted are bytes of data: a disk is as long as somebody once wished, and most of it is done in no
// time.

import Glibc
import Synchronization

/// Shows how far something is. Safe from any thread.
package final class Progress: Sendable {
  private struct State {
    var total: UInt64 = 0
    var done: UInt64 = 0
    var pace = Pace()
    var last: Int64 = 0
    var isShown = false
  }
  /// Not more often than this, in nanoseconds.
  private static let pause: Int64 = 100_000_000

  private let onTerminal: Bool
  private let asWords: Bool
  private let state = Mutex(State())

  /// Shows nothing unless `on`, or, with `automatic`, where standard error is a terminal.
  package init(on: Bool, automatic: Bool = false) {
    let isTerminal = isatty(2) == 1
    onTerminal = isTerminal && (on || automatic)
    asWords = on && !isTerminal
  }

  /// Whether anything is shown: else nobody need find out how much there is to do.
  var isOn: Bool { onTerminal || asWords }

  private static func now() -> Int64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Int64(time.tv_sec) * 1_000_000_000 + Int64(time.tv_nsec)
  }

  /// So many bytes are to be done. Begins anew.
  func expect(_ bytes: UInt64) {
    state.withLock { state in
      let wasShown = state.isShown
      state = State()
      state.total = bytes
      state.isShown = wasShown
      state.pace.note(0, at: Self.now())
    }
  }

  /// So many bytes more are done.
  func advance(_ bytes: UInt64) {
    guard isOn else { return }
    let shown = state.withLock { state -> String? in
      state.done = min(state.total, state.done + bytes)
      let now = Self.now()
      guard state.total > 0, now - state.last >= Self.pause else { return nil }
      state.last = now
      state.isShown = true
      state.pace.note(state.done, at: now)
      return text(state)
    }
    if let shown { put(shown) }
  }

  private func text(_ state: State) -> String {
    guard onTerminal else {
      let part = Double(state.done) / Double(state.total) * 100
      return "    (\(Words.fixed(part, places: 2))/100%)\r"
    }
    // The last column stays free: a cursor that has left the line begins another one.
    let columns = max(1, Self.columns - 1)
    let line = ProgressLine(
      done: state.done, total: state.total, rate: state.pace.rate, columns: columns
    ).text
    return "\r" + line + String(repeating: " ", count: columns - line.utf8.count)
  }

  /// How wide the terminal is. Source: tty_ioctl(4).
  private static var columns: Int {
    var size = winsize()
    guard ioctl(2, UInt(TIOCGWINSZ), &size) == 0, size.ws_col > 0 else { return 80 }
    return Int(size.ws_col)
  }

  private func put(_ text: String) {
    let bytes = [UInt8](text.utf8)
    // Nobody is left to tell that this could not be shown.
    _ = write(onTerminal ? 2 : 1, bytes, bytes.count)
  }

  /// Everything is done.
  func finish() {
    if asWords { put("    (100.00/100%)\r\n") }
    guard onTerminal else { return }
    let shown = state.withLock { state -> String? in
      guard state.isShown else { return nil }
      state.done = state.total
      return text(state)
    }
    if let shown { put(shown + "\n") }
  }
}

/// How fast something goes: over the last seconds, since what comes next is most like those.
struct Pace {
  /// Nanoseconds that are looked back upon.
  private static let window: Int64 = 5_000_000_000
  private var notes: [(bytes: UInt64, time: Int64)] = []

  /// So many bytes in all were done at this time, in nanoseconds.
  mutating func note(_ bytes: UInt64, at time: Int64) {
    notes.append((bytes, time))
    let old = notes.dropLast().lastIndex { time - $0.time >= Self.window } ?? 0
    notes.removeFirst(old)
  }

  /// Bytes a second; nil as long as nobody can say.
  var rate: Double? {
    guard let first = notes.first, let last = notes.last, last.time - first.time >= 500_000_000,
      last.bytes > first.bytes
    else { return nil }
    return Double(last.bytes - first.bytes) / (Double(last.time - first.time) / 1e9)
  }
}

/// One line that says how far something is, no longer than the terminal is wide.
struct ProgressLine {
  private static let longestBar = 40
  private static let shortestBar = 10
  /// "[] 100.0 %  59:59 left  1023 MiB/s  1023 MiB of 1023 GiB"
  private static let besideBar = 56

  /// Bytes that are done, of so many.
  var done: UInt64
  var total: UInt64
  /// Bytes a second, if that is known.
  var rate: Double?
  /// How many characters there is room for.
  var columns: Int

  /// The share, then as much of the rest as there is room for, in this order: the time left, the
  /// rate, the bytes, and where there is room for all of that a bar.
  var text: String {
    let part = total > 0 ? min(1, Double(done) / Double(total)) : 1
    let share = Words.right(Words.fixed(part * 100, places: 1), 5) + " %"
    let amount = "  \(Words.size(done)) of \(Words.size(total))"
    var pace = ""
    var left = ""
    if let rate, rate > 0 {
      pace = "  \(Words.size(UInt64(rate)))/s"
      if done < total { left = "  \(Self.time(Double(total - done) / rate)) left" }
    }
    guard share.utf8.count <= columns else { return String(share.prefix(columns)) }
    // By the terminal alone: a bar that changes with what is beside it says nothing.
    let width = min(Self.longestBar, columns - Self.besideBar)
    var line = share
    if width >= Self.shortestBar {
      let full = Int(part * Double(width))
      line =
        "[" + String(repeating: "#", count: full) + String(repeating: ".", count: width - full)
        + "] " + share
    }
    for words in [left, pace, amount] {
      guard line.utf8.count + words.utf8.count <= columns else { break }
      line += words
    }
    return line
  }

  /// Seconds as minutes and seconds, or hours, minutes and seconds.
  static func time(_ seconds: Double) -> String {
    guard seconds < 360_000 else { return "days" }
    let whole = Int(seconds.rounded(.up))
    func two(_ number: Int) -> String { number < 10 ? "0\(number)" : "\(number)" }
    let minutes = whole / 60 % 60
    return whole < 3600
      ? "\(minutes):\(two(whole % 60))" : "\(whole / 3600):\(two(minutes)):\(two(whole % 60))"
  }
}
