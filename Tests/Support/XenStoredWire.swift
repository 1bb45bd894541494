// SPDX-License-Identifier: Apache-2.0
//
// A second, independent client of xenstored, for tests: it speaks over the socket itself and
// shares no code with libxenstore or with the client under test. Blocking, one connection.
//
// A message, in the host's byte order: u32 type, u32 request id, u32 transaction, u32 length of
// the payload, payload. An answer repeats type and ids; type 16 is an error, its payload the name of
// an errno and a NUL. Source: xen/io/xs_wire.h, docs/misc/xenstore.txt.

import Glibc
import Synchronization

/// What xenstored or the socket refused a test's own client.
package struct WireError: Error, Sendable, CustomStringConvertible {
  /// xenstored's name for it, such as `ENOENT`; or what the socket did.
  package let name: String
  /// The request and its path.
  package let request: String
  /// Both in one line.
  package var description: String { "\(request): \(name)" }
}

/// One connection to xenstored as domain 0, by hand.
package final class XenStoredWire: Sendable {
  enum Kind: UInt32 {
    case directory = 1
    case read = 2
    case getPermissions = 3
    case beginTransaction = 6
    case endTransaction = 7
    case introduce = 8
    case release = 9
    case write = 11
    case makeDirectory = 12
    case remove = 13
    case setPermissions = 14
    case watchEvent = 15
    case error = 16
  }

  // The lock makes a request and its answer one step.
  private let socket: Mutex<Int32>

  /// Connects; waits at most ten seconds for any later answer.
  package init(socketPath: String) throws(WireError) {
    let descriptor = Glibc.socket(
      AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    guard descriptor >= 0, socketPath.utf8.count < MemoryLayout.size(ofValue: address.sun_path)
    else { throw WireError(name: "no socket", request: "connect \(socketPath)") }
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: socketPath.utf8) }
    let size = socklen_t(MemoryLayout<sockaddr_un>.size)
    let result = withUnsafePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { connect(descriptor, $0, size) }
    }
    guard result == 0 else {
      let reason = String(cString: strerror(errno))
      Glibc.close(descriptor)
      throw WireError(name: reason, request: "connect \(socketPath)")
    }
    var limit = timeval(tv_sec: 10, tv_usec: 0)
    setsockopt(
      descriptor, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    socket = Mutex(descriptor)
  }

  deinit {
    socket.withLock { _ = Glibc.close($0) }
  }

  /// The value of a node.
  package func read(_ path: String, in transaction: UInt32 = 0) throws(WireError) -> String {
    String(decoding: try ask(.read, [path], transaction), as: UTF8.self)
  }

  /// The names of a node's children.
  package func list(_ path: String, in transaction: UInt32 = 0) throws(WireError) -> [String] {
    try ask(.directory, [path], transaction).split(separator: 0).map {
      String(decoding: $0, as: UTF8.self)
    }
  }

  /// Sets a node's value.
  package func write(
    _ path: String, _ value: String, in transaction: UInt32 = 0
  ) throws(WireError) {
    _ = try ask(.write, Array("\(path)\0\(value)".utf8), path, transaction)
  }

  /// Makes a node.
  package func makeDirectory(_ path: String, in transaction: UInt32 = 0) throws(WireError) {
    _ = try ask(.makeDirectory, [path], transaction)
  }

  /// Removes a node and what is below it; a missing one is no failure.
  package func remove(_ path: String, in transaction: UInt32 = 0) throws(WireError) {
    do {
      _ = try ask(.remove, [path], transaction)
    } catch {
      guard error.name == "ENOENT" else { throw error }
    }
  }

  /// The permissions of a node, such as `n0`, `r5`.
  package func permissions(
    of path: String, in transaction: UInt32 = 0
  ) throws(WireError) -> [String] {
    try ask(.getPermissions, [path], transaction).split(separator: 0).map {
      String(decoding: $0, as: UTF8.self)
    }
  }

  /// Sets the permissions of a node.
  package func setPermissions(
    _ permissions: [String], of path: String, in transaction: UInt32 = 0
  ) throws(WireError) {
    _ = try ask(.setPermissions, [path] + permissions, transaction)
  }

  /// Tells xenstored of a domain, as the toolstack does at its creation.
  package func introduce(domain: Int) throws(WireError) {
    _ = try ask(.introduce, ["\(domain)", "1", "1"], 0)
  }

  /// Tells xenstored that a domain is gone, as the toolstack does.
  package func release(domain: Int) throws(WireError) {
    _ = try ask(.release, ["\(domain)"], 0)
  }

  /// Begins a transaction; its number goes into the requests that belong to it.
  package func beginTransaction() throws(WireError) -> UInt32 {
    let text = String(decoding: try ask(.beginTransaction, [""], 0), as: UTF8.self)
    guard let number = UInt32(text.prefix { $0 != "\0" }) else {
      throw WireError(name: "odd answer \(text)", request: "begin a transaction")
    }
    return number
  }

  /// Ends a transaction; false if it was to be committed and conflicted with another writer.
  package func endTransaction(_ transaction: UInt32, commit: Bool) throws(WireError) -> Bool {
    do {
      _ = try ask(.endTransaction, [commit ? "T" : "F"], transaction)
      return true
    } catch {
      guard error.name == "EAGAIN" else { throw error }
      return false
    }
  }

  /// Runs `body` in transactions until one is committed; the number of attempts it took.
  @discardableResult
  package func transaction(_ body: (UInt32) throws(WireError) -> Void) throws(WireError) -> Int {
    for attempt in 1...10_000 {
      let transaction = try beginTransaction()
      do throws(WireError) {
        try body(transaction)
      } catch {
        _ = try endTransaction(transaction, commit: false)
        throw error
      }
      if try endTransaction(transaction, commit: true) { return attempt }
    }
    throw WireError(name: "conflicts without end", request: "commit a transaction")
  }

  private func ask(
    _ kind: Kind, _ words: [String], _ transaction: UInt32
  ) throws(WireError) -> [UInt8] {
    let payload = words.flatMap { (word: String) -> [UInt8] in Array(word.utf8) + [0] }
    return try ask(kind, payload, words.first ?? "", transaction)
  }

  private func ask(
    _ kind: Kind, _ payload: [UInt8], _ path: String, _ transaction: UInt32
  ) throws(WireError) -> [UInt8] {
    let request = "\(kind) \(path)"
    var message: [UInt8] = []
    for word in [kind.rawValue, 1, transaction, UInt32(payload.count)] {
      withUnsafeBytes(of: word) { message.append(contentsOf: $0) }
    }
    message += payload
    let (answer, body) = try socket.withLock { descriptor throws(WireError) in
      let sent = send(descriptor, message, message.count, Int32(MSG_NOSIGNAL))
      guard sent == message.count else {
        throw WireError(name: String(cString: strerror(errno)), request: request)
      }
      return try Self.receiveAnswer(descriptor, request)
    }
    if answer == Kind.error.rawValue {
      throw WireError(
        name: String(decoding: body.prefix { $0 != 0 }, as: UTF8.self), request: request)
    }
    return body
  }

  private static func receiveAnswer(
    _ descriptor: Int32, _ request: String
  ) throws(WireError) -> (UInt32, [UInt8]) {
    let header = try receive(16, descriptor, request)
    let words = stride(from: 0, to: 16, by: 4).map { start in
      (0..<4).reduce(UInt32(0)) { $0 | UInt32(header[start + $1]) << UInt32(8 * $1) }
    }
    return (words[0], try receive(Int(words[3]), descriptor, request))
  }

  private static func receive(
    _ count: Int, _ descriptor: Int32, _ request: String
  ) throws(WireError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var filled = 0
    while filled < count {
      let result = bytes[filled...].withUnsafeMutableBytes {
        recv(descriptor, $0.baseAddress, count - filled, 0)
      }
      guard result > 0 else {
        let reason = result == 0 ? "connection closed" : String(cString: strerror(errno))
        throw WireError(name: reason, request: request)
      }
      filled += result
    }
    return bytes
  }
}
