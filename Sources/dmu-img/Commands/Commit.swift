// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img commit`: writing an image into its base.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

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
