// SPDX-License-Identifier: Apache-2.0
// Where the fixtures and the built programs are.

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
