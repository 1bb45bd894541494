// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img info`: describing an image.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

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
