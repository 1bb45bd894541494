// SPDX-License-Identifier: Apache-2.0
// The configuration of a guest, as xl reads it: settings NAME = VALUE, values strings, numbers or
// lists, comments behind '#'. Everything but the dmu lines of `disk` stays byte for byte.

/// Rewrites the disk lines in a guest's configuration.
package enum GuestConfiguration {
  /// The configuration with each string of a list `disk = [ … ]` or `disk += [ … ]` that is a
  /// `PositionalLine` written as xl takes it; nil when there is none. Quotes and backslashes stay.
  /// What is no configuration is not judged: xl says what is wrong with it.
  /// Source: libxlu_cfg_l.l, libxlu_cfg_y.y of Xen.
  package static func rewritten(_ text: [UInt8]) -> [UInt8]? {
    var scanner = Scanner(text)
    var result: [UInt8] = []
    var copied = 0
    var setting = Setting()
    while let token = scanner.next() {
      guard case .string(let inner) = token else {
        setting.take(token)
        continue
      }
      guard setting.isDiskList, let line = String(validating: text[inner], as: UTF8.self),
        let disk = PositionalLine(line)
      else { continue }
      result += text[copied..<inner.lowerBound]
      result += disk.rewritten.utf8
      copied = inner.upperBound
    }
    guard copied > 0 else { return nil }
    return result + text[copied...]
  }

  /// Where in a setting the scanner is.
  private struct Setting {
    private enum State {
      /// Before a name.
      case start
      /// After a name: whether it is `disk`.
      case named(Bool)
      /// After '=' or '+='.
      case assigned(Bool)
      /// In so many brackets.
      case list(Bool, depth: Int)
      /// In what is none of these, up to the end of the setting.
      case other
    }
    private var state = State.start

    var isDiskList: Bool {
      if case .list(true, depth: 1) = state { true } else { false }
    }

    mutating func take(_ token: Token) {
      switch (state, token) {
      case (.list(let isDisk, let depth), .open): state = .list(isDisk, depth: depth + 1)
      case (.list(_, depth: 1), .close): state = .other
      case (.list(let isDisk, let depth), .close): state = .list(isDisk, depth: depth - 1)
      case (.list, _): break
      case (_, .end): state = .start
      case (.start, .name(let isDisk)): state = .named(isDisk)
      case (.named(let isDisk), .assign): state = .assigned(isDisk)
      case (.assigned(let isDisk), .open): state = .list(isDisk, depth: 1)
      default: state = .other
      }
    }
  }

  private enum Token {
    /// A name, and whether it is `disk`.
    case name(Bool)
    case assign
    case open
    case close
    /// A newline or semicolon.
    case end
    /// A string: the range between its quotes.
    case string(Range<Int>)
    case other
  }

  private struct Scanner {
    private let text: [UInt8]
    private var place = 0

    init(_ text: [UInt8]) { self.text = text }

    /// The next token; nil at the end.
    mutating func next() -> Token? {
      while place < text.count {
        let byte = text[place]
        switch byte {
        case UInt8(ascii: " "), UInt8(ascii: "\t"), UInt8(ascii: "\r"): place += 1
        case UInt8(ascii: "#"): skip { $0 != UInt8(ascii: "\n") }
        case UInt8(ascii: "\""), UInt8(ascii: "'"): return quoted(byte)
        case _ where Scanner.beginsName(byte):
          let start = place
          skip { Scanner.beginsName($0) || Scanner.continuesName($0) }
          return .name(text[start..<place].elementsEqual("disk".utf8))
        default:
          place += 1
          return single(byte)
        }
      }
      return nil
    }

    private mutating func single(_ byte: UInt8) -> Token {
      switch byte {
      case UInt8(ascii: "\n"), UInt8(ascii: ";"): return .end
      case UInt8(ascii: "["): return .open
      case UInt8(ascii: "]"): return .close
      case UInt8(ascii: "="): return .assign
      case UInt8(ascii: "+") where place < text.count && text[place] == UInt8(ascii: "="):
        place += 1
        return .assign
      default: return .other
      }
    }

    /// A string up to its quote; up to the end of the line, where there is none, it is no string.
    private mutating func quoted(_ quote: UInt8) -> Token {
      let start = place + 1
      var at = start
      while at < text.count, text[at] != UInt8(ascii: "\n") {
        if text[at] == quote {
          place = at + 1
          return .string(start..<at)
        }
        // A backslash holds the next byte, but not the end of the line.
        let isHeld = text[at] == UInt8(ascii: "\\")
        at += isHeld && at + 1 < text.count && text[at + 1] != UInt8(ascii: "\n") ? 2 : 1
      }
      place = min(at, text.count)
      return .other
    }

    private mutating func skip(while holds: (UInt8) -> Bool) {
      while place < text.count, holds(text[place]) { place += 1 }
    }

    private static func continuesName(_ byte: UInt8) -> Bool {
      (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) || byte == UInt8(ascii: ".")
    }

    private static func beginsName(_ byte: UInt8) -> Bool {
      (UInt8(ascii: "a")...UInt8(ascii: "z")).contains(byte)
        || (UInt8(ascii: "A")...UInt8(ascii: "Z")).contains(byte) || byte == UInt8(ascii: "_")
    }
  }
}
