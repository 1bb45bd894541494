// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img bench`: measuring an image.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

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
