// SPDX-License-Identifier: Apache-2.0
// What a command prints: collected in a large buffer, so that a million lines cost little.

import Glibc

/// Text on its way to a descriptor. Used from one thread.
package final class Output {
  private static let size = 64 << 10
  /// The longest number.
  private static let room = 64
  private let descriptor: Int32
  private let bytes = UnsafeMutablePointer<UInt8>.allocate(capacity: size + room)
  private var count = 0
  /// The first error; what comes after it is not written.
  private var failure: IOError?

  /// Text for a descriptor, standard output unless asked otherwise.
  package init(_ descriptor: Int32 = 1) { self.descriptor = descriptor }

  deinit { bytes.deallocate() }

  /// Adds text, made fit for a terminal: names in it may come from elsewhere.
  package func put(_ text: String) {
    var text = ForeignText.lines(text)
    text.withUTF8 { put($0) }
  }

  /// Adds text that is known when the program is built, at less cost.
  package func put(known text: StaticString) {
    put(UnsafeBufferPointer(start: text.utf8Start, count: text.utf8CodeUnitCount))
  }

  private func put(_ text: UnsafeBufferPointer<UInt8>) {
    var rest = text[...]
    while !rest.isEmpty {
      if count >= Self.size { drain() }
      let piece = rest.prefix(Self.size - count)
      _ = UnsafeMutableBufferPointer(start: bytes + count, count: piece.count)
        .update(fromContentsOf: piece)
      count += piece.count
      rest = rest.dropFirst(piece.count)
    }
  }

  /// Adds a number in decimal digits, filled with blanks to a width.
  package func put(_ number: UInt64, width: Int = 0) { digits(number, base: 10, width: width) }

  /// Adds 0x and a number in hexadecimal digits (0 without the 0x), filled with blanks to a
  /// width.
  package func put(hexadecimal number: UInt64, width: Int) {
    guard number > 0 else { return digits(0, base: 16, width: width) }
    put(known: "0x")
    digits(number, base: 16, width: width - 2)
  }

  /// Adds digits at the left of `width` columns, 32 at most.
  private func digits(_ number: UInt64, base: UInt64, width: Int) {
    if count >= Self.size { drain() }
    var length = 1
    var rest = number / base
    while rest > 0 {
      length += 1
      rest /= base
    }
    rest = number
    let start = bytes + count
    for index in stride(from: length - 1, through: 0, by: -1) {
      let digit = UInt8(truncatingIfNeeded: rest % base)
      start[index] = digit < 10 ? UInt8(ascii: "0") + digit : UInt8(ascii: "a") + digit - 10
      rest /= base
    }
    for index in length..<max(length, width) { start[index] = UInt8(ascii: " ") }
    count += max(length, width)
  }

  private func drain() {
    var done = 0
    while done < count, failure == nil {
      let written = write(descriptor, bytes + done, count - done)
      if written < 0 {
        if errno == EINTR { continue }
        failure = IOError.last("write the output")
      } else {
        done += written
      }
    }
    count = 0
  }

  /// Writes what is left. Throws what any write has thrown.
  package func finish() throws(IOError) {
    drain()
    if let failure { throw failure }
  }
}
