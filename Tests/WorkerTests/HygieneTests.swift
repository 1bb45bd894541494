// SPDX-License-Identifier: Apache-2.0
// What cowd, and the tools in its file, must not be made of.

import BlockIO
import Glibc
import LinuxBlock
import SystemIO
import Testing

@Suite("What cowd is made of") struct HygieneTests {
  private static let rooms = [
    "CLinux", "DiskModel", "SystemIO", "BlockIO", "LinuxBlock", "DMU", "DiskFormats", "Target",
    "NBDServer", "WorkerLink", "Worker",
    "cowd", "ImageTool", "dmu-img", "dscow_tool", "DiskPrograms",
  ]

  /// No room in cowd's file imports Foundation, not even its essentials: those come, if at all,
  /// with the parser of arguments.
  @Test func noRoomImportsFoundation() throws {
    let root = #filePath.split(separator: "/", omittingEmptySubsequences: false).dropLast(3)
      .joined(separator: "/")
    var files = 0
    for room in Self.rooms {
      for path in try sources("\(root)/Sources/\(room)") {
        files += 1
        for line in try text(path).split(separator: "\n") {
          let words = line.split(separator: " ")
          guard words.contains("import"), let module = words.last else { continue }
          #expect(!module.hasPrefix("Foundation"), "\(path)")
          #expect(!module.hasPrefix("Dispatch"), "\(path)")
        }
      }
    }
    #expect(files > 30)
  }

  /// The program itself neither needs the library nor holds its symbols; FoundationEssentials
  /// is another module (and "20FoundationEssentials" in a symbol).
  @Test func theProgramHoldsNoFoundation() throws {
    let bytes = try contents(program("cowd"))
    #expect(find("$s6Worker", in: bytes), "the search finds what is there")
    #expect(!find("$s10Foundation", in: bytes))
    #expect(!find("libFoundation.so", in: bytes))
  }

  private func sources(_ folder: String) throws -> [String] {
    guard let open = opendir(folder) else { throw IOError.last("read", folder) }
    defer { closedir(open) }
    var found: [String] = []
    while let entry = readdir(open) {
      let name = withUnsafeBytes(of: entry.pointee.d_name) {
        String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
      }
      guard !name.hasPrefix(".") else { continue }
      let path = folder + "/" + name
      if entry.pointee.d_type == UInt8(DT_DIR) { found += try sources(path) }
      if name.hasSuffix(".swift") { found.append(path) }
    }
    return found
  }

  private func contents(_ path: String) throws -> [UInt8] {
    let store = try FileStore(path: path, writable: false)
    return try store.read(at: 0, count: Int(store.size))
  }

  private func text(_ path: String) throws -> String {
    String(decoding: try contents(path), as: UTF8.self)
  }

  private func find(_ needle: String, in bytes: [UInt8]) -> Bool {
    let needle = Array(needle.utf8)
    return bytes.withUnsafeBytes { bytes in
      var start = 0
      while start + needle.count <= bytes.count {
        let from = bytes.baseAddress! + start
        guard let hit = memchr(from, Int32(needle[0]), bytes.count - needle.count - start + 1)
        else { return false }
        if memcmp(hit, needle, needle.count) == 0 { return true }
        start = UnsafeRawPointer(hit) - bytes.baseAddress! + 1
      }
      return false
    }
  }
}
