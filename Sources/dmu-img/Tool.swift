// SPDX-License-Identifier: Apache-2.0
// dmu-img: the arguments of the commands in ImageTool.

import ArgumentParser
import Glibc
import ImageFormats
import ImageTool
import Posix

extension CompletionKind {
  /// The names of formats.
  static let formats = CompletionKind.list(DiskFormats.all.names)
  /// NAME=VALUE,NAME=VALUE of the format that the command line gives for the new image.
  static let formatOptions = CompletionKind.custom { words, index, _ in
    // `create -f FORMAT`, `convert -O FORMAT`; both are raw otherwise.
    let option = words.contains("convert") ? "-O" : "-f"
    let name = words.value(after: option) ?? "raw"
    guard let kind = DiskFormats.all.named(name) else { return [] }
    return ImageOptions.completions(
      of: words.indices.contains(index) ? words[index] : "", for: kind)
  }
  /// Sizes that are often wanted.
  static func sizes(_ sizes: String...) -> CompletionKind { .list(sizes) }
}

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

struct Size: ExpressibleByArgument {
  let bytes: UInt64

  init?(argument: String) {
    guard let bytes = ImageFile.bytes(argument) else { return nil }
    self.bytes = bytes
  }
}

enum OutputForm: String, ExpressibleByArgument, CaseIterable {
  case human, json
}

struct Form: ParsableArguments {
  @Option(name: .customLong("output"), help: "What to print: human or json.")
  var output = OutputForm.human
  @Flag(name: .long, help: "Print JSON.") var json = false
  var isJSON: Bool { json || output == .json }
}

struct Looking: ParsableArguments {
  @Flag(
    name: [.customShort("U"), .customLong("force-share")],
    help: "Look at an image in use; what is printed may contradict itself.")
  var evenInUse = false
}

struct Trust: ParsableArguments {
  @Flag(help: "Refuse to open any file that an image names: base, data file, extent.")
  var untrusted = false
}

struct Format: ParsableArguments {
  @Option(
    name: .customShort("f"),
    help: "The image's format; unless given, its first bytes say, and it may name no file.",
    completion: .formats)
  var format: String?
  @Option(
    name: .customLong("base-format"),
    help: "The format of the image's base, whatever the image says of it.", completion: .formats)
  var ownBaseFormat: String?
  @OptionGroup var trust: Trust
  func source(_ path: String, evenInUse: Bool = false) -> ImageSource {
    ImageSource(
      path, format: format, baseFormat: ownBaseFormat, evenInUse: evenInUse,
      untrusted: trust.untrusted)
  }
}

struct Quiet: ParsableArguments {
  @Flag(name: .shortAndLong, help: "Print nothing but errors.") var quiet = false
}

struct Create: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "create", abstract: "Make an image.")
  @Option(
    name: .customShort("f"), help: "The format: raw, qcow2, dscow, vpc and others.",
    completion: .formats)
  var format = "raw"
  @Option(
    name: .customShort("b"), help: "The base, as the image shall name it.", completion: .file())
  var base: String?
  @Option(name: .customShort("F"), help: "The base's format.", completion: .formats)
  var baseFormat: String?
  @Option(
    name: .customShort("o"), help: "NAME=VALUE,NAME=VALUE of the format.",
    completion: .formatOptions)
  var options: [String] = []
  @OptionGroup var trust: Trust
  @OptionGroup var quiet: Quiet
  @Argument(help: "The file to make, or a device.", completion: .file()) var file: String
  @Argument(
    help: "Length of the disk. (default: that of the base)",
    completion: .sizes("1G", "10G", "100G", "1T"))
  var size: Size?

  func run() throws {
    try finish { output throws(ImageError) in
      var request = ImageTool.CreateRequest(path: file)
      request.format = format
      request.size = size?.bytes
      request.base = base
      request.baseFormat = baseFormat
      request.options = options
      request.quiet = quiet.quiet
      request.untrusted = trust.untrusted
      try ImageTool.create(request, to: output)
      return 0
    }
  }
}

struct Info: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "info", abstract: "Describe an image.")
  @OptionGroup var format: Format
  @OptionGroup var form: Form
  @Flag(help: "Describe every image under it as well.") var backingChain = false
  @OptionGroup var looking: Looking
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish { output throws(ImageError) in
      try ImageTool.info(
        format.source(file, evenInUse: looking.evenInUse),
        chain: backingChain, json: form.isJSON, to: output)
      return 0
    }
  }
}

enum RepairWord: String, ExpressibleByArgument, CaseIterable {
  case leaks, all
  var repair: Repair { self == .leaks ? .leaks : .all }
}

struct Check: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "check",
    abstract: "Look for damage.",
    discussion: """
      Ends with 0 for a sound image, 1 when the check could not be done, 2 for damage, 3 for \
      leaks that harm nobody, 63 for a format that has nothing to check.
      """)
  @OptionGroup var format: Format
  @OptionGroup var form: Form
  @Option(name: [.customShort("r"), .long], help: "Mend: leaks, or all.")
  var repair: RepairWord?
  @OptionGroup var quiet: Quiet
  @OptionGroup var looking: Looking
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish(unsupported: ImageTool.CheckExit.unsupported.rawValue) {
      output throws(ImageError) in
      try ImageTool.check(
        format.source(file, evenInUse: looking.evenInUse && repair == nil),
        repair: repair?.repair, json: form.isJSON, quiet: quiet.quiet, to: output
      ).rawValue
    }
  }
}

struct Convert: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "convert",
    abstract: "Copy a disk into another format.",
    discussion: "The target gets its name when it is whole, in the place of what has it.")
  @OptionGroup var format: Format
  @Option(name: .customShort("O"), help: "The target's format.", completion: .formats)
  var targetFormat = "raw"
  @Option(
    name: .customShort("o"), help: "NAME=VALUE,NAME=VALUE of the target's format.",
    completion: .formatOptions)
  var options: [String] = []
  @Option(
    name: .customShort("B"), help: "The target's base: only what differs is copied.",
    completion: .file())
  var base: String?
  @Option(name: .customShort("F"), help: "The base's format.", completion: .formats)
  var baseFormat: String?
  @Option(
    name: .customShort("l"), help: "An internal snapshot, to be read instead.",
    completion: .list(["snapshot.id=", "snapshot.name="]))
  var snapshot: String?
  @Option(
    name: .customShort("S"), help: "Leave out runs of so many zeroes. (default: 4K; 0: none)",
    completion: .sizes("0", "4K", "64K"))
  var sparse: Size?
  @Option(
    name: [.customShort("m"), .customShort("j")],
    help: "Threads. (default: one a processor, 4 at least)",
    completion: .list(["1", "2", "4", "8", "16"]))
  var threads: Int?
  @Option(
    name: .customShort("t"),
    help: "writeback: on the medium when done; unsafe: whenever the system writes it.",
    completion: .list(["unsafe", "writeback"]))
  var cache = "unsafe"
  @Flag(name: .customShort("c"), help: "Compress (qcow2).") var compress = false
  @Flag(name: .customShort("C"), help: "Have the kernel copy, zeroes and all.") var offload = false
  @Flag(name: .customShort("n"), help: "Write into a target that is there.")
  var intoExisting = false
  @Flag(help: "With -n: the target reads as zeroes.") var targetIsZero = false
  @Flag(name: .customShort("p"), help: "Show the progress.") var progress = false
  @Flag(name: .customShort("W"), help: "Accepted for qemu-img compatibility; ignored.")
  var outOfOrder = false
  @OptionGroup var quiet: Quiet
  @OptionGroup var looking: Looking
  @Argument(help: "The image.", completion: .file()) var source: String
  @Argument(help: "The target.", completion: .file()) var target: String

  func run() throws {
    try finish { _ throws(ImageError) in
      var request = ImageTool.ConvertRequest(
        format.source(source, evenInUse: looking.evenInUse),
        target: target, progress: Progress(on: progress, automatic: !quiet.quiet))
      request.format = targetFormat
      request.options = options
      request.base = base
      request.baseFormat = baseFormat
      request.snapshot = snapshot.map(Self.name)
      request.sparse = sparse?.bytes ?? 4096
      request.threads = threads
      request.compress = compress
      request.offload = offload
      request.intoExisting = intoExisting
      request.targetIsZero = targetIsZero
      request.durable = cache != "unsafe"
      try ImageTool.convert(request)
      return 0
    }
  }

  /// "snapshot.id=X" and "snapshot.name=X" are X.
  private static func name(_ words: String) -> String {
    for prefix in ["snapshot.id=", "snapshot.name="] where words.hasPrefix(prefix) {
      return String(words.dropFirst(prefix.count))
    }
    return words
  }
}

struct Map: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "map", abstract: "Say what is where.")
  @OptionGroup var format: Format
  @OptionGroup var form: Form
  @Option(
    name: [.short, .long], help: "The first byte.", completion: .sizes("0", "1M", "1G"))
  var startOffset: Size?
  @Option(
    name: [.customShort("l"), .long], help: "How many bytes.",
    completion: .sizes("1M", "1G"))
  var maxLength: Size?
  @Option(
    help: "Draw it into this file instead.", completion: .file(extensions: ["svg"]))
  var svg: String?
  @OptionGroup var looking: Looking
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish { output throws(ImageError) in
      let source = format.source(file, evenInUse: looking.evenInUse)
      if let svg {
        try ImageTool.draw(source, into: svg)
      } else {
        try ImageTool.map(
          source, start: startOffset?.bytes ?? 0, count: maxLength?.bytes,
          form: form.isJSON ? .json : .text, to: output)
      }
      return 0
    }
  }
}

struct Compare: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "compare",
    abstract: "Tell whether two disks hold the same.",
    discussion: "Ends with 0 for the same, 1 for a difference, 2 when it cannot be told.")
  @Option(name: .customShort("f"), help: "The first image's format.", completion: .formats)
  var format: String?
  @Option(name: .customShort("F"), help: "The second image's format.", completion: .formats)
  var otherFormat: String?
  @Flag(name: .customShort("s"), help: "Lengths, and what is there at all, have to agree.")
  var strict = false
  @Flag(name: .customShort("p"), help: "Show the progress.") var progress = false
  @OptionGroup var trust: Trust
  @OptionGroup var quiet: Quiet
  @OptionGroup var looking: Looking
  @Argument(help: "An image.", completion: .file()) var first: String
  @Argument(help: "Another.", completion: .file()) var second: String

  func run() throws {
    try finish(failed: 2) { output throws(ImageError) in
      func source(_ path: String, _ format: String?) -> ImageSource {
        ImageSource(
          path, format: format, evenInUse: looking.evenInUse, untrusted: trust.untrusted)
      }
      let isSame = try ImageTool.compare(
        source(first, format), source(second, otherFormat), strict: strict, quiet: quiet.quiet,
        progress: Progress(on: progress), to: output)
      return isSame ? 0 : 1
    }
  }
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
