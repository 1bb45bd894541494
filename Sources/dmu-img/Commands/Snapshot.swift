// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img snapshot`: the snapshots of a qcow2 image.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

struct Snapshot: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "snapshot", abstract: "List internal snapshots.")
  @Flag(name: .customShort("l"), help: "List them, which is all there is.") var list = false
  @OptionGroup var format: Format
  @OptionGroup var form: Form
  @OptionGroup var looking: Looking
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish { output throws(ImageError) in
      try ImageTool.listSnapshots(
        format.source(file, evenInUse: looking.evenInUse),
        json: form.isJSON, to: output)
      return 0
    }
  }
}
