// SPDX-License-Identifier: Apache-2.0
//
// The real C xenstored, run without Xen under Tests/xenstored-shim, for one test or one suite:
// with a directory, a socket and a store of its own, so that any number can run at once.

import Glibc
import Synchronization

/// Why xenstored could not be run.
package struct XenStoredFailure: Error, Sendable, CustomStringConvertible {
  /// What went wrong, and what to do.
  package let description: String
}

/// One running xenstored.
///
/// Ends with `stop`, when the last reference goes, or with the process that started it.
package final class XenStored: Sendable {
  private struct State {
    var pid: pid_t = 0
    /// Held open as long as xenstored shall run.
    var lifeline: Int32 = -1
    var options: [String]
  }

  /// The directory that holds all of it.
  package let directory: String
  private let program: String
  private let shim: String
  /// The unprivileged domain that has a way in beside domain 0; nil: none.
  private let domain: Int?
  private let state: Mutex<State>

  /// Where clients connect.
  package var socketPath: String { directory + "/run/socket" }
  /// What stands for /dev/xen/xenbus in the unprivileged domain, once that was introduced. One
  /// client may use it.
  package var domainPath: String { directory + "/run/domain" }
  /// The process, or 0 while none runs.
  package var pid: Int32 { state.withLock { $0.pid } }

  /// Starts xenstored and waits until it listens. `options` are given to it beside `-N -I`, and
  /// `--trace` among them makes it keep a `trace`. `domain`: one that has a `domainPath`.
  package static func start(
    options: [String] = [], domain: Int? = nil
  ) throws(XenStoredFailure) -> XenStored {
    let instance = try XenStored(options, domain)
    try instance.launch()
    return instance
  }

  private init(_ options: [String], _ domain: Int?) throws(XenStoredFailure) {
    self.domain = domain
    program = try Self.program()
    shim = try Self.builtShim.get()
    state = Mutex(State(options: options))
    var name = Array("/tmp/dmu-xenstored-XXXXXX".utf8CString)
    guard mkdtemp(&name) != nil else { throw Self.failure("make a directory", errno) }
    directory = String(decoding: name.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    for part in ["/run", "/root"] {
      guard mkdir(directory + part, 0o700) == 0 else { throw Self.failure("make \(part)", errno) }
    }
  }

  deinit {
    stop()
    for part in [
      "/run/socket", "/run/domain", "/run/xenstored.pid", "/log", "/trace", "/run", "/root",
    ] {
      remove(directory + part)
    }
    rmdir(directory)
  }

  /// A connection that is independent of the client under test.
  package func connect() throws(WireError) -> XenStoredWire {
    try XenStoredWire(socketPath: socketPath)
  }

  /// Ends xenstored at once, as `kill -9` does; its store is lost. Twice is once.
  package func stop() {
    let (pid, lifeline) = state.withLock { state in
      defer { state = State(options: state.options) }
      return (state.pid, state.lifeline)
    }
    guard pid > 0 else { return }
    Glibc.kill(pid, SIGKILL)
    var status: Int32 = 0
    while waitpid(pid, &status, 0) < 0 && errno == EINTR {}
    close(lifeline)
  }

  /// Kills xenstored and starts it anew, with an empty store or with what the old one held.
  package func restart(keepingData: Bool = false, options: [String]? = nil) throws {
    let saved = keepingData ? try save() : []
    stop()
    if let options { state.withLock { $0.options = options } }
    try launch()
    try restore(saved)
  }

  /// Starts xenstored again after `stop`, with an empty store.
  package func launch() throws(XenStoredFailure) {
    guard pid == 0 else { return }
    var ends: [Int32] = [-1, -1]
    let kind = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue)
    guard socketpair(AF_UNIX, kind, 0, &ends) == 0 else {
      throw Self.failure("make a lifeline", errno)
    }
    defer { close(ends[1]) }
    let child: pid_t
    do throws(XenStoredFailure) {
      child = try spawn(lifeline: ends[1])
    } catch {
      close(ends[0])
      throw error
    }
    state.withLock { state in
      state.pid = child
      state.lifeline = ends[0]
    }
    try waitUntilItListens(child)
  }

  /// Stops xenstored in its tracks, alive but silent.
  package func pause() {
    Glibc.kill(pid, SIGSTOP)
  }

  /// Lets a paused xenstored go on.
  package func resume() {
    Glibc.kill(pid, SIGCONT)
  }
}

extension XenStored {
  private func spawn(lifeline: Int32) throws(XenStoredFailure) -> pid_t {
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
    posix_spawn_file_actions_addopen(
      &actions, 1, directory + "/log", O_WRONLY | O_CREAT | O_APPEND, 0o600)
    posix_spawn_file_actions_adddup2(&actions, 1, 2)
    posix_spawn_file_actions_adddup2(&actions, lifeline, 3)
    // Signals as a program expects them, whatever the thread that spawns has blocked.
    var attributes = posix_spawnattr_t()
    posix_spawnattr_init(&attributes)
    defer { posix_spawnattr_destroy(&attributes) }
    var none = sigset_t()
    sigemptyset(&none)
    posix_spawnattr_setsigmask(&attributes, &none)
    posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK))
    var environment = [
      "LD_PRELOAD=\(shim)", "SHIM_LIFELINE=3", "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
      "XENSTORED_RUNDIR=\(directory)/run", "XENSTORED_ROOTDIR=\(directory)/root",
    ]
    if let domain {
      environment += ["SHIM_DOMAIN=\(domain)", "SHIM_DOMAIN_PATH=\(domainPath)"]
    }
    var child: pid_t = 0
    let options = state.withLock { $0.options }.flatMap { (option: String) -> [String] in
      option == "--trace" ? ["--trace-file", directory + "/trace"] : [option]
    }
    let result = withCStrings([program, "-N", "-I"] + options) { arguments in
      withCStrings(environment) {
        posix_spawn(&child, program, &actions, &attributes, arguments, $0)
      }
    }
    guard result == 0 else { throw Self.failure("run \(program)", result) }
    return child
  }

  private func waitUntilItListens(_ child: pid_t) throws(XenStoredFailure) {
    for _ in 0..<1000 {
      // That it fails is what is waited out; a daemon that never listens is told of below.
      if (try? connect()) != nil { return }
      var status: Int32 = 0
      if waitpid(child, &status, WNOHANG) == child {
        let lifeline = state.withLock { state in
          defer { state = State(options: state.options) }
          return state.lifeline
        }
        close(lifeline)
        throw XenStoredFailure(
          description: "xenstored ended at once (status \(status)): see \(log())")
      }
      usleep(5000)
    }
    stop()
    throw XenStoredFailure(description: "xenstored does not listen after 5 s: \(log())")
  }

  /// What xenstored has received and sent so far, if it was started with `--trace`: a line each,
  /// such as `IN 0x55 20251121 10:51:14 UNWATCH (/path token )`.
  package func trace() -> String { text(of: "/trace") }

  private func log() -> String { text(of: "/log") }

  private func text(of name: String) -> String {
    guard let file = fopen(directory + name, "r") else { return "" }
    defer { fclose(file) }
    var all: [UInt8] = []
    var bytes = [UInt8](repeating: 0, count: 4096)
    while case let count = fread(&bytes, 1, bytes.count, file), count > 0 {
      all += bytes.prefix(count)
    }
    return String(decoding: all, as: UTF8.self)
  }

  private static func program() throws(XenStoredFailure) -> String {
    var found = glob_t()
    defer { globfree(&found) }
    guard glob("/usr/lib/xen-*/bin/xenstored", 0, nil, &found) == 0, found.gl_pathc > 0,
      let path = found.gl_pathv[Int(found.gl_pathc) - 1]
    else {
      throw XenStoredFailure(description: "no xenstored: apt-get install xen-utils-4.17")
    }
    return String(cString: path)
  }

  /// Built once in a process, by the script beside the source.
  private static let builtShim = Result { () throws(XenStoredFailure) in try buildShim() }

  private static func buildShim() throws(XenStoredFailure) -> String {
    let package = #filePath.split(separator: "/").dropLast(3).joined(separator: "/")
    let script = "/\(package)/Tests/xenstored-shim/build"
    guard let output = popen("'\(script)'", "r") else { throw failure("run \(script)", errno) }
    var bytes = [UInt8](repeating: 0, count: 4096)
    let count = fread(&bytes, 1, bytes.count, output)
    let status = pclose(output)
    let path = String(decoding: bytes.prefix(count).prefix { $0 != 10 }, as: UTF8.self)
    guard status == 0, access(path, R_OK) == 0 else {
      throw XenStoredFailure(description: "\(script) failed (status \(status)): run it by hand")
    }
    return path
  }

  static func failure(_ what: String, _ number: Int32) -> XenStoredFailure {
    XenStoredFailure(description: "cannot \(what): \(String(cString: strerror(number)))")
  }
}

/// Lends a NULL-terminated array of C strings.
private func withCStrings<T>(
  _ strings: [String], _ body: (UnsafePointer<UnsafeMutablePointer<CChar>?>) -> T
) -> T {
  let copies = strings.map { strdup($0) } + [nil]
  defer { for copy in copies { free(copy) } }
  return copies.withUnsafeBufferPointer { body($0.baseAddress!) }
}
