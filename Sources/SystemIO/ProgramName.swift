// SPDX-License-Identifier: Apache-2.0
// A multi-call file holds several programs; the name by which it is called selects one of them.

internal import CLinux
import Glibc

/// The name by which this process was started.
package enum ProgramName {
  /// The last component of argv[0]: the name of the file or of a link to it, or what `exec -a` gave.
  package static var called: String {
    CommandLine.arguments.first?.split(separator: "/").last.map(String.init) ?? ""
  }

  /// Reports that the file has no program of this name, and exits with 64 (EX_USAGE).
  package static func refuse(_ known: String...) -> Never {
    let message = """
      \(ForeignText.shown(called, limit: 64)): no program of this name is in this file: \
      call it by one of the names \(known.joined(separator: ", "))\n
      """
    let bytes = Array(message.utf8)
    // Nobody is left to report to when stderr fails.
    _ = write(2, bytes, bytes.count)
    exit(64)
  }

  /// Has another program, looked for in PATH, take this process's place; answers why it could not: the
  /// errno of execvp(3). Descriptors without close-on-exec stay open in it; no signal is blocked in it,
  /// as they are on threads of a pool, on one of which this may run.
  package static func become(_ words: [String]) -> IOError {
    var pointers: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) }
    pointers.append(nil)
    var none = sigset_t()
    sigemptyset(&none)
    pthread_sigmask(SIG_SETMASK, &none, nil)
    execvp(pointers[0]!, pointers)
    let code = errno
    for case let pointer? in pointers { free(pointer) }
    return IOError(code, "start", words[0])
  }
}
