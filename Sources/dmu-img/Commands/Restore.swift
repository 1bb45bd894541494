// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img restore`: making an image of such a dump.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

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
