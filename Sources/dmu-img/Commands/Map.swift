// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img map`: saying where the blocks of an image are.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

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
