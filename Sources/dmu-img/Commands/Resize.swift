// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img resize`: giving an image another size.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

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
