// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img rebase`: giving an image another base.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

struct Rebase: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "rebase",
    abstract: "Put an image over another base.",
    discussion: """
      What the image shows stays the same: where old and new base differ, the old one's data \
      is copied into the image. With -u only the name is changed.
      """)
  @OptionGroup var format: Format
  @Option(name: .customShort("b"), help: "The new base; empty: none.", completion: .file())
  var base: String
  @Option(name: .customShort("F"), help: "Its format.", completion: .formats)
  var baseFormat: String?
  @Flag(name: .customShort("u"), help: "Only change the name; the bases hold the same.")
  var unsafe = false
  @Flag(name: .customShort("p"), help: "Show the progress.") var progress = false
  @OptionGroup var quiet: Quiet
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish { _ throws(ImageError) in
      try ImageTool.rebase(
        format.source(file), base: base.isEmpty ? nil : base,
        baseFormat: baseFormat, unsafe: unsafe,
        progress: Progress(on: progress, automatic: !quiet.quiet))
      return 0
    }
  }
}
