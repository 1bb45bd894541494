// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img convert`: converting images.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

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
