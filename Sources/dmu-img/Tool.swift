// SPDX-License-Identifier: Apache-2.0
// dmu-img: its commands, a file each in Commands/, and how every one of them ends.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

struct Tool: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "dmu-img",
    abstract: "Make, describe, check, convert and compare disk images.",
    discussion: "Options mean what they mean to qemu-img, where that has them.",
    version: Version.text,
    subcommands: wanted)

  private static let all: [any ParsableCommand.Type] = [
    Create.self, Info.self, Check.self, Convert.self, Map.self, Compare.self, Commit.self,
    Rebase.self, Resize.self, Snapshot.self, Dump.self, Restore.self, Bench.self,
  ]

  /// The one that is called by its name: the parser then need not look at the others, which
  /// would take it longer than most of what they do. All of them for anything else. They say
  /// their names, since the parser would find them by reflection, which takes long too.
  private static var wanted: [any ParsableCommand.Type] {
    let name = CommandLine.arguments.dropFirst().first
    let called = all.filter { $0.configuration.commandName == name }
    return called.isEmpty ? all : called
  }
}

/// Runs a command; turns an error into a line on stderr, and anything but success into the
/// exit code.
func finish(
  failed: Int32 = 1, unsupported: Int32? = nil,
  _ body: (Output) throws(ImageError) -> Int32
) throws {
  let output = Output()
  var exit = failed
  func complain(_ error: any Error) {
    let message = [UInt8](ForeignText.lines("dmu-img: \(error)\n").utf8)
    // There is nobody left to tell when stderr fails.
    _ = write(2, message, message.count)
  }
  do throws(ImageError) {
    exit = try body(output)
  } catch {
    complain(error)
    if error.code == .unsupported, let unsupported { exit = unsupported }
  }
  do throws(IOError) {
    try output.finish()
  } catch {
    complain(error)
    exit = failed
  }
  if exit != 0 { throw ExitCode(exit) }
}

/// A length that is given as less by so much is no option: it goes behind the end of those.
private func withoutNegatives(_ arguments: [String]) -> [String] {
  func isNegative(_ word: String) -> Bool {
    word.hasPrefix("-") && word.dropFirst().first.map { $0.isASCII && $0.isNumber } == true
  }
  guard arguments.first == Resize.configuration.commandName, !arguments.contains("--") else {
    return arguments
  }
  let negatives = arguments.filter(isNegative)
  guard !negatives.isEmpty else { return arguments }
  return arguments.filter { !isNegative($0) } + ["--"] + negatives
}

/// dmu-img.
package enum Program {
  /// Runs the program with the arguments of this process.
  package static func main() {
    Tool.main(withoutNegatives(Array(CommandLine.arguments.dropFirst())))
  }
}
