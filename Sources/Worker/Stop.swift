// SPDX-License-Identifier: Apache-2.0
// Ending on a signal.

import SystemIO

extension EventLoop {
  /// Calls `stop` for every signal that comes.
  func addStop(
    _ signals: SignalSource, _ log: Log, _ stop: @escaping () -> Void
  ) throws(IOError) {
    _ = try add(signals.raw, for: .readable) { _ in
      do throws(IOError) {
        while let signal = try signals.next() {
          log(.info, "told to stop", ["signal": "\(signal)"])
          stop()
        }
      } catch {
        // Without signals nobody could end this program in good order: end it now.
        log(.error, "cannot read signals", ["error": "\(error)"])
        stop()
      }
    }
  }
}
