// SPDX-License-Identifier: Apache-2.0
// A thread that nobody joins.

internal import CLinux
import Glibc

/// Starts threads for what waits in system calls.
package enum DetachedThread {
  private final class Body: Sendable {
    let run: @Sendable () -> Void
    init(_ run: @escaping @Sendable () -> Void) { self.run = run }
  }

  /// Runs the body on a thread with a stack of so many bytes, which ends with it. Throws: the
  /// errno of pthread_create(3).
  package static func start(
    stackSize: Int, _ body: @escaping @Sendable () -> Void
  ) throws(IOError) {
    var thread = pthread_t()
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
    pthread_attr_setstacksize(&attributes, stackSize)
    defer { pthread_attr_destroy(&attributes) }
    let context = Unmanaged.passRetained(Body(body))
    let code = pthread_create(
      &thread, &attributes,
      { argument in
        guard let argument else { return nil }
        Unmanaged<Body>.fromOpaque(argument).takeRetainedValue().run()
        return nil
      }, context.toOpaque())
    guard code == 0 else {
      context.release()
      throw IOError(code, "start a thread")
    }
  }
}
