// SPDX-License-Identifier: Apache-2.0
// Signals as something to read, instead of something that interrupts. Source: signalfd(2).

internal import CLinux
import Glibc

/// A descriptor from which signals are read. They are blocked for this thread and every one
/// that it starts later, so make it before any other thread.
package final class SignalSource: Sendable {
  private let descriptor: Descriptor

  /// The descriptor, lent: readable when a signal waits.
  package var raw: Int32 { descriptor.raw }

  /// Blocks these signals and makes them readable. SIGPIPE and SIGXFSZ are ignored at the same
  /// time: a closed pipe and a file at its largest are errors of the call, EPIPE and EFBIG.
  /// Throws: the errno of signalfd(2).
  package init(_ signals: [Int32]) throws(IOError) {
    let raw = dmu_signal_descriptor(signals, signals.count)
    guard raw >= 0 else { throw IOError.last("wait for signals") }
    descriptor = Descriptor(owning: raw)
  }

  /// The next signal that waits, or nil. Throws: the errno of read(2).
  package func next() throws(IOError) -> Int32? {
    let signal = dmu_read_signal(raw)
    guard signal < 0 else { return signal }
    guard errno == EAGAIN || errno == EINTR else { throw IOError.last("read a signal") }
    return nil
  }
}
