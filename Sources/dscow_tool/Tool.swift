// SPDX-License-Identifier: Apache-2.0
// dscow_tool: the arguments of the commands in DscowTool.

import ArgumentParser
import DiskFormats
import Glibc
import SystemIO

struct Tool: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "dscow_tool",
    abstract: "Make, describe and check dscow stores.",
    discussion: "'dscow_tool -c STORE BASE' is 'dscow_tool create STORE BASE'.",
    version: Version.text,
    subcommands: [Create.self, Info.self, Check.self, Map.self, Accept.self, Reblock.self])
}

struct Size: ExpressibleByArgument {
  let bytes: UInt64

  init?(argument: String) {
    guard let bytes = ImageFile.bytes(argument) else { return nil }
    self.bytes = bytes
  }
}

private let blockSizes = CompletionKind.list(
  (2...12).map { $0 < 10 ? "\(1 << $0)K" : "\(1 << ($0 - 10))M" })

struct Looking: ParsableArguments {
  @Flag(name: .long, help: "Print JSON.") var json = false
  @Flag(
    name: [.customShort("U"), .customLong("force-share")],
    help: "Look at a store in use; what is printed may contradict itself.")
  var evenInUse = false
}

struct BaseFormat: ParsableArguments {
  @Option(
    name: [.customShort("F"), .customLong("base-format")],
    help: "The base's format; unless given, its first bytes say, and it may name no file.",
    completion: .list(FormatList.all.names))
  var baseFormat: String?
  @Flag(help: "Refuse to open any file that the store or the base names.")
  var untrusted = false
}

struct Create: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Make a store over a base (also: -c).")
  @Argument(help: "The file to make, or a block device.", completion: .file())
  var store: String
  @Argument(help: "The base; without one, unwritten blocks read as zeroes.", completion: .file())
  var base: String?
  @Option(
    name: .shortAndLong, help: "Bytes of a block, 4K to 4M. (default: 4K)",
    completion: blockSizes)
  var blockSize: Size?
  @Option(
    help: "Length of the disk, up to 64T. (default: that of the base)",
    completion: .list(["1G", "10G", "100G", "1T"]))
  var size: Size?
  @Flag(name: .shortAndLong, help: "Overwrite what is in the store.") var force = false
  @OptionGroup var format: BaseFormat

  func run() throws {
    try finish { () throws(ImageError) in
      put(
        try DscowTool.create(
          store: store, base: base, baseFormat: format.baseFormat, untrusted: format.untrusted,
          blockSize: blockSize?.bytes, size: size?.bytes, force: force))
      return .done
    }
  }
}

struct Info: ParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Describe a store.")
  @Argument(help: "The store.", completion: .file()) var store: String
  @OptionGroup var looking: Looking

  func run() throws {
    try finish { () throws(ImageError) in
      put(
        try DscowTool.info(store: store, json: looking.json, evenInUse: looking.evenInUse))
      return .done
    }
  }
}

struct Check: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Look for damage.",
    discussion: """
      Ends with 0 for a clean store, 1 when the check could not be done, 2 for damage, 3 for \
      leftovers that harm nobody.
      """)
  @Argument(help: "The store.", completion: .file()) var store: String
  @Option(
    help: "Compare this base with what the store knows of it.", completion: .file())
  var base: String?
  @Flag(help: "Mend what can be mended.") var repair = false
  @OptionGroup var format: BaseFormat
  @OptionGroup var looking: Looking

  func run() throws {
    try finish { () throws(ImageError) in
      let (text, exit) = try DscowTool.check(
        store: store, base: base, baseFormat: format.baseFormat, untrusted: format.untrusted,
        repair: repair, json: looking.json, evenInUse: looking.evenInUse)
      put(text)
      return exit
    }
  }
}

struct Map: ParsableCommand {
  static let configuration = CommandConfiguration(abstract: "Say what is where.")
  @Argument(help: "The store.", completion: .file()) var store: String
  @OptionGroup var looking: Looking

  func run() throws {
    try finish { () throws(ImageError) in
      let output = Output()
      try DscowTool.map(
        store: store, json: looking.json, evenInUse: looking.evenInUse, to: output)
      do throws(IOError) { try output.finish() } catch { throw ImageError(error) }
      return .done
    }
  }
}

struct Accept: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Take a base that has changed as the store's own.",
    discussion: """
      Only for a base whose contents are still those under the store: copied, moved, or grown \
      at the end. A base that was written to makes the disk unsound, and this does not mend it.
      """)
  @Argument(help: "The store.", completion: .file()) var store: String
  @Argument(help: "The base, when it has moved.", completion: .file()) var base: String?
  @OptionGroup var format: BaseFormat

  func run() throws {
    try finish { () throws(ImageError) in
      put(
        try DscowTool.accept(
          store: store, base: base, baseFormat: format.baseFormat, untrusted: format.untrusted))
      return .done
    }
  }
}

struct Reblock: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Give a store blocks of another size.",
    discussion: """
      No data moves. Smaller blocks can always be had; larger ones only where all the small \
      blocks of each are alike, in the store or not.
      """)
  @Argument(help: "The store, which nobody uses.", completion: .file()) var store: String
  @Argument(help: "Bytes of a block, 4K to 4M.", completion: blockSizes) var size: Size

  func run() throws {
    try finish { () throws(ImageError) in
      put(try DscowTool.reblock(store: store, to: size.bytes))
      return .done
    }
  }
}

func put(_ text: String) { print(ForeignText.lines(text), terminator: "") }

/// Runs a command; turns an error into a line on stderr, and anything but success into the
/// exit code.
func finish(_ body: () throws(ImageError) -> DscowTool.Exit) throws {
  var exit = DscowTool.Exit.failed
  do throws(ImageError) {
    exit = try body()
    if fflush(nil) != 0 { exit = .failed }
  } catch {
    let message = [UInt8](ForeignText.lines("dscow_tool: \(error)\n").utf8)
    // There is nobody left to tell when stderr fails.
    _ = write(2, message, message.count)
  }
  if exit != .done { throw ExitCode(exit.rawValue) }
}

/// dscow_tool.
package enum Program {
  /// Runs the program with the arguments of this process.
  package static func main() {
    var arguments = [String](CommandLine.arguments.dropFirst())
    if arguments.first == "-c" { arguments[0] = "create" }
    Tool.main(arguments)
  }
}
