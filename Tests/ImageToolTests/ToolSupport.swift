// SPDX-License-Identifier: Apache-2.0
// The built dmu-img, qemu-img as its judge, and a folder for both.

import BlockIO
import DiskFormats
import Foundation
import SystemIO
import TestSupport

/// A folder, and programs run in it.
final class Bench {
  /// What a program said, and how it ended.
  struct Outcome {
    var exit: Int32
    var out: String
    var error: String
  }

  /// A program that had to succeed did not.
  struct Failure: Error, CustomStringConvertible {
    let description: String
  }

  let folder: TemporaryFolder

  init() throws { folder = try TemporaryFolder() }

  func path(_ name: String) -> String { folder.file(name) }

  /// Where the programs of this package were built.
  private static let programs: URL = {
    let bundle = CommandLine.arguments.first { $0.hasSuffix(".xctest") }
    return URL(fileURLWithPath: bundle ?? CommandLine.arguments[0]).deletingLastPathComponent()
  }()

  /// A program of this package.
  static func program(_ name: String) throws -> URL {
    let path = programs.appendingPathComponent(name)
    guard FileManager.default.isExecutableFile(atPath: path.path) else {
      throw CocoaError(.fileNoSuchFile, userInfo: [NSFilePathErrorKey: path.path])
    }
    return path
  }

  /// Runs a program, one of this package or of the system's, to its end.
  func run(_ program: String, _ arguments: [String]) throws -> Outcome {
    let process = try start(program, arguments)
    let out = (process.standardOutput as? Pipe)?.fileHandleForReading.readDataToEndOfFile()
    let error = (process.standardError as? Pipe)?.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return Outcome(
      exit: process.terminationStatus, out: String(decoding: out ?? Data(), as: UTF8.self),
      error: String(decoding: error ?? Data(), as: UTF8.self))
  }

  /// Starts a program.
  func start(_ program: String, _ arguments: [String]) throws -> Process {
    let process = Process()
    let own = Self.programs.appendingPathComponent(program)
    if FileManager.default.isExecutableFile(atPath: own.path) {
      process.executableURL = own
      process.arguments = arguments
    } else {
      process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
      process.arguments = [program] + arguments
    }
    process.currentDirectoryURL = URL(fileURLWithPath: folder.path)
    process.standardOutput = Pipe()
    process.standardError = Pipe()
    try process.run()
    return process
  }

  /// Runs dmu-img.
  func tool(_ arguments: String...) throws -> Outcome { try run("dmu-img", arguments) }

  /// Runs a program that has to succeed; returns what it printed.
  @discardableResult
  func must(_ program: String, _ arguments: String...) throws -> String {
    let outcome = try run(program, arguments)
    guard outcome.exit == 0 else {
      throw Failure(
        description: "\(program) \(arguments) ended with \(outcome.exit): "
          + outcome.out + outcome.error)
    }
    return outcome.out
  }

  /// Makes a raw disk: random data, text, zeroes and holes in pieces, by a seed.
  func makeRaw(_ name: String, size: Int, seed: UInt64) throws {
    let store = try FileStore(
      Descriptor(path: path(name), flags: O_RDWR | O_CREAT | O_TRUNC, mode: 0o644), name: name)
    try store.resize(to: UInt64(size))
    var random = SplitMix64(seed: seed)
    let noise = (0..<20480).flatMap { _ in withUnsafeBytes(of: random.next()) { [UInt8]($0) } }
    let words = (0..<9000).flatMap { Array("the same words again \($0 % 100) ".utf8) }
    var offset = 0
    while offset < size {
      let count = min(size - offset, (1 + random.below(40)) * 4096)
      let start = random.below(noise.count - count + 1)
      switch random.below(4) {
      case 0: try store.write([UInt8](noise[start..<(start + count)]), at: UInt64(offset))
      case 1: try store.write([UInt8](words[start..<(start + count)]), at: UInt64(offset))
      case 2: try store.write([UInt8](repeating: 0, count: count), at: UInt64(offset))
      default: break
      }
      offset += count
    }
  }

  /// Everything in the folder.
  func names() throws -> [String] {
    try FileManager.default.contentsOfDirectory(atPath: folder.path).sorted()
  }

  /// The bytes of a file.
  func bytes(_ name: String) throws -> [UInt8] {
    [UInt8](try Data(contentsOf: URL(fileURLWithPath: path(name))))
  }
}
