// Where the fixtures and the built programs are, and how much the long tests do.

import Foundation

enum Fixture {
  static func text(_ name: String, file: String = #filePath) throws -> String {
    let folder = URL(fileURLWithPath: file).deletingLastPathComponent().deletingLastPathComponent()
    let path = folder.appendingPathComponent("Fixtures").appendingPathComponent(name)
    return try String(contentsOf: path, encoding: .utf8)
  }

  /// A program that was built with these tests: beside the test bundle.
  static func program(_ name: String) throws -> URL {
    let bundle = CommandLine.arguments.first { $0.hasSuffix(".xctest") }
    let own = URL(fileURLWithPath: bundle ?? CommandLine.arguments[0])
    let path = own.deletingLastPathComponent().appendingPathComponent(name)
    guard FileManager.default.isExecutableFile(atPath: path.path) else {
      throw CocoaError(.fileNoSuchFile, userInfo: [NSFilePathErrorKey: path.path])
    }
    return path
  }
}

/// How much of the long tests is done: DMU_DEPTH times a little, 1 by default. With 30 every
/// kind and every place is tried, and the random tests do what docs/testing.md tells of.
enum Depth {
  static let factor = max(1, getenv("DMU_DEPTH").flatMap { Int(String(cString: $0)) } ?? 1)

  /// A count times the depth.
  static func times(_ count: Int) -> Int { count * factor }

  /// `count` times the depth of some items, evenly spread over them; all when that is more.
  static func some<Item>(_ count: Int, of items: [Item]) -> [Item] {
    let wanted = min(items.count, times(count))
    return (0..<wanted).map { items[$0 * items.count / wanted] }
  }
}
