// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img create`: making an image.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

struct Create: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "create", abstract: "Make an image.")
  @Option(
    name: .customShort("f"), help: "The format: raw, qcow2, dscow, vpc and others.",
    completion: .formats)
  var format = "raw"
  @Option(
    name: .customShort("b"), help: "The base, as the image shall name it.", completion: .file())
  var base: String?
  @Option(name: .customShort("F"), help: "The base's format.", completion: .formats)
  var baseFormat: String?
  @Option(
    name: .customShort("o"), help: "NAME=VALUE,NAME=VALUE of the format.",
    completion: .formatOptions)
  var options: [String] = []
  @OptionGroup var trust: Trust
  @OptionGroup var quiet: Quiet
  @Argument(help: "The file to make, or a device.", completion: .file()) var file: String
  @Argument(
    help: "Length of the disk. (default: that of the base)",
    completion: .sizes("1G", "10G", "100G", "1T"))
  var size: Size?

  func run() throws {
    try finish { output throws(ImageError) in
      var request = ImageTool.CreateRequest(path: file)
      request.format = format
      request.size = size?.bytes
      request.base = base
      request.baseFormat = baseFormat
      request.options = options
      request.quiet = quiet.quiet
      request.untrusted = trust.untrusted
      try ImageTool.create(request, to: output)
      return 0
    }
  }
}
