// What a command prints: collected in a large buffer, so that a million lines cost little.

import Glibc
import ImageFormats
public import Posix

/// Text on its way to a descriptor. Used from one thread.
public final class Output {
  private static let size = 64 << 10
  private let descriptor: Int32
  private var bytes: [UInt8] = []
  /// The first error; what comes after it is not written.
  private var failure: IOError?

  /// Text for a descriptor, standard output unless asked otherwise.
  public init(_ descriptor: Int32 = 1) {
    self.descriptor = descriptor
    bytes.reserveCapacity(Self.size + 4096)
  }

  /// Adds text.
  public func put(_ text: String) {
    bytes += text.utf8
    if bytes.count >= Self.size { drain() }
  }

  /// Adds text that is known when the program is built.
  func put(_ text: StaticString) {
    bytes += UnsafeBufferPointer(start: text.utf8Start, count: text.utf8CodeUnitCount)
    if bytes.count >= Self.size { drain() }
  }

  /// Adds bytes.
  func put(_ text: [UInt8]) {
    bytes += text
    if bytes.count >= Self.size { drain() }
  }

  /// Adds a number in decimal digits.
  func put(_ number: UInt64) { digits(number, base: 10, width: 0) }

  /// Adds 0x and a number in hexadecimal digits, filled with blanks to a width.
  func put(hexadecimal number: UInt64, width: Int) {
    bytes.append(UInt8(ascii: "0"))
    if number != 0 { bytes.append(UInt8(ascii: "x")) }
    if number == 0 {
      for _ in 0..<max(0, width - 1) { bytes.append(UInt8(ascii: " ")) }
      return
    }
    digits(number, base: 16, width: width - 2)
  }

  private func digits(_ number: UInt64, base: UInt64, width: Int) {
    withUnsafeTemporaryAllocation(of: UInt8.self, capacity: 24) { buffer in
      var first = buffer.count
      var rest = number
      repeat {
        first -= 1
        let digit = UInt8(rest % base)
        buffer[first] = digit < 10 ? UInt8(ascii: "0") + digit : UInt8(ascii: "a") + digit - 10
        rest /= base
      } while rest > 0
      bytes += buffer[first...]
      for _ in 0..<max(0, width - (buffer.count - first)) { bytes.append(UInt8(ascii: " ")) }
    }
    if bytes.count >= Self.size { drain() }
  }

  private func drain() {
    var done = 0
    while done < bytes.count, failure == nil {
      let count = bytes[done...].withUnsafeBytes { write(descriptor, $0.baseAddress, $0.count) }
      if count < 0 {
        if errno == EINTR { continue }
        failure = IOError.last("write the output")
      } else {
        done += count
      }
    }
    bytes.removeAll(keepingCapacity: true)
  }

  /// Writes what is left. Throws what any write has thrown.
  public func finish() throws(IOError) {
    drain()
    if let failure { throw failure }
  }
}
