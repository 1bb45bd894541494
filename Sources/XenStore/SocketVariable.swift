// SPDX-License-Identifier: Apache-2.0
//
// libxenstore takes the path of xenstored's socket from XENSTORED_PATH alone. A client may be given
// a path of its own, so the variable must change for the length of one xs_open.
//
// setenv may move the whole environment while another thread reads it. Instead one buffer of
// our own is put into the environment once and then rewritten in place: to the path, and back to
// what was there before, or to a name that nobody looks for when there was nothing.

import CXenStore
import Glibc
import Synchronization

enum SocketVariable {
  private static let name = "XENSTORED_PATH"
  private static let pathLimit = Int(PATH_MAX)

  /// Guards the variable, and with it that one opening runs at a time.
  private static let state = Mutex(State())

  private struct State {
    /// The text `NAME=VALUE` that stands in the environment; nil until a path was asked for.
    var buffer: Int?
    /// What the process was started with.
    var original: String?
  }

  /// The path that libxenstore takes by itself.
  static func defaultPath() -> String {
    state.withLock { _ in String(cString: xs_daemon_socket()) }
  }

  /// Runs `body` with the variable naming `path`, or as the process was started if that is nil.
  static func withPath<T>(_ path: String?, _ body: () -> sending T) -> sending T {
    state.withLock { state in
      guard let path else { return body() }
      // A path that the system has found to exist is never longer.
      precondition(path.utf8.count <= pathLimit)
      let text = prepare(&state)
      write(path, named: name, to: text)
      defer { restore(state, text) }
      return body()
    }
  }

  private static func prepare(_ state: inout State) -> UnsafeMutablePointer<CChar> {
    if let address = state.buffer, let text = UnsafeMutablePointer<CChar>(bitPattern: address) {
      return text
    }
    state.original = getenv(name).map { String(cString: $0) }
    // Lives as long as the process: the environment points into it.
    let longest = max(pathLimit, state.original?.utf8.count ?? 0)
    let text = UnsafeMutablePointer<CChar>.allocate(capacity: name.utf8.count + longest + 2)
    restore(state, text)
    putenv(text)
    state.buffer = Int(bitPattern: text)
    return text
  }

  private static func restore(_ state: State, _ text: UnsafeMutablePointer<CChar>) {
    if let original = state.original {
      write(original, named: name, to: text)
    } else {
      write("", named: "_" + name.dropFirst(), to: text)
    }
  }

  private static func write(
    _ value: String, named name: String, to text: UnsafeMutablePointer<CChar>
  ) {
    let bytes = Array("\(name)=\(value)".utf8) + [0]
    for (index, byte) in bytes.enumerated() { text[index] = CChar(bitPattern: byte) }
  }
}
