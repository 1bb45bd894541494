// SPDX-License-Identifier: Apache-2.0
// Where metrics are served: a Unix socket or an address that only this host reaches.

import Glibc

/// An address for metrics.
package enum MetricsAddress: Sendable, Equatable, CustomStringConvertible {
  /// A Unix socket by its path.
  case unix(String)
  /// A loopback address, as a numeral, and a port.
  case loopback(String, Int)

  /// What a configuration may say; for messages.
  static let wanted =
    "the path of a Unix socket, at most 107 bytes, or a loopback address and a port, as in"
    + " \"127.0.0.1:9817\" or \"[::1]:9817\", or \"\""

  /// From "/PATH", "127.A.B.C:PORT" or "[::1]:PORT"; nil for anything else.
  init?(_ text: String) {
    if text.hasPrefix("/") {
      // Source: unix(7), the length of sun_path without its end.
      guard text.utf8.count <= 107, !text.hasSuffix("/") else { return nil }
      self = .unix(text)
      return
    }
    guard let colon = text.lastIndex(of: ":") else { return nil }
    let digits = text[text.index(after: colon)...]
    guard digits.utf8.allSatisfy({ (0x30...0x39).contains($0) }), let port = Int(digits),
      (1...65535).contains(port)
    else { return nil }
    let host = String(text[..<colon])
    if host == "[::1]" {
      self = .loopback("::1", port)
      return
    }
    var address = in_addr()
    guard inet_pton(AF_INET, host, &address) == 1, UInt32(bigEndian: address.s_addr) >> 24 == 127
    else { return nil }
    self = .loopback(host, port)
  }

  /// As a configuration says it.
  package var description: String {
    switch self {
    case .unix(let path): path
    case .loopback(let host, let port): host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
    }
  }
}
