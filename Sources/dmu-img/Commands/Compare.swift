// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img compare`: comparing two images.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

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
