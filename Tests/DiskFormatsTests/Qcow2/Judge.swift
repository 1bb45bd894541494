// SPDX-License-Identifier: Apache-2.0
// QEMU's tools as the judge of what this program reads and writes.

import BlockIO
import DiskFormats
import Foundation
import SystemIO

/// Runs qemu-img and qemu-io in a folder of its own, which goes with it.
final class Judge {
  /// What a tool said.
  struct Failure: Error, CustomStringConvertible {
    let description: String
  }

  let folder: String

  init() throws {
    let base = FileManager.default.temporaryDirectory.path
    folder = base + "/judge-" + UUID().uuidString
    try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
  }

  deinit {
    do {
      try FileManager.default.removeItem(atPath: folder)
    } catch {
      print("cannot remove \(folder): \(error)")
    }
  }

  /// A path in the folder.
  func path(_ name: String) -> String { folder + "/" + name }

  /// Runs a program there; returns what it printed and how it ended.
  func run(_ program: String, _ arguments: [String]) throws -> (output: String, status: Int32) {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
    process.arguments = [program] + arguments
    process.currentDirectoryURL = URL(fileURLWithPath: folder)
    let pipe = Pipe()
    process.standardOutput = pipe
    process.standardError = pipe
    try process.run()
    let data = pipe.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return (String(decoding: data, as: UTF8.self), process.terminationStatus)
  }

  /// Runs a program that has to succeed.
  @discardableResult
  func must(_ program: String, _ arguments: String...) throws -> String {
    let (output, status) = try run(program, arguments)
    guard status == 0 else {
      throw Failure(description: "\(program) \(arguments) ended with \(status): \(output)")
    }
    return output
  }

  /// Has qemu-io do things to an image.
  func io(_ image: String, _ format: String, _ commands: [String]) throws {
    let arguments = ["-f", format] + commands.flatMap { ["-c", $0] } + [image]
    let (output, status) = try run("qemu-io", arguments)
    guard status == 0, !output.contains("failed"), !output.contains("Error") else {
      throw Failure(description: "qemu-io \(arguments) ended with \(status): \(output)")
    }
  }

  /// Has qemu-img compare an image with a model of the disk in it.
  func compare(_ image: String, _ format: String, with model: [UInt8]) throws {
    try Data(model).write(to: URL(fileURLWithPath: path("model.raw")))
    try must("qemu-img", "compare", "-q", "-f", format, "-F", "raw", image, "model.raw")
  }

  /// The disk in an image, as QEMU reads it.
  func contents(_ image: String, _ format: String, snapshot: String? = nil) throws -> [UInt8] {
    let raw = path("judge-contents.raw")
    let options = snapshot.map { ["-l", "snapshot.name=\($0)"] } ?? []
    let arguments = ["convert", "-f", format] + options + ["-O", "raw", image, raw]
    let (output, status) = try run("qemu-img", arguments)
    guard status == 0 else { throw Failure(description: "qemu-img convert: \(output)") }
    let data = try Data(contentsOf: URL(fileURLWithPath: raw))
    try FileManager.default.removeItem(atPath: raw)
    return [UInt8](data)
  }

  /// Opens a file of the folder.
  func open(_ name: String, writable: Bool) throws -> FileStore {
    try FileStore(path: path(name), writable: writable)
  }

  /// Opens an image of the folder with everything under it.
  func chain(
    _ store: FileStore, kind: ImageKind?, writable: Bool, snapshot: String? = nil
  ) throws -> any ImageFormat {
    try Chain(store, kind: kind) {
      request throws(ImageError) in
      do throws(IOError) {
        let path = request.path.hasPrefix("/") ? request.path : self.path(request.path)
        return try FileStore(
          path: path, writable: writable && request.role != .base && request.from == store.name)
      } catch { throw ImageError(error) }
    }.disk(writable: writable, snapshot: snapshot)
  }
}
