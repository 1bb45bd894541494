// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img dump`: writing a mapping as text.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

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
