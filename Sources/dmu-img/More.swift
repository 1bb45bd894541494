// SPDX-License-Identifier: Apache-2.0
// The arguments of the commands that change images, and how every command ends.

import ArgumentParser
import Glibc
import ImageFormats
import ImageTool
import Posix

struct Commit: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "commit",
    abstract: "Write what an image has into its base.",
    discussion: "The image is empty afterwards, unless -d is given.")
  @OptionGroup var format: Format
  @Flag(name: .customShort("d"), help: "Keep what the image has.") var keep = false
  @Flag(name: .customShort("p"), help: "Show the progress.") var progress = false
  @OptionGroup var quiet: Quiet
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish { output throws(ImageError) in
      try ImageTool.commit(
        format.source(file), keep: keep,
        progress: Progress(on: progress, automatic: !quiet.quiet), quiet: quiet.quiet, to: output)
      return 0
    }
  }
}

struct Rebase: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "rebase",
    abstract: "Put an image over another base.",
    discussion: """
      What the image shows stays the same: where old and new base differ, the old one's data \
      is copied into the image. With -u only the name is changed.
      """)
  @OptionGroup var format: Format
  @Option(name: .customShort("b"), help: "The new base; empty: none.", completion: .file())
  var base: String
  @Option(name: .customShort("F"), help: "Its format.", completion: .formats)
  var baseFormat: String?
  @Flag(name: .customShort("u"), help: "Only change the name; the bases hold the same.")
  var unsafe = false
  @Flag(name: .customShort("p"), help: "Show the progress.") var progress = false
  @OptionGroup var quiet: Quiet
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish { _ throws(ImageError) in
      try ImageTool.rebase(
        format.source(file), base: base.isEmpty ? nil : base,
        baseFormat: baseFormat, unsafe: unsafe,
        progress: Progress(on: progress, automatic: !quiet.quiet))
      return 0
    }
  }
}

struct Resize: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "resize",
    abstract: "Give a disk another length.",
    discussion: "The length is SIZE, +SIZE or -SIZE, with K, M, G or T.")
  @OptionGroup var format: Format
  @Flag(help: "Needed for a length that is less than now.") var shrink = false
  @OptionGroup var quiet: Quiet
  @Argument(help: "The image.", completion: .file()) var file: String
  @Argument(help: "The new length.", completion: .sizes("+1G", "+10G", "10G", "100G"))
  var size: String

  func run() throws {
    try finish { output throws(ImageError) in
      try ImageTool.resize(
        format.source(file), size: size, shrink: shrink, quiet: quiet.quiet,
        to: output)
      return 0
    }
  }
}

struct Snapshot: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "snapshot", abstract: "List internal snapshots.")
  @Flag(name: .customShort("l"), help: "List them, which is all there is.") var list = false
  @OptionGroup var format: Format
  @OptionGroup var form: Form
  @OptionGroup var looking: Looking
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish { output throws(ImageError) in
      try ImageTool.listSnapshots(
        format.source(file, evenInUse: looking.evenInUse),
        json: form.isJSON, to: output)
      return 0
    }
  }
}

struct Dump: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "dump",
    abstract: "Write an image's mapping as XML.",
    discussion: "The schema is that of thin_dump.")
  @OptionGroup var format: Format
  @Option(
    name: .shortAndLong, help: "The file to write. (default: standard output)",
    completion: .file(extensions: ["xml"]))
  var output: String?
  @OptionGroup var looking: Looking
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish { _ throws(ImageError) in
      try ImageTool.dump(
        format.source(file, evenInUse: looking.evenInUse), into: output)
      return 0
    }
  }
}

struct Restore: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "restore",
    abstract: "Make an image of a mapping in XML and the file that holds its blocks.")
  @Option(
    name: .shortAndLong, help: "The mapping, as 'dump' wrote it.",
    completion: .file(extensions: ["xml"]))
  var input: String
  @Option(
    name: .customShort("D"), help: "The file that holds the blocks: the dumped image.",
    completion: .file())
  var data: String
  @Option(
    name: .customShort("O"), help: "The format of the image to make.", completion: .formats)
  var format = "qcow2"
  @Option(
    name: .customShort("b"), help: "The base that the image shall have.", completion: .file())
  var base: String?
  @Option(name: .customShort("F"), help: "The base's format.", completion: .formats)
  var baseFormat: String?
  @OptionGroup var trust: Trust
  @OptionGroup var looking: Looking
  @Argument(help: "The image to make.", completion: .file()) var file: String

  func run() throws {
    try finish { _ throws(ImageError) in
      try ImageTool.restore(
        input,
        data: ImageSource(data, evenInUse: looking.evenInUse, untrusted: trust.untrusted),
        into: file, format: format, base: base, baseFormat: baseFormat)
      return 0
    }
  }
}

struct Bench: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "bench",
    abstract: "Time reads or writes of an image.",
    discussion: "Writes change the image.")
  @OptionGroup var format: Format
  @Option(
    name: .customShort("c"), help: "How many requests.", completion: .list(["1000", "75000"]))
  var count: UInt64 = 75000
  @Option(
    name: .customShort("d"), help: "How many at a time.", completion: .list(["1", "16", "64"]))
  var depth = 64
  @Option(
    name: .customShort("s"), help: "Bytes of a request.", completion: .sizes("4K", "64K", "1M"))
  var size: Size?
  @Option(
    name: .customShort("S"), help: "From one request to the next. (default: -s)",
    completion: .sizes("4K", "64K", "1M"))
  var step: Size?
  @Option(
    name: .customShort("o"), help: "Where the first one begins.",
    completion: .sizes("0", "1M", "1G"))
  var offset: Size?
  @Option(help: "The byte that is written.", completion: .list(["0", "255"]))
  var pattern: UInt8 = 0
  @Option(
    help: "Flush after every so many writes; 0: not in between.",
    completion: .list(["0", "1", "16", "64"]))
  var flushInterval: UInt64 = 0
  @Flag(name: .customShort("w"), help: "Write.") var writing = false
  @OptionGroup var form: Form
  @OptionGroup var quiet: Quiet
  @OptionGroup var looking: Looking
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish { output throws(ImageError) in
      var request = ImageTool.BenchRequest(
        format.source(file, evenInUse: looking.evenInUse && !writing))
      request.count = count
      request.depth = depth
      request.size = size?.bytes ?? 4096
      request.step = step?.bytes ?? request.size
      request.offset = offset?.bytes ?? 0
      request.pattern = pattern
      request.flushInterval = flushInterval
      request.isWriting = writing
      try ImageTool.bench(request, json: form.isJSON, quiet: quiet.quiet, to: output)
      return 0
    }
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
