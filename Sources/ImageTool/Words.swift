// SPDX-License-Identifier: Apache-2.0
// Numbers and tables as people read them, without Foundation.

import Glibc

/// Text for people.
enum Words {
  /// A number with so many significant digits, as printf's %g has it.
  static func number(_ value: Double, digits: Int32 = 3) -> String {
    printf("%.*g", [digits, value])
  }

  /// A number with so many places after the point.
  static func fixed(_ value: Double, places: Int32) -> String {
    printf("%.*f", [places, value])
  }

  private static func printf(_ format: String, _ arguments: [any CVarArg]) -> String {
    var buffer = [CChar](repeating: 0, count: 64)
    let count = withVaList(arguments) { vsnprintf(&buffer, buffer.count, format, $0) }
    return String(
      decoding: buffer[..<max(0, min(Int(count), buffer.count - 1))].map { UInt8(bitPattern: $0) },
      as: UTF8.self)
  }

  /// A size in the largest unit in which it is at least one, nearly: "20 MiB".
  static func size(_ bytes: UInt64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    var value = Double(bytes)
    var unit = 0
    while value >= 1000, unit < units.count - 1 {
      value /= 1024
      unit += 1
    }
    return "\(number(value)) \(units[unit])"
  }

  /// Text on the left of a column.
  static func left(_ text: String, _ width: Int) -> String {
    text + String(repeating: " ", count: max(0, width - text.count))
  }

  /// Text on the right of a column.
  static func right(_ text: String, _ width: Int) -> String {
    String(repeating: " ", count: max(0, width - text.count)) + text
  }
}

extension Words {
  /// A time as the local clock shows it. Source: localtime(3), strftime(3).
  static func date(_ seconds: UInt32) -> String {
    var time = time_t(seconds)
    var parts = tm()
    localtime_r(&time, &parts)
    var buffer = [CChar](repeating: 0, count: 32)
    let count = strftime(&buffer, buffer.count, "%Y-%m-%d %H:%M:%S", &parts)
    return String(decoding: buffer[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }
}
