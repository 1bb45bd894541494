// SPDX-License-Identifier: Apache-2.0

import Glibc

/// Runs `body` on a new thread that takes no signals.
///
/// libxenstore changes the process's action for SIGPIPE around its writes, which two threads can do
/// to each other's harm; where the signal is blocked a write into a dead socket is just EPIPE.
func startThread(
  _ body: @escaping @Sendable () -> Void
) throws(XenStoreError) {
  let context = Unmanaged.passRetained(ThreadBody(body))
  var attributes = pthread_attr_t()
  pthread_attr_init(&attributes)
  defer { pthread_attr_destroy(&attributes) }
  pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED))
  var thread = pthread_t()
  let result = pthread_create(
    &thread, &attributes,
    { argument in
      guard let argument else { return nil }
      var signals = sigset_t()
      sigfillset(&signals)
      pthread_sigmask(SIG_BLOCK, &signals, nil)
      Unmanaged<ThreadBody>.fromOpaque(argument).takeRetainedValue().body()
      return nil
    }, context.toOpaque())
  if result != 0 {
    context.release()
    throw XenStoreError(errno: result, "start a thread", nil)
  }
}

private final class ThreadBody: Sendable {
  let body: @Sendable () -> Void

  init(_ body: @escaping @Sendable () -> Void) {
    self.body = body
  }
}
