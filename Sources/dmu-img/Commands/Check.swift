// SPDX-License-Identifier: Apache-2.0
// The arguments of `dmu-img check`: checking an image, and repairing it.

import ArgumentParser
import DiskFormats
import Glibc
import ImageTool
import SystemIO

enum RepairWord: String, ExpressibleByArgument, CaseIterable {
  case leaks, all
  var repair: Repair { self == .leaks ? .leaks : .all }
}

struct Check: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "check",
    abstract: "Look for damage.",
    discussion: """
      Ends with 0 for a sound image, 1 when the check could not be done, 2 for damage, 3 for \
      leaks that harm nobody, 63 for a format that has nothing to check.
      """)
  @OptionGroup var format: Format
  @OptionGroup var form: Form
  @Option(name: [.customShort("r"), .long], help: "Mend: leaks, or all.")
  var repair: RepairWord?
  @OptionGroup var quiet: Quiet
  @OptionGroup var looking: Looking
  @Argument(help: "The image.", completion: .file()) var file: String

  func run() throws {
    try finish(unsupported: ImageTool.CheckExit.unsupported.rawValue) {
      output throws(ImageError) in
      try ImageTool.check(
        format.source(file, evenInUse: looking.evenInUse && repair == nil),
        repair: repair?.repair, json: form.isJSON, quiet: quiet.quiet, to: output
      ).rawValue
    }
  }
}
