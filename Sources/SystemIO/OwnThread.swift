// SPDX-License-Identifier: Apache-2.0
// One thing done on a thread that is made for it: for what a thread cannot undo.

import Glibc

/// A thread for one thing.
final class OwnThread: Sendable {
  private let body: @Sendable () -> Void

  private init(_ body: @escaping @Sendable () -> Void) { self.body = body }

  /// Does it and waits for its end. Throws: the errno of pthread_create(3).
  static func run(_ body: @escaping @Sendable () -> Void) throws(IOError) {
    var thread = pthread_t()
    let work = Unmanaged.passRetained(OwnThread(body))
    let code = pthread_create(
      &thread, nil,
      { context in
        if let context { Unmanaged<OwnThread>.fromOpaque(context).takeRetainedValue().body() }
        return nil
      }, work.toOpaque())
    guard code == 0 else {
      work.release()
      throw IOError(code, "start a thread")
    }
    pthread_join(thread, nil)
  }
}
