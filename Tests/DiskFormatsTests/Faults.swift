// SPDX-License-Identifier: Apache-2.0
// Images that other programs made, which lie beside the project: they are read where they lie.

import Fakes
import Foundation
import TestSupport

/// The folder of such images: `../shared/faults` from the package, or what DMU_FAULTS names.
enum Faults {
  static let folder: String = {
    if let named = getenv("DMU_FAULTS") { return String(cString: named) }
    var package = URL(fileURLWithPath: #filePath)
    for _ in 0..<3 { package.deleteLastPathComponent() }
    return package.deletingLastPathComponent().appendingPathComponent("shared/faults").path
  }()

  static let isThere: Bool = {
    let isThere = FileManager.default.fileExists(atPath: folder + "/images")
    if !isThere { print("SKIPPED: images of other programs: there is no \(folder)/images") }
    return isThere
  }()

  /// Unpacks an image into a folder.
  static func unpack(_ name: String, into target: String) throws {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
    process.arguments = ["gzip", "-dc", "\(folder)/images/\(name).gz"]
    guard FileManager.default.createFile(atPath: target, contents: nil) else {
      throw CocoaError(.fileWriteUnknown, userInfo: [NSFilePathErrorKey: target])
    }
    process.standardOutput = try FileHandle(forWritingTo: URL(fileURLWithPath: target))
    try process.run()
    process.waitUntilExit()
    guard process.terminationStatus == 0 else {
      throw CocoaError(.fileReadUnknown, userInfo: [NSFilePathErrorKey: name])
    }
  }

  /// An image in memory.
  static func image(_ name: String) throws -> MemoryStore {
    let folder = try TemporaryFolder()
    try unpack(name, into: folder.file(name))
    let bytes = try Data(contentsOf: URL(fileURLWithPath: folder.file(name)))
    return MemoryStore(name, bytes: [UInt8](bytes))
  }
}
